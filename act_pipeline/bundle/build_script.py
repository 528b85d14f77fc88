"""``build.sh`` of a bundle: the engine, built on the target machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from act_pipeline.engines.tensorrt.targets import RTX, Target, Version, trtexec_flags

_TRTEXEC = """\
#!/bin/sh
# Builds {engine} from {model}, on {device} with {version}{jetpack}{capability}.
# ./build.sh [{dla_flag}further flags of trtexec]
set -eu
cd "$(dirname "$0")"
{dla_choice}
{trtexec}{run}
echo "{engine} is built; next: {next_step}"
"""
_FIND = """\
for candidate in "$(command -v trtexec || true)" /usr/src/tensorrt/bin/trtexec /opt/tensorrt/bin/trtexec; do
    if [ -z "${{TRTEXEC:-}}" ] && [ -n "$candidate" ] && [ -x "$candidate" ]; then TRTEXEC="$candidate"; fi
done
if [ -z "${{TRTEXEC:-}}" ]; then
{without_trtexec}    echo "error: trtexec is missing: install {version}{jetpack}, or set TRTEXEC to its path" >&2
    exit 2
fi
# The first line is such as: &&&& RUNNING TensorRT.trtexec [TensorRT v8502], or v100300
number=$("$TRTEXEC" --help 2>&1 | sed -n 's/.*\\[TensorRT v\\([0-9]*\\)\\].*/\\1/p' | head -n 1)
if [ -z "$number" ]; then
    echo "error: $TRTEXEC does not tell its version, expected {version}" >&2
    exit 2
fi
if [ "$number" -ge 100000 ]; then
    found="$((number / 10000)).$((number / 100 % 100))"
else
    found="$((number / 1000)).$((number / 100 % 10))"
fi
case "$found" in
    {pattern}) ;;
    *) echo "error: {what} for {version}, here is TensorRT $found: make one with --tensorrt" >&2; exit 2 ;;
esac
"""
_BY_PYTHON = """\
    if {not_dla}python3 -c "import tensorrt" 2>/dev/null; then exec python3 build.py; fi
"""
_NEXT = "python3 verify.py && python3 run.py --repeat 50"
_DLA = """\
dla=
if [ "${1:-}" = "--dla" ]; then dla=1; shift; fi"""
_NO_DLA = """\
if [ "${1:-}" = "--dla" ]; then
    echo "error: %s" >&2
    exit 2
fi"""
_RTX = """\
#!/bin/sh
# Builds model.plan from {model} with TensorRT-RTX, for {device}; needs no GPU.
set -eu
cd "$(dirname "$0")"
python3 build.py
echo "model.plan is built; next: {next_step}"
"""


def build_script(
    target: Target,
    version: Version,
    model: str,
    *,
    quantized: bool,
    profile: Mapping[str, list[list[int]]] | None,
    dla_model: str | None = None,
    engine: str = "model.plan",
    next_step: str = _NEXT,
    by_python: bool = True,
) -> str:
    """Return the script.

    Args:
        target: the device.
        version: its TensorRT.
        model: name of the ONNX file.
        quantized: whether it has Q/DQ pairs.
        profile: see :func:`act_pipeline.engines.tensorrt.targets.trtexec_flags`.
        dla_model: name of the float ONNX file for the deep learning accelerator; None: there is none.
        engine: the file to build, not for TensorRT-RTX.
        next_step: what to do afterwards.
        by_python: whether ``build.py`` lies next to the script, for a machine without ``trtexec``.
    """
    if version.name == RTX:
        return _RTX.format(model=model, device=target.device, next_step=next_step)
    usual = trtexec_flags(target, version, quantized=quantized, profile=profile)
    run = _command(model, engine, usual)
    if dla_model is not None:
        on_dla = trtexec_flags(target, version, quantized=False, profile=profile, dla=True)
        run = f'if [ -n "$dla" ]; then\n    {_command(dla_model, engine, on_dla)}\nelse\n    {run}\nfi'
    missing = (
        "the DLA computes no Q/DQ pairs: make the bundle with --float_model_path, the float model for it"
        if target.dla
        else f"{target.device} has no DLA"
    )
    capabilities = " and ".join(target.compute_capabilities)
    # A distribution of TensorRT without trtexec is NVIDIA's wheel, which build.py uses.
    without = _BY_PYTHON.format(not_dla='[ -z "$dla" ] && ' if dla_model else "") if by_python else ""
    return _TRTEXEC.format(
        model=model,
        device=target.device,
        version=version.title,
        jetpack=_jetpack(target, version),
        capability=f", compute capability {capabilities}" if capabilities else "",
        dla_flag="--dla] [" if dla_model is not None else "",
        dla_choice=_DLA if dla_model is not None else _NO_DLA % missing,
        trtexec=find_trtexec(target, version, "this bundle is", without),
        engine=engine,
        next_step=next_step,
        run=run,
    )


def find_trtexec(target: Target, version: Version, what: str, without_trtexec: str = "") -> str:
    """Return lines of a shell script that set ``$TRTEXEC``, ``$found`` (``10.3``) and ``$number`` (``100300``).

    They end the script where there is no ``trtexec``, or one of another version.

    Args:
        target: the device.
        version: its TensorRT.
        what: what is for this version, and the verb.
        without_trtexec: lines to run where there is none.
    """
    return _FIND.format(
        version=version.title,
        jetpack=_jetpack(target, version),
        what=what,
        without_trtexec=without_trtexec,
        pattern=version.name if "." in version.name else f"{version.name}.*",
    )


def _jetpack(target: Target, version: Version) -> str:
    pack = target.jetpack.get(version.name)
    return f" (JetPack {pack})" if pack else ""


def _command(model: str, engine: str, flags: Sequence[str]) -> str:
    return f'"$TRTEXEC" --onnx={model} --saveEngine={engine} {" ".join(flags)} "$@"'
