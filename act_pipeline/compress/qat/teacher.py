"""The teacher outside the training program: its outputs are computed once an image and fed.

PaddleSlim merges teacher and student into one program, so that every step runs both, in Paddle's native kernels. The
teacher does not learn: what it gives on an image is the same every time the image comes round. :func:`split_teacher`
takes its ops out of the merged program before that is quantized, and :class:`Teacher` runs them, convolutions and
matmuls by oneDNN, an image at a time (so that what an image gives does not depend on the others of its batch, nor on
what is cached: a resumed run finds the same bits), and keeps the results by the hash of the image's values.

In PaddleSlim 2.6.0 `quant_aware` also rounds what the teacher's matmuls read, by moving averages, which is no float
teacher; one that is split off stays float.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from act_pipeline.compress.paddleslim.int8_program import TEACHER_PREFIX
from act_pipeline.execution.cpu_kernels import all_cores, on_cpu, run_in_onednn
from act_pipeline.execution.runners import Runner, make_runner
from act_pipeline.graph.deformable_attention import attend_by_rows
from act_pipeline.graph.program_desc import parsed

_logger = logging.getLogger(__name__)
_BYTES_PER_MB = 1_000_000
# Between a batch and its images alone: the order of float sums.
_TOLERANCE = 1e-3
_COMMON_QUERIES = 0.95


class Teacher:
    """The teacher's ops as a program of their own, over the parameters that the training's scope holds."""

    def __init__(
        self,
        runner: Runner,
        inputs: Sequence[str],
        outputs: Sequence[str],
        budget_mb: float,
        queries: str | None = None,
    ) -> None:
        """Take what :func:`split_teacher` found.

        Args:
            runner: fetches ``outputs``, in a scope of its own: it runs in a thread beside the training, and what a
                program is fed lies in its scope.
            inputs: of the training's feed.
            outputs: tensors that the loss reads, each with the batch as its first dimension.
            budget_mb: how much the kept outputs may take, in 10^6 bytes; what comes later is computed each time.
            queries: the one of ``outputs`` that says which places a DETR's rows belong to, [N, Q]; None: there is none.
        """
        self._queries = queries if queries in outputs else None
        self.inputs, self.outputs = list(inputs), list(outputs)
        self.kept_bytes = self.runs = 0
        self._runner = runner
        self._budget = budget_mb * _BYTES_PER_MB
        self._kept: dict[bytes, list[np.ndarray]] = {}

    def outputs_of(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return output -> array [N, ...] of a batch of N images."""
        count = len(feed[self.inputs[0]])
        found = [self._image({name: feed[name][index : index + 1] for name in self.inputs}) for index in range(count)]
        return {name: np.concatenate(parts) for name, parts in zip(self.outputs, zip(*found))}

    def run(self, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Run a batch as it is, and keep nothing."""
        self.runs += 1
        return self._runner.run({name: np.ascontiguousarray(feed[name]) for name in self.inputs})

    def release_caches(self) -> None:
        """See `Runner.release_caches`."""
        self._runner.release_caches()

    def _image(self, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        digest = hashlib.blake2b(digest_size=16)
        for name in self.inputs:
            digest.update(np.ascontiguousarray(feed[name]).data)
        key = digest.digest()
        if key in self._kept:
            return self._kept[key]
        values = self.run(feed)
        size = sum(value.nbytes for value in values)
        # The first to come stay: each image comes once an epoch, so that none is worth more than another.
        if self.kept_bytes + size <= self._budget:
            self._kept[key] = values
            self.kept_bytes += size
        return values

    def by_image(self, probe: Mapping[str, np.ndarray], batch_size: int) -> str:
        """Return why the teacher cannot be run image by image and remembered; empty if it can.

        Args:
            probe: the feed of one image.
            batch_size: how many images a batch of the training has.
        """
        alone = self.run(probe)
        if any(not np.array_equal(one, two, equal_nan=True) for one, two in zip(alone, self.run(probe))):
            return "it gives something else each time"
        if batch_size == 1:
            return ""
        # Two images that differ, of the one that is there.
        other = {name: value[..., ::-1] if value.ndim == 4 else value for name, value in probe.items()}
        try:
            parts = [np.concatenate(pair) for pair in zip(alone, self.run(other))]
            whole = self.run({name: np.concatenate([probe[name], other[name]]) for name in self.inputs})
        except (RuntimeError, ValueError) as error:
            return f"it does not run on two images ({type(error).__name__})"
        if not self._near(parts, whole):
            return "what it gives on an image depends on the others of the batch"
        return ""

    def _near(self, first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> bool:
        if any(one.shape != two.shape for one, two in zip(first, second)):
            return False
        pairs = list(zip(first, second))
        if self._queries is not None:
            # Of places with nearly one score, now this comes first and now that.
            places = pairs.pop(self.outputs.index(self._queries))
            common = [np.intersect1d(one, two, return_indices=True)[1:] for one, two in zip(*places)]
            count = places[0].shape[1]
            if any(len(rows) < _COMMON_QUERIES * count for rows, _ in common):
                return False
            in_rows = [one.shape[:2] == places[0].shape for one, _ in pairs]
            pairs = [pair for pair, rows in zip(pairs, in_rows) if not rows] + [
                (one[image][rows], two[image][other])
                for (one, two), is_row in zip(pairs, in_rows)
                if is_row
                for image, (rows, other) in enumerate(common)
            ]
        return all(
            np.allclose(
                one, two, rtol=0, atol=_TOLERANCE * max(float(np.abs(two).max(initial=0.0)), 1e-6), equal_nan=True
            )
            for one, two in pairs
        )


def split_teacher(
    program: Any,
    executor: Any,
    probe: Mapping[str, np.ndarray],
    batch_size: int,
    budget_mb: float,
    queries: str | None = None,
) -> Teacher | None:
    """Take the teacher's ops out of a merged training program; its outputs become inputs of the program.

    Nothing is changed where the teacher reads anything but its parameters and the feed, or cannot be run image by
    image.

    Args:
        program: PaddleSlim's, with loss and gradients, not yet quantized; changed in place.
        executor: where its parameters are.
        probe: the feed of one image.
        batch_size: how many images a batch of the training has.
        budget_mb, queries: see :class:`Teacher`.

    Returns:
        the teacher; None: the program is as it was.
    """
    block = program.global_block()
    teaching = [op for op in block.ops if _is_teaching(op)]
    inside = {id(op) for op in teaching}
    written = {name for op in teaching for name in op.output_arg_names}
    others = [op for op in block.ops if id(op) not in inside]
    read = {name for op in others for name in op.input_arg_names}
    outputs = sorted(written & read)
    inputs = sorted(
        {
            name
            for op in teaching
            for name in op.input_arg_names
            if name not in written and not (name.startswith(TEACHER_PREFIX) and block.var(name).persistable)
        }
    )
    fed = {op.output("Out")[0] for op in others if op.type == "feed"}
    if not outputs or not inputs or not set(inputs) <= fed & set(probe) or len(program.blocks) > 1:
        return None
    runner = _teaching_runner(program, teaching, outputs, executor.place)
    teacher = Teacher(runner, inputs, outputs, budget_mb, queries)
    with all_cores():
        why_not = teacher.by_image(probe, batch_size)
    if why_not:
        _logger.warning("the teacher runs within every step: %s", why_not)
        return None
    for op in reversed(teaching):
        block._remove_op(block.ops.index(op), sync=False)
    used = {name for op in block.ops for name in (*op.input_arg_names, *op.output_arg_names)}
    for name in [name for name in block.vars if name.startswith(TEACHER_PREFIX) and name not in used]:
        block._remove_var(name, sync=False)
    column = 1 + max(op.attr("col") for op in block.ops if op.type == "feed")
    for index, name in enumerate(outputs):
        variable = block.var(name)
        variable.stop_gradient = True
        variable.is_data = True
        block._prepend_op(
            type="feed", inputs={"X": [block.var("feed")]}, outputs={"Out": [variable]}, attrs={"col": column + index}
        )
    return teacher


def _is_teaching(op: Any) -> bool:
    names = op.output_arg_names
    return bool(names) and all(name.startswith(TEACHER_PREFIX) and "@GRAD" not in name for name in names)


def _teaching_runner(program: Any, teaching: Sequence[Any], outputs: Sequence[str], place: Any) -> Runner:
    """Return a runner of the teacher's ops alone; it shares the parameters of the current scope."""
    import paddle
    from paddle.base.proto import framework_pb2

    desc = parsed(program.desc.serialize_to_string())
    block = desc.blocks[0]
    first = {op.output_arg_names[0] for op in teaching}
    nodes = [
        framework_pb2.OpDesc.FromString(node.SerializeToString())
        for node in block.ops
        if node.type != "feed" and any(name in first for slot in node.outputs for name in slot.arguments)
    ]
    del block.ops[:]
    block.ops.extend(nodes)
    if on_cpu():
        attend_by_rows(desc)
    alone = paddle.static.Program.parse_from_string(desc.SerializeToString())
    if on_cpu():
        run_in_onednn(alone)
    scope, block = paddle.static.Scope(), alone.global_block()
    for name in {name for op in block.ops for name in op.input_arg_names}:
        if block.var(name).persistable:
            trained = paddle.static.global_scope().find_var(name)
            scope.var(name).get_tensor()._share_data_with(trained.get_tensor())
    return make_runner(alone, outputs, place, scope)
