"""INT8 models in Paddle Inference as they stand, by oneDNN: every Q/DQ rounds, and nothing is slower than it must be.

Paddle's own CPU kernels spend most of an INT8 model's time in float convolutions without oneDNN and in rounding one
element at a time. Here the same program runs with three changes that leave its arithmetic as it is, but for the order
in which floats are added:

- weights are dequantized once, when the model is loaded, by Paddle's own ``dequantize_linear``;
- ``quantize_linear`` and ``dequantize_linear`` of an activation become oneDNN's ``quantize`` and ``dequantize``
  (``x * 127 / scale``, rounded to the nearest with ties to even, saturated to -128..127; and back);
- all else runs in oneDNN's float kernels.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from act_pipeline.engines.base import available_cpus
from act_pipeline.engines.model_files import ModelSummary, inspect_model
from act_pipeline.engines.paddle_native import Predictor
from act_pipeline.model import InferenceModel
from act_pipeline.records import versions as package_versions

_LARGEST = 127
_ROUNDING_OPS = ("quantize_linear", "dequantize_linear")


class PaddleSimulatedEngine:
    """An INT8 model with every Q/DQ computed, as an :class:`act_pipeline.engines.base.Engine`; CPU only.

    It stands for the engine ``paddle``, of which it is the quick form: single scores differ where a sum falls on
    another side of a rounding boundary, and mAP by what such noise makes.
    """

    def __init__(
        self,
        model: InferenceModel,
        precision: str = "int8",
        device: str = "CPU",
        threads: int | None = None,
        batch_size: int | None = None,
        summary: ModelSummary | None = None,
        inference: Any = None,
    ) -> None:
        """Load the model; some seconds go into writing its program anew, to a temporary folder.

        Args:
            model: with Q/DQ ops.
            precision: ``int8``.
            device: ``CPU``.
            threads: CPU threads; None: all that this process may use.
            batch_size: the largest batch; None: any.
            summary: of ``model``, if it is at hand.
            inference: a stand-in for ``paddle.inference``.

        Raises:
            UserError: the files are damaged, or Paddle refuses them.
        """
        self.name = "paddle_simulated"
        self.precision, self.device = precision, device
        self.threads = available_cpus() if threads is None else threads
        self.artifact = model

        def configure(config: Any, _: Any) -> None:
            config.set_cpu_math_library_num_threads(self.threads)
            config.enable_mkldnn()

        with tempfile.TemporaryDirectory(prefix="act_pipeline_simulated_") as folder:
            rewritten = with_onednn_rounding(model, Path(folder))
            self._predictor = Predictor(
                rewritten, configure, inspect_model(rewritten), inference, "; --engine=paddle runs it", batch_size
            )

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See :meth:`act_pipeline.engines.base.Engine.run`."""
        return self._predictor.run(inputs)

    def close(self) -> None:
        """Free the predictor and its weights."""
        self._predictor.close()

    def versions(self) -> dict[str, str]:
        """Return the versions of Paddle and its companions."""
        return package_versions()


def with_onednn_rounding(model: InferenceModel, directory: Path) -> InferenceModel:
    """Write an INT8 model with float weights (rounded) and oneDNN's ops for the rounding of activations.

    Activations that are rounded per channel, or to other than 8 bits, keep Paddle's ops; ACT makes none of RT-DETR's.

    Args:
        model: with Q/DQ ops, as `act_pipeline.compress` and PaddleSlim's ACT (``onnx_format: true``) write them.
        directory: an existing folder.

    Raises:
        UserError: the files are damaged.
    """
    # static_graph knows engines.model_files, and is not needed by who runs other engines.
    from act_pipeline.static_graph import StaticGraph, fold_constants, static_mode

    with static_mode():
        graph = StaticGraph.load(model)
        fold_constants(graph)
        graph.unwrap_outputs()
        block = graph.program.global_block()
        scales: dict[str, float] = {}
        for index, op in enumerate(block.ops):
            if op.type == "quantize_linear" and _by_tensor(graph, op):
                scales[op.output("Y")[0]] = _factor(graph, op)
        readers = {name for op in block.ops if op.type != "dequantize_linear" for name in op.input_arg_names}
        pairs = [op for op in block.ops if op.type == "dequantize_linear" and op.input("X")[0] in scales]
        whole = {
            op.input("X")[0]
            for op in pairs
            if _by_tensor(graph, op) and _factor(graph, op) == scales[op.input("X")[0]] and op.input("X")[0] not in readers
        }
        for op in [op for op in block.ops if op.type in _ROUNDING_OPS]:
            quantizes = op.type == "quantize_linear"
            source, result = op.input("X")[0], op.output("Y")[0]
            integers = result if quantizes else source
            if integers not in whole:
                continue
            index = block.ops.index(op)
            block._remove_op(index, sync=False)
            attributes = {"Scale": scales[integers], "use_mkldnn": True, "mkldnn_data_type": "float32"}
            if quantizes:
                attributes.update(is_negative_input=True, output_format="NCHW")
            block._insert_op_without_sync(
                index,
                type="quantize" if quantizes else "dequantize",
                inputs={"Input": [source]},
                outputs={"Output": [result]},
                attrs=attributes,
            )
        graph.remove_unused_parameters()
        return graph.save(directory)


def _by_tensor(graph: Any, op: Any) -> bool:
    return op.attr("bit_length") == 8 and graph.is_parameter(op.input("Scale")[0]) and (
        graph.parameter(op.input("Scale")[0]).size == 1
    )


def _factor(graph: Any, op: Any) -> float:
    return _LARGEST / float(graph.parameter(op.input("Scale")[0]).reshape(-1)[0])
