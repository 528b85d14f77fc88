"""``.pdmodel`` and ``.pdiparams``: ``graph.model_files.inspect_model``, then Paddle itself in a child process."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.graph.model_files import inspect_model
from tests.fuzz.harness import Target
from tests.fuzz.mutate import ODD_NUMBERS, raw

# Less than the harness allows, so that the child does not outlive it.
_SECONDS = 40


def _examples(folder: Path) -> st.SearchStrategy[tuple[bytes, bytes]]:
    import paddle  # noqa: F401
    from paddle.base.proto import framework_pb2

    # In a child too: what has run in a process may not run in its fork.
    _in_child(lambda: _make(folder))
    model = InferenceModel.load(folder / "valid")
    program, parameters = model.model_path.read_bytes(), model.params_path.read_bytes()
    integers = [number for number in ODD_NUMBERS if isinstance(number, int)]

    @st.composite
    def changed(draw: st.DrawFn) -> bytes:
        desc = framework_pb2.ProgramDesc.FromString(program)
        for _ in range(draw(st.integers(1, 2))):
            block = desc.blocks[0] if desc.blocks else desc.blocks.add(idx=0, parent_idx=-1)
            message = draw(
                st.sampled_from(
                    [
                        desc,
                        block,
                        *block.ops,
                        *block.vars,
                        *(slot for op in block.ops for slot in (*op.inputs, *op.outputs)),
                        *(attribute for op in block.ops for attribute in op.attrs),
                        *(variable.type for variable in block.vars),
                        *(variable.type.lod_tensor.tensor for variable in block.vars),
                    ]
                )
            )
            field = draw(st.sampled_from(list(message.DESCRIPTOR.fields)))
            kind = draw(st.sampled_from(["clear", "double", "set"]))
            if kind == "clear":
                message.ClearField(field.name)
            elif hasattr(getattr(message, field.name), "append"):
                values = getattr(message, field.name)
                if not len(values):
                    continue
                index = draw(st.integers(0, len(values) - 1))
                if kind == "double":
                    values.append(values[index])
                else:
                    del values[index]
            elif field.type == field.TYPE_STRING:
                names = [op.type for op in block.ops] + [variable.name for variable in block.vars]
                setattr(message, field.name, draw(st.sampled_from(["", "nothing", *sorted(set(names))])))
            elif field.cpp_type in (field.CPPTYPE_INT32, field.CPPTYPE_INT64):
                setattr(message, field.name, draw(st.sampled_from([n for n in integers if abs(n) < 2**31])))
            elif field.type == field.TYPE_BOOL:
                setattr(message, field.name, draw(st.booleans()))
            elif field.type == field.TYPE_ENUM:
                setattr(message, field.name, draw(st.sampled_from([value.number for value in field.enum_type.values])))
        return desc.SerializePartialToString()

    return st.one_of(
        st.tuples(raw([program]), st.just(parameters)),
        st.tuples(st.just(program), raw([parameters])),
        st.tuples(changed(), st.just(parameters)),
    )


def _make(folder: Path) -> None:
    from inference_fixtures import export_tiny_model

    export_tiny_model(folder / "valid", quantized=True)


def _read(folder: Path, example: tuple[bytes, bytes]) -> None:
    directory = folder / "model"
    directory.mkdir(exist_ok=True)
    model = InferenceModel(directory)
    model.model_path.write_bytes(example[0])
    model.params_path.write_bytes(example[1])
    model = InferenceModel.load(directory)
    summary = inspect_model(model)
    summary.quantized, summary.input_size  # noqa: B018  (a property that reads)
    _in_child(lambda: _load(model))


def _load(model: InferenceModel) -> None:
    from act_pipeline.graph.static_graph import StaticGraph, static_mode

    with static_mode():
        graph = StaticGraph.load(model)
        for name in summary_parameters(graph):
            graph.parameter(name)


def summary_parameters(graph: Any) -> list[str]:
    """Return the parameters of a loaded graph."""
    return [name for name in graph.program.global_block().vars if graph.is_parameter(name)]


def _in_child(work: Callable[[], None]) -> None:
    """Run ``work`` in a fork of this process.

    Raises:
        UserError: it raised one.
        AssertionError: it raised something else, was ended by a signal, or took too long.
    """
    ready, answer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ready)
        message = ""
        try:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 1)
            os.dup2(null, 2)
            signal.setitimer(signal.ITIMER_REAL, 0)
            work()
            message = "fine"
        except UserError as error:
            message = f"refused{error}"
        except BaseException as error:
            message = f"raised {type(error).__name__}: {error}"[:2000]
        finally:
            os.write(answer, message.encode("utf-8", "replace"))
            os._exit(0)
    os.close(answer)
    try:
        readable, _, _ = select.select([ready], [], [], _SECONDS)
        said = os.read(ready, 4096).decode() if readable else ""
        if not readable:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    finally:
        os.close(ready)
    if said.startswith("refused"):
        raise UserError(said[len("refused") :])
    assert readable, f"Paddle took more than {_SECONDS} s"
    assert said == "fine" and status == 0, said or f"Paddle ended the process with the signal {os.WTERMSIG(status)}"


PADDLE_MODEL = Target("paddle_model", _examples, _read)
