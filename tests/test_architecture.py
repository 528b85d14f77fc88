"""The layout is a contract: what may import what, where Paddle's private names stand, and no state in modules."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "act_pipeline"
# From the ground up: a package imports those before it, and none after it, also inside functions.
LAYERS = (
    "core",
    "config",
    "graph",
    "execution",
    "families",
    "onnx_export",
    "engines",
    "data",
    "rtdetr",
    "export",
    "importers",
    "calibration",
    "evaluation",
    "analysis",
    "benchmark",
    "inference",
    "bundle",
    "triton",
    "report",
    "compress",
    "search",
    "serving",
    "server",
    "demo",
    "doctor",
    "cli",
)
MODULES = sorted(PACKAGE.rglob("*.py"))
# Private to Paddle 2.6.2: programs in protobuf, blocks, passes. Each module says why it needs them.
PRIVATE = ("paddle.base", "framework_pb2", "IrGraph", "_sync_with_cpp", "_insert_op", "_remove_op", "_optimized_guard")
TOUCH_PADDLE = {
    "compress/paddleslim",
    "compress/qat",
    "execution",
    "graph",
    "engines/paddle",
    "compress/accuracy_control/revert.py",
    "engines/machine.py",
    "core/interruption.py",
}


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and name of each module of this package that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("act_pipeline"):
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.startswith("act_pipeline"))


def layer_of(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else ""


def violations(path: Path, module: str) -> list[str]:
    own = LAYERS.index(layer_of(module))
    return [
        f"{path.name}:{line} imports {name}, which stands above it"
        for line, name in imported(path)
        if layer_of(name) in LAYERS and LAYERS.index(layer_of(name)) > own
    ]


def test_every_top_level_name_has_a_layer() -> None:
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert found - {"__init__"} == set(LAYERS)


@pytest.mark.parametrize("layer", LAYERS)
def test_no_package_imports_one_above_it(layer: str) -> None:
    found = []
    for path in MODULES:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if layer_of(module) == layer:
            found += violations(path, module)
    assert not found, "\n".join(found)


def test_an_import_against_the_order_is_found_inside_a_function(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text("def f():\n    from act_pipeline.compress import compress\n")
    assert violations(tmp_path / "wrong.py", "act_pipeline.engines.wrong")
    assert not violations(tmp_path / "wrong.py", "act_pipeline.cli.wrong")


def test_no_module_grows_beyond_one_idea() -> None:
    """CONTRIBUTING.md says about 400 lines."""
    long = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8").count("\n") for path in MODULES}
    assert not {path: lines for path, lines in long.items() if lines > 425}


def test_paddles_private_names_stand_in_the_allotted_modules() -> None:
    found = {
        str(path.relative_to(PACKAGE))
        for path in MODULES
        if any(name in path.read_text(encoding="utf-8") for name in PRIVATE)
    }
    outside = {
        name for name in found if not any(name == place or name.startswith(place + "/") for place in TOUCH_PADDLE)
    }
    assert not outside, outside
    unused = {
        place for place in TOUCH_PADDLE if not any(name == place or name.startswith(place + "/") for name in found)
    }
    assert not unused, f"these need no allowance any more: {unused}"


def test_modules_hold_no_state() -> None:
    """A name of a module is bound once: nothing that one run leaves is met by the next."""
    found = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Global)
    ]
    assert not found, found


def test_functions_write_no_attributes_of_classes() -> None:
    """A class's attribute that a function of its module sets is a global variable under another name."""
    found = []
    for path in MODULES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        classes = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
        for function in ast.walk(tree):
            if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
                found += [
                    f"{path.relative_to(PACKAGE)}:{node.lineno}"
                    for node in ast.walk(function)
                    if isinstance(node, ast.Attribute)
                    and isinstance(node.ctx, ast.Store)
                    and isinstance(node.value, ast.Name)
                    and node.value.id in classes
                ]
    assert not found, found
