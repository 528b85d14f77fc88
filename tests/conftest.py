"""Fixtures that are made once and shared."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from inference_fixtures import TRAINED, float_model, int8_model  # noqa: E402, F401

import act_pipeline  # noqa: E402, F401  (makes paddle importable, whichever test imports it first)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    """A cache of the session's own: evaluations of an earlier session, by other code, must not count."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACT_PIPELINE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory):
    """The whole path on the built-in sample, trained for a few iterations."""
    from act_pipeline.demo import WEIGHTS, run_demo

    if not WEIGHTS.exists():
        pytest.fail(f"{WEIGHTS} is missing: the sample's weights belong to the repository")
    root = tmp_path_factory.mktemp("demo")
    made = run_demo(root / "data", root / "output", TRAINED)
    made.root = root
    return made
