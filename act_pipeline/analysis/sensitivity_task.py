"""What is to be measured: a task, and the units into which its work is cut."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Optional

import numpy as np

from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.data.reader_settings import ReaderSettings
from act_pipeline.families.registry import Decoder
from act_pipeline.graph.quantizable_ops import QuantizableOp

# Changes when figures measured before are not comparable any more.
_VERSION = 1
Unit = tuple[str, int]
# Batch index of a unit that measures mAP on the subset.
MAP = -1


@dataclass(frozen=True)
class Subset:
    """Images with ground truth on which mAP is measured.

    Attributes:
        reader: the reader's settings, fitted to the model.
        data_hash: hash of its eval split.
        images: number of images, the first ones of the eval split.
        sources: the model's input name -> the reader's name.
    """

    reader: ReaderSettings
    data_hash: str
    images: int
    sources: Mapping[str, str]


@dataclass(frozen=True)
class Task:
    """The data that a worker needs to measure sensitivities, in any process.

    Attributes:
        key: hash of what is measured; measurements with the same key are comparable.
        program: serialized program of the prepared float model.
        params: serialized parameters of this model.
        ops: the ops to be measured.
        thresholds: activation name -> threshold, for all activations of ``ops``.
        batches: dicts of the model's inputs.
        device: ``CPU`` or ``GPU``.
        subset: images on which the mAP of each op is measured; None to not measure mAP.
        decoder: turns the outputs into detections; None: the first two outputs are ``bbox`` and ``bbox_num``.
    """

    key: str
    program: bytes = field(repr=False)
    params: bytes = field(repr=False)
    ops: tuple[QuantizableOp, ...] = field(repr=False)
    thresholds: Mapping[str, float] = field(repr=False)
    batches: tuple[Mapping[str, np.ndarray], ...] = field(repr=False)
    device: str = "CPU"
    subset: Optional[Subset] = None
    decoder: Optional[Decoder] = None

    @classmethod
    def of(
        cls,
        model: InferenceModel,
        ops: Sequence[QuantizableOp],
        thresholds: Mapping[str, float],
        batches: Sequence[Mapping[str, np.ndarray]],
        *,
        device: str = "CPU",
        subset: Subset | None = None,
        source_hash: str | None = None,
        decoder: Decoder | None = None,
    ) -> Task:
        """Return the task of measuring ``ops`` on ``batches``.

        Args:
            model: the prepared float model.
            ops, thresholds, batches, device, subset, decoder: see :class:`Task`.
            source_hash: content hash of the model that ``model`` was prepared from, used in the key; None for the hash
                of ``model``.
        """
        used = {name: float(thresholds[name]) for op in ops for name in op.activations}
        content = (_VERSION, (source_hash or model.content_hash()) + (decoder.key if decoder else ""), device)
        return cls(
            _key(content, ops, used, batches, subset),
            program=model.model_path.read_bytes(),
            params=model.params_path.read_bytes(),
            ops=tuple(ops),
            thresholds=used,
            batches=tuple(batches),
            device=device,
            subset=subset,
            decoder=decoder,
        )

    @property
    def units(self) -> list[Unit]:
        """The units (op, batch), ordered by batch so that each is prepared once; batch :data:`MAP` measures mAP."""
        batches = [*range(len(self.batches)), *([MAP] if self.subset else [])]
        return [(op.name, batch) for batch in batches for op in self.ops]

    @property
    def images(self) -> int:
        """The number of images in all batches."""
        return sum(len(next(iter(batch.values()))) for batch in self.batches)


def _key(
    content: tuple[int, str, str],
    ops: Sequence[QuantizableOp],
    thresholds: Mapping[str, float],
    batches: Sequence[Mapping[str, np.ndarray]],
    subset: Subset | None,
) -> str:
    """Return the hash of what is measured; ``content``: version of the figures, hash of the model, device."""
    digest = hashlib.sha256()
    digest.update(repr(content).encode())
    digest.update(repr(sorted(thresholds.items())).encode())
    digest.update(repr(subset and (subset.data_hash, subset.images)).encode())
    digest.update(repr([asdict(op) for op in ops]).encode())
    for batch in batches:
        for name in sorted(batch):
            digest.update(repr((name, batch[name].shape)).encode())
            digest.update(np.ascontiguousarray(batch[name]).data)
    return f"sha256:{digest.hexdigest()}"
