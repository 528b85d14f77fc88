"""Run calibration images through a float graph once and feed the values of its tensors to observers."""

from __future__ import annotations

import contextlib
import tempfile
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from act_pipeline.calibration.observers import NotFiniteError, Observer
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.engines.tensor_runners import create_tensor_runner
from act_pipeline.graph.static_graph import StaticGraph, static_mode


def quantizable_tensors(graph: StaticGraph, op_types: Collection[str]) -> dict[str, str]:
    """Return the activations that the ops of ``op_types`` read.

    These are the tensors that get Q/DQ in quantization-aware training.

    Args:
        graph: a float graph with folded constants.
        op_types: Paddle op types, for example ``conv2d``, ``depthwise_conv2d`` or ``matmul_v2``.

    Returns:
        Tensor name -> the first op that reads it, as ``read by <type> (<output name>)``, in the order of the graph.
    """
    tensors: dict[str, str] = {}
    for op in graph.program.global_block().ops:
        if op.type in op_types:
            for slot in ("Input", "Filter", "X", "Y"):
                for name in op.input(slot) if slot in op.input_names else ():
                    if not graph.is_parameter(name):
                        tensors.setdefault(name, f"read by {op.type} ({op.output_arg_names[0]})")
    return tensors


def collect(
    model: InferenceModel,
    observers: Mapping[str, Sequence[Observer]],
    batches: Iterable[Mapping[str, np.ndarray]],
    device: str = "CPU",
    ops: Mapping[str, str] | None = None,
    where: str = "",
) -> int:
    """Run batches through a float model and feed its tensors to observers.

    If the first dimension of a tensor is open (-1) in the program, its values are split into the images of the batch,
    one after another along that axis (``[N * heads, ...]`` too). For every other tensor a batch counts as one image. On
    a CPU with OpenVINO the images are run one by one.

    Args:
        model: the float model.
        observers: tensor name -> its observers.
        batches: input name -> array with the images along the first axis; names that are no inputs are ignored.
        device: ``CPU`` or ``GPU``.
        ops: tensor name -> description of the op that reads or writes it, for error messages.
        where: path of the model in error messages; empty: the folder of ``model``.

    Returns:
        The number of images that were run.

    Raises:
        UserError: an observer found NaN or an infinite value in a tensor (the message names its op), memory does not
            suffice, or the runtime cannot run the model.
    """
    names = list(observers)
    images = 0
    with static_mode(), tempfile.TemporaryDirectory(prefix="act_pipeline_") as folder:
        with contextlib.closing(StaticGraph.load(model)) as graph:
            batched = [_is_batched(graph.program.global_block().var(name).shape) for name in names]
            exposed = expose(graph, names, Path(folder))
        with contextlib.closing(create_tensor_runner(exposed, device)) as runner:
            sizes: deque[int] = deque()
            for tensors in runner.run(_sized(batches, runner.single, sizes)):
                count = sizes.popleft()
                for name, by_image, values in zip(names, batched, tensors):
                    parts = count if by_image and values.shape[0] % count == 0 else 1
                    for observer in observers[name]:
                        try:
                            observer.update(values, parts)
                        except NotFiniteError as error:
                            op = (ops or {}).get(name)
                            raise UserError(
                                f"{where or model.directory}: tensor {name}{f', {op},' if op else ''} holds {error} on "
                                f"{_images_in_words(images, count)}; the weights or the images are damaged: "
                                "evaluate the float model, and export it again"
                            ) from None
                images += count
    return images


def _sized(
    batches: Iterable[Mapping[str, np.ndarray]], single: bool, sizes: deque[int]
) -> Iterator[Mapping[str, np.ndarray]]:
    """Yield the batches, image by image if ``single``, and append the number of images of each to ``sizes``."""
    for batch in batches:
        count = len(next(iter(batch.values())))
        for start in range(0, count, 1 if single else count):
            part = {name: array[start : start + 1] for name, array in batch.items()} if single else batch
            sizes.append(1 if single else count)
            yield part


def _images_in_words(before: int, count: int) -> str:
    if count == 1:
        return f"calibration image {before + 1}"
    return f"calibration images {before + 1} to {before + count}"


def expose(graph: StaticGraph, names: Sequence[str], directory: Path) -> InferenceModel:
    """Write a model whose outputs are the given tensors of a graph.

    Args:
        graph: the float graph; it is changed.
        names: the tensors, in the order of the new model's outputs. Inputs that they do not depend on are removed.
        directory: an existing folder for the new model.

    Returns:
        The model as written.
    """
    block = graph.program.global_block()
    needed = set(names)
    for op in reversed(block.ops):
        if needed.intersection(op.output_arg_names):
            needed.update(op.input_arg_names)
    graph.unwrap_outputs()
    graph.feed_names = [name for name in graph.feed_names if name in needed]
    targets = [block.var(name) for name in names]
    if not any(graph.is_parameter(name) for name in needed):
        # Inputs alone: Paddle neither writes nor loads a model without parameters, so one is multiplied by 1.
        one = graph.add_parameter("expose@one", np.ones(1, np.float32))
        plain, targets[0] = targets[0], block.create_var(name="expose@input", dtype="float32", shape=targets[0].shape)
        block.append_op(type="elementwise_mul", inputs={"X": plain, "Y": one}, outputs={"Out": targets[0]})
    graph.fetch_targets = targets
    return graph.save(directory)


def _is_batched(shape: Sequence[int]) -> bool:
    return bool(shape) and shape[0] == -1
