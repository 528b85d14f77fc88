"""Post-training quantization: scales from calibration images, without training.

The float graph is run once over the images (`compress.ptq.statistics`). The threshold of each activation is computed
from its statistics (`calibration.thresholds`), and weights are rounded per channel. The model is written by the same
passes and code as a trained one (`compress.paddleslim.int8_program`).
"""

from __future__ import annotations

import copy
import dataclasses
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from act_pipeline.calibration import AbsHistogram, AbsMax
from act_pipeline.calibration.thresholds import threshold
from act_pipeline.compress.accuracy_control.revert import revert_to_float
from act_pipeline.compress.paddleslim import qdq_program
from act_pipeline.compress.paddleslim.int8_program import save_int8
from act_pipeline.compress.plan.op_inventory import OpInventory, inventory_of
from act_pipeline.compress.plan.op_selection import Selection
from act_pipeline.compress.ptq.bias_correction import correct_biases, find_biases
from act_pipeline.compress.ptq.insertion import Inserted, insert
from act_pipeline.compress.ptq.statistics import Statistics, gather
from act_pipeline.compress.smooth_quant.groups import DividedTensor
from act_pipeline.config import Config, QuantPost
from act_pipeline.config.sections import CalibrationAlgorithm
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.quiet import quiet_upstream
from act_pipeline.core.timing import timed
from act_pipeline.graph.static_graph import StaticGraph


@dataclass
class Calibration:
    """Result of a post-training quantization.

    Attributes:
        model: the saved INT8 model.
        inventory: its INT8 ops.
        images: the number of calibration images that were run.
        thresholds: quantized activation -> the largest absolute value that INT8 represents; 0 for ``zero_tensors``,
            whose scale in the model is that of threshold 1.
        corrected_biases: the number of biases that were corrected.
        zero_tensors: activations that were zero on all images.
        seconds: seconds of the stages ``calibrate`` and ``quantize``.
    """

    model: InferenceModel
    inventory: OpInventory
    images: int
    thresholds: dict[str, float]
    corrected_biases: int = 0
    zero_tensors: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


class PostTraining:
    """Run the calibration images once, then write INT8 models by any calibration algorithm.

    Use it within :func:`static_mode`.

    Attributes:
        model: the float model.
        statistics: statistics of the calibration images.
        seconds: ``calibrate`` -> seconds that the calibration images took.
        written: algorithm -> the model that was written for a comparison, for who wants the same one.
    """

    def __init__(
        self,
        model: InferenceModel,
        config: Config,
        batches: Callable[[], Iterator[Mapping[str, np.ndarray]]],
        device: str = "CPU",
        selection: Selection | None = None,
        spare: Collection[str] = (),
        divided: Mapping[str, DividedTensor] | None = None,
    ) -> None:
        """Run the calibration images through the float model.

        Args:
            model: the float model with folded constants and BatchNorm.
            config: section ``QuantPost`` has the settings.
            batches: yields the calibration images in batches, the same at every call.
            device: ``CPU`` or ``GPU``, where the float model runs.
            selection: the ops to quantize; None: all of ``QuantPost.quantize_op_types``. Those that stay float have to
                be marked in ``model`` (:func:`act_pipeline.compress.plan.op_selection.mark_float`).
            spare: ops that stay float by default whose inputs are calibrated too, so that :meth:`write` can have them
                in INT8.
            divided: tensors that have other values in an equalized model, for :meth:`equalized`; None: there is none.

        Raises:
            UserError: a weight or tensor is NaN or infinite, no op can be quantized, or memory does not suffice.
        """
        self.model = model
        self._config = config
        self._selection = selection
        self._divided = divided or {}
        self.seconds: dict[str, float] = {}
        self.written: dict[CalibrationAlgorithm, Calibration] = {}
        read = [name for op in (selection.ops if selection else ()) if op.name in spare for name in op.activations]
        with timed(self.seconds, "calibrate"):
            self._inserted: Inserted | None = insert(model, config.quant_post)
            self.statistics = gather(model, self._inserted, config, batches, device, dict.fromkeys(read), self._divided)

    def equalized(self, model: InferenceModel, selection: Selection | None) -> PostTraining:
        """Return the calibration of the equalized model on the same images, which are not run again.

        Args:
            model: the equalized float model, whose tensors are those of ``divided``, and else have the same values.
            selection: the ops to quantize; None: all.
        """
        found = copy.copy(self)
        found.model, found._selection, found._divided, found.seconds = model, selection, {}, {}
        found.written = {}
        found._inserted = None
        found.statistics = self.statistics.equalized(self._divided)
        return found

    def thresholds(self, algo: CalibrationAlgorithm) -> dict[str, float]:
        """Return quantized activation -> its threshold by ``algo``; see `calibration.thresholds.threshold`."""
        return _thresholds(self.statistics, dataclasses.replace(self._config.quant_post, algo=algo))

    def write(
        self, save_dir: Path, algo: CalibrationAlgorithm | None = None, taken_back: Collection[str] = ()
    ) -> Calibration:
        """Write the INT8 model.

        Args:
            save_dir: an existing folder for the model.
            algo: the calibration algorithm; None: ``QuantPost.algo``.
            taken_back: those of the spare ops that compute in INT8 in this model.
        """
        selection = self._selection.take_back(taken_back) if self._selection else None
        seconds = dict(self.seconds)
        with timed(seconds, "quantize"):
            settings = self._config.quant_post
            settings = settings if algo is None else dataclasses.replace(settings, algo=algo)
            # Writing replaces the scope's float weights by integers, so a second call has to load the model again.
            inserted = None if taken_back else self._inserted
            if inserted is None:
                inserted = insert(self.model, settings, taken_back)
            else:
                self._inserted = None
            weight_only = selection.weight_only if selection else ()
            whole = save_dir / ".whole" if weight_only else save_dir
            whole.mkdir(exist_ok=True)
            calibration = write(inserted, settings, self.statistics, whole, selection)
            if weight_only:
                dynamic = selection.dynamic if selection else ()
                calibration.model = revert_to_float(calibration.model, weight_only, save_dir, dynamic=dynamic)
                calibration.inventory = inventory_of(
                    calibration.model, settings.quantize_op_types, "QuantPost", selection
                )
                shutil.rmtree(whole)
        calibration.seconds = seconds
        return calibration


def write(
    inserted: Inserted,
    settings: QuantPost,
    statistics: Statistics,
    save_dir: Path,
    selection: Selection | None = None,
) -> Calibration:
    """Compute the thresholds, correct the biases and write the INT8 model.

    Args:
        inserted: the output of :func:`insert`; its graph is changed and closed.
        settings: section ``QuantPost``.
        statistics: the output of :func:`gather`.
        save_dir: an existing folder for the model.
        selection: the ops to quantize; None: all.
    """
    graph = inserted.graph
    statistics = statistics.of(qdq_program.quantized_tensors(inserted.program))
    thresholds = _thresholds(statistics, settings)
    # A tensor of zeros is exact at any scale. The threshold 1 is a guess for other values that may occur at inference.
    ranges = {name: _threshold(seen, settings) for name, seen in statistics.ranges.items()}
    used = {name: value or 1.0 for name, value in {**ranges, **thresholds}.items()}
    with quiet_upstream():
        corrected = _correct_biases(graph, settings, statistics, selection) if settings.bias_correction else 0
        qdq_program.set_scales(inserted.program, graph, used)
        if settings.zero_points:
            lowest = {name: seen.lowest for name, seen in statistics.activations.items() if thresholds[name] > 0}
            qdq_program.set_lowest(inserted.program, lowest)
        saved, inventory = save_int8(
            inserted.program,
            graph.scope,
            graph.executor.place,
            feed_names=graph.feed_names,
            fetch_names=[target.name for target in graph.fetch_targets],
            op_types=settings.quantize_op_types,
            directory=save_dir,
            section="QuantPost",
            selection=selection,
        )
    graph.close()
    zeros = [name for name, value in thresholds.items() if value == 0]
    return Calibration(saved, inventory, statistics.images, thresholds, corrected, zeros)


def _thresholds(statistics: Statistics, settings: QuantPost) -> dict[str, float]:
    return {name: _threshold(seen, settings) for name, seen in statistics.activations.items()}


def _threshold(seen: AbsMax, settings: QuantPost) -> float:
    """Return the threshold of a tensor: by the algorithm if there is a histogram of it."""
    if not isinstance(seen, AbsHistogram):
        return seen.abs_max
    return threshold(seen, settings.algo, settings.hist_percent, settings.zero_points)


def _correct_biases(
    graph: StaticGraph, settings: QuantPost, statistics: Statistics, selection: Selection | None
) -> int:
    """Correct the biases of the ops that are quantized; return their number."""
    means = {name: observer.mean for name, observer in statistics.means.items()}
    kept = selection.kept if selection else {}
    biases = [
        bias for bias in find_biases(graph, settings.quantize_op_types) if bias.source in means and bias.op not in kept
    ]
    return correct_biases(graph, biases, means, settings.weight_quantize_type == "channel_wise_abs_max")
