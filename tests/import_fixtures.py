"""What the tests of imported weights share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from act_pipeline.export import ExportPlan


def catch_models(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the list that gets the models that imports fill from now on, instead of an export."""
    models: list[Any] = []

    def build_and_load(plan: ExportPlan, load: Callable[[Any], None], *_: Any) -> None:
        from act_pipeline.rtdetr.build import build_model

        models.append(build_model(plan.content, source=plan.source))
        load(models[-1])

    monkeypatch.setattr(ExportPlan, "export", build_and_load)
    return models
