"""The probe of a version's INT8 model in a worker: the share of its activations beyond their calibrated ranges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union

import numpy as np

from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.engines import inspect_artifact, machine
from act_pipeline.engines.onnx_runtimes.range_probe import RangeProbe, probe_runtime, write_model_probe
from act_pipeline.server.items import Item, Refused, Shares
from act_pipeline.server.model import recorded_reader
from act_pipeline.server.network_inputs import batch_of, prepared_item
from act_pipeline.server.pictures import BadPicture
from act_pipeline.server.settings import Limits


@dataclass(frozen=True)
class ProbedModel:
    """What a worker needs to load and feed the probe of a model.

    Attributes:
        artifact: the ONNX file.
        runtime: ``onnxruntime`` or ``openvino``.
        tensors: names of the tensors, in the order of the shares.
        input_size: height and width of the network's input, pixels.
        steps: the preprocessing of pictures.
        constants: inputs that are the same for every image, name -> [1, ...].
    """

    artifact: Path
    runtime: str
    tensors: tuple[str, ...]
    input_size: tuple[int, int]
    steps: Sequence[dict[str, Any]]
    constants: Mapping[str, np.ndarray] = field(default_factory=dict)

    def load(self, threads: int, max_batch: int, limits: Limits) -> LoadedProbe:
        """Load it into this process.

        Raises:
            UserError: the runtime refuses it.
        """
        return LoadedProbe(self, limits)


def probed_model(folder: str | Path) -> ProbedModel:
    """Write the probe of a model, and read its preprocessing; imports Paddle where needed.

    Args:
        folder: the folder of an INT8 model.

    Raises:
        UserError: it is no INT8 model, nothing here can run its probe, or its preprocessing is not recorded.
    """
    from act_pipeline.bundle.description import device_steps
    from act_pipeline.data.model_fit import constant_inputs

    model = InferenceModel.load(folder)
    summary = inspect_artifact(model)
    if not summary.quantized:
        raise UserError("the version is no INT8 model")
    runtime = probe_runtime(machine())
    if runtime is None:
        raise UserError("neither ONNX Runtime nor OpenVINO is here")
    reader = recorded_reader(model)
    if summary.input_size is not None and tuple(reader.input_size) != tuple(summary.input_size):
        reader = reader.with_input_size(*summary.input_size)
    path, tensors = write_model_probe(model)
    size = int(reader.input_size[0]), int(reader.input_size[1])
    return ProbedModel(path, runtime, tensors, size, device_steps(reader), constant_inputs(model))


class LoadedProbe:
    """A probe in its runtime; one thread may call :meth:`run`."""

    def __init__(self, model: ProbedModel, limits: Limits) -> None:
        """Load the probe; see :meth:`ProbedModel.load`."""
        self._model, self._limits = model, limits
        # Nobody waits for it, and a process of low priority is often held up: the other threads would spin meanwhile.
        self._probe = RangeProbe(model.artifact, model.runtime, threads=1)

    def warm(self) -> None:
        """Do nothing: images are run one by one."""

    def run(self, items: Sequence[Item]) -> list[Union[Shares, Refused]]:
        """Return the shares of each image."""
        return [self._one(item) for item in items]

    def close(self) -> None:
        """Free the probe."""
        del self._probe

    def _one(self, item: Item) -> Union[Shares, Refused]:
        try:
            sample = prepared_item(self._model, item, self._limits)
            return Shares(self._probe.run(batch_of(self._model, [sample])))
        except BadPicture as error:
            return Refused(str(error))
        except UserError as error:
            return Refused(str(error), by_client=False)
