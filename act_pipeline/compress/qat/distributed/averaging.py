"""Average all values that differ between the ranks of a training, within the training program, in every step.

These are the gradients, the loss, and the state of the forward pass: the moving averages of the activations' scales.
A single all-reduce takes all of them as one vector, between backward and optimizer. Several operations would not be
matched correctly between the ranks, since the order of a program's ops and the numbers in variable names differ between
processes (`compress.qat.state`).

Afterwards weights, optimizer state and scales are equal on all ranks bit by bit. A scale is the moving average of the
mean, over the ranks, of each batch's maximum; a single process with the whole batch would use the maximum instead.

PaddleSlim 2.6.0 averages only the gradients, by ``fleet``, and saves the scales of rank 0. Paddle 2.6.2's ``fleet``
fails with protobuf 7 (``FieldDescriptor.label``), so this module inserts the same ops that ``fleet`` would insert.
"""

from __future__ import annotations

import math
from typing import Any

from act_pipeline.compress.qat import state
from act_pipeline.compress.qat.distributed import gloo_store
from act_pipeline.compress.qat.distributed.follower import Follower
from act_pipeline.compress.qat.distributed.leader import Leader
from act_pipeline.compress.qat.distributed.ranks import Ranks
from act_pipeline.graph.op_inserter import Inserter

# Paddle's OpRole.
_BACKWARD, _OPTIMIZE = 1, 2
_RING = 0


def connect(ranks: Ranks, device: str) -> None:
    """Let collective operations work between the ranks: by NCCL on ``GPU``, by Gloo on ``CPU``; once.

    Only the first call in a process has an effect, and only with several ranks.

    Args:
        ranks: the processes that train together.
        device: ``CPU`` or ``GPU``.
    """
    if ranks.world == 1 or ranks.connected:
        return
    if device == "GPU":
        import paddle

        # In static mode Paddle would look for the communicators of Paddle 1.
        paddle.disable_static()
        try:
            paddle.distributed.init_parallel_env()
        finally:
            paddle.enable_static()
    else:
        _connect_gloo(ranks)
    ranks.connected = True


def _connect_gloo(ranks: Ranks) -> None:
    """Do the same as ``paddle.distributed.gloo_init_parallel_env``, without its fixed waiting times."""
    if isinstance(ranks, Leader):
        with gloo_store.running(ranks.host) as port:
            ranks.tell("gloo", host=ranks.host, port=port)
            _start_gloo(ranks, ranks.host, port)
            ranks.hear_all()  # the store has to run until all ranks have read the addresses
    else:
        assert isinstance(ranks, Follower)
        place = ranks.receive().fields
        _start_gloo(ranks, place["host"], place["port"])
        ranks.say("connected")


def _start_gloo(ranks: Ranks, host: str, port: int) -> None:
    from paddle.base import core

    strategy = core.GlooParallelStrategy()
    strategy.rank, strategy.rank_num = ranks.rank, ranks.world
    strategy.ip_address, strategy.ip_port = host, port
    # Between steps no rank is in a collective operation (followers wait for a message), so that the run timeout is
    # never reached.
    strategy.init_seconds, strategy.run_seconds = 120, 9_999_999
    core.GlooParallelContext(strategy).init()


def average(info: Any, world: int) -> list[str]:
    """Insert the averaging into a training program.

    Args:
        info: PaddleSlim's ``ProgramInfo``; its program is changed in place.
        world: the number of ranks.

    Returns:
        The names of the averaged variables.

    Raises:
        RuntimeError: an op of the backward pass follows the optimizer's first op.
    """
    program = info.program
    block = program.global_block()
    roles = [op.attr("op_role") if op.has_attr("op_role") else 0 for op in block.ops]
    first = next(index for index, role in enumerate(roles) if role & _OPTIMIZE)
    if any(role & _BACKWARD for role in roles[first:]):
        raise RuntimeError("the optimizer's ops do not follow the gradients' in PaddleSlim's program")
    gradients = {
        op.attr("op_role_var")[index]
        for op, role in zip(block.ops[:first], roles)
        if role & _BACKWARD and op.has_attr("op_role_var")
        for index in range(1, len(op.attr("op_role_var")), 2)
    }
    written = {name for op in block.ops[:first] for name in op.output_arg_names}
    changing = [
        name
        for _, name in sorted(state.changing_variables([info]).items())
        if name in written and _is_float(block.var(name))
    ]
    names = [*sorted(gradients), *changing, info.fetch_targets[0].name]
    _insert(block, first, names, world)
    program._sync_with_cpp()
    return names


def _is_float(variable: Any) -> bool:
    import paddle

    return variable.dtype == paddle.float32


def _insert(block: Any, index: int, names: list[str], world: int) -> None:
    def variable(name: str, shape: list[int]) -> Any:
        dtype = block.var(names[0]).dtype
        return block.create_var(name=f"ranks@{name}", shape=shape, dtype=dtype, stop_gradient=True)

    new_ops = Inserter(block, index, op_role=_BACKWARD)

    def reshape(source: Any, target: Any, shape: list[int]) -> None:
        shape_of = variable(f"{source.name}@shape", [0, *source.shape])
        new_ops.add("reshape2", {"X": source}, {"Out": target, "XShape": shape_of}, shape=shape)

    sizes = [math.prod(block.var(name).shape) for name in names]
    flat = [variable(f"{name}@flat", [size]) for name, size in zip(names, sizes)]
    means = [variable(f"{name}@mean", [size]) for name, size in zip(names, sizes)]
    own, total, mean = (variable(name, [sum(sizes)]) for name in ("own", "total", "mean"))
    for name, part, size in zip(names, flat, sizes):
        reshape(block.var(name), part, [size])
    new_ops.add("concat", {"X": flat}, {"Out": own}, axis=0)
    new_ops.add("c_allreduce_sum", {"X": own}, {"Out": total}, ring_id=_RING, use_calc_stream=True)
    new_ops.add("scale", {"X": total}, {"Out": mean}, scale=1.0 / world)
    new_ops.add("split", {"X": mean}, {"Out": means}, axis=0, sections=sizes)
    for name, part in zip(names, means):
        reshape(part, block.var(name), list(block.var(name).shape))
