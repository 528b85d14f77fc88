"""From a trained RT-DETR to an INT8 model, measured: export, compress (ACT), evaluate.

Importing this package makes paddlepaddle importable. paddlepaddle 2.6.2 exports its own copy of zlib's
symbols; when it is loaded before Python's ``zlib`` the first decompression of the process ends in a crash
(SIGSEGV in ``inflateReset2``). Whoever loads ``zlib`` first decides which copy is used, so it is loaded here.
"""

import os
import zlib  # noqa: F401  (loaded before paddle on purpose, see above)

from act_pipeline.core.cache_dir import provide_home
from act_pipeline.core.cpus import available_cpus, cpu_quota
from act_pipeline.core.version import __version__ as __version__

# Paddle's C++ side writes a line on stderr for every executor it makes; warnings and errors still come.
os.environ.setdefault("GLOG_minloglevel", "1")
# ONNX Runtime 1.31 writes an identifier of the machine into ~/.cache and reports its use, unless told before its
# import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# Before matplotlib is imported, which ends with a traceback where there is no home folder.
provide_home()
# NumPy's OpenBLAS takes a thread for every CPU of the machine, also where a container may use a few of them; these then
# wait for each other. It reads this when NumPy is loaded.
if cpu_quota() is not None and "OMP_NUM_THREADS" not in os.environ:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", str(available_cpus()))
