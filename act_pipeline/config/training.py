"""``TrainConfig`` of a compression config, in which PaddleSlim's ACT names Paddle's optimizers, schedules and clips.

These classes and their arguments are checked against Paddle's signatures when the config is read, so that an error is
found before the calibration and not when the training starts.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Optional, Union

from act_pipeline.config.schema import Invalid, key
from act_pipeline.core.errors import suggest

_COSINE, _PERIOD = "CosineAnnealingDecay", "T_max"
_logger = logging.getLogger(__name__)


def with_period(content: Mapping[str, Any], in_file: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a config whose cosine schedule has a ``T_max``: ``train_iter``, where the file leaves it out.

    A rate that reaches 0 with the last iteration is what a training needs; ``T_max`` in a file does not change with
    ``-o TrainConfig.train_iter``, hence the warning.

    Args:
        content: the config with its overrides.
        in_file: the config without them.
        where: the file, for the warning.
    """
    train, before = content.get("TrainConfig"), in_file.get("TrainConfig")
    rate = train.get("learning_rate") if isinstance(train, dict) else None
    if not isinstance(train, dict) or not isinstance(rate, dict) or rate.get("type") != _COSINE:
        return dict(content)
    iterations, period = train.get("train_iter"), rate.get(_PERIOD)
    if period is None and type(iterations) is int:
        return {**content, "TrainConfig": {**train, "learning_rate": {**rate, _PERIOD: iterations}}}
    if isinstance(before, dict) and period == before.get("train_iter") != iterations and period is not None:
        _logger.warning(
            "%s: TrainConfig.learning_rate.T_max is %s, as train_iter in the file, but train_iter is set to %s, so the "
            "learning rate does not fall to 0 with the last iteration; set T_max to it too, or leave T_max out",
            where, period, iterations,
        )  # fmt: skip
    return dict(content)


@dataclass(frozen=True)
class PaddleClass:
    """A class of Paddle and its arguments.

    Attributes:
        type: name of the class.
        arguments: the other keys of the section: keyword arguments of the class.
    """

    type: str
    arguments: dict[str, Any] = key(factory=dict, rest=True)

    def check(self, module: str, refused: Iterable[str], supplied: Iterable[str] = ()) -> Any:
        """Check that the class exists and takes the arguments.

        Args:
            module: the module in which ACT looks up the class.
            refused: names of classes in it that ACT cannot use.
            supplied: names of the arguments that ACT passes itself.

        Returns:
            The class.

        Raises:
            Invalid: the class does not exist, or an argument is unknown, missing or one of ``supplied``.
        """
        namespace = importlib.import_module(module)
        names = [
            name
            for name in dir(namespace)
            if inspect.isclass(getattr(namespace, name)) and not name.startswith("_") and name not in refused
        ]
        if self.type not in names:
            raise Invalid("type", f"is the text '{self.type}', expected a class of {module}{suggest(self.type, names)}")
        found = getattr(namespace, self.type)
        parameters = dict(list(inspect.signature(found.__init__).parameters.items())[1:])
        for name in self.arguments:
            if name in supplied:
                raise Invalid(name, f"is given to {self.type} by the keys around it; take it out here")
            if name not in parameters:
                known = [parameter for parameter in parameters if parameter not in supplied]
                raise Invalid(
                    name,
                    f"is not an argument of {module}.{self.type}, expected one of {', '.join(known)}"
                    f"{suggest(name, known)}",
                )
        for name in supplied:
            if name not in parameters:
                raise Invalid("type", f"is '{self.type}', which takes no {name}; choose SGD, Momentum or AdamW")
        for name, parameter in parameters.items():
            if parameter.default is parameter.empty and name not in self.arguments and name not in supplied:
                raise Invalid(name, f"is missing, expected the argument of {module}.{self.type}; add it")
        return found

    def check_by_making(self, module: str, refused: Iterable[str] = ()) -> None:
        """Check that the class can be constructed with the arguments, by constructing it.

        Args:
            module: the module in which ACT looks up the class.
            refused: names of classes in it that ACT cannot use.

        Raises:
            Invalid: as :meth:`check`, or the constructor fails.
        """
        found = self.check(module, refused)
        try:
            found(**copy.deepcopy(self.arguments))
        except Exception as error:  # Paddle's classes compute with their arguments before they check the types
            reason = " ".join(str(error).split()) or type(error).__name__
            raise Invalid("", f"is refused by {module}.{self.type}: {reason}; correct its arguments") from None


@dataclass(frozen=True)
class LearningRate(PaddleClass):
    """A schedule of ``paddle.optimizer.lr`` that needs neither a function nor a metric."""

    def __post_init__(self) -> None:
        self.check_by_making(
            "paddle.optimizer.lr",
            refused=("LRScheduler", "LambdaDecay", "MultiplicativeDecay", "ReduceOnPlateau", "Tensor", "Variable"),
        )


@dataclass(frozen=True)
class Optimizer(PaddleClass):
    """An optimizer of ``paddle.optimizer`` that works in a static graph."""

    def __post_init__(self) -> None:
        self.check("paddle.optimizer", ("Optimizer", "LBFGS"), ("learning_rate", "grad_clip", "weight_decay"))


@dataclass(frozen=True)
class Regularizer(PaddleClass):
    """A class of ``paddle.regularizer``."""

    def __post_init__(self) -> None:
        self.check_by_making("paddle.regularizer", refused=("WeightDecayRegularizer",))


@dataclass(frozen=True)
class GradClip(PaddleClass):
    """``ClipGradByValue``, ``ClipGradByNorm`` or ``ClipGradByGlobalNorm`` of ``paddle.nn``."""

    def __post_init__(self) -> None:
        if not self.type.startswith("ClipGrad"):
            known = ("ClipGradByGlobalNorm", "ClipGradByNorm", "ClipGradByValue")
            hint = suggest(self.type, known)
            raise Invalid("type", f"is the text '{self.type}', expected one of {', '.join(known)}{hint}")
        self.check_by_making("paddle.nn")


@dataclass(frozen=True)
class OptimizerBuilder:
    """The optimizer and its regularization.

    Attributes:
        optimizer: the optimizer's class.
        weight_decay: L2 factor, at least 0; it excludes ``regularizer``. AdamW needs it.
        regularizer: the regularizer's class.
        grad_clip: the class of the gradient clipping; None: no clipping.
    """

    optimizer: Optimizer
    weight_decay: Optional[float] = key(None, at_least=0)
    regularizer: Optional[Regularizer] = None
    grad_clip: Optional[GradClip] = None

    def __post_init__(self) -> None:
        if self.weight_decay is not None and self.regularizer is not None:
            raise Invalid("weight_decay", "is given together with 'regularizer', which ACT uses instead; delete one")
        if self.optimizer.type == "AdamW" and self.weight_decay is None:
            raise Invalid("weight_decay", "is missing, expected a number: AdamW needs it; add it")


@dataclass(frozen=True)
class TrainConfig:
    """ACT's ``TrainConfig``.

    Attributes:
        epochs: epochs of training; required if ``train_iter`` is not given.
        train_iter: iterations of training; required if ``epochs`` is not given.
        learning_rate: a number or a schedule. ``T_max`` of ``CosineAnnealingDecay`` is ``train_iter`` if left out.
        optimizer_builder: the optimizer and its regularization.
        eval_iter: iterations between evaluations.
        snapshot_iter: iterations between training checkpoints (PaddleDetection's ``snapshot_epoch``, in iterations);
            None: only a new best writes one. A new best always writes one. ACT does not have this key.
        patience: evaluations in a row without a new best, after which the training ends; None: no limit. ACT does not
            have this key.
        logging_iter: iterations between lines of the log.
        origin_metric: the expected mAP of the float model; a run whose float model differs by more than 0.05 is
            refused. If it is set, training stops early at an mAP within 0.5% of the float model's measured mAP.
        target_metric: mAP at which training stops early.
        amp_config, recompute_config, sharding_config, sparse_model: keys of ACT's schema; ``recompute_config`` and
            ``sharding_config`` have to be empty, since they need Paddle's fleet.
    """

    epochs: Optional[int] = key(None, at_least=1)
    train_iter: Optional[int] = key(None, at_least=1)
    learning_rate: Union[float, LearningRate] = key(0.02, above=0)
    optimizer_builder: OptimizerBuilder = key(factory=lambda: OptimizerBuilder(Optimizer("SGD")))
    eval_iter: int = key(1000, at_least=1)
    snapshot_iter: Optional[int] = key(100, at_least=1)
    patience: Optional[int] = key(5, at_least=1)
    logging_iter: Optional[int] = key(10, at_least=1)
    origin_metric: Optional[float] = key(None, at_least=0, at_most=1)
    target_metric: Optional[float] = key(None, at_least=0, at_most=1)
    amp_config: Optional[dict[str, Any]] = None
    recompute_config: Optional[dict[str, Any]] = None
    sharding_config: Optional[dict[str, Any]] = None
    sparse_model: bool = False

    def __post_init__(self) -> None:
        if self.epochs is None and self.train_iter is None:
            raise Invalid("train_iter", "is missing, and so is 'epochs', expected one of them; add train_iter: 500")
        for name in ("recompute_config", "sharding_config"):
            if getattr(self, name):
                raise Invalid(
                    name, "is for Paddle's fleet, which trainings here do without, expected nothing; remove it"
                )
