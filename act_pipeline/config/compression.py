"""The compression config: PaddleSlim's ACT schema, typed and checked before anything runs.

Sections and keys are those of ``paddleslim.auto_compression.strategy_config`` (2.6.0) and of the ``Global`` section of
PaddleSlim's detection example; docstrings state which keys are added here. To add a section, write its dataclass and
add a field of that type to :class:`Config`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Optional

from act_pipeline.config.schema import Invalid, Source, build, key, to_mapping

# `detection`, and the losses of paddleslim.dist that ACT can call with one teacher and one student tensor (`fsp` takes
# four tensors). ACT runs `eval` on this name, so only names listed here may reach it.
from act_pipeline.config.sections import Distillation, Global, QuantAware, Quantize, QuantPost, SmoothQuant, Strategy
from act_pipeline.config.training import TrainConfig, with_period
from act_pipeline.core.defaults import find_shipped
from act_pipeline.core.yaml_files import apply_overrides, load_yaml, parse_override


class TrainingSections(NamedTuple):
    """The sections that say how to train."""

    distillation: Distillation
    quant_aware: QuantAware
    train_config: TrainConfig


@dataclass(frozen=True)
class Config:
    """A compression config.

    Attributes:
        path: the YAML file it was read from.
        global_: section ``Global``.
        strategy: section ``Strategy``; ``auto`` by default.
        quantize: section ``quantize``: the ops to compute in INT8.
        distillation: section ``Distillation``; ``qat_dis`` needs it.
        quant_aware: section ``QuantAware``; ``qat_dis`` needs it.
        train_config: section ``TrainConfig``; ``qat_dis`` needs it.
        quant_post: section ``QuantPost``: how ``ptq`` and ``smooth_quant`` calibrate.
        smooth_quant: section ``SmoothQuant``: how ``smooth_quant`` changes the float model before calibration.
        overrides: ``Section.key=value`` each, set over the file's values.
    """

    path: Path = key(from_yaml=False)
    global_: Global = key(name="Global")
    strategy: Strategy = key(factory=Strategy, name="Strategy")
    quantize: Quantize = key(factory=Quantize)
    distillation: Optional[Distillation] = key(None, name="Distillation")
    quant_aware: Optional[QuantAware] = key(None, name="QuantAware")
    train_config: Optional[TrainConfig] = key(None, name="TrainConfig")
    quant_post: QuantPost = key(factory=QuantPost, name="QuantPost")
    smooth_quant: SmoothQuant = key(factory=SmoothQuant, name="SmoothQuant")
    overrides: tuple[str, ...] = key((), from_yaml=False)

    def __post_init__(self) -> None:
        sections = self._training_sections()
        begun = self.strategy.name == "auto" and any(section is not None for section in sections.values())
        if self.strategy.name == "qat_dis" or begun:
            for name, section in sections.items():
                if section is None:
                    raise Invalid(name, "is missing, expected a mapping of 'key: value' lines; add it")
        if self.strategy.name == "auto" and not self.global_.evaluation:
            raise Invalid(
                "Strategy.name", "is auto, which needs Global.Evaluation: true; name ptq, smooth_quant or qat_dis"
            )
        self._check_limits()
        self._check_search()

    def _check_search(self) -> None:
        if not self.strategy.search:
            return
        if self.global_.evaluation is not True:
            raise Invalid(
                "Strategy.search",
                f"is true, but Global.Evaluation is {str(self.global_.evaluation).lower()}: variants are chosen by "
                "their mAP; expected Global.Evaluation: true, or leave search out",
            )
        if self.strategy.max_drop is None:
            raise Invalid(
                "Strategy.search",
                "is true, but Strategy.max_drop is empty: the search stays within it; set it, or leave search out",
            )

    def _check_limits(self) -> None:
        strategy, evaluation = self.strategy, self.global_.evaluation
        if strategy.min_agreement is not None and not evaluation:
            raise Invalid(
                "Strategy.min_agreement",
                f"is {strategy.min_agreement}, but Global.Evaluation is false: nothing is compared; expected "
                "Global.Evaluation: agreement (no labels needed), or true",
            )
        if strategy.name == "auto" and strategy.min_agreement is None and evaluation == "agreement":
            raise Invalid(
                "Strategy.min_agreement",
                "is missing, expected a number from 0 to 1, 0.9 say: auto stops at a limit, and with "
                "Global.Evaluation: agreement there is no mAP for max_drop; add it",
            )

    @property
    def trains(self) -> bool:
        """Whether the config has all sections that training needs."""
        return all(section is not None for section in self._training_sections().values())

    @property
    def training(self) -> TrainingSections:
        """The sections that say how to train.

        Raises:
            ValueError: the config has none (:attr:`trains`).
        """
        if self.distillation is None or self.quant_aware is None or self.train_config is None:
            raise ValueError(f"{self.strategy.name} has no training")
        return TrainingSections(self.distillation, self.quant_aware, self.train_config)

    @property
    def op_section(self) -> str:
        """The section whose ``quantize_op_types`` apply: ``QuantAware`` for ``qat_dis``, else ``QuantPost``."""
        return "QuantAware" if self.strategy.name == "qat_dis" else "QuantPost"

    @property
    def op_types(self) -> list[str]:
        """The op types to quantize: ``quantize_op_types`` of the section :attr:`op_section`."""
        if self.op_section == "QuantAware":
            return list(self.training.quant_aware.quantize_op_types)
        return list(self.quant_post.quantize_op_types)

    def _training_sections(self) -> dict[str, Any]:
        return {"Distillation": self.distillation, "QuantAware": self.quant_aware, "TrainConfig": self.train_config}

    def to_act(self) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        """Return the arguments of ``paddleslim.auto_compression.AutoCompression``, as new dicts that it may change.

        Returns:
            The strategies, ``{"Distillation": {...}, "QuantAware": {...}}``, and the keys of ``TrainConfig``, both
            without the keys that ACT does not have.

        Raises:
            ValueError: a section that training needs is missing.
        """
        distillation, quant_aware, train = self.training
        strategies = {"Distillation": to_mapping(distillation), "QuantAware": to_mapping(quant_aware)}
        strategies["Distillation"].pop("teacher_cache_mb")
        train_config = to_mapping(train)
        for name in ("snapshot_iter", "patience"):
            train_config.pop(name, None)
        return strategies, train_config

    def as_dict(self) -> dict[str, Any]:
        """Return the whole config including defaults, in JSON types."""
        return {"path": str(self.path), **to_mapping(self)}


def load_config(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Config:
    """Read and check a compression config.

    Args:
        path: a YAML file in ACT's schema; ``configs/...`` of this package too.
        overrides: ``Section.key=value`` each, set over the file's values.

    Raises:
        UserError: the file is not YAML, or a section, key, type or value does not fit the schema.
    """
    path, overrides = find_shipped(path), list(overrides)
    in_file = load_yaml(path)
    content = with_period(apply_overrides(in_file, overrides), in_file, str(path))
    # An empty section counts as present, with its defaults.
    content = {name: {} if value is None else value for name, value in content.items()}
    source = Source(path, tuple(".".join(parse_override(override)[0]) for override in overrides))
    return build(Config, content, source, path=path, overrides=tuple(overrides))
