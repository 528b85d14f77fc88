"""Python and the packages that the basic path needs: what is expected, and what to do otherwise."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import re
import sys
from collections.abc import Mapping

MISSING = "missing"
OLDEST_PYTHON, NEWEST_PYTHON = (3, 9), (3, 12)
INSTALL = "install with `make env`, or pip install --require-hashes --no-deps -r requirements/cpu.txt"


@dataclasses.dataclass(frozen=True)
class Requirement:
    """A package that the basic path needs.

    Attributes:
        names: the packages that provide it; one of them is enough.
        expected: version bounds such as ``>=1.23,<2``; empty for any.
        module: what to import to see that it works; empty where its version says enough.
        why: what happens outside the bounds.
    """

    names: tuple[str, ...]
    expected: str = ""
    module: str = ""
    why: str = ""


REQUIREMENTS = (
    Requirement(("numpy",), ">=1.23,<2", "numpy", "paddlepaddle 2.6.2 was built against NumPy 1"),
    Requirement(("pillow",), "<11", "PIL.Image", "importing paddleslim with later ones crashed the process"),
    Requirement(("matplotlib",), "<3.9", "matplotlib", "importing paddleslim with later ones crashed the process"),
    Requirement(("setuptools",), "<81", "pkg_resources", "ppdet imports pkg_resources, which later ones lack"),
    Requirement(("opencv-python-headless", "opencv-python"), ">=4.5,<5", "cv2", "paddleslim asks for 4.6.0.66"),
    Requirement(("pycocotools",), "", "pycocotools.mask"),
    Requirement(("pyyaml",), "", "yaml"),
    Requirement(("jinja2",), "", "jinja2"),
    Requirement(("onnx",), ">=1.19,<1.24", "onnx", "what is built on it was tried with these"),
    Requirement(("openvino",), ">=2025.3,<2026.5", "openvino", "what is built on it was tried with these"),
    Requirement(("protobuf",), ">=3.20.2", "google.protobuf", "paddlepaddle needs 3.20.2 or later"),
    Requirement(("scikit-learn",), "", "sklearn"),
    Requirement(("scipy",), "", "scipy"),
    Requirement(("six",)),
    Requirement(("requests",)),
    Requirement(("tqdm",)),
    Requirement(("paddlepaddle", "paddlepaddle-gpu"), "==2.6.2", "paddle", "ACT of paddleslim 2.6.0 fails on paddle 3"),
    Requirement(("paddledet",), "==2.6.0", "ppdet", "what is built on it was tried with 2.6.0"),
    Requirement(("paddleslim",), "==2.6.0", "paddleslim", "what is built on it was tried with 2.6.0"),
)

# What an import says -> what to do about it. The first that fits counts.
_REMEDIES = (
    (
        r"libGL\.so|libgthread|libglib",
        "pip install --force-reinstall --no-deps opencv-python-headless==4.6.0.66 "
        "(or, as root: apt-get install libgl1 libglib2.0-0)",
    ),
    (r"libgomp\.so", "as root: apt-get install libgomp1"),
    (r"libcuda\.so", "install the NVIDIA driver, or requirements/cpu.txt on a machine without a GPU"),
    (
        r"libcudnn|libcudart|libcublas|libcufft|libcusolver|libcusparse|libcurand",
        "install CUDA 11.8 and cuDNN 8.6 and put their folders into LD_LIBRARY_PATH, or install requirements/cpu.txt",
    ),
    (r"libnvinfer", "install TensorRT 8.5.3 and put its lib folder into LD_LIBRARY_PATH"),
    (r"GLIBC(XX)?_", "use a newer Linux: the wheels are built for glibc 2.28 or later"),
    (r"numpy\.dtype size|_ARRAY_API|numpy\.core\.multiarray", "pip install 'numpy<2'"),
    (r"pkg_resources", "pip install 'setuptools<81'"),
    (r"signal \d+|SIG[A-Z]+", INSTALL),
)


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of the first table: what was found, what was expected, and what to do if that is not the same."""

    name: str
    found: str
    expected: str
    ok: bool
    why: str = ""
    required: bool = True


def version_fits(found: str, expected: str) -> bool:
    """Tell whether a version is within bounds such as ``>=1.23,<2`` (operators ``==``, ``>=`` and ``<``).

    Only the leading numbers are compared, so ``1.26.4.post1`` counts as 1.26.4. No bounds: any version fits.
    """

    def numbers(version: str) -> tuple[int, ...]:
        leading = re.match(r"\d+(\.\d+)*", version)
        parts = [int(part) for part in leading.group().split(".")] if leading else []
        while parts and parts[-1] == 0:
            parts.pop()
        return tuple(parts)

    for bound in filter(None, (part.strip() for part in expected.split(","))):
        operator = "<" if bound.startswith("<") else bound[:2]
        have, want = numbers(found), numbers(bound[len(operator) :])
        if not {"==": have == want, ">=": have >= want, "<": have < want}[operator]:
            return False
    return True


def remedy_for(message: str) -> str:
    """Return what to do about an import that failed with ``message``."""
    for pattern, remedy in _REMEDIES:
        if re.search(pattern, message):
            return remedy
    return INSTALL


def missing_package(error: ModuleNotFoundError) -> str | None:
    """Return one line about a package of the basic path that an import did not find; None if it is not of these.

    Args:
        error: what the import raised. A module that is missing in an installed package is a bug, or another version.
    """
    for requirement in REQUIREMENTS:
        module = requirement.module or requirement.names[0]
        if error.name and f"{module}.".startswith(f"{error.name}."):  # without protobuf `google` is missing too
            return f"the package {requirement.names[0]} is missing ({error}); {INSTALL}"
    return None


def installed_version(name: str) -> str | None:
    """Return a package's version without importing it, None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_python() -> Check:
    """Check the running Python and its platform against what the locks are made for."""
    found = f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    ok = OLDEST_PYTHON <= sys.version_info[:2] <= NEWEST_PYTHON
    why = "" if ok else "paddlepaddle 2.6.2 has wheels for 3.9 to 3.12: make the environment with one of these"
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        ok, why = False, "the locks are made for Linux on x86_64: use such a machine or container"
    return Check("python", found, "3.9 to 3.12, Linux x86_64", ok, why)


def check_package(requirement: Requirement, imports: Mapping[str, str], versions: Mapping[str, str | None]) -> Check:
    """Judge one package.

    Args:
        requirement: what is needed.
        imports: module -> "" if it could be imported, else what went wrong; a module that is absent was not tried.
        versions: package -> installed version, None if it is not.
    """
    found = {name: versions[name] for name in requirement.names if versions.get(name)}
    label = next(iter(found), requirement.names[0])
    shown = ", ".join(f"{name} {version}" if len(found) > 1 else str(version) for name, version in found.items())
    failure = imports.get(requirement.module, "")
    if not found:
        return Check(label, MISSING, requirement.expected, False, "not installed")
    if requirement.module == "paddle" and len(found) > 1:
        why = "both packages write the same files: pip uninstall paddlepaddle paddlepaddle-gpu, then install one"
        return Check(label, shown, requirement.expected, False, why)
    if failure:
        return Check(label, shown, requirement.expected, False, f"{failure}; {remedy_for(failure)}")
    for version in found.values():
        if not version_fits(str(version), requirement.expected):
            return Check(label, shown, requirement.expected, False, f"{requirement.why}; {INSTALL}")
    return Check(label, shown, requirement.expected, True)
