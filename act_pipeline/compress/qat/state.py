"""Read and write the state of a training in Paddle, NumPy and Python as plain values.

Paddle 2.6.2 returns the state of its random generator as an object that cannot be serialized. Every step therefore
seeds the generator with its own number (:func:`seed_step`), as `data.loader` does for every epoch, so that the number
of the step is the state.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from typing import Any

import numpy as np

from act_pipeline.compress.paddleslim.prefixes import TEACHER_PREFIX
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.graph.model_files import inspect_model
from act_pipeline.graph.parameters_file import read_parameters

_OBSERVER = "moving_average_abs_max_scale"
# Inputs of Paddle's fake-quantization ops whose variables have numbered names.
_NUMBERED_SLOTS = {"InState", "InAccum", "Iter", "InScales"}


def program_of(info: Any) -> Any:
    """Return the program of PaddleSlim's ``ProgramInfo``, whether it is compiled or not."""
    return getattr(info.program, "_program", info.program)


def changing_variables(infos: Iterable[Any]) -> dict[str, str]:
    """Return the variables that training may change.

    These are all persistable variables, without constants of the teacher. A learning rate that follows a schedule is
    not included, since every run of the program sets it from the state of the schedule.

    Args:
        infos: PaddleSlim's ``ProgramInfo`` of each program.

    Returns:
        A name that is the same in every run -> the variable's name in this run. They differ for the moving averages,
        which Paddle's passes number (``accum_3``) in the order of memory addresses. A tensor that an op with a weight
        and one without read is rounded by two ops, one of each pass: their averages cannot be told apart, and need not
        be, since they are those of the same values.
    """
    names, written, roles = set(), set(), {}
    for info in infos:
        program = program_of(info)
        scheduled = getattr(getattr(program, "lr_scheduler", None), "_var_name", None)
        names |= {variable.name for variable in program.list_vars() if variable.persistable} - {scheduled}
        for op in program.global_block().ops:
            written.update(op.output_arg_names)
            for slot in _NUMBERED_SLOTS.intersection(op.input_names):
                for name in op.input(slot):
                    roles[name] = f"{op.type}:{op.input('X')[0]}:{slot}"
    constant = {name for name in names - written if name.startswith(TEACHER_PREFIX)}
    kept = sorted(names - constant - {"feed", "fetch"})
    counts: Counter[str] = Counter()
    found = {}
    for name in kept:
        role = roles.get(name, name)
        counts[role] += 1
        found[role if counts[role] == 1 else f"{role}:{counts[role]}"] = name
    return found


def observed_only(infos: Iterable[Any]) -> set[str]:
    """Return the variables that only observers write: scales of tensors without Q/DQ.

    Args:
        infos: PaddleSlim's ``ProgramInfo`` of each program.
    """
    by_observers: set[str] = set()
    by_others: set[str] = set()
    for info in infos:
        for op in program_of(info).global_block().ops:
            (by_observers if op.type == _OBSERVER else by_others).update(op.output_arg_names)
    return by_observers - by_others


def start_moving_averages(info: Any, thresholds: Mapping[str, float], place: Any) -> int:
    """Set the moving averages of tensors in the current scope to their limits for a constant maximum.

    ``moving_average_abs_max`` is ``accum / state`` with ``accum = rate * accum + abs_max`` and
    ``state = rate * state + 1``. If ``abs_max`` is always ``threshold``, the limits are ``threshold / (1 - rate)`` and
    ``1 / (1 - rate)``.

    Args:
        info: PaddleSlim's ``ProgramInfo`` of the training program.
        thresholds: tensor, quantized or only observed -> its largest absolute value. Tensors that are not listed, or
            whose value is 0, are left unchanged.
        place: the device of the variables.

    Returns:
        The number of tensors whose moving averages were set.
    """
    import paddle

    scope = paddle.static.global_scope()
    scales = {"quantize_linear": "Scale", _OBSERVER: "OutScale"}
    found = 0
    for op in program_of(info).global_block().ops:
        if op.type not in scales or "InState" not in op.input_names or not op.input("InState"):
            continue
        value = thresholds.get(op.input("X")[0])
        if not value:
            continue
        state = 1 / (1 - op.attr("moving_rate"))
        scale = (op.input if op.type == "quantize_linear" else op.output)(scales[op.type])[0]
        for name, number in ((scale, value), (op.input("InAccum")[0], value * state), (op.input("InState")[0], state)):
            tensor = scope.find_var(name).get_tensor()
            tensor.set(np.full(tensor.shape(), number, np.array(tensor).dtype), place)
        found += 1
    return found


def start_biases(info: Any, model: InferenceModel, place: Any) -> int:
    """Set trained parameters in the current scope to the float32 parameters of a calibrated model.

    These are mainly biases, which calibration may have corrected.

    Args:
        info: PaddleSlim's ``ProgramInfo`` of the training program.
        model: the calibrated INT8 model; its integer weights are ignored.
        place: the device of the variables.

    Returns:
        The number of parameters that were set.
    """
    import paddle

    scope, found = paddle.static.global_scope(), 0
    values = read_parameters(model, inspect_model(model).parameters)
    for op in program_of(info).global_block().ops:
        name = op.input("Param")[0] if "Param" in op.input_names else ""
        tensor = scope.find_var(name).get_tensor() if name in values else None
        if tensor is not None and values[name].dtype == np.float32 and tensor.shape() == [*values[name].shape]:
            tensor.set(values[name], place)
            found += 1
    return found


def read_variables(names: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Return copies of variables of the current scope, without those that are not initialized.

    Args:
        names: key -> name of the variable, the output of :func:`changing_variables`.

    Returns:
        Key -> value.
    """
    import paddle

    scope = paddle.static.global_scope()
    values = {}
    for key, name in names.items():
        variable = scope.find_var(name)
        if variable is not None and variable.get_tensor()._is_initialized():
            values[key] = np.array(variable.get_tensor())
    return values


def write_variables(values: Mapping[str, np.ndarray], names: Mapping[str, str], place: Any) -> None:
    """Set variables of the current scope.

    Args:
        values: key -> value, the output of :func:`read_variables`.
        names: key -> name of the variable.
        place: the device of the variables.

    Raises:
        UserError: a variable does not exist or has another shape, since the values belong to another program.
    """
    import paddle

    scope = paddle.static.global_scope()
    for name, value in values.items():
        variable = scope.find_var(names.get(name, ""))
        found = tuple(variable.get_tensor().shape()) if variable is not None else None
        if found != value.shape:
            raise UserError(
                f"the checkpoint's variable {name} has the shape {value.shape}, expected {found}; start from the "
                "beginning, without --resume"
            )
        variable.get_tensor().set(value, place)


def first_not_finite(values: Mapping[str, np.ndarray], but: Container[str] = ()) -> str:
    """Return the name of the first float variable with a NaN or infinite value; empty if there is none.

    Args:
        values: name -> value.
        but: names to ignore.
    """
    for name, value in values.items():
        if name not in but and value.dtype.kind == "f" and not np.isfinite(value).all():
            return name
    return ""


def seed_step(iteration: int) -> None:
    """Seed Paddle's random generator with the number of the step, so that its state need not be saved."""
    import paddle

    paddle.seed(iteration)


def read_random_states() -> dict[str, Any]:
    """Return the states of Python's and NumPy's global random generators, in JSON types."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
    }


def write_random_states(states: Mapping[str, Any]) -> None:
    """Set the states of Python's and NumPy's global random generators to the output of :func:`read_random_states`."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))


def seed_all(seed: int) -> None:
    """Seed Python's and NumPy's global random generators."""
    random.seed(seed)
    np.random.seed(seed)


def plain(value: Any) -> Any:
    """Return a learning-rate scheduler's state in JSON types; floats keep their full precision."""
    if isinstance(value, Mapping):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return value.item() if isinstance(value, np.generic) else value
