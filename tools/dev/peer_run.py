"""NNCF's post-training quantization and this package's, side by side: the same float model, images and machine.

Three sides: `nncf` (``nncf.quantize`` with the transformer's settings, on the model as exported to ONNX and read by
OpenVINO), `ptq` (calibration by the config's ``QuantPost``) and `auto` (the cheapest strategy that keeps the mAP of
``Strategy.max_drop``). Each has a process of its own, one after the other, with a cache and a copy of the float model
of
its own: neither the model's evaluation nor the ONNX file of a model exists yet. `nncf` evaluates nothing, so
there is a ratio without the evaluations of the others. When a side's clock has stopped, its model is evaluated in
OpenVINO.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from act_pipeline.config import Config, load_config
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.cpus import available_cpus
from act_pipeline.core.errors import UserError
from act_pipeline.core.tables import BYTES_PER_MB, text_table
from act_pipeline.data import Reader
from act_pipeline.engines.interface import Artifact
from act_pipeline.evaluation.act_json import ActRecord
from tools.dev.compress_run import Clock, first_images, read_request, run_side, write_row

PEER_SCHEMA = "act_pipeline.benchmark_peer/1"
PEER = "nncf"
OURS = ("ptq", "auto")
SIDES = (PEER, *OURS)
FLOAT = "fp32"
# Derived: all but the evaluations, and of that what is neither preparation nor file.
QUANTIZATION, UNEVALUATED, TOTAL = "quantization", "total - evaluate", "total"
_AROUND = ("start", "prepare", "save", "evaluate", "other")
_DERIVED = (QUANTIZATION, UNEVALUATED, TOTAL)
# Stages of `act.json` that evaluate or measure, and are none of the quantization.
_EVALUATIONS = ("evaluate_fp32", "evaluate_int8", "latency", "reference")
_IR = Path("nncf", "nncf_int8.xml")


@dataclasses.dataclass(frozen=True)
class PeerRequest:
    """What is compared.

    Attributes:
        config: the compression config, in ACT's schema.
        options: ``Section.key=value`` set over it; ``QuantPost.calib_images`` is how many images all sides see.
        eval_images: the first so many images of EvalDataset; None: all.
        no_map: do not evaluate in OpenVINO what came of it.
    """

    config: str
    options: tuple[str, ...] = ()
    eval_images: int | None = 50
    no_map: bool = False

    def load(self, side: str = PEER, model: InferenceModel | None = None) -> Config:
        """Return the config of a side; `ptq` has no ``max_drop``, so that it calibrates and does no more, as `nncf`.

        Args:
            side: one of :data:`SIDES`, or ``fp32``.
            model: stands for the float model that the config names; None: that one.

        Raises:
            UserError: it is no config.
        """
        if self.eval_images is not None and self.eval_images < 1:
            raise UserError(f"--eval_images is {self.eval_images}, expected at least 1")
        strategy = ["Strategy.name=auto"] if side == "auto" else ["Strategy.name=ptq", "Strategy.max_drop=null"]
        config = load_config(self.config, [*self.options, *strategy, "Global.Evaluation=true"])
        if model is None:
            return config
        return dataclasses.replace(config, global_=dataclasses.replace(config.global_, model_dir=model.directory))


def compare_peer(request: PeerRequest, progress: bool = True, timeout_s: float | None = None) -> dict[str, Any]:
    """Run the sides one after the other and return the record (schema ``act_pipeline.benchmark_peer/1``).

    Args:
        request: what is compared.
        progress: log lines of all sides on stderr.
        timeout_s: for each side; None: as long as it takes.

    Returns:
        ``rows``: side -> ``seconds`` by stage, with ``quantization``, ``total - evaluate`` and ``total``, ``chosen``,
        ``map`` in OpenVINO, ``bytes`` of what OpenVINO reads, ``failure`` (None, or what ended it); ``fp32`` has no
        seconds. ``ratios``: side -> stage -> its seconds / NNCF's.

    Raises:
        UserError: NNCF is not installed; the config, the model or the data are wrong.
    """
    from act_pipeline.benchmark.nncf_peer import require_nncf

    require_nncf()
    config = request.load()
    reader = Reader.load(config.global_.reader_config)
    reader.check("train", "eval")
    InferenceModel.load(config.global_.model_dir, config.global_.model_filename, config.global_.params_filename)
    sides = SIDES if request.no_map else (*SIDES, FLOAT)
    rows = {side: run_side(__name__, side, request, progress, timeout_s, PEER_SCHEMA) for side in sides}
    return {
        "request": dataclasses.asdict(request),
        "config": config.as_dict(),
        "calibration_images": calibration_images(config, reader),
        "data_hash": {split: reader.fingerprint(split) for split in ("train", "eval")},
        "cpus": available_cpus(),
        "rows": rows,
        "ratios": peer_ratios(rows),
    }


def calibration_images(config: Config, reader: Reader) -> int:
    """Return how many images calibrate: those asked for, or all of a smaller train split."""
    settings = config.quant_post
    return len(reader.loader("train", batch_size=1, shuffle=False, drop_last=False, images=settings.images))


def derive(seconds: Mapping[str, float]) -> dict[str, float]:
    """Return seconds by stage, of which ``total`` is one, with the two sums that the sides can be compared by."""
    rest = {name: value for name, value in seconds.items() if name not in _DERIVED}
    quantization = sum(value for name, value in rest.items() if name not in _AROUND)
    unevaluated = seconds[TOTAL] - seconds.get("evaluate", 0.0)
    return {**rest, QUANTIZATION: round(quantization, 3), UNEVALUATED: round(unevaluated, 3), TOTAL: seconds[TOTAL]}


def peer_ratios(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return side -> sum of stages -> its seconds / NNCF's, of what both have finished."""
    done = {side: row["seconds"] for side, row in rows.items() if row["failure"] is None}
    if PEER not in done:
        return {}
    return {
        side: {name: done[side][name] / done[PEER][name] for name in _DERIVED if done[PEER].get(name)}
        for side in OURS
        if side in done
    }


def peer_table(record: Mapping[str, Any]) -> str:
    """Return seconds by stage, one column a side, the ratios to NNCF's, and what each model scored."""
    rows, ratios = record["rows"], record["ratios"]
    done = {side: rows[side] for side in SIDES if rows[side]["failure"] is None}
    stages = dict.fromkeys(stage for row in done.values() for stage in row["seconds"] if stage not in _DERIVED)
    lines = []
    if done:
        body = [
            [
                stage,
                *(f"{row['seconds'][stage]:.1f}" if stage in row["seconds"] else "" for row in done.values()),
                *(f"{found[stage]:.2f}" if stage in found else "" for found in ratios.values()),
            ]
            for stage in sorted(stages, key="other".__eq__) + list(_DERIVED)
        ]
        lines.append(text_table(["seconds", *done, *(f"{side} / {PEER}" for side in ratios)], body))
    scored = [
        f"{side} {row['map']:.4f} ({row['bytes'] / BYTES_PER_MB:.2f} MB{', ' * bool(row['chosen'])}{row['chosen']})"
        for side, row in rows.items()
        if row["failure"] is None and row["map"] is not None
    ]
    asked = record["request"]["eval_images"]
    images = "all images" if asked is None else f"{asked} images"
    if scored:
        lines.append(f"mAP in OpenVINO on {images} of EvalDataset: {'; '.join(scored)}")
    lines += [f"{side} failed: {row['failure']}" for side, row in rows.items() if row["failure"] is not None]
    lines.append(
        f"{record['calibration_images']} calibration images, the same for all; ours evaluate on {images}; "
        f"{record['cpus']} CPUs"
    )
    return "\n".join(lines)


def run_nncf(config: Config, reader: Reader, work: Path, clock: Clock) -> Artifact:
    """Run NNCF and return the IR."""
    from act_pipeline.benchmark import nncf_peer

    with clock.stage("start"):
        nncf_peer.import_nncf()
        images = calibration_images(config, reader)
    settings = config.quant_post
    batches = functools.partial(
        reader.loader, "train", batch_size=1, shuffle=False, drop_last=False, seed=settings.seed, images=settings.images
    )
    return nncf_peer.quantize(_float_model(config), reader, images, work / _IR, batches=batches, stage=clock.stage)


def run_compress(config: Config, reader: Reader, work: Path, clock: Clock) -> tuple[InferenceModel, str]:
    """Run :func:`act_pipeline.compress.compress`; return the model and what it is called in ``act.json``."""
    from act_pipeline.compress import compress

    annotations = f"EvalDataset.anno_path={reader.annotation_file('eval')}"
    print(f"{clock.side}: compress", file=sys.stderr, flush=True)
    done = compress(config, work / "int8", "CPU", progress=False, reader_overrides=[annotations])
    act = ActRecord.from_json(done.record)
    # The float model's and each candidate's evaluation; those of a training are within its own seconds.
    clock.add(act.seconds, dict.fromkeys(_EVALUATIONS, "evaluate"))
    return done.model, act.chosen or ""


def own_copy(model: InferenceModel, directory: Path) -> InferenceModel:
    """Copy a model without its subfolders: the ONNX file that another side, or another run, exported."""
    directory.mkdir(parents=True)
    for path in model.directory.iterdir():
        if path.is_file():
            shutil.copyfile(path, directory / path.name)
    return dataclasses.replace(model, directory=directory)


def _float_model(config: Config) -> InferenceModel:
    found = config.global_
    return InferenceModel.load(found.model_dir, found.model_filename, found.params_filename)


def _score(model: Artifact, precision: str, reader: Reader) -> dict[str, Any]:
    """Return the mAP in OpenVINO, and the size of what it read."""
    from act_pipeline.benchmark.nncf_peer import OpenVINOModel, load_peer
    from act_pipeline.engines import create_engine
    from act_pipeline.evaluation import evaluate

    threads = available_cpus()
    if isinstance(model, OpenVINOModel):
        engine = load_peer(model, threads, 1)
    else:
        engine = create_engine("openvino", model, precision, "CPU", threads)
    with contextlib.closing(engine):
        return {"map": evaluate(engine, reader, progress=False).map, "bytes": engine.artifact.bytes}


def main(argv: list[str]) -> int:
    """Run one side in this process: ``python -m tools.dev.peer_run nncf|ptq|auto|fp32 FOLDER``."""
    side, work = argv[0], Path(argv[1])
    clock = Clock(side, ())
    request = PeerRequest(**read_request(work))
    with clock.stage("start"):
        import paddle  # noqa: F401  (reads the model on every side)

        copied = own_copy(_float_model(request.load(side)), work / "float")
        config = request.load(side, copied)
        reader = first_images(Reader.load(config.global_.reader_config), request.eval_images, work)
        reader.check("train", "eval")  # imports ppdet, whose transforms read the images on every side
    row: dict[str, Any] = {"seconds": {}, "chosen": "", "map": None, "bytes": None, "failure": None}
    model: Artifact = copied
    if side == PEER:
        model = run_nncf(config, reader, work, clock)
    elif side in OURS:
        model, row["chosen"] = run_compress(config, reader, work, clock)
    if side != FLOAT:
        row["seconds"] = derive(clock.row())
    if not request.no_map:
        row.update(_score(model, "fp32" if side == FLOAT else "int8", reader))
    write_row(work, row, PEER_SCHEMA)
    return 0


if __name__ == "__main__":
    from act_pipeline.core.errors import run_command

    sys.exit(run_command(lambda argv=None: main(sys.argv[1:])))
