"""Models that compute what a given one does in float, and are hard to calibrate: channels of very different ranges.

    python tests/hard_models.py depthwise output/rtdetr_sample output/hard

`conv`: one channel between two convolutions is 1,000 times as large. `norm`: four channels of every LayerNorm that a
matmul reads are 100 times as large, and divided again for its other readers. `depthwise`: the channels that depthwise
convolutions read are scaled by random powers of ten, as in MobileNet (Nagel et al. 2019, figure 2).
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from act_pipeline.cli.flags import Parser
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError, run_command
from act_pipeline.graph.folding import prepare
from act_pipeline.graph.op_index import GraphIndex
from act_pipeline.graph.static_graph import StaticGraph, static_mode


def scaled_convolution(graph: StaticGraph, index: int = 4, size: float = 1000.0) -> str:
    """Scale a channel between two convolutions, with ReLU, and back; return the op with the hard activations."""
    block = graph.program.global_block()
    ops = GraphIndex(block.ops)
    chains = []
    for op in block.ops:
        relu = ops.producer.get(op.input("Input")[0]) if op.type == "conv2d" else None
        if relu is None or relu.type != "relu" or len(ops.readers[relu.output_arg_names[0]]) != 1:
            continue
        add = ops.producer[relu.input("X")[0]]
        before = ops.producer.get(add.input("X")[0]) if add.type == "elementwise_add" else None
        if before is not None and before.type == "conv2d":
            chains.append((before.input("Filter")[0], add.input("Y")[0], op))
    if len(chains) <= index:
        raise UserError(
            f"the model has {len(chains)} pairs of convolutions with ReLU only between, expected {index + 1}"
        )
    weight, bias, op = chains[index]
    for name, places, factor in (
        (weight, np.s_[3], size),
        (bias, np.s_[3], size),
        (op.input("Filter")[0], np.s_[:, 3], 1 / size),
    ):
        value = graph.parameter(name)
        scaled = value.reshape(-1) if name == bias else value
        scaled[places] *= factor
        graph.set_parameter(name, scaled.reshape(value.shape))
    return str(op.output_arg_names[0])


def scaled_depthwise(graph: StaticGraph, seed: int = 0, decades: int = 2) -> int:
    """Scale the channels that depthwise convolutions read by powers of ten, and their weights back.

    Args:
        graph: a float graph with folded BatchNorm.
        seed: of the random powers.
        decades: the powers are whole numbers from ``-decades`` to ``decades``.

    Returns:
        The number of depthwise convolutions.
    """
    block = graph.program.global_block()
    ops, random, changed = GraphIndex(block.ops), np.random.default_rng(seed), 0
    for op in block.ops:
        add = ops.producer.get(op.input("Input")[0]) if op.type == "depthwise_conv2d" else None
        if add is None or add.type != "elementwise_add" or len(ops.readers[add.output_arg_names[0]]) != 1:
            continue
        before = ops.producer[add.input("X")[0]]
        weight, bias, own = before.input("Filter")[0], add.input("Y")[0], op.input("Filter")[0]
        factors = np.float32(10) ** random.integers(-decades, decades + 1, graph.parameter(own).shape[0])
        for name, scale in ((weight, factors), (bias, factors), (own, 1 / factors)):
            value = graph.parameter(name)
            scaled = value.reshape(len(factors), -1) * scale[:, None]
            graph.set_parameter(name, scaled.reshape(value.shape).astype(np.float32))
        changed += 1
    return changed


def scaled_norms(graph: StaticGraph, size: float = 100.0) -> int:
    """Scale four channels of every norm that a matmul reads, compensate in all readers; return the number of norms."""
    block = graph.program.global_block()
    changed = 0
    for norm in [op for op in block.ops if op.type == "layer_norm"]:
        name = norm.output("Y")[0]
        readers = [op for op in block.ops if name in op.input_arg_names]
        matmuls = [op for op in readers if op.type == "matmul_v2"]
        if not matmuls:
            continue
        large = np.ones(block.var(name).shape[-1], np.float32)
        large[np.random.default_rng(changed).choice(len(large), 4, replace=False)] = size
        for slot in ("Scale", "Bias"):
            graph.set_parameter(norm.input(slot)[0], graph.parameter(norm.input(slot)[0]) * large)
        for op in matmuls:
            weight = op.input("Y")[0]
            graph.set_parameter(weight, graph.parameter(weight) / large[:, None])
        back = graph.add_parameter(f"{name}.back", 1 / large)
        like = block.var(name)
        calm = block.create_var(name=f"{name}.calm", shape=like.shape, dtype=like.dtype)
        block._insert_op_without_sync(
            block.ops.index(norm) + 1,
            type="elementwise_mul",
            inputs={"X": [like], "Y": [back]},
            outputs={"Out": [calm]},
            attrs={"axis": -1},
        )
        for op in readers:
            for slot in op.input_names:
                if op not in matmuls and name in op.input(slot):
                    op.desc.set_input(slot, [calm.name if given == name else given for given in op.input(slot)])
        changed += 1
    return changed


KINDS: dict[str, Callable[[StaticGraph], object]] = {
    "conv": scaled_convolution,
    "norm": scaled_norms,
    "depthwise": scaled_depthwise,
}


def harden(
    model: InferenceModel, folder: Path, change: Callable[[StaticGraph], object]
) -> tuple[InferenceModel, object]:
    """Write a hard model with the same detections.

    Args:
        model: a float model.
        folder: a folder for the model.
        change: one of :data:`KINDS`.

    Returns:
        the model, and the result of ``change``.
    """
    with static_mode():
        graph = StaticGraph.load(prepare(model, folder))
        graph.unwrap_outputs()
        found = change(graph)
        saved = graph.save(folder)
    shutil.copyfile(model.infer_cfg_path, folder / "infer_cfg.yml")
    return saved, found


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("kind", choices=list(KINDS))
    parser.add_argument("model", help="folder of a float model")
    parser.add_argument("output", help="folder for the hard model")
    arguments = parser.parse(argv)
    _, found = harden(InferenceModel.load(arguments.model), Path(arguments.output), KINDS[arguments.kind])
    print(f"{arguments.output}: {arguments.kind}, {found}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
