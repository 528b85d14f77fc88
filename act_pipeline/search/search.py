"""Search over decoder layers, queries and input sizes, in float and INT8: ``tools/search.py``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Optional

from act_pipeline.calibration.feeds import open_reader
from act_pipeline.compress.judging.choice import choose_judge
from act_pipeline.compress.judging.judge import Judge
from act_pipeline.config import Config
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.core.output_places import require_writable_folder
from act_pipeline.core.records import SEARCH_FILENAME, SEARCH_SCHEMA, write_record
from act_pipeline.core.timing import timed
from act_pipeline.data import Reader
from act_pipeline.engines.device import paddle_device
from act_pipeline.engines.float_model import require_float
from act_pipeline.evaluation import Evaluation, GroundTruth
from act_pipeline.evaluation.batches import Latencies
from act_pipeline.evaluation.comparison import agreement_on_some, compare_on_some
from act_pipeline.evaluation.confidence import AgreementLoss, MapDifference
from act_pipeline.families.registry import decoder_for
from act_pipeline.search.halving import Entry, Limits, halve, ranked, within
from act_pipeline.search.int8_models import CALIBRATION_IMAGES, Int8Maker, Int8Model, config_of
from act_pipeline.search.outcome import (
    PICTURE_FILENAME,
    Row,
    SearchOutcome,
    draw,
    fastest_within,
    with_front,
)
from act_pipeline.search.screening import first_look, loaded, screen
from act_pipeline.search.variants import Source, Variant

_FLOAT_ROUNDS = 5

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
    limit are not tried. The best of them are calibrated as ``auto`` does, the full model by ``ptq``; they are evaluated
    and timed in INT8. ``save_dir`` gets ``search.json``, ``search.png`` and the models, in ``float/`` and ``int8/``; a
    second search with the same config takes those that are there.

    Args:
        config: the compression config; ``Global.model_dir`` is a folder of ``tools/export_model.py``.
        save_dir: the folder for the results.
        device: ``CPU``, ``GPU`` or ``auto``.
        layers, queries, sizes: what to try, see :meth:`act_pipeline.search.variants.Source.variants`.
        candidates: how many variants besides the full model are made INT8.
        full_int8: the full model in INT8, to which the others are compared; None: it is calibrated by ``ptq``.
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
    if folder.resolve() == model.directory.resolve():
        raise UserError(f"--save_dir is the folder of the model, {folder}; choose another one for the search")
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

    say(f"exporting up to {len(variants) - 1} variants of {model.directory}")
    with loaded(judge, {full.variant.name: (full.model, full.reader)}, "fp32") as reference:

        def look(entries: Sequence[Entry]) -> None:
            say(f"a first look in {judge.fp32_engine} at {'; '.join(entry.variant.words for entry in entries)}")
            with timed(seconds, "first_look"):
                first_look(judge, full, reference, entries, limits, _FLOAT_ROUNDS, progress)

        entries, skipped = screen(variants[1:], make, look)
    with timed(seconds, "evaluate"):
        alive = halve(
            [entry for entry in entries if not entry.dropped], _evaluator(judge, progress), limits, candidates
        )
    rows = [_row(entry.variant, "fp32", entry.model, entry.evaluation, entry.difference, _timed(entry),
                 config, entry.dropped, entry.loss) for entry in (full, *entries)]  # fmt: skip
    best = [entry for entry in ranked(alive, limits) if within(entry, limits)][:candidates]
    maker = Int8Maker(config, judge, folder / "int8", device, progress, reader_overrides, seconds, say)
    made = [*maker.full(full, full_int8), *(one for entry in best for one in maker.variant(entry))]
    rows += _int8_rows(maker, limits, made)
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
    changed = config_of(config, model)
    resized = variant.reader_overrides(Reader.load(config.global_.reader_config, overrides))
    reader, _ = open_reader(changed, model, [*overrides, *resized])
    return Entry(variant, model, reader, tuple(resized))


def _evaluator(judge: Judge, progress: bool) -> Callable[[Entry, Optional[int]], Evaluation]:
    def evaluate(entry: Entry, count: Optional[int]) -> Evaluation:
        if count is None:  # into the cache, where the compression of the variant finds it
            return judge.evaluate_float(entry.model, entry.reader, progress, entry.evaluation)[0]
        return judge.evaluate(entry.model, "fp32", entry.reader, progress, limit=count, before=entry.evaluation)

    return evaluate


def _int8_rows(maker: Int8Maker, limits: Limits, models: Sequence[Int8Model]) -> list[Row]:
    """Time INT8 models in turns, the full one first, and return their rows."""
    reference, checked = limits.reference, limits.min_agreement is not None
    return [
        _row(
            each.variant, "int8", each.model, each.evaluation,
            compare_on_some(reference, each.evaluation, limits.truth), latencies, maker.config, None,
            agreement_on_some(reference, each.evaluation) if checked else None,
        )
        for each, latencies in zip(models, maker.time(models))
    ]  # fmt: skip


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
        bf16=variant.bf16,
    )
