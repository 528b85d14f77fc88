"""A training by stock PaddleSlim and by this package, side by side: the same model, data, iterations, evaluations.

Stock is `paddleslim.auto_compression.AutoCompression` as it is installed, driven as PaddleSlim's example for detection
drives it: the reader's batches by name, and a callback that runs the program it is given in the executor, image by
image, and scores the boxes by COCO. It is subclassed to read the clock, and changed in nothing.

Each of the two has a process of its own, one after the other: Paddle keeps state in its process, and memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from act_pipeline.config import Config, load_config
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.atomic_files import write_text_atomically
from act_pipeline.core.cpus import available_cpus
from act_pipeline.core.errors import UserError
from act_pipeline.core.package_versions import versions
from act_pipeline.core.records import read_record, write_record
from act_pipeline.core.tables import text_table
from act_pipeline.data import Reader
from act_pipeline.data.model_fit import fit_reader

COMPRESS_SCHEMA = "act_pipeline.benchmark_compress/1"
STAGES = ("prepare", "train", "evaluate", "save")  # of stock; ours has those of act.json
TOTAL = "total"
SIDES = ("stock", "ours")
_REQUEST, _RESULT = "request.json", "result.json"


@dataclasses.dataclass(frozen=True)
class Request:
    """What is compared.

    Attributes:
        config: the compression config, in ACT's schema.
        options: ``Section.key=value`` set over it.
        train_iter: iterations of training.
        eval_iter: iterations between evaluations; divides ``train_iter``, since stock evaluates then only.
        eval_images: the first so many images of EvalDataset; None: all.
    """

    config: str
    options: tuple[str, ...] = ()
    train_iter: int = 50
    eval_iter: int = 10
    eval_images: int | None = 50

    def load(self) -> Config:
        """Return the config with the strategy and the iterations of the comparison.

        Raises:
            UserError: it is no config, has no training, or the iterations do not go into each other.
        """
        if self.train_iter < 1 or self.eval_iter < 1 or self.train_iter % self.eval_iter:
            raise UserError(
                f"--eval_iter is {self.eval_iter}, expected a divisor of --train_iter, which is "
                f"{self.train_iter}: stock "
                "evaluates at multiples of it only"
            )
        if self.eval_images is not None and self.eval_images < 1:
            raise UserError(f"--eval_images is {self.eval_images}, expected at least 1")
        overrides = [
            *self.options,
            "Strategy.name=qat_dis",
            "Strategy.max_drop=null",
            "Global.Evaluation=true",
            "TrainConfig.epochs=null",
            f"TrainConfig.train_iter={self.train_iter}",
            f"TrainConfig.eval_iter={self.eval_iter}",
        ]
        config = load_config(self.config, overrides)
        # Neither shall stop early, or evaluate the float model in the training's executor.
        train_config = dataclasses.replace(config.train_config, origin_metric=None, target_metric=None, patience=None)
        return dataclasses.replace(config, train_config=train_config)


def compare(
    request: Request, sides: tuple[str, ...] = SIDES, progress: bool = True, timeout_s: float | None = None
) -> dict[str, Any]:
    """Run the sides one after the other and return the record (schema ``act_pipeline.benchmark_compress/1``).

    Args:
        request: what is compared.
        sides: some of :data:`SIDES`.
        progress: log lines of both on stderr.
        timeout_s: for each side; None: as long as it takes.

    Returns:
        ``rows``: side -> ``seconds`` by stage and ``total``, ``steps``, ``evaluations`` (mAP of each), ``loss`` (first
        and last), ``failure`` (None, or what ended it); ``ratios``: ``total`` -> stock's seconds / ours, if both ran.

    Raises:
        UserError: the config, the model or the data are wrong.
    """
    config = request.load()
    reader = _reader(config)
    reader.check("train", "eval")
    rows = {side: run_side(__name__, side, request, progress, timeout_s) for side in sides}
    return {
        "request": dataclasses.asdict(request),
        "config": config.as_dict(),
        "data_hash": {split: reader.fingerprint(split) for split in ("train", "eval")},
        "cpus": available_cpus(),
        "rows": rows,
        "ratios": ratios(rows),
    }


def _reader(config: Config) -> Reader:
    """Return the reader as the model takes it."""
    global_ = config.global_
    model = InferenceModel.load(global_.model_dir, global_.model_filename, global_.params_filename)
    return fit_reader(model, Reader.load(global_.reader_config)).reader


def ratios(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return ``total`` -> stock's seconds / ours, if both have finished; their stages do not have the same limits."""
    if any(rows.get(side) is None or rows[side]["failure"] is not None for side in SIDES):
        return {}
    stock, ours = (rows[side]["seconds"] for side in SIDES)
    return {TOTAL: stock[TOTAL] / ours[TOTAL]}


def compress_table(record: Mapping[str, Any]) -> str:
    """Return a table of seconds by stage, a column for each tool, the ratio of the totals, and why one failed.

    Args:
        record: a record of ``tools/benchmark_compress.py``.
    """
    rows, found = record["rows"], record["ratios"]
    done = {side: row for side, row in rows.items() if row["failure"] is None}
    stages = list(dict.fromkeys(stage for row in done.values() for stage in row["seconds"]))
    body = [
        [
            stage,
            *(f"{row['seconds'][stage]:.1f}" if stage in row["seconds"] else "" for row in done.values()),
            *([f"{found[stage]:.1f}" if stage in found else ""] if found else []),
        ]
        for stage in sorted(stages, key=lambda stage: (stage == TOTAL, stage == "other"))
    ]
    asked = record["request"]
    lines = [text_table(["seconds", *done, *(["ratio"] if found else [])], body)] if done else []
    for side, row in rows.items():
        if row["failure"] is not None:
            lines.append(f"{side} failed: {row['failure']}")
        else:
            maps = ", ".join(f"{value:.4f}" for value in row["evaluations"])
            lines.append(f"{side}: {row['steps']} iterations, mAP {maps or '-'}")
    images = "all images" if asked["eval_images"] is None else f"{asked['eval_images']} images"
    lines.append(f"an evaluation every {asked['eval_iter']} iterations, on {images}; {record['cpus']} CPUs")
    return "\n".join(lines)


def run_side(
    module: str, side: str, request: Any, progress: bool, timeout_s: float | None, schema: str = COMPRESS_SCHEMA
) -> dict[str, Any]:
    """Run ``python -m module side FOLDER`` with the request in the folder; return the row that it leaves there.

    Returns:
        with ``failure``, and without ``seconds``, if it ended otherwise.
    """
    with tempfile.TemporaryDirectory(prefix="act_pipeline_benchmark_") as work:
        write_text_atomically(Path(work, _REQUEST), json.dumps(dataclasses.asdict(request)))
        package = str(Path(__file__).resolve().parents[2])
        places = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        # A cache of its own: the float model is evaluated, not remembered.
        environment = {**os.environ, "PYTHONPATH": places, "ACT_PIPELINE_CACHE": str(Path(work, "cache"))}
        command = [sys.executable, "-m", module, side, work]
        with open(Path(work, "log"), "w+b") as log:
            try:
                ended = subprocess.run(
                    command, env=environment, stdout=log, stderr=None if progress else log, timeout=timeout_s
                )
                failure = None if ended.returncode == 0 else f"its process ended with {ended.returncode}"
            except subprocess.TimeoutExpired:
                failure = f"it took longer than {timeout_s:.0f} s"
            log.seek(0)
            lines = [line for line in log.read().decode("utf-8", "replace").splitlines() if line.strip()]
        if failure is None:
            return read_record(Path(work, _RESULT), schema)["row"]
        told = f": {lines[-1].strip()}" if lines else ""
        return {"seconds": {}, "failure": f"{failure}{told}"}


class Clock:
    """Seconds by stage, with a line on stderr when a stage begins.

    A stage within another stops the outer one's clock. ``stages`` are in the row even where they never came.
    """

    def __init__(self, side: str, stages: Iterable[str] = STAGES) -> None:
        self.side = side
        self.seconds = dict.fromkeys(stages, 0.0)
        self.start = self._since = time.perf_counter()
        self._stages: list[str] = []

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the block's seconds to a stage."""
        self._switch()
        self._stages.append(name)
        elapsed = time.perf_counter() - self.start
        print(f"{self.side} {elapsed:8.1f} s: {name}", file=sys.stderr, flush=True)
        try:
            yield
        finally:
            self._switch()
            self._stages.pop()

    def _switch(self) -> None:
        now = time.perf_counter()
        if self._stages:
            stage = self._stages[-1]
            self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._since
        self._since = now

    def add(self, seconds: Mapping[str, float], names: Mapping[str, str] = MappingProxyType({})) -> None:
        """Add seconds that a record has.

        Args:
            seconds: stage of the record -> seconds.
            names: stage of the record -> stage here, where they differ.
        """
        for stage, value in seconds.items():
            name = names.get(stage, stage)
            self.seconds[name] = self.seconds.get(name, 0.0) + value

    def row(self) -> dict[str, float]:
        """Return the seconds, with what is no stage's as ``other``, and ``total``."""
        total = time.perf_counter() - self.start
        counted = {name: round(value, 3) for name, value in self.seconds.items()}
        return {**counted, "other": round(total - sum(self.seconds.values()), 3), TOTAL: round(total, 3)}


def first_images(reader: Reader, count: int | None, directory: Path) -> Reader:
    """Return a reader that evaluates on the first ``count`` images of its annotation file."""
    if count is None:
        return reader
    content = json.loads(reader.annotation_file("eval").read_text(encoding="utf-8"))
    content["images"] = content["images"][:count]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [box for box in content["annotations"] if box["image_id"] in kept]
    path = directory / "eval.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return reader.with_dataset("eval", anno_path=str(path.resolve()))


def read_request(work: Path) -> dict[str, Any]:
    """Return the fields of the request that :func:`run_side` left in the folder."""
    content = json.loads((work / _REQUEST).read_text(encoding="utf-8"))
    return {**content, "options": tuple(content["options"])}


def write_row(work: Path, row: Mapping[str, Any], schema: str = COMPRESS_SCHEMA) -> None:
    """Leave a side's row for :func:`run_side`."""
    write_record(work / _RESULT, schema, {"row": _plain(row), "versions": versions()})


def main(argv: list[str]) -> int:
    """Run one side in this process: ``python -m tools.dev.compress_run stock|ours FOLDER``."""
    side, work = argv[0], Path(argv[1])
    request = Request(**read_request(work))
    from tools.dev import compress_sides

    config = request.load()
    reader = first_images(_reader(config), request.eval_images, work)
    clock = Clock(side, STAGES if side == "stock" else ())
    run = {"stock": compress_sides.run_stock, "ours": compress_sides.run_ours}[side]
    write_row(work, {**run(config, reader, work, clock), "seconds": clock.row(), "failure": None})
    return 0


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value.item() if isinstance(value, np.generic) else value


if __name__ == "__main__":
    from act_pipeline.core.errors import run_command

    sys.exit(run_command(lambda argv=None: main(sys.argv[1:])))
