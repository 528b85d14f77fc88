"""One pass over calibration images through the float graph, feeding observers of its tensors."""

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
    """Return the activations that the ops of ``op_types`` read: what quantization-aware training puts Q/DQ on.

    Args:
        graph: a float graph, its constants folded.
        op_types: ``conv2d``, ``depthwise_conv2d``, ``matmul_v2``, ...

    Returns:
        tensor -> the first op that reads it, as ``read by type (its output)``, in the order of the graph.
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

    A tensor whose first dimension the program leaves open holds the images of a batch one after another, whatever
    stands between (``[N * heads, ...]``); of any other, a batch counts as one image. On a CPU with OpenVINO the images
    are run one by one.

    Args:
        model: the float model.
        observers: tensor -> who observes it.
        batches: the model's inputs by name; others are let be.
        device: ``CPU`` or ``GPU``.
        ops: tensor -> the op that reads or gives it, in words for messages.
        where: the model that the user knows, for messages; empty: ``model``.

    Returns:
        how many images were run.

    Raises:
        UserError: a tensor is NaN or infinite (its op is named), or memory does not suffice.
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
                                "evaluate the "
                                "float model, and export it again"
                            ) from None
                images += count
    return images


def _sized(
    batches: Iterable[Mapping[str, np.ndarray]], single: bool, sizes: deque[int]
) -> Iterator[Mapping[str, np.ndarray]]:
    """Yield the batches, image by image if ``single``, and note how many images each has."""
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
    """Write a model that computes the same and gives the tensors ``names`` in this order; ``graph`` is changed."""
    block = graph.program.global_block()
    needed = set(names)
    for op in reversed(block.ops):
        if needed.intersection(op.output_arg_names):
            needed.update(op.input_arg_names)
    graph.unwrap_outputs()
    graph.feed_names = [name for name in graph.feed_names if name in needed]
    graph.fetch_targets = [block.var(name) for name in names]
    return graph.save(directory)


def _is_batched(shape: Sequence[int]) -> bool:
    return bool(shape) and shape[0] == -1
