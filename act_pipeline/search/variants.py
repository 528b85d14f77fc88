"""The variants of an exported model that need no training, and their exports."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.defaults import find_shipped
from act_pipeline.core.errors import UserError
from act_pipeline.core.hashing import hash_files
from act_pipeline.core.records import read_record
from act_pipeline.core.yaml_files import apply_overrides, load_yaml
from act_pipeline.data import Reader
from act_pipeline.export import EXPORT_SCHEMA, RECORD_FILENAME, export_model
from act_pipeline.rtdetr.build import weights_path

_TRANSFORMER = "RTDETRTransformer"
# Defaults of PaddleDetection's classes, for keys that a model config does not set.
_LAYERS, _QUERIES, _TOP_QUERIES, _CLASSES = 6, 300, 100, 80
_QUERY_STEP = 10


@dataclass(frozen=True)
class Variant:
    """A variant of the model.

    Attributes:
        layers: decoder layers that are computed; None: the model has none to leave out.
        queries: queries that the decoder computes; None: as ``layers``.
        size: height and width of the input in pixels.
        bf16: whether its INT8 model computes in bf16 what is not INT8 (OpenVINO).
    """

    layers: Optional[int]
    queries: Optional[int]
    size: tuple[int, int]
    bf16: bool = False

    @property
    def name(self) -> str:
        """Name of its folder."""
        parts = [] if self.layers is None else [f"layers{self.layers}", f"queries{self.queries}"]
        return "_".join([*parts, f"{self.size[0]}x{self.size[1]}", *(["bf16"] if self.bf16 else [])])

    @property
    def words(self) -> str:
        """What it is, for a message."""
        size, rest = f"{self.size[0]} x {self.size[1]}", ", the rest in bf16" if self.bf16 else ""
        if self.layers is None:
            return f"{size}{rest}"
        return f"{size}, {self.layers} decoder layer{'' if self.layers == 1 else 's'}, {self.queries} queries{rest}"

    def is_cut_of(self, other: Variant) -> bool:
        """Return whether it is another variant with fewer decoder layers or queries, at the same input size."""
        if self == other or self.size != other.size:
            return False
        return (self.layers or 0) <= (other.layers or 0) and (self.queries or 0) <= (other.queries or 0)

    def overrides(self) -> list[str]:
        """Return the ``key=value`` for the model config."""
        height, width = self.size
        found = [f"TestReader.inputs_def.image_shape=[3, {height}, {width}]", f"eval_size=[{height}, {width}]"]
        if self.layers is not None:
            found += [f"{_TRANSFORMER}.eval_idx={self.layers - 1}", f"{_TRANSFORMER}.num_queries={self.queries}"]
        return found

    def reader_overrides(self, reader: Reader) -> list[str]:
        """Return the ``key=value`` for the reader's file that resize to this size.

        Raises:
            UserError: the reader has no Resize.
        """
        if tuple(reader.input_size) == self.size:
            return []
        name = reader.settings.reader_name
        for place, step in enumerate(reader.settings.reader.sample_transforms):
            if "Resize" in step:
                return [f"{name}.sample_transforms.{place}.Resize.target_size=[{self.size[0]}, {self.size[1]}]"]
        raise UserError(
            f"{reader.path}: {name}.sample_transforms have no Resize, expected one to try other input sizes"
        )


@dataclass(frozen=True)
class Source:
    """What a model was exported from.

    Attributes:
        config: the model config.
        overrides: those of the export.
        full: the model as it is.
        top_queries, classes: the post-process selects so many of (queries x classes).
        label_list: the class names; None: an earlier version wrote none.
    """

    config: str
    overrides: tuple[str, ...]
    full: Variant
    top_queries: int
    classes: int
    label_list: Optional[tuple[str, ...]] = None

    @classmethod
    def of(cls, model: InferenceModel) -> Source:
        """Read the record of an export.

        Raises:
            UserError: ``tools/export_model.py`` did not make the model, or its weights are missing or others now.
        """
        path = model.directory / RECORD_FILENAME
        if not path.exists():
            raise UserError(
                f"{model.directory} has no {RECORD_FILENAME}, expected a model of tools/export_model.py, whose "
                "variants are exported again from its weights; an imported model has none. Export the RT-DETR or "
                "PP-YOLOE, and give that folder as Global.model_dir"
            )
        record = read_record(path, EXPORT_SCHEMA)
        config, overrides = str(record.get("config")), tuple(record.get("overrides") or ())
        content = apply_overrides(load_yaml(find_shipped(config)), overrides)
        weights = weights_path(str(content.get("weights")))
        if not Path(weights).exists() or hash_files([weights]) != record.get("source_hash"):
            raise UserError(
                f"{path}: the model was exported from {weights}, which is missing or has changed since; export it "
                "again with tools/export_model.py"
            )
        size = (int(record["input_size"][0]), int(record["input_size"][1]))
        layers = queries = None
        transformer = _section(content, _TRANSFORMER)
        if _TRANSFORMER in content:
            count = int(transformer.get("num_decoder_layers", _LAYERS))
            last = int(transformer.get("eval_idx", -1))
            layers = 1 + (last if last >= 0 else count + last)
            queries = int(transformer.get("num_queries", _QUERIES))
        top = int(_section(content, "DETRPostProcess").get("num_top_queries", _TOP_QUERIES))
        names = record.get("label_list")
        return cls(
            config, overrides, Variant(layers, queries, size), top, int(content.get("num_classes", _CLASSES)),
            None if names is None else tuple(map(str, names)),
        )  # fmt: skip

    def variants(
        self,
        layers: Sequence[int] | None = None,
        queries: Sequence[int] | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> list[Variant]:
        """Return the variants to try, the model as it is first.

        Args:
            layers: numbers of decoder layers; None: from all of them to half of them.
            queries: numbers of queries; None: all, two thirds and one third of them.
            sizes: height and width in pixels; None: the one that the model was exported for.

        Raises:
            UserError: a number is more than the model has, or too small for its post-process.
        """
        full = self.full
        if full.layers is None or full.queries is None:
            for flag, given in (("layers", layers), ("queries", queries)):
                if given:
                    raise UserError(
                        f"--{flag} is for RT-DETR, {self.config} is another model; leave it out: --sizes only"
                    )
            options: list[Variant] = [Variant(None, None, size) for size in sizes or (full.size,)]
        else:
            least = -(-self.top_queries // self.classes)
            _check("layers", layers, 1, full.layers)
            _check("queries", queries, least, full.queries)
            layers = layers or range(full.layers, (full.layers - 1) // 2, -1)
            thirds = [round(full.queries * part / 3 / _QUERY_STEP) * _QUERY_STEP for part in (2, 1)]
            queries = queries or [full.queries, *(count for count in thirds if least <= count < full.queries)]
            options = [Variant(*found) for found in itertools.product(layers, queries, sizes or (full.size,))]
        found = list(dict.fromkeys([full, *options]))
        if len(found) == 1:
            raise UserError(
                "there is nothing to search: give other --sizes, --layers or --queries than the model's own"
            )
        return found

    def export(self, variant: Variant, folder: Path) -> InferenceModel:
        """Export a variant into a folder below ``folder``, unless it is there already."""
        overrides = [*self.overrides, *variant.overrides()]
        return export_model(self.config, folder / variant.name, overrides, reuse=True, label_list=self.label_list)


def _check(flag: str, numbers: Sequence[int] | None, least: int, most: int) -> None:
    for number in numbers or ():
        if not least <= number <= most:
            raise UserError(f"--{flag}={number}, expected a number from {least} to {most}, which the model has")


def _section(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return content.get(name) or {}
