"""Run the teacher outside the training program, once for each image, and feed its outputs to the program.

PaddleSlim merges teacher and student into one program, so that every step runs both in Paddle's native kernels. The
teacher is constant, and its outputs on an image are the same in every epoch. :func:`split_teacher` moves its ops out of
the merged program before quantization. :class:`Teacher` runs them, with oneDNN convolutions and matmuls on a CPU, and
caches the outputs under the hash of the image's values. It runs one image at a time, so that the outputs depend neither
on the other images of the batch nor on the content of the cache, and a resumed run gets identical bits.

In PaddleSlim 2.6.0 `quant_aware` also rounds the inputs of the teacher's matmuls, with moving averages. A teacher that
is split off stays in float.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from act_pipeline.compress.paddleslim.prefixes import TEACHER_PREFIX
from act_pipeline.execution.cpu_cores import all_cores, on_cpu
from act_pipeline.execution.cpu_kernels import run_in_onednn
from act_pipeline.execution.runners import Runner, make_runner
from act_pipeline.graph.deformable_attention import attend_by_rows
from act_pipeline.graph.program_desc import parsed

_logger = logging.getLogger(__name__)
_BYTES_PER_MB = 1_000_000
# Allowed difference between a batch and its images run one by one, which differ in the order of float sums; relative to
# the largest value.
_TOLERANCE = 1e-3
_COMMON_QUERIES = 0.95


class Teacher:
    """The teacher's ops as a separate program, which shares the parameters of the training's scope.

    Attributes:
        inputs: names of the inputs, a subset of the training's feed.
        outputs: names of the outputs, the teacher's tensors that the loss reads.
        kept_bytes: size of the cached outputs, in bytes.
        runs: the number of runs so far.
    """

    def __init__(
        self,
        runner: Runner,
        inputs: Sequence[str],
        outputs: Sequence[str],
        budget_mb: float,
        queries: str | None = None,
    ) -> None:
        """Store the program that :func:`split_teacher` made.

        Args:
            runner: runs the program and fetches ``outputs``. It needs a separate scope, since it runs in a thread in
                parallel with the training, and the fed inputs are variables of the scope.
            inputs: names of the inputs, a subset of the training's feed.
            outputs: names of the tensors that the loss reads, each with the batch as its first dimension.
            budget_mb: maximal size of the cache, in 10^6 bytes; outputs that do not fit are computed each time.
            queries: the one of ``outputs`` with the positions that a DETR's rows belong to, [N, Q]; None: there is
                none.
        """
        self._queries = queries if queries in outputs else None
        self.inputs, self.outputs = list(inputs), list(outputs)
        self.kept_bytes = self.runs = 0
        self._runner = runner
        self._budget = budget_mb * _BYTES_PER_MB
        self._kept: dict[bytes, list[np.ndarray]] = {}

    def outputs_of(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the teacher's outputs on a batch, from the cache where possible.

        Args:
            feed: input -> array [N, ...].

        Returns:
            Output -> array [N, ...].
        """
        count = len(feed[self.inputs[0]])
        found = [self._image({name: feed[name][index : index + 1] for name in self.inputs}) for index in range(count)]
        return {name: np.concatenate(parts) for name, parts in zip(self.outputs, zip(*found))}

    def run(self, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Run a whole batch without the cache; return the outputs in the order of :attr:`outputs`."""
        self.runs += 1
        return self._runner.run({name: np.ascontiguousarray(feed[name]) for name in self.inputs})

    def release_caches(self) -> None:
        """Release the runner's caches, see `Runner.release_caches`."""
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
        # No eviction: each image comes once an epoch, so that replacing an entry gains nothing.
        if self.kept_bytes + size <= self._budget:
            self._kept[key] = values
            self.kept_bytes += size
        return values

    def by_image(self, probe: Mapping[str, np.ndarray], batch_size: int) -> str:
        """Return why the teacher cannot be run image by image and cached; empty if it can.

        Args:
            probe: the feed of one image.
            batch_size: the batch size of the training.
        """
        alone = self.run(probe)
        if any(not np.array_equal(one, two, equal_nan=True) for one, two in zip(alone, self.run(probe))):
            return "it gives something else each time"
        if batch_size == 1:
            return ""
        # The test needs a batch of two different images; the second one is the mirrored first one.
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
            # The order of positions with nearly equal scores may differ, so only rows of common positions are compared.
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
    *,
    budget_mb: float,
    queries: str | None = None,
) -> Teacher | None:
    """Move the teacher's ops out of a merged training program, whose inputs their outputs become.

    The program is not changed if the teacher reads anything but its parameters and the feed, or cannot be run image by
    image.

    Args:
        program: PaddleSlim's program with loss and gradients, not yet quantized; changed in place.
        executor: the executor of the program, for its device.
        probe: the feed of one image.
        batch_size: the batch size of the training.
        budget_mb, queries: see :class:`Teacher`.

    Returns:
        The teacher; None: the program was not changed.
    """
    part = _TeacherPart.of(program)
    if part is None or not set(part.inputs) <= set(probe):
        return None
    runner = _teaching_runner(program, part.ops, part.outputs, executor.place)
    teacher = Teacher(runner, part.inputs, part.outputs, budget_mb, queries)
    with all_cores():
        why_not = teacher.by_image(probe, batch_size)
    if why_not:
        _logger.warning("the teacher runs within every step: %s", why_not)
        return None
    _remove_ops(program.global_block(), part.ops)
    _feed_variables(program.global_block(), part.outputs)
    return teacher


@dataclass(frozen=True)
class _TeacherPart:
    """The teacher's ops in a merged program, the fed variables that they read, and those that other ops read."""

    ops: list[Any]
    inputs: list[str]
    outputs: list[str]

    @classmethod
    def of(cls, program: Any) -> _TeacherPart | None:
        """Return the teacher's part; None: it cannot be split off, since it reads more than the feed."""
        block = program.global_block()
        ops = [op for op in block.ops if _is_teaching(op)]
        inside = {id(op) for op in ops}
        others = [op for op in block.ops if id(op) not in inside]
        written = {name for op in ops for name in op.output_arg_names}
        read = {name for op in others for name in op.input_arg_names}
        fed = {op.output("Out")[0] for op in others if op.type == "feed"}
        inputs = {
            name
            for op in ops
            for name in op.input_arg_names
            if name not in written and not (name.startswith(TEACHER_PREFIX) and block.var(name).persistable)
        }
        outputs = written & read
        if not outputs or not inputs or not inputs <= fed or len(program.blocks) > 1:
            return None
        return cls(ops, sorted(inputs), sorted(outputs))


def _remove_ops(block: Any, ops: Sequence[Any]) -> None:
    """Remove the teacher's ops, and its variables that no other op uses."""
    for op in reversed(ops):
        block._remove_op(block.ops.index(op), sync=False)
    used = {name for op in block.ops for name in (*op.input_arg_names, *op.output_arg_names)}
    for name in [name for name in block.vars if name.startswith(TEACHER_PREFIX) and name not in used]:
        block._remove_var(name, sync=False)


def _feed_variables(block: Any, names: Sequence[str]) -> None:
    """Turn variables into inputs of the program, in columns after those of its other inputs."""
    column = 1 + max(op.attr("col") for op in block.ops if op.type == "feed")
    for index, name in enumerate(names):
        variable = block.var(name)
        variable.stop_gradient = True
        variable.is_data = True
        block._prepend_op(
            type="feed", inputs={"X": [block.var("feed")]}, outputs={"Out": [variable]}, attrs={"col": column + index}
        )


def _is_teaching(op: Any) -> bool:
    names = op.output_arg_names
    return bool(names) and all(name.startswith(TEACHER_PREFIX) and "@GRAD" not in name for name in names)


def _teaching_runner(program: Any, teaching: Sequence[Any], outputs: Sequence[str], place: Any) -> Runner:
    """Return a runner of only the teacher's ops, which shares the parameters of the current scope."""
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
