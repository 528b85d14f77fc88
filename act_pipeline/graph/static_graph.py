"""Static graphs: loading, saving, and rewriting that leaves what the graph computes as it was.

This module and `compress/paddleslim/int8_program.py` are the ones that touch Paddle's program internals (2.6.2:
``Block._insert_op_without_sync``, ``Block._remove_op``, ``Program._prune``, ``framework_pb2``), because Paddle has no
public way to rewrite a program. Python alone changes the programs here, so the look for what C++ may have added, which
Paddle takes over the whole program before every change (``sync``), is left out: it is most of the time.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.graph.model_files import inspect_model
from act_pipeline.graph.program_desc import keep, parsed

_SAVED_OUTPUT_PREFIX = "save_infer_model/scale_"
# Written by the Python tracer: file names and lines of the machine that made the graph, read by nothing at
# inference, a third to a half of a .pdmodel.
_TRACE_ATTRIBUTES = ("op_callstack",)


@contextlib.contextmanager
def static_mode() -> Iterator[None]:
    """Switch Paddle to static graphs and leave it as it was found."""
    import paddle

    was_dygraph = paddle.in_dynamic_mode()
    paddle.enable_static()
    try:
        yield
    finally:
        if was_dygraph:
            paddle.disable_static()


def free(scope: Any) -> None:
    """Free a scope that nothing uses any more.

    Paddle keeps every scope that Python makes in a pool of the process (2.6.2: ``ScopePool``) until it ends, whether or
    not Python still knows the scope.
    """
    gc.collect()  # Paddle's executor and its cache refer to each other, and the cache to the scope
    scope._remove_from_pool()


@contextlib.contextmanager
def what_there_is_stays() -> Iterator[None]:
    """Let Python's garbage collections within the block look only at what is made there.

    The programs of a training are some hundred thousand objects, and each model that is written or evaluated meanwhile
    collects garbage (:func:`free`): 0.2 to 0.4 seconds of RT-DETR-R18 each time.
    """
    if gc.get_freeze_count():  # somebody else's, who has it thawed when it is time
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@dataclass
class StaticGraph:
    """A program in memory with the scope that holds its parameters.

    Attributes:
        program: a `paddle.static.Program` with feed and fetch ops.
        feed_names: the inputs.
        fetch_targets: the outputs, variables of the program.
        scope: the parameters.
        executor: a CPU executor.
    """

    program: Any
    feed_names: list[str]
    fetch_targets: list[Any]
    scope: Any
    executor: Any

    @classmethod
    def load(cls, model: InferenceModel) -> StaticGraph:
        """Load a model; call it within :func:`static_mode`.

        Raises:
            UserError: the files are damaged or do not belong together.
        """
        import paddle

        inspect_model(model)  # a damaged program would end the process within Paddle
        stem = Path(model.model_filename).stem
        if (model.model_filename, model.params_filename) == (f"{stem}.pdmodel", f"{stem}.pdiparams"):
            prefix, contents = str(model.directory / stem), {}
        else:
            prefix, contents = (
                None,
                {
                    "model_filename": model.model_path.read_bytes(),
                    "params_filename": model.params_path.read_bytes(),
                },
            )
        scope = paddle.static.Scope()
        executor = paddle.static.Executor(paddle.CPUPlace())
        with paddle.static.scope_guard(scope):
            try:
                program, feed_names, fetch_targets = paddle.static.load_inference_model(prefix, executor, **contents)
            except (RuntimeError, ValueError, OSError) as error:
                reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
                raise UserError(
                    f"{model.model_path} and {model.params_filename} cannot be read as a Paddle model ({reason}); the "
                    "files may be truncated or not belong together: copy or export them again"
                ) from None
        return cls(program, list(feed_names), list(fetch_targets), scope, executor)

    def close(self) -> None:
        """Free the parameters; nothing that belongs to the graph may be used from then on."""
        self.executor.close()
        free(self.scope)
        self.scope = self.executor = None

    def save(self, directory: Path) -> InferenceModel:
        """Write ``model.pdmodel`` and ``model.pdiparams`` into ``directory``, without the traces of their making.

        Inputs on which no output depends are left out, as PaddleDetection's exporter does.
        """
        import paddle

        self.unwrap_outputs()
        self._forget_unused_inputs()
        block = self.program.global_block()
        model = InferenceModel(directory)
        # Names of their own for the identity ops behind the outputs, whatever was saved before in this process.
        with paddle.static.scope_guard(self.scope), paddle.utils.unique_name.guard():
            # clip_extra would also drop the scales that are kept as attributes.
            paddle.static.save_inference_model(
                str(directory / "model"),
                [block.var(name) for name in self.feed_names],
                self.fetch_targets,
                self.executor,
                program=self.program,
                clip_extra=False,
            )
        _remove_traces(model.model_path)
        return model

    def unwrap_outputs(self) -> None:
        """Take away the identity ops that an earlier save put behind the outputs.

        Saving puts new ones there under the same names, so that the outputs would be written from themselves; on such a
        cycle PaddleSlim's search for the last weights never ends.
        """
        block = self.program.global_block()
        for op in [op for op in block.ops if op.type == "fetch"]:
            block._remove_op(block.ops.index(op), sync=False)
        for index, target in enumerate(self.fetch_targets):
            while target.name.startswith(_SAVED_OUTPUT_PREFIX):
                op = _identity(block, target.name)
                if op is None:  # other tools put ops of theirs there, such as Q/DQ, and may read it elsewhere
                    name = _free_name(block, f"output_{index}")
                    block._rename_var(target.name, name)
                    target = block.var(name)
                    break
                wrapper, target = target, block.var(op.input("X")[0])
                block._remove_op(block.ops.index(op), sync=False)
                block._remove_var(wrapper.name, sync=False)  # another output may take its name, and be of another type
            self.fetch_targets[index] = target

    def _forget_unused_inputs(self) -> None:
        needed = {target.name for target in self.fetch_targets}
        for op in reversed(self.program.global_block().ops):
            if not needed.isdisjoint(op.output_arg_names):
                needed.update(op.input_arg_names)
        self.feed_names = [name for name in self.feed_names if name in needed]

    def parameter(self, name: str) -> np.ndarray:
        """Return a parameter's value."""
        return np.array(self.scope.find_var(name).get_tensor())

    def set_parameter(self, name: str, value: np.ndarray) -> None:
        """Set a parameter's value; the variable is made if it does not exist."""
        import paddle

        self.scope.var(name).get_tensor().set(np.ascontiguousarray(value), paddle.CPUPlace())

    def add_parameter(self, name: str, value: np.ndarray) -> Any:
        """Add a persistable variable to the program and give it a value."""
        variable = self.program.global_block().create_var(
            name=name, shape=list(value.shape), dtype=str(value.dtype), persistable=True, stop_gradient=True
        )
        self.set_parameter(name, value)
        return variable

    def is_parameter(self, name: str) -> bool:
        from paddle.base.core import VarDesc

        block = self.program.global_block()
        # Feed and fetch are persistable too, and hold no tensor.
        return (
            block.has_var(name) and block.var(name).persistable and block.var(name).type == VarDesc.VarType.LOD_TENSOR
        )

    def remove_unused_parameters(self) -> None:
        """Remove parameters that no op reads, so that they are not saved."""
        block = self.program.global_block()
        used = {name for op in block.ops for name in (*op.input_arg_names, *op.output_arg_names)}
        for name in [name for name in block.vars if name not in used]:
            block._remove_var(name, sync=False)


def _identity(block: Any, name: str) -> Any:
    """Return the op that only gives another tensor the name ``name``; None if there is none, or another op reads it."""
    writers = [op for op in block.ops if name in op.output_arg_names]
    if len(writers) != 1 or any(name in op.input_arg_names for op in block.ops):
        return None
    op = writers[0]
    if op.type != "scale" or op.attr("scale") != 1.0 or op.attr("bias") != 0.0 or op.input("ScaleTensor"):
        return None
    return op


def _free_name(block: Any, name: str) -> str:
    while block.has_var(name):
        name += "_"
    return name


def _remove_traces(model_path: Path) -> None:
    """Remove the attributes that only say where an op was made; Paddle gives them to the ops that saving adds, too."""
    program = parsed(model_path.read_bytes())
    for block in program.blocks:
        for op in block.ops:
            keep(op.attrs, lambda attribute: attribute.name not in _TRACE_ATTRIBUTES)
    model_path.write_bytes(program.SerializeToString())
