"""Shared fixtures that are made once, and the order of the test files in parallel runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from together import a_turn, keep_to_own_cores, together  # noqa: E402

keep_to_own_cores()

from inference_fixtures import float_model, int8_model  # noqa: E402, F401
from placement_fixtures import four_groups  # noqa: E402, F401
from sample_fixtures import demo, sample_model  # noqa: E402, F401

import act_pipeline  # noqa: E402, F401  (makes paddle importable, whichever test imports it first)

# Each process takes one file at a time. Slow files come first, so that no process starts one when the others have
# nothing left to run. While one process makes the demo, another has tests that do not need it.
FIRST = ("test_strategies.py", "test_survival.py", "test_sizes.py", "test_compress.py", "test_rtdetr.py")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    """Use a separate cache, so that the user's cache is neither read nor written."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("ACT_PIPELINE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the slow files first."""
    if together():
        items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item):
    """Run a test marked ``alone``, including its fixtures, while no other process runs a test."""
    with a_turn(item.config._tmp_path_factory, item.get_closest_marker("alone") is not None):
        return (yield)
