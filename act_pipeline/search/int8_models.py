"""The best variants of a search in INT8, and the full model beside them: calibrated, evaluated, and timed in turns."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from act_pipeline.compress import Compressed, compress
from act_pipeline.compress.judging.judge import Judge
from act_pipeline.config import Config
from act_pipeline.config.sections import StrategyName
from act_pipeline.core.artifacts import InferenceModel, copy_infer_cfg
from act_pipeline.core.output_folders import new_artifact
from act_pipeline.core.timing import timed
from act_pipeline.data import Reader
from act_pipeline.engines.onnx_runtimes.openvino import FLOAT_PRECISION_KEY, computes_in_bf16
from act_pipeline.evaluation import Evaluation
from act_pipeline.evaluation.batches import Latencies
from act_pipeline.search.halving import Entry
from act_pipeline.search.screening import loaded, timed_in_turns
from act_pipeline.search.variants import Variant

# Images of each calibration: with 200 images, R18 cut to 2 layers agrees no better with its float model.
CALIBRATION_IMAGES = 64
_ROUNDS = 10


@dataclass(frozen=True)
class Int8Model:
    """A variant in INT8, the data in its input size, and its evaluation on all images."""

    variant: Variant
    model: InferenceModel
    reader: Reader
    evaluation: Evaluation


@dataclass(frozen=True)
class Int8Maker:
    """Makes variants INT8.

    Attributes:
        config: the config of the search.
        judge: evaluates and times.
        folder: the models are written below it.
        device: ``CPU``, ``GPU`` or ``auto``.
        progress: show progress bars on stderr.
        reader_overrides: ``Section.key=value`` each, set over the values of the reader's file.
        seconds: the seconds of the stages are added to it.
        say: is called with one line per step.
    """

    config: Config
    judge: Judge
    folder: Path
    device: str
    progress: bool
    reader_overrides: Sequence[str]
    seconds: dict[str, float]
    say: Callable[[str], None]

    def full(self, entry: Entry, given: InferenceModel | None = None) -> list[Int8Model]:
        """Return the full model in INT8, to which the variants are compared.

        Args:
            entry: the full model in float.
            given: its INT8 model; None: it is calibrated by ``ptq``, which takes half the time of ``auto``.
        """
        return self._made(entry, Compressed(given, {}) if given is not None else self._calibrated(entry, "ptq"))

    def variant(self, entry: Entry) -> list[Int8Model]:
        """Return a variant in INT8, calibrated as ``auto`` does."""
        return self._made(entry, self._calibrated(entry, "auto"))

    def _calibrated(self, entry: Entry, strategy: StrategyName) -> Compressed:
        self.say(f"INT8 of {entry.variant.words}")
        with timed(self.seconds, "calibrate"):
            return compress(
                config_of(self.config, entry.model, strategy), self.folder / entry.variant.name, self.device,
                progress=self.progress, reuse=True, reader_overrides=[*self.reader_overrides, *entry.reader_overrides],
                checks=False,
            )  # fmt: skip

    def _made(self, entry: Entry, done: Compressed) -> list[Int8Model]:
        """Return an evaluated INT8 model; where OpenVINO computes in bf16, also with bf16 for what is not INT8."""
        variant = entry.variant
        models = {variant: done.model}
        if self.judge.engine == "openvino" and computes_in_bf16():
            rest_in_bf16 = dataclasses.replace(variant, bf16=True)
            models[rest_in_bf16] = _with_bf16(done.model, self.folder / rest_in_bf16.name)
        known = {variant: done.evaluation}
        with timed(self.seconds, "evaluate"):
            return [
                Int8Model(
                    each, model, entry.reader,
                    known.get(each) or self.judge.evaluate(model, "int8", entry.reader, self.progress),
                )
                for each, model in models.items()
            ]  # fmt: skip

    def time(self, models: Sequence[Int8Model]) -> list[Latencies]:
        """Measure latencies in turns; ratios are to the first model."""
        named = {each.variant.name: (each.model, each.reader) for each in models}
        with timed(self.seconds, "time"), loaded(self.judge, named, "int8") as found:
            return list(timed_in_turns(found, _ROUNDS).values())


def config_of(config: Config, model: InferenceModel, strategy: StrategyName = "ptq") -> Config:
    """Return the config that calibrates a model of the search with at most :data:`CALIBRATION_IMAGES`.

    Args:
        config: the config of the search.
        model: the full model or a variant, in float.
        strategy: ``ptq``, which has rounded residual connections then, or ``auto``, which tries what they change. It
            has no limits, since those of the search refer to the full model: ``auto`` ends with the best calibration.
    """
    places = dataclasses.replace(
        config.global_, model_dir=model.directory, model_filename=model.model_filename,
        params_filename=model.params_filename,
    )  # fmt: skip
    unlimited = dataclasses.replace(config.strategy, name=strategy, max_drop=None, min_agreement=None, search=False)
    calibration = dataclasses.replace(
        config.quant_post, calib_images=min(config.quant_post.images, CALIBRATION_IMAGES), batch_nums=None,
        round_residuals=True,
    )  # fmt: skip
    return dataclasses.replace(
        config, global_=places, strategy=unlimited, quant_post=calibration, distillation=None, quant_aware=None,
        train_config=None,
    )  # fmt: skip


def _with_bf16(model: InferenceModel, folder: Path) -> InferenceModel:
    """Copy an INT8 model into a folder whose description lets OpenVINO compute in bf16 what is not INT8.

    Its ``act.json`` is left out: it has the figures of the model that computes the rest in f32.
    """
    with new_artifact(folder) as staging:
        for path in (model.model_path, model.params_path):
            shutil.copyfile(path, staging / path.name)
        copy_infer_cfg(model, staging, folder, {FLOAT_PRECISION_KEY: "bf16"})
    return InferenceModel.load(folder, model.model_filename, model.params_filename)
