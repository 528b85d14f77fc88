"""``measure.sh``: builds the engines of several ONNX files on the target machine, and times them in turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from act_pipeline.bundle.build_script import find_trtexec
from act_pipeline.engines.tensorrt.targets import Target, TimingFlags, Version

# In the folder of the script: an ONNX file for each candidate, and what the script writes.
CANDIDATES, RESULTS = "candidates", "results"
MACHINE, PROFILE = f"{RESULTS}/machine.txt", f"{RESULTS}/profile_{{name}}.json"

_SCRIPT = """\
#!/bin/sh
# Builds the engines of the candidates for the placement of Q/DQ, on {device} with {version}, and times them in turns.
# It goes on where it was interrupted. Let nothing else run on the GPU. Then, where these files were written:
# {next_step}
set -eu
cd "$(dirname "$0")"
{trtexec}
mkdir -p engines logs {results}
gpu=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null) || gpu=
gpu=$(printf '%s\\n' "$gpu" | head -n 1)
if [ -z "$gpu" ] && [ -r /proc/device-tree/model ]; then gpu=$(tr -d '\\000' </proc/device-tree/model); fi
now="trtexec $number
gpu ${{gpu:-unknown}}"
if [ -f {machine} ] && [ "$(cat {machine})" != "$now" ]; then
    echo "error: {results}/ and engines/ are of another machine ($(tr '\\n' ' ' <{machine})), here is: $now;" \\
        "move them away to measure here" | tr '\\n' ' ' >&2
    echo >&2
    exit 2
fi
printf '%s\\n' "$now" >{machine}

# call LOG WHAT FILE FLAG...: trtexec, which has to write FILE, with its output in a log
call() {{
    log="logs/$1.log" what="$2" made="$3"
    shift 3
    if ! "$TRTEXEC" "$@" >"$log" 2>&1; then
        echo "error: trtexec cannot $what: $(grep '\\[E\\]' "$log" | head -n 1); see $log" >&2
        exit 1
    fi
    if [ ! -f "$made" ]; then
        echo "error: trtexec ended without an error, but did not write $made ($what); see $log" >&2
        exit 1
    fi
}}
# build NAME FLAG...
build() {{
    name="$1"
    shift
    if [ -f "engines/$name.plan" ]; then return; fi
    echo "building the engine of $name"
    call "build_$name" "build $name" "engines/$name.part" \\
        "--onnx={candidates}/$name.onnx" "--saveEngine=engines/$name.part" \\
        --timingCacheFile=engines/timing.cache {build_flags} "$@"
    mv "engines/$name.part" "engines/$name.plan"
}}
# turn STEP ROUND NAME...: a round counts when all of it was measured without an interruption
turn() {{
    folder="{results}/step$1/round$2"
    shift 2
    if [ -d "$folder" ]; then return; fi
    echo "timing $# engines: $folder"
    rm -rf "$folder.part"
    mkdir -p "$folder.part"
    for name in "$@"; do
        call "time_$name" "time $name" "$folder.part/$name.json" \\
            "--loadEngine=engines/$name.plan" "--exportTimes=$folder.part/$name.json" \\
            {run_flags}
    done
    mv "$folder.part" "$folder"
}}
# profile NAME: the times of its layers, which do not decide
profile() {{
    if [ -f "{results}/profile_$1.json" ]; then return; fi
    call "profile_$1" "profile $1" {results}/profile.part \\
        "--loadEngine=engines/$1.plan" "--exportProfile={results}/profile.part" \\
        {profile_flags}
    mv {results}/profile.part "{results}/profile_$1.json"
}}

{calls}
echo "measured; next, where these files were written, with {results}/ from here: {next_step}"
"""


@dataclass(frozen=True)
class Turns:
    """A measurement: candidates that are timed in turns.

    Attributes:
        step: its number, from 1.
        rounds: the order of the candidates' names in each round.
    """

    step: int
    rounds: Sequence[Sequence[str]]


def measure_script(
    target: Target,
    version: Version,
    builds: Mapping[str, Sequence[str]],
    turns: Sequence[Turns],
    profiled: Sequence[str],
    flags: TimingFlags,
    next_step: str,
) -> str:
    """Return the script.

    Args:
        target: the device.
        version: its TensorRT, not TensorRT-RTX.
        builds: name of a candidate -> flags to build it.
        turns: the measurements, in their order.
        profiled: candidates whose layers are timed.
        flags: to build and to time.
        next_step: what to do afterwards, on the machine where the candidates were written.
    """
    calls = [f"build {name} {' '.join(given)}" for name, given in builds.items()]
    calls += [
        f"turn {each.step} {number:02d} {' '.join(names)}"
        for each in turns
        for number, names in enumerate(each.rounds, 1)
    ]
    calls += [f"profile {name}" for name in profiled]
    return _SCRIPT.format(
        device=target.device,
        version=version.title,
        trtexec=find_trtexec(target, version, "these candidates are"),
        candidates=CANDIDATES,
        results=RESULTS,
        machine=MACHINE,
        build_flags=" ".join(flags.build),
        run_flags=" ".join(flags.run),
        profile_flags=" ".join(flags.profile),
        calls="\n".join(calls),
        next_step=next_step,
    )


def round_folder(step: int, number: int) -> str:
    """Return the folder of a round's times, ``NAME.json`` each, as the script writes it."""
    return f"{RESULTS}/step{step}/round{number:02d}"
