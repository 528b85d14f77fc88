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

import enum
import gc
import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from act_pipeline.analysis.dataflow import DataFlow
from act_pipeline.analysis.simulated_program import ProgramBuilder, scale_name, set_tensor
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.graph.op_types import QUANTIZABLE_OPS
from act_pipeline.graph.program_desc import dtype_of_tensor, parsed
from act_pipeline.graph.quantizable_ops import QuantizableOp
from act_pipeline.graph.static_graph import StaticGraph, static_mode

# Each keeps tensors, some 30 MB an image of 224 x 224; a choice of ops is seldom asked for again later.
_KEPT_PROGRAMS = 2
_OUTPUTS = ("bbox", "bbox_num")


class _Mode(enum.Enum):
    WHOLE = "all ops"
    HOLD = "all ops, and the tensors to cache"
    FROM_HELD = "only the ops that depend on a quantized op, from cached tensors"


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
        self._ops = {op.name: op for op in ops}
        with static_mode():
            graph = StaticGraph.load(model)
            graph.unwrap_outputs()
            if device == "GPU":
                graph = _on_gpu(graph)
        self._loaded: StaticGraph | None = graph
        template, nodes = _split(graph)
        if device == "CPU" and onednn:
            _compute_by_onednn(nodes)
        self._flow = DataFlow(nodes)
        of_model = _model_outputs(graph)
        self._output_names = tuple(of_model)
        self._outputs = {**of_model, **self._checked_taps(taps)}
        self._held_names = self._frontier({var.name for var in template.blocks[0].vars if var.persistable})
        of_inputs = [var for var in template.blocks[0].vars if var.name in graph.feed_names]
        self._dtypes = {var.name: dtype_of_tensor(var) for var in of_inputs}
        # Inputs and held tensors live in the scope from run to run, as parameters do.
        for var in template.blocks[0].vars:
            if var.name in self._held_names or var.name in graph.feed_names:
                var.persistable = True
        self._builder = ProgramBuilder(graph, template, self._flow, self._ops)
        self._thresholds: dict[str, float] = {}
        self._programs: dict[Any, tuple[Any, list[str]]] = {}
        self._held: bytes | None = None
        self._held_outputs: dict[str, np.ndarray] = {}

    def outputs_of(self, outputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the model's own outputs, in its order, of the result of :meth:`run` or :meth:`hold`."""
        return {name: outputs[name] for name in self._output_names}

    def set_thresholds(self, thresholds: Mapping[str, float]) -> None:
        """Set the thresholds of activations; those set before are kept.

        Args:
            thresholds: activation name -> the largest absolute value that its INT8 form represents, see
                :func:`act_pipeline.calibration.thresholds.threshold`; 0 (the activation was always 0) is replaced by 1.
        """
        for name, value in thresholds.items():
            self._thresholds[name] = float(value)
            set_tensor(self._graph, scale_name(name), np.array([value or 1.0], np.float32))

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
        self._check_names(quantized, weight_only)
        if self._held is not None and self._held != self._digest(feed):
            self._held = None
        if self._held is not None:
            return self._execute(_Mode.FROM_HELD, quantized, weight_only)
        self._feed(feed)
        return self._execute(_Mode.WHOLE, quantized, weight_only)

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
        outputs = self._execute(_Mode.HOLD, frozenset(), frozenset())
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

    def _checked_taps(self, taps: Sequence[str]) -> dict[str, str]:
        produced = self._flow.written()
        for name in taps:
            if name not in produced:
                raise ValueError(f"no op gives the tensor {name}")
        return {name: name for name in taps}

    def _check_names(self, quantized: Collection[str], weight_only: Collection[str]) -> None:
        for name in (*quantized, *weight_only):
            if name not in self._ops:
                raise ValueError(f"{name} is none of the {len(self._ops)} quantizable ops")
        for name in quantized:
            missing = [tensor for tensor in self._ops[name].activations if tensor not in self._thresholds]
            if missing:
                raise ValueError(f"{missing[0]}, read by {name}, has no threshold")

    def _frontier(self, parameters: Collection[str]) -> set[str]:
        """Return the tensors to cache: unchanged inputs of the ops affected by any one op, and the outputs."""
        wanted = set(self._outputs.values())
        boundaries = (self._flow.boundary(self._flow.affected({name}, wanted)) for name in self._ops)
        return (wanted.union(*boundaries) & self._flow.written()).difference(parameters)

    def _execute(self, mode: _Mode, quantized: frozenset[str], weight_only: frozenset[str]) -> dict[str, np.ndarray]:
        import paddle

        with static_mode(), paddle.static.scope_guard(self._graph.scope):
            program, fetches = self._program(mode, quantized, weight_only)
            try:
                values = self._graph.executor.run(program, fetch_list=fetches) if program is not None else []
            except (MemoryError, RuntimeError) as error:
                line = next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
                raise UserError(
                    f"Paddle cannot run the model with {len(quantized)} ops in INT8: {line.strip()}"
                ) from error
        found = {name: np.asarray(value) for name, value in zip(fetches, values)}
        # Fetched rather than read from the scope, where oneDNN stores tensors in its own layout.
        return {key: found[name] if name in found else self._held_outputs[key] for key, name in self._outputs.items()}

    def _program(self, mode: _Mode, quantized: frozenset[str], weight_only: frozenset[str]) -> tuple[Any, list[str]]:
        """Return the program of a subset of ops, None if it has none, and the tensors that it fetches."""
        key = (mode, quantized, weight_only)
        if key not in self._programs:
            if len(self._programs) >= _KEPT_PROGRAMS:
                self._forget_programs()
            self._programs[key] = self._built(mode, quantized, weight_only)
        return self._programs[key]

    def _built(self, mode: _Mode, quantized: frozenset[str], weight_only: frozenset[str]) -> tuple[Any, list[str]]:
        outputs = self._outputs.values()
        if mode is _Mode.FROM_HELD:
            positions = self._flow.affected(quantized | weight_only, outputs)
        else:
            positions = self._flow.needed({*outputs, *(self._held_names if mode is _Mode.HOLD else ())})
        if not positions:
            return None, []
        written = self._flow.written(positions)
        transient = written if mode is not _Mode.HOLD else ()
        program = self._builder.build(positions, quantized, weight_only, transient)
        return program, [name for name in dict.fromkeys(outputs) if name in written]  # the other outputs are cached

    def _forget_programs(self) -> None:
        """Free the prepared programs; each holds tensors in a child scope, 0.1 GB on a small model."""
        import paddle

        place = self._graph.executor.place
        self._programs.clear()
        self._graph.executor.close()
        self._graph.executor = paddle.static.Executor(place)
        gc.collect()  # Paddle's executor and its cache form a reference cycle
        self._graph.scope.drop_kids()

    def _feed(self, feed: Mapping[str, np.ndarray]) -> None:
        for name, array in self._inputs(feed):
            set_tensor(self._graph, name, array)

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
            yield name, np.ascontiguousarray(feed[name], self._dtypes[name])


def _split(graph: StaticGraph) -> tuple[Any, list[Any]]:
    """Return a graph's program as a protobuf message without ops, and its ops except feed and fetch."""
    template = parsed(graph.program.desc.serialize_to_string())
    nodes = [op for op in template.blocks[0].ops if op.type not in ("feed", "fetch")]
    del template.blocks[0].ops[:]
    return template, nodes


def _model_outputs(graph: StaticGraph) -> dict[str, str]:
    """Return the key of each output -> its tensor."""
    targets = [target.name for target in graph.fetch_targets]
    return dict(zip((*_OUTPUTS, *(f"output_{number}" for number in range(2, len(targets)))), targets))


def _compute_by_onednn(nodes: Sequence[Any]) -> None:
    for node in nodes:
        if node.type in QUANTIZABLE_OPS:  # other kernels gain nothing measurable from oneDNN without fusions
            _set_bool(node, "use_mkldnn")


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
