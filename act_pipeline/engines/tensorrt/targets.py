"""The devices that models are shipped to: what each can run, and which TensorRT it has."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from act_pipeline.core.errors import UserError, suggest
from act_pipeline.engines.tensorrt.build import BuildOptions

RTX = "rtx"
# Of a timed run: enough for the GPU's clocks to rise, and for hundreds of inferences.
WARM_UP_MS, DURATION_S = 500, 1
# Ops that the export writes and NVIDIA's ONNX parser of a version does not know (onnx-tensorrt, by its branches).
_NEVER = frozenset({"DynamicQuantizeLinear", "MatMulInteger"})
_NOT_IN_8_5 = _NEVER | {"LayerNormalization", "IsInf"}
_NOT_IN_8_2 = _NOT_IN_8_5 | {"GridSample", "HardSwish", "Mod", "NonZero", "OneHot", "Trilu", "Xor"}


@dataclass(frozen=True)
class Version:
    """A version of TensorRT.

    Attributes:
        name: ``8.6``, or ``10`` for all of 10; :data:`RTX` for TensorRT-RTX.
        typed: whether precisions are those of the ONNX file; otherwise of the builder's flags (8 and 9).
        opset: the newest opset that its ONNX parser takes.
        lacks: ops that its ONNX parser does not know.
        plugins: whether it has the plugin ``EfficientNMS_TRT``.
    """

    name: str
    typed: bool
    opset: int
    lacks: frozenset[str] = _NEVER
    plugins: bool = True

    @property
    def title(self) -> str:
        """The name for messages."""
        return "TensorRT-RTX" if self.name == RTX else f"TensorRT {self.name}"


VERSIONS: Mapping[str, Version] = {
    version.name: version
    for version in (
        Version("8.2", typed=False, opset=13, lacks=_NOT_IN_8_2),
        Version("8.5", typed=False, opset=17, lacks=_NOT_IN_8_5),
        Version("8.6", typed=False, opset=17),
        Version("10", typed=True, opset=20),
        Version("11", typed=True, opset=20),
        Version(RTX, typed=True, opset=20, plugins=False),
    )
}


@dataclass(frozen=True)
class Target:
    """A device, or a class of devices.

    Attributes:
        name: what ``--target`` takes.
        device: its name for people.
        versions: names of the versions of TensorRT that run on it, the usual one first; empty: it has no TensorRT.
        compute_capabilities: of its GPU, such as ``8.7``; empty: of many.
        int8: whether it computes in INT8.
        jetpack: version of TensorRT -> the JetPack that has it; empty: it is no Jetson.
        dla: number of its deep learning accelerators.
        batch: the largest batch by default.
        workspace_mib: memory for the builder's tactics, MiB.
        largest_input: the largest height or width that is advised, pixels; None: any.
    """

    name: str
    device: str
    versions: tuple[str, ...] = ()
    compute_capabilities: tuple[str, ...] = ()
    int8: bool = True
    jetpack: Mapping[str, str] = field(default_factory=dict)
    dla: int = 0
    batch: int = 1
    workspace_mib: int = 4096
    largest_input: int | None = None

    def version(self, asked: str | None = None) -> Version | None:
        """Return a version of TensorRT of this device; None: it has no TensorRT.

        Args:
            asked: such as ``10`` or ``8.6``; None: the usual one.

        Raises:
            UserError: it does not have that version.
        """
        if asked is not None and asked not in self.versions:
            can = f"{self.device} has {', '.join(self.versions)}" if self.versions else f"{self.name} has no TensorRT"
            raise UserError(f"--tensorrt is {asked!r}, but {can}; leave it out, or name one of these")
        return VERSIONS[asked or self.versions[0]] if self.versions else None


TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target("t4", "NVIDIA T4", ("10", "11", "8.6", "8.5"), ("7.5",), batch=8),
        Target("a10", "NVIDIA A10", ("10", "11", "8.6", "8.5"), ("8.6",), batch=8),
        Target(
            "orin",
            "Jetson Orin",
            ("10", "11", "8.6", "8.5"),
            ("8.7",),
            jetpack={"10": "6.1 or 6.2", "11": "7.2.2", "8.6": "6.0", "8.5": "5.1"},
            dla=2,
            workspace_mib=2048,
        ),
        Target("xavier", "Jetson Xavier", ("8.5",), ("7.2",), jetpack={"8.5": "5.1"}, dla=2, workspace_mib=2048),
        Target(
            "nano",
            "Jetson Nano or TX2",
            ("8.2",),
            ("5.3", "6.2"),
            int8=False,
            jetpack={"8.2": "4.6.1 or later of 4"},
            workspace_mib=512,
            largest_input=416,
        ),
        Target(RTX, "GeForce RTX or RTX PRO", (RTX,), batch=1),
        Target("cpu", "a CPU", batch=8),
    )
}


def find_target(name: str) -> Target:
    """Return a target by its name.

    Raises:
        UserError: there is none of this name.
    """
    if name not in TARGETS:
        raise UserError(f"--target is {name!r}, expected one of {', '.join(TARGETS)}{suggest(name, TARGETS)}")
    return TARGETS[name]


def check_precision(target: Target, quantized: bool, where: str) -> None:
    """Check that a device computes at a model's precision.

    Args:
        target: the device.
        quantized: whether it is an INT8 model.
        where: path of the model, for the message.

    Raises:
        UserError: it is an INT8 model, and the device has no INT8.
    """
    if quantized and not target.int8:
        raise UserError(
            f"{where} is an INT8 model, but {target.device} (compute capability "
            f"{' and '.join(target.compute_capabilities)}) has no INT8; give the float model's folder, which it runs "
            "in FP16"
        )


def check_can_build(target: Target) -> None:
    """Check that an engine for a device can be made on another machine at all.

    Raises:
        UserError: it cannot; the message says what the device needs.
    """
    if not target.versions:
        raise UserError(f"--target={target.name} needs no engine: {_bundle(target, 'run.py')}")
    if target.jetpack:
        packs = ", ".join(f"{VERSIONS[name].title} of JetPack {pack}" for name, pack in target.jetpack.items())
        raise UserError(
            f"--target={target.name}: an engine for {target.device} is built on the device, by {packs}: "
            f"{_bundle(target, 'build.sh')}"
        )


def for_target(
    target: Target, options: BuildOptions, rtx: bool, compute_capability: tuple[int, int] | None
) -> BuildOptions:
    """Return the builder options for a device.

    Args:
        target: the device.
        options: the options that are asked for.
        rtx: whether TensorRT-RTX builds; otherwise TensorRT, which builds for the GPU that it builds on.
        compute_capability: of the GPU here; None: there is none.

    Raises:
        UserError: the builder or the GPU here is of another kind than the device needs.
    """
    if target.name == RTX and not rtx:
        raise UserError(
            f"--target={RTX} needs TensorRT-RTX, and TensorRT would build here: install the extra tensorrt-rtx, or "
            f"{_bundle(target, 'build.sh')}"
        )
    wanted, asked = target.compute_capabilities, options.compute_capability
    if asked is not None and wanted and asked not in wanted:
        raise UserError(
            f"--compute_capability={asked} contradicts --target={target.name}, which has {' or '.join(wanted)}; leave "
            "one of them out"
        )
    if not wanted:
        return options
    if rtx:
        return dataclasses.replace(options, compute_capability=wanted[0])
    found = None if compute_capability is None else ".".join(map(str, compute_capability))
    if found is not None and found not in wanted:
        raise UserError(
            f"--target={target.name} has compute capability {' or '.join(wanted)}, the GPU here {found}, and TensorRT "
            f"builds for the GPU that it builds on: {_bundle(target, 'build.sh')}"
        )
    return options


def _bundle(target: Target, script: str) -> str:
    return f"make a bundle with deploy/bundle.py --target={target.name}, and run its {script} there"


def trtexec_flags(
    target: Target,
    version: Version,
    *,
    quantized: bool,
    profile: Mapping[str, list[list[int]]] | None = None,
    dla: bool = False,
) -> list[str]:
    """Return the flags of ``trtexec``, besides the files, that build an engine.

    Args:
        target: the device.
        version: its TensorRT, not TensorRT-RTX.
        quantized: whether the ONNX file has Q/DQ pairs.
        profile: input name -> the smallest, the optimal and the largest shape; None: the file fixes the batch.
        dla: whether to build for the deep learning accelerator: a float file, weakly typed before TensorRT 11.
    """
    flags = []
    if not version.typed or (dla and version.name == "10"):
        flags += ["--int8"] if quantized else []
        flags += ["--fp16"]
    elif version.name == "10":  # from 11 on every network is typed
        flags += ["--stronglyTyped"]
    if dla:
        flags += ["--useDLACore=0", "--allowGPUFallback"]
    if version.name == "8.2":
        flags.append(f"--workspace={target.workspace_mib}")
    else:
        flags.append(f"--memPoolSize=workspace:{target.workspace_mib}")
    for place, name in enumerate(("min", "opt", "max") if profile else ()):
        shapes = [f"{key}:{'x'.join(map(str, sizes[place]))}" for key, sizes in (profile or {}).items()]
        flags.append(f"--{name}Shapes={','.join(shapes)}")
    return flags


@dataclass(frozen=True)
class TimingFlags:
    """Flags of ``trtexec`` to build an engine without running it, and to time one that is built.

    Attributes:
        build: to build and not to run.
        run: to time the GPU's work alone: launched as one CUDA graph, without copies of inputs and outputs, while the
            host waits actively. From 11 on that is the default, and the flags are deprecated.
        profile: for ``--exportProfile``, in a run of its own, since a profiler slows down what it looks at.
    """

    build: tuple[str, ...]
    run: tuple[str, ...]
    profile: tuple[str, ...]


def timing_flags(version: Version, profile: Mapping[str, list[list[int]]] | None = None) -> TimingFlags:
    """Return the flags, besides the files, by which ``trtexec`` builds and times an engine.

    Args:
        version: its TensorRT, 8.5 or later, not TensorRT-RTX.
        profile: as for :func:`trtexec_flags`; the optimal shapes are timed.
    """
    shapes = [f"{name}:{'x'.join(map(str, sizes[1]))}" for name, sizes in (profile or {}).items()]
    common = [f"--shapes={','.join(shapes)}"] if shapes else []
    common += [f"--warmUp={WARM_UP_MS}", f"--duration={DURATION_S}"]
    run = common if version.name == "11" else [*common, "--useCudaGraph", "--noDataTransfers", "--useSpinWait"]
    build = "--buildOnly" if version.name == "8.5" else "--skipInference"
    return TimingFlags((build,), tuple(run), tuple(common))
