"""From a trained RT-DETR to an INT8 model, measured: export, compress (ACT), evaluate.

Importing this package makes paddlepaddle importable. paddlepaddle 2.6.2 exports its own copy of zlib's
symbols; when it is loaded before Python's ``zlib`` the first decompression of the process ends in a crash
(SIGSEGV in ``inflateReset2``). Whoever loads ``zlib`` first decides which copy is used, so it is loaded here.
"""

import os
import zlib  # noqa: F401  (loaded before paddle on purpose, see above)

# Paddle's C++ side writes a line on stderr for every executor it makes; warnings and errors still come.
os.environ.setdefault("GLOG_minloglevel", "1")
# ONNX Runtime 1.31 writes an identifier of the machine into ~/.cache and reports its use, unless told before its import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
