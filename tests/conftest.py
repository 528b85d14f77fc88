"""Fixtures that are made once and shared, and the order in which several processes share the tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from together import a_turn, keep_to_own_cores, together  # noqa: E402

keep_to_own_cores()

from inference_fixtures import float_model, int8_model  # noqa: E402, F401
from sample_fixtures import demo, sample_model  # noqa: E402, F401

import act_pipeline  # noqa: E402, F401  (makes paddle importable, whichever test imports it first)

# Processes take one file after another. These come first, those that take minutes before the others, so that no process
# begins a long one when the others have nothing left; while one makes the demo, another has tests that do not need it.
FIRST = ("test_strategies.py", "test_survival.py", "test_sizes.py", "test_compress.py", "test_rtdetr.py")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    """A cache of the tests' own: nothing is taken from the user's, and nothing is left there."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("ACT_PIPELINE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take long first."""
    if together():
        items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item):
    """Run what is marked ``alone`` while no other process runs a test; its fixtures are made within."""
    with a_turn(item.config._tmp_path_factory, item.get_closest_marker("alone") is not None):
        return (yield)
