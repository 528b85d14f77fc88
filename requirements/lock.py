"""Make the lock files of this folder from the ``*.in`` files and the overrides in ``pyproject.toml``.

Run it as ``make lock`` (keeps the versions that are locked where they still fit) or ``make lock UPGRADE=1`` (takes
the newest that fit). A lock has names, versions, hashes and the name of who needs each package, and no address of a
package index: where packages come from is the machine's own setting.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
# In this order: gpu.in and dev.in are held to the versions of cpu.txt, the optional runtimes to those of dev.txt too.
LOCKS = (
    "cpu",
    "gpu",
    "dev",
    "openvino",
    "onnxruntime",
    "importers",
    "paddle3",
    "tensorrt-rtx",
    "nncf",
    "serve",
    "lock-tool",
)
OLDEST_PYTHON = "3.9"
# uv repeats in every line the platform that pyproject.toml states once. Without it a machine of another kind gets
# pip's "no matching distribution" instead of an installation of nothing that ends well.
_PLATFORM_MARKER = " and implementation_name == 'cpython' and platform_machine == 'x86_64' and sys_platform == 'linux'"
_UPPER_PYTHON = "python_full_version < '3.13'"


def shorten_markers(lock: str) -> str:
    """Return the text of a lock without the part of its markers that holds for every line."""
    lines = []
    for line in lock.splitlines():
        line = line.replace(_PLATFORM_MARKER, "")
        line = line.replace(f" and {_UPPER_PYTHON}", "").replace(f" ; {_UPPER_PYTHON}", "")
        lines.append(line)
    return "\n".join(lines) + "\n"


def make_lock(uv: str, name: str, upgrade: bool) -> None:
    """Resolve ``<name>.in`` for every supported Python into ``<name>.txt``; raises CalledProcessError if it cannot."""
    target = FOLDER / f"{name}.txt"
    draft = FOLDER / f".{name}.txt.draft"
    if target.exists() and not upgrade:
        draft.write_text(target.read_text(encoding="utf-8"), encoding="utf-8")
    command = [
        uv,
        "pip",
        "compile",
        f"requirements/{name}.in",
        "--output-file",
        str(draft.relative_to(ROOT)),
        "--quiet",
        "--universal",
        "--python-version",
        OLDEST_PYTHON,
        "--generate-hashes",
        "--only-binary",
        ":all:",
        "--no-emit-index-url",
        "--no-emit-find-links",
        "--custom-compile-command",
        "make lock",
    ]
    try:
        subprocess.run(command + (["--upgrade"] if upgrade else []), cwd=ROOT, check=True)
        draft.write_text(shorten_markers(draft.read_text(encoding="utf-8")), encoding="utf-8")
        os.replace(draft, target)
    finally:
        if draft.exists():
            draft.unlink()


def main(argv: Sequence[str] | None = None) -> int:
    """Make all locks with the given uv; returns 1 if one has no solution (uv says why on stderr)."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--uv", default="uv", help="the uv program")
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that fit")
    arguments = parser.parse_args(argv)
    for name in LOCKS:
        print(f"lock: requirements/{name}.in -> requirements/{name}.txt", flush=True)
        try:
            make_lock(arguments.uv, name, arguments.upgrade)
        except subprocess.CalledProcessError:
            print(f"error: requirements/{name}.in has no solution (above); its lock is left as it was", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
