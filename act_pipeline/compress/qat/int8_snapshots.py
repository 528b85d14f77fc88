"""Write, check and score the INT8 models of a running training."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np

from act_pipeline.compress.paddleslim.int8_program import save_int8
from act_pipeline.compress.plan.op_inventory import OpInventory
from act_pipeline.compress.qat.unfolded_weights import folded
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.evaluation.batches import NotFinite
from act_pipeline.execution import finite_checks
from act_pipeline.execution.finite_checks import LOWER_RATE, Diverged
from act_pipeline.graph.int8_rounding import scale_weights
from act_pipeline.graph.static_graph import StaticGraph, free


@dataclass(frozen=True)
class Scorer:
    """Functions that score an INT8 model.

    Attributes:
        agreement: returns the agreement of a model's detections with the float model's on training images, in [0, 1].
            The model with the highest one is saved.
        map: returns a model's mAP on the evaluation images; called only if ``TrainConfig.target_metric`` or
            ``origin_metric`` is set.
        survives_nan: returns whether the other two functions are safe for a graph that computes NaN, that is, raise
            :class:`NotFinite` and do not crash. If not, the outputs on a training image are checked before.
    """

    agreement: Callable[[InferenceModel], float]
    map: Callable[[InferenceModel], float]
    survives_nan: Callable[[StaticGraph], bool] = lambda graph: False


class Int8Snapshots:
    """Write and score INT8 models of a training's current weights."""

    def __init__(
        self,
        scorer: Scorer | None,
        probe: Mapping[str, np.ndarray],
        op_types: Collection[str],
        order: Sequence[str],
        factors: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Store the settings.

        Args:
            scorer: the functions for :meth:`score`; None: the models are not scored.
            probe: the feed of one training image, for the check of the outputs.
            op_types: the op types that are quantized.
            order: outputs of the float program's ops, see `compress.paddleslim.op_order.in_order`.
            factors: factors of the weights that are trained unfolded, see `compress.qat.unfolded_weights.unfold`.
        """
        self._scorer, self._probe, self._op_types, self._order = scorer, probe, op_types, order
        self._factors = factors or {}
        self._survives_nan: Optional[bool] = None

    def save(self, info: Any, iteration: int, folder: Path) -> tuple[InferenceModel, OpInventory]:
        """Write the INT8 model of the current weights; the training's variables are not changed.

        Args:
            info: PaddleSlim's ``ProgramInfo`` of the test program, whose parameters are in the global scope.
            iteration: the last iteration, for messages.
            folder: the folder to create for the model.

        Returns:
            The model and the inventory of its ops.

        Raises:
            Diverged: outputs of the model are not finite.
        """
        import paddle

        trained = paddle.static.global_scope()
        program = getattr(info.program, "_program", info.program)
        scope, place = paddle.static.Scope(), paddle.CPUPlace()
        for variable in program.list_vars():
            if variable.persistable and variable.name not in ("feed", "fetch"):
                value = np.array(trained.find_var(variable.name).get_tensor())
                if variable.name in self._factors:
                    value = folded(value, self._factors[variable.name])
                scope.var(variable.name).get_tensor().set(value, place)
        # The training's own scales are of the weights before the last step.
        scale_weights(
            program,
            lambda name: np.array(scope.find_var(name).get_tensor()),
            lambda name, value: scope.find_var(name).get_tensor().set(value, place),
        )
        folder.mkdir()
        try:
            return save_int8(
                program,
                scope,
                place,
                feed_names=info.feed_target_names,
                fetch_names=[target.name for target in info.fetch_targets],
                op_types=self._op_types,
                directory=folder,
                order=self._order,
                check=lambda graph: self._check(graph, iteration),
            )
        finally:
            free(scope)

    def score(self, model: InferenceModel, iteration: int, stops: bool) -> tuple[float, Optional[float]]:
        """Score a model.

        Args:
            model: the INT8 model.
            iteration: the last iteration, for messages.
            stops: whether the mAP may stop the training, so that it is measured.

        Returns:
            The agreement in [0, 1], and the mAP or None.

        Raises:
            Diverged: boxes of the model are not finite.
        """
        assert self._scorer is not None
        try:
            return self._scorer.agreement(model), self._scorer.map(model) if stops else None
        except NotFinite as error:
            raise Diverged(f"{_name(iteration)}: {error}; {LOWER_RATE}") from error

    def _check(self, graph: StaticGraph, iteration: int) -> None:
        if self._scorer is not None and self._survives_nan is None:  # the same for all models of a training
            self._survives_nan = self._scorer.survives_nan(graph)
        if not self._survives_nan:
            finite_checks.check_outputs(graph, self._probe, _name(iteration), LOWER_RATE)


def _name(iteration: int) -> str:
    if not iteration:
        return "the INT8 model before the first iteration"
    return f"the INT8 model after iteration {iteration}"
