"""Outputs of a float model with any subset of its ops in INT8, without writing models to disk.

Quantizing an op has the same meaning as in the saved INT8 model: its activations pass through Paddle's
``quantize_linear`` and ``dequantize_linear``, and its weight is rounded per output channel. Each subset is a program
over the parameters of one scope. Preparing it takes Paddle's executor a few tenths of a second; ops that stay in float
cost nothing extra. On the CPU convolutions and matmuls are computed by oneDNN.

:meth:`Simulation.hold` caches the float model's tensors of a batch. Later runs on this batch compute only the ops that
depend on a quantized op, since all other tensors are unchanged. PaddleSlim's ``AnalysisPTQ`` writes a model for each op
and runs all of it.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.graph.int8_rounding import rounded_weight
from act_pipeline.graph.op_types import QUANTIZABLE_OPS
from act_pipeline.graph.program_desc import parsed
from act_pipeline.graph.quantizable_ops import QuantizableOp
from act_pipeline.graph.static_graph import StaticGraph, static_mode

# Each keeps tensors, some 30 MB an image of 224 x 224; a choice of ops is seldom asked for again later.
_KEPT_PROGRAMS = 2
_OUTPUTS = ("bbox", "bbox_num")


class Simulation:
    """A float graph of which any subset of ops can compute in INT8, chosen at every run.

    Example::

        with contextlib.closing(Simulation(model, ops)) as simulation:
            simulation.set_thresholds(thresholds)
            exact = simulation.hold(batch)
            for op in ops:
                outputs = simulation.run(batch, {op.name})
    """

    def __init__(
        self,
        model: InferenceModel,
        ops: Sequence[QuantizableOp],
        device: str = "CPU",
        taps: Sequence[str] = (),
        onednn: bool = True,
    ) -> None:
        """Load the model.

        Args:
            model: the float model with constants and BatchNorm folded (:func:`act_pipeline.graph.folding.prepare`).
            ops: the ops that can be quantized.
            device: ``CPU`` or ``GPU``.
            taps: names of tensors that :meth:`run` returns in addition to the outputs.
            onednn: False uses Paddle's own kernels on the CPU: 4 times slower on RT-DETR-R18 at 640, and bit-identical
                to the saved INT8 model in Paddle's executor.

        Raises:
            UserError: the files are damaged.
            ValueError: no op computes one of ``taps``.
        """
        import paddle

        self._ops = {op.name: op for op in ops}
        self._device = device
        with static_mode():
            graph = StaticGraph.load(model)
            graph.unwrap_outputs()
            if device == "GPU":
                graph = _on_gpu(graph)
        self._loaded: StaticGraph | None = graph
        self._place = graph.executor.place
        desc = parsed(graph.program.desc.serialize_to_string())
        block = desc.blocks[0]
        nodes = [op for op in block.ops if op.type not in ("feed", "fetch")]
        del block.ops[:]
        if device == "CPU" and onednn:
            for node in nodes:
                if node.type in QUANTIZABLE_OPS:  # other kernels gain nothing measurable from oneDNN without fusions
                    _set_bool(node, "use_mkldnn")
        self._desc, self._nodes = desc, nodes
        self._reads = [[name for slot in node.inputs for name in slot.arguments] for node in nodes]
        self._writes = [[name for slot in node.outputs for name in slot.arguments] for node in nodes]
        produced = {name for names in self._writes for name in names}
        self._position = {names[0]: index for index, names in enumerate(self._writes) if names}
        targets = [target.name for target in graph.fetch_targets]
        self._keys = dict(zip((*_OUTPUTS, *(f"output_{n}" for n in range(2, len(targets)))), targets))
        for name in taps:
            if name not in produced:
                raise ValueError(f"no op gives the tensor {name}")
            self._keys[name] = name
        self._parameters = {var.name for var in block.vars if var.persistable}
        self._held_names = self._frontier(produced)
        # Inputs and held tensors live in the scope from run to run, as parameters do.
        for var in block.vars:
            if var.name in self._held_names or var.name in graph.feed_names:
                var.persistable = True
        self._thresholds: dict[str, float] = {}
        self._programs: dict[Any, tuple[Any, list[str]]] = {}
        self._held: bytes | None = None
        self._held_outputs: dict[str, np.ndarray] = {}
        self._paddle = paddle

    def set_thresholds(self, thresholds: Mapping[str, float]) -> None:
        """Set the thresholds of activations; those set before are kept.

        Args:
            thresholds: activation name -> the largest absolute value that its INT8 form represents, see
                :func:`act_pipeline.calibration.thresholds.threshold`; 0 (the activation was always 0) is replaced by 1.
        """
        for name, value in thresholds.items():
            self._thresholds[name] = float(value)
            self._set(_scale_name(name), np.array([value or 1.0], np.float32))

    def run(
        self, feed: Mapping[str, np.ndarray], quantized: Collection[str], weight_only: Collection[str] = ()
    ) -> dict[str, np.ndarray]:
        """Run a batch with some ops in INT8.

        Args:
            feed: the model's inputs, see :meth:`act_pipeline.engines.interface.Engine.run`; other entries are ignored.
            quantized: names of ops whose activations and weight are rounded to INT8.
            weight_only: names of ops of which only the weight is rounded; an op without a weight stays in float.

        Returns:
            ``bbox`` float32 [K, 6], ``bbox_num`` [N], and the taps under their names.

        Raises:
            ValueError: a name is not a quantizable op, or an activation has no threshold.
            UserError: memory does not suffice.
        """
        quantized, weight_only = frozenset(quantized), frozenset(weight_only) - frozenset(quantized)
        for name in quantized | weight_only:
            if name not in self._ops:
                raise ValueError(f"{name} is none of the {len(self._ops)} quantizable ops")
        for name in quantized:
            missing = [tensor for tensor in self._ops[name].activations if tensor not in self._thresholds]
            if missing:
                raise ValueError(f"{missing[0]}, read by {name}, has no threshold")
        if self._held is not None and self._held != self._digest(feed):
            self._held = None
        if self._held is None:
            self._feed(feed)
        return self._execute(quantized, weight_only, "from held" if self._held is not None else "whole")

    def hold(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the float model and cache its tensors for later runs on the same batch.

        The cache needs the memory of the tensors between the ops: about 0.2 GB per image for R18 at 640. It is dropped
        when another batch is run.

        Args:
            feed: see :meth:`run`.

        Returns:
            the float model's outputs, as from :meth:`run` with no op quantized.
        """
        self._held = None
        self._feed(feed)
        outputs = self._execute(frozenset(), frozenset(), "hold")
        self._held, self._held_outputs = self._digest(feed), outputs
        return dict(outputs)

    def close(self) -> None:
        """Free the parameters and all tensors; further calls have no effect."""
        if self._loaded is not None:
            self._programs.clear()
            self._loaded.close()
            self._loaded = None

    @property
    def _graph(self) -> StaticGraph:
        if self._loaded is None:
            raise ValueError("the simulation is closed")
        return self._loaded

    def _frontier(self, produced: set[str]) -> set[str]:
        """Return the tensors to cache: unchanged inputs of the ops affected by any one op, and the outputs."""
        held = set(self._keys.values())
        for name in self._ops:
            held.update(self._boundary(self._affected({name})))
        return (held & produced) - self._parameters

    def _affected(self, names: Collection[str]) -> list[int]:
        """Return the positions of the ops that depend on ``names`` and contribute to the outputs."""
        changed: set[str] = set()
        starts = {self._position[name] for name in names}
        positions = []
        for index in range(min(starts, default=len(self._nodes)), len(self._nodes)):
            if index in starts or not changed.isdisjoint(self._reads[index]):
                changed.update(self._writes[index])
                positions.append(index)
        wanted = set(self._keys.values())
        kept = []
        for index in reversed(positions):
            if not wanted.isdisjoint(self._writes[index]):
                wanted.update(self._reads[index])
                kept.append(index)
        return kept[::-1]

    def _boundary(self, positions: Sequence[int]) -> set[str]:
        written = {name for index in positions for name in self._writes[index]}
        return {name for index in positions for name in self._reads[index]} - written

    def _execute(self, quantized: frozenset[str], weight_only: frozenset[str], mode: str) -> dict[str, np.ndarray]:
        key = (quantized, weight_only, mode)
        with static_mode(), self._paddle.static.scope_guard(self._graph.scope):
            if key not in self._programs:
                if len(self._programs) >= _KEPT_PROGRAMS:
                    self._forget_programs()
                self._programs[key] = self._build(quantized, weight_only, mode)
            program, fetches = self._programs[key]
            try:
                values = self._graph.executor.run(program, fetch_list=fetches) if program is not None else []
            except (MemoryError, RuntimeError) as error:
                line = next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
                raise UserError(
                    f"Paddle cannot run the model with {len(quantized)} ops in INT8: {line.strip()}"
                ) from error
        found = {name: np.asarray(value) for name, value in zip(fetches, values)}
        # Fetched rather than read from the scope, where oneDNN stores tensors in its own layout.
        return {key: found[name] if name in found else self._held_outputs[key] for key, name in self._keys.items()}

    def _build(self, quantized: frozenset[str], weight_only: frozenset[str], mode: str) -> tuple[Any, list[str]]:
        """Return the program of a subset of ops and the tensors that it fetches; the other outputs are cached."""
        from paddle.base.proto import framework_pb2

        positions = self._affected(quantized | weight_only) if mode == "from held" else self._needed(mode)
        written = {name for index in positions for name in self._writes[index]}
        fetches = [name for name in dict.fromkeys(self._keys.values()) if name in written]
        if not positions:
            return None, []
        desc = framework_pb2.ProgramDesc()
        desc.CopyFrom(self._desc)
        block = desc.blocks[0]
        variables = {var.name: var for var in block.vars}
        if mode != "hold":
            for name in written:
                variables[name].persistable = False
        rounded: set[str] = set()
        for index in positions:
            node = self._nodes[index]
            name = self._writes[index][0]
            op = self._ops.get(name)
            renamed: dict[str, str] = {}
            if op is not None and name in quantized:
                for tensor in op.activations:
                    renamed[tensor] = f"{tensor}@dequantized"
                    if tensor not in rounded:
                        rounded.add(tensor)
                        self._add_rounding(block, variables, tensor)
            if op is not None and op.weight is not None and (name in quantized or name in weight_only):
                renamed[op.weight] = self._rounded_weight(block, variables, op.weight, op.weight_axis)
            added = block.ops.add()
            added.CopyFrom(node)
            for slot in added.inputs if renamed else ():
                arguments = [renamed.get(argument, argument) for argument in slot.arguments]
                del slot.arguments[:]
                slot.arguments.extend(arguments)
        return self._paddle.static.Program.parse_from_string(desc.SerializeToString()), fetches

    def _needed(self, mode: str) -> list[int]:
        wanted = set(self._keys.values()) | (self._held_names if mode == "hold" else set())
        kept = []
        for index in reversed(range(len(self._nodes))):
            if not wanted.isdisjoint(self._writes[index]):
                wanted.update(self._reads[index])
                kept.append(index)
        return kept[::-1]

    def _add_rounding(self, block: Any, variables: dict[str, Any], tensor: str) -> None:
        """Append the ops that round ``tensor`` to INT8, the same as in a saved INT8 model."""
        scale, zero_point = _scale_name(tensor), "act_pipeline@zero_point"
        self._declare(block, variables, scale, variables[tensor], [1])
        if zero_point not in variables:
            self._declare(block, variables, zero_point, variables[tensor], [1])
            self._set(zero_point, np.zeros(1, np.float32))
        source = tensor
        for kind in ("quantize", "dequantize"):
            result = f"{tensor}@{kind}d"
            self._declare(block, variables, result, variables[tensor])
            op = block.ops.add()
            op.type = f"{kind}_linear"
            for slots, slot, argument in (
                (op.inputs, "X", source),
                (op.inputs, "Scale", scale),
                (op.inputs, "ZeroPoint", zero_point),
                (op.outputs, "Y", result),
            ):
                slots.add(parameter=slot, arguments=[argument])
            for name, value in (("quant_axis", -1), ("bit_length", 8)):
                op.attrs.add(name=name, type=0, i=value)
            source = result

    def _rounded_weight(self, block: Any, variables: dict[str, Any], weight: str, axis: int) -> str:
        """Return the name of the INT8-rounded copy of a weight, which is created at its first use."""
        name = f"{weight}@rounded{axis}"
        if name not in self._parameters:
            self._set(name, rounded_weight(self._graph.parameter(weight), axis))
            self._parameters.add(name)
        self._declare(block, variables, name, variables[weight])
        return name

    def _declare(
        self, block: Any, variables: dict[str, Any], name: str, like: Any, shape: Sequence[int] | None = None
    ) -> None:
        if name in variables:
            return
        var = block.vars.add()
        var.CopyFrom(like)
        var.name = name
        var.persistable = shape is not None or name in self._parameters
        if shape is not None:
            tensor = var.type.lod_tensor.tensor
            del tensor.dims[:]
            tensor.dims.extend(shape)
        variables[name] = var

    def _forget_programs(self) -> None:
        """Free the prepared programs; each holds tensors in a child scope, 0.1 GB on a small model."""
        self._programs.clear()
        self._graph.executor.close()
        self._graph.executor = self._paddle.static.Executor(self._place)
        gc.collect()  # Paddle's executor and its cache form a reference cycle
        self._graph.scope.drop_kids()

    def _feed(self, feed: Mapping[str, np.ndarray]) -> None:
        for name, array in self._inputs(feed):
            self._set(name, array)

    def _digest(self, feed: Mapping[str, np.ndarray]) -> bytes:
        digest = hashlib.blake2b(digest_size=16)
        for name, array in self._inputs(feed):
            digest.update(repr((name, array.shape)).encode())
            digest.update(array.data)
        return digest.digest()

    def _inputs(self, feed: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
        for name in self._graph.feed_names:
            if name not in feed:
                raise ValueError(f"the model takes an input {name!r}, which is none of {sorted(feed)}")
            yield name, np.ascontiguousarray(feed[name], np.float32)

    def _set(self, name: str, value: np.ndarray) -> None:
        self._graph.scope.var(name).get_tensor().set(np.ascontiguousarray(value), self._place)


def _scale_name(tensor: str) -> str:
    return f"{tensor}@threshold"


def _set_bool(node: Any, name: str) -> None:
    """Set a boolean attribute of a protobuf op; 6 is ``AttrType.BOOLEAN`` in Paddle's framework.proto."""
    for attribute in node.attrs:
        if attribute.name == name:
            attribute.b = True
            return
    node.attrs.add(name=name, type=6, b=True)


def _on_gpu(graph: StaticGraph) -> StaticGraph:
    """Move the parameters to the first GPU; otherwise they would be copied there at every run."""
    import paddle

    place = paddle.CUDAPlace(0)
    for name in graph.program.global_block().vars:
        if graph.is_parameter(name):
            graph.scope.find_var(name).get_tensor().set(graph.parameter(name), place)
    return StaticGraph(graph.program, graph.feed_names, graph.fetch_targets, graph.scope, paddle.static.Executor(place))
