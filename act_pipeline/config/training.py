"""``TrainConfig`` of a compression config: PaddleSlim's ACT names Paddle's own optimizers, schedules and clips in it.

These classes are checked when the config is read, by their signatures in Paddle, so that a misspelt argument is found
before the first hour and not after it.
"""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Optional, Union

from act_pipeline.config.schema import Invalid, key
from act_pipeline.core.errors import suggest


@dataclass(frozen=True)
class PaddleClass:
    """A class of Paddle by its name (``type``) and the arguments that stand beside it."""

    type: str
    arguments: dict[str, Any] = key(factory=dict, rest=True)

    def check(self, module: str, refused: Iterable[str], supplied: Iterable[str] = ()) -> Any:
        """Return the class, having checked that it exists and takes the arguments.

        Args:
            module: where ACT looks the class up.
            refused: names there that ACT cannot use.
            supplied: arguments that ACT itself gives.

        Raises:
            Invalid: it does not.
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
        """Check that the class can be made of these arguments, by making one."""
        found = self.check(module, refused)
        try:
            found(**copy.deepcopy(self.arguments))
        except Exception as error:  # Paddle's classes compute with their arguments before they look at them
            reason = " ".join(str(error).split()) or type(error).__name__
            raise Invalid("", f"is refused by {module}.{self.type}: {reason}; correct its arguments") from None


@dataclass(frozen=True)
class LearningRate(PaddleClass):
    """A schedule of ``paddle.optimizer.lr`` that needs no function and no metric."""

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
    """How the optimizer is made: its class, and one of ``weight_decay`` (L2) and ``regularizer``."""

    optimizer: Optimizer
    weight_decay: Optional[float] = key(None, at_least=0)
    regularizer: Optional[Regularizer] = None
    grad_clip: Optional[GradClip] = None

    def __post_init__(self) -> None:
        if self.weight_decay is not None and self.regularizer is not None:
            raise Invalid("weight_decay", "is given beside 'regularizer', which ACT would use alone; delete one")
        if self.optimizer.type == "AdamW" and self.weight_decay is None:
            raise Invalid("weight_decay", "is missing, expected a number: AdamW needs it; add it")


@dataclass(frozen=True)
class TrainConfig:
    """ACT's ``TrainConfig``.

    Attributes:
        train_iter: iterations of training; or give ``epochs``.
        eval_iter: iterations between evaluations.
        snapshot_iter: iterations between checkpoints (PaddleDetection's ``snapshot_epoch``, in ACT's unit); each new
            best is one as well; None: no others. ACT does not know this key.
        patience: evaluations in a row without a new best, after which the training ends; None: it goes on. ACT does not
            know this key.
        logging_iter: iterations between lines of the log.
        learning_rate: a number or a schedule.
        origin_metric: mAP the float model must have, within 0.05, before training starts.
        target_metric: mAP at which training stops early.
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
