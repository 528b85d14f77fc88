"""Static graphs in memory: loading, saving, access to parameters.

Paddle has no public functions for rewriting a program. The modules of this package use internal ones (2.6.2:
``Block._insert_op_without_sync``, ``Block._remove_op``, ``Program._prune``, ``framework_pb2``). Before every change
Paddle compares the whole program with its C++ counterpart (``sync``), which takes most of the time. Programs are
changed only from Python here, so this step is omitted (``sync=False``).
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
# Source files and line numbers, written by the Python tracer: a third to a half of a .pdmodel, not used at inference.
_TRACE_ATTRIBUTES = ("op_callstack",)


@contextlib.contextmanager
def static_mode() -> Iterator[None]:
    """Enable Paddle's static graph mode during the block and restore the previous mode afterwards."""
    import paddle

    was_dygraph = paddle.in_dynamic_mode()
    paddle.enable_static()
    try:
        yield
    finally:
        if was_dygraph:
            paddle.disable_static()


def free(scope: Any) -> None:
    """Free a scope that is no longer used.

    Paddle (2.6.2: ``ScopePool``) holds every scope that Python creates until the process ends, even if Python has no
    reference to it.

    Args:
        scope: a `paddle.static.Scope`.
    """
    gc.collect()  # Paddle's executor and its cache refer to each other, and the cache to the scope
    scope._remove_from_pool()


@contextlib.contextmanager
def existing_objects_frozen() -> Iterator[None]:
    """Exclude existing objects from Python's garbage collection during the block (``gc.freeze``).

    The programs of training consist of some hundred thousand objects, and each model that is written or evaluated
    triggers a collection (:func:`free`): 0.2 to 0.4 s each time for RT-DETR-R18.
    """
    if gc.get_freeze_count():  # an outer block has frozen the objects and unfreezes them
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
        feed_names: names of the inputs.
        fetch_targets: the outputs, variables of the program.
        scope: the `paddle.static.Scope` with the values of the parameters.
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

        Args:
            model: the model to load.

        Raises:
            UserError: the files are damaged or not from the same export.
        """
        import paddle

        inspect_model(model)  # Paddle crashes on a damaged program
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
        """Free the parameters; the graph must not be used afterwards."""
        self.executor.close()
        free(self.scope)
        self.scope = self.executor = None

    def save(self, directory: Path) -> InferenceModel:
        """Write ``model.pdmodel`` and ``model.pdiparams``, without trace attributes and unused inputs.

        PaddleDetection's exporter also drops inputs on which no output depends.

        Args:
            directory: an existing folder.

        Returns:
            The model in ``directory``.
        """
        import paddle

        self.unwrap_outputs()
        self._forget_unused_inputs()
        block = self.program.global_block()
        model = InferenceModel(directory)
        # The names of the identity ops after the outputs must not depend on what this process has saved before.
        with paddle.static.scope_guard(self.scope), paddle.utils.unique_name.guard():
            # clip_extra would also remove the scales that are stored as attributes.
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
        """Remove the identity ops that an earlier save added after the outputs.

        Saving again would add new ones with the same names, each with its own output as input. On such a cycle
        PaddleSlim's search for the last weights never ends.
        """
        block = self.program.global_block()
        for op in [op for op in block.ops if op.type == "fetch"]:
            block._remove_op(block.ops.index(op), sync=False)
        for index, target in enumerate(self.fetch_targets):
            while target.name.startswith(_SAVED_OUTPUT_PREFIX):
                op = _identity(block, target.name)
                if op is None:  # another tool has inserted an op here, such as Q/DQ, or reads this output elsewhere
                    name = _free_name(block, f"output_{index}")
                    block._rename_var(target.name, name)
                    target = block.var(name)
                    break
                wrapper, target = target, block.var(op.input("X")[0])
                block._remove_op(block.ops.index(op), sync=False)
                block._remove_var(wrapper.name, sync=False)  # another output may reuse its name with another type
            self.fetch_targets[index] = target

    def _forget_unused_inputs(self) -> None:
        needed = {target.name for target in self.fetch_targets}
        for op in reversed(self.program.global_block().ops):
            if not needed.isdisjoint(op.output_arg_names):
                needed.update(op.input_arg_names)
        self.feed_names = [name for name in self.feed_names if name in needed]

    def parameter(self, name: str) -> np.ndarray:
        """Return a copy of a parameter's value."""
        return np.array(self.scope.find_var(name).get_tensor())

    def set_parameter(self, name: str, value: np.ndarray) -> None:
        """Set a variable of the scope, which is created if it does not exist; the program is unchanged.

        Args:
            name: name of the parameter.
            value: its value, of the shape and type of the variable in the program.
        """
        import paddle

        self.scope.var(name).get_tensor().set(np.ascontiguousarray(value), paddle.CPUPlace())

    def add_parameter(self, name: str, value: np.ndarray) -> Any:
        """Add a persistable variable to the program and set its value.

        Args:
            name: name of the new parameter.
            value: its value; determines shape and type.

        Returns:
            The variable.
        """
        variable = self.program.global_block().create_var(
            name=name, shape=list(value.shape), dtype=str(value.dtype), persistable=True, stop_gradient=True
        )
        self.set_parameter(name, value)
        return variable

    def is_parameter(self, name: str) -> bool:
        from paddle.base.core import VarDesc

        block = self.program.global_block()
        # The variables of feed and fetch are persistable too, but not tensors.
        return (
            block.has_var(name) and block.var(name).persistable and block.var(name).type == VarDesc.VarType.LOD_TENSOR
        )

    def remove_unused_parameters(self) -> None:
        """Remove all variables that no op reads or writes, so that unused parameters are not saved."""
        block = self.program.global_block()
        used = {name for op in block.ops for name in (*op.input_arg_names, *op.output_arg_names)}
        for name in [name for name in block.vars if name not in used]:
            block._remove_var(name, sync=False)


def _identity(block: Any, name: str) -> Any:
    """Return the identity ``scale`` op that writes ``name``; None if there is none, or another op reads ``name``."""
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
    """Remove the trace attributes from a file, because Paddle also adds them to the ops that saving creates."""
    program = parsed(model_path.read_bytes())
    for block in program.blocks:
        for op in block.ops:
            keep(op.attrs, lambda attribute: attribute.name not in _TRACE_ATTRIBUTES)
    model_path.write_bytes(program.SerializeToString())
