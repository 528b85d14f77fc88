"""Search over decoder layers, queries and input sizes, in float and INT8: ``tools/search.py``."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Optional

from act_pipeline.calibration.feeds import open_reader
from act_pipeline.compress import Compressed, compress
from act_pipeline.compress.judging.choice import choose_judge
from act_pipeline.compress.judging.judge import Judge
from act_pipeline.config import Config
from act_pipeline.core.artifacts import InferenceModel, copy_infer_cfg
from act_pipeline.core.errors import UserError
from act_pipeline.core.output_folders import new_artifact
from act_pipeline.core.output_places import require_writable_folder
from act_pipeline.core.records import SEARCH_FILENAME, SEARCH_SCHEMA, write_record
from act_pipeline.core.timing import timed
from act_pipeline.data import Reader
from act_pipeline.engines.device import paddle_device
from act_pipeline.engines.float_model import require_float
from act_pipeline.engines.onnx_runtimes.openvino import FLOAT_PRECISION_KEY, computes_in_bf16
from act_pipeline.evaluation import Evaluation, GroundTruth
from act_pipeline.evaluation.batches import Latencies
from act_pipeline.evaluation.comparison import agreement_on_some, compare_on_some
from act_pipeline.evaluation.confidence import AgreementLoss, MapDifference
from act_pipeline.families.registry import decoder_for
from act_pipeline.search.halving import Entry, Limits, halve, ranked, within
from act_pipeline.search.outcome import (
    PICTURE_FILENAME,
    Row,
    SearchOutcome,
    draw,
    fastest_within,
    with_front,
)
from act_pipeline.search.screening import first_look, loaded, screen, timed_in_turns
from act_pipeline.search.variants import Source, Variant

# Images for the calibration of each variant: the chosen one can be compressed again with more.
CALIBRATION_IMAGES = 64
ROUNDS, _FLOAT_ROUNDS = 10, 5

Say = Callable[[str], None]


def search(
    config: Config,
    save_dir: str | os.PathLike[str],
    device: str = "auto",
    *,
    layers: Sequence[int] | None = None,
    queries: Sequence[int] | None = None,
    sizes: Sequence[tuple[int, int]] | None = None,
    candidates: int = 2,
    full_int8: InferenceModel | None = None,
    progress: bool = True,
    reader_overrides: Sequence[str] = (),
    say: Say = lambda line: print(line, file=sys.stderr),
) -> SearchOutcome:
    """Find the fastest variant within ``Strategy.max_drop`` and ``Strategy.min_agreement``, without training.

    The variants are exported from the weights, the larger ones first, timed in turns in the engine that compress
    evaluates in, and evaluated in float by successive halving. Those that are smaller than one that is surely beyond a
    limit are not tried. The best of them and the full model are calibrated (``ptq``), evaluated and timed in
    INT8. ``save_dir`` gets ``search.json``, ``search.png`` and the models, in ``float/`` and ``int8/``; a second search
    with the same config takes those that are there.

    Args:
        config: the compression config; ``Global.model_dir`` is a folder of ``tools/export_model.py``.
        save_dir: the folder for the results.
        device: ``CPU``, ``GPU`` or ``auto``.
        layers, queries, sizes: what to try, see :meth:`act_pipeline.search.variants.Source.variants`.
        candidates: how many variants besides the full model are made INT8.
        full_int8: the full model in INT8, to which the others are compared; None: it is calibrated as they are.
        progress: show progress bars on stderr.
        reader_overrides: ``Section.key=value`` each, set over the values of the reader's file.
        say: is called with one line per step.

    Raises:
        UserError: the model was not exported here, there are no labels or no ``max_drop``, a variant cannot be
            made, or nothing can be written to ``save_dir``.
    """
    max_drop = config.strategy.max_drop
    if max_drop is None:
        raise UserError(f"{config.path}: Strategy.max_drop is empty, expected a number: the search stays within it")
    if config.global_.evaluation is not True:
        raise UserError(f"{config.path}: Global.Evaluation is {config.global_.evaluation}, expected true for a search")
    folder, places = Path(save_dir), config.global_
    require_writable_folder(folder, "--save_dir")
    model = InferenceModel.load(places.model_dir, places.model_filename, places.params_filename)
    require_float(model)
    source = Source.of(model)
    variants = source.variants(layers, queries, sizes)
    seconds: dict[str, float] = {}
    judge = choose_judge(config.strategy.engine, paddle_device(device), model, decoder=decoder_for(config, model))
    full = _entry(config, source.full, model, reader_overrides)
    full.reader.require_labels("eval", "the search")
    with timed(seconds, "evaluate"):
        full.evaluation, _ = judge.evaluate_float(full.model, full.reader, progress)
    limits = Limits(full.evaluation, GroundTruth.load(full.reader, "eval"), max_drop, config.strategy.min_agreement)

    def make(variant: Variant) -> Entry:
        with timed(seconds, "export"):
            made = source.export(variant, folder / "float")
        return _entry(config, variant, made, reader_overrides)

    def look(entries: Sequence[Entry]) -> None:
        say(f"a first look in {judge.fp32_engine} at {'; '.join(entry.variant.words for entry in entries)}")
        with timed(seconds, "first_look"):
            first_look(judge, full, entries, limits, _FLOAT_ROUNDS, progress)

    say(f"exporting up to {len(variants) - 1} variants of {model.directory}")
    entries, skipped = screen(variants[1:], make, look)
    with timed(seconds, "evaluate"):
        alive = halve(
            [entry for entry in entries if not entry.dropped], _evaluator(judge, progress), limits, candidates
        )
    rows = [_row(entry.variant, "fp32", entry.model, entry.evaluation, entry.difference, _timed(entry),
                 config, entry.dropped, entry.loss) for entry in (full, *entries)]  # fmt: skip
    best = [entry for entry in ranked(alive, limits) if within(entry, limits)][:candidates]
    rows += _int8_rows(
        config, judge, [full, *best], limits, folder,
        full_int8=full_int8, device=device, progress=progress, reader_overrides=reader_overrides, seconds=seconds,
        say=say,
    )  # fmt: skip
    rows = with_front(rows)
    outcome = SearchOutcome(
        rows,
        fastest_within(rows, max_drop, config.strategy.confidence, limits.min_agreement),
        max_drop,
        config.strategy.confidence,
        f"{judge.engine} on {judge.device}",
        {name: round(value, 2) for name, value in seconds.items()},
        {"config": str(config.path), "model": str(model.directory), "model_hash": model.content_hash(),
         "reader": str(full.reader.path), "reader_hash": full.reader.fingerprint()},
        min(config.quant_post.images, CALIBRATION_IMAGES),
        None if full_int8 is None else str(full_int8.directory),
        limits.min_agreement,
        tuple((each.variant.words, each.larger.words) for each in skipped),
    )  # fmt: skip
    draw(outcome, folder / PICTURE_FILENAME)
    write_record(folder / SEARCH_FILENAME, SEARCH_SCHEMA, outcome.as_json())
    return outcome


def _entry(config: Config, variant: Variant, model: InferenceModel, overrides: Sequence[str]) -> Entry:
    changed = _config_of(config, model)
    resized = variant.reader_overrides(Reader.load(config.global_.reader_config, overrides))
    reader, _ = open_reader(changed, model, [*overrides, *resized])
    return Entry(variant, model, reader, tuple(resized))


def _config_of(config: Config, model: InferenceModel) -> Config:
    """Return the config that calibrates a variant, without limits: these refer to the full model."""
    places = dataclasses.replace(
        config.global_, model_dir=model.directory, model_filename=model.model_filename,
        params_filename=model.params_filename,
    )  # fmt: skip
    strategy = dataclasses.replace(config.strategy, name="ptq", max_drop=None, min_agreement=None, search=False)
    calibrated = config.quant_post
    count = min(calibrated.images, CALIBRATION_IMAGES)
    calibrated = dataclasses.replace(calibrated, calib_images=count, batch_nums=None, round_residuals=True)
    return dataclasses.replace(config, global_=places, strategy=strategy, quant_post=calibrated)


def _evaluator(judge: Judge, progress: bool) -> Callable[[Entry, Optional[int]], Evaluation]:
    def evaluate(entry: Entry, count: Optional[int]) -> Evaluation:
        if count is None:  # into the cache, where the compression of the variant finds it
            return judge.evaluate_float(entry.model, entry.reader, progress, entry.evaluation)[0]
        return judge.evaluate(entry.model, "fp32", entry.reader, progress, limit=count, before=entry.evaluation)

    return evaluate


def _int8_rows(
    config: Config,
    judge: Judge,
    entries: Sequence[Entry],
    limits: Limits,
    folder: Path,
    *,
    full_int8: InferenceModel | None,
    device: str,
    progress: bool,
    reader_overrides: Sequence[str],
    seconds: dict[str, float],
    say: Say,
) -> list[Row]:
    """Calibrate, evaluate and time variants in INT8, the full model first, and with bf16 where that may be faster."""
    made: dict[str, _Int8] = {}
    for entry in entries:
        variant = entry.variant
        say(f"INT8 of {variant.words}")
        with timed(seconds, "calibrate"):
            done = Compressed(full_int8, {}) if full_int8 is not None and entry is entries[0] else compress(
                _config_of(config, entry.model), folder / "int8" / variant.name, device, progress=progress, reuse=True,
                reader_overrides=[*reader_overrides, *entry.reader_overrides], checks=False,
            )  # fmt: skip
            model = done.model
        models = {variant: model}
        if judge.engine == "openvino" and computes_in_bf16():
            rest_in_bf16 = dataclasses.replace(variant, bf16=True)
            models[rest_in_bf16] = _with_bf16(model, folder / "int8" / rest_in_bf16.name)
        with timed(seconds, "evaluate"):
            for each, model in models.items():
                evaluation = done.evaluation if each == variant else None
                evaluation = evaluation or judge.evaluate(model, "int8", entry.reader, progress)
                made[each.name] = _Int8(each, model, entry.reader, evaluation)
    with timed(seconds, "time"):
        with loaded(judge, {name: (each.model, each.reader) for name, each in made.items()}, "int8") as found:
            measured = timed_in_turns(found, ROUNDS)
    checked = limits.min_agreement is not None
    reference = limits.reference
    return [
        _row(
            each.variant, "int8", each.model, each.evaluation,
            compare_on_some(reference, each.evaluation, limits.truth), measured[name], config, None,
            agreement_on_some(reference, each.evaluation) if checked else None,
        )
        for name, each in made.items()
    ]  # fmt: skip


class _Int8(NamedTuple):
    """An INT8 model, the data in its input size, and its evaluation."""

    variant: Variant
    model: InferenceModel
    reader: Reader
    evaluation: Evaluation


def _with_bf16(model: InferenceModel, folder: Path) -> InferenceModel:
    """Copy an INT8 model into a folder whose description lets OpenVINO compute in bf16 what is not INT8.

    Its ``act.json`` is left out: it has the figures of the model that computes the rest in f32.
    """
    with new_artifact(folder) as staging:
        for path in (model.model_path, model.params_path):
            shutil.copyfile(path, staging / path.name)
        copy_infer_cfg(model, staging, folder, {FLOAT_PRECISION_KEY: "bf16"})
    return InferenceModel.load(folder, model.model_filename, model.params_filename)


def _timed(entry: Entry) -> Latencies:
    assert entry.latencies is not None
    return entry.latencies


def _row(
    variant: Variant,
    precision: str,
    model: InferenceModel,
    evaluation: Optional[Evaluation],
    difference: Optional[MapDifference],
    latencies: Latencies,
    config: Config,
    dropped: Optional[str],
    loss: Optional[AgreementLoss] = None,
) -> Row:
    limits = config.strategy
    return Row(
        name=variant.name,
        words=variant.words,
        layers=variant.layers,
        queries=variant.queries,
        size=list(variant.size),
        precision=precision,
        folder=str(model.directory),
        bytes=model.bytes,
        map=evaluation.map if evaluation is not None and evaluation.has_map else None,
        images=evaluation.images if evaluation is not None else 0,
        map_drop=None if difference is None else -difference.difference,
        low=None if difference is None else -difference.high,
        high=None if difference is None else -difference.low,
        probability=None if difference is None else difference.probability(limits.max_drop or 0.0),
        latency_ms=latencies.latency_ms["p50"],
        ratio=latencies.ratio,
        dropped=dropped,
        agreement=None if loss is None else loss.agreement,
        agreement_probability=None if loss is None else loss.probability(1 - (limits.min_agreement or 0.0)),
    )
