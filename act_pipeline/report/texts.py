"""The texts of a report by language; ``texts_en.py`` explains where each is used."""

from __future__ import annotations

from collections.abc import Mapping

from act_pipeline.report import texts_en, texts_zh

LANGUAGES = ("en", "zh")
_MODULES = {"en": texts_en, "zh": texts_zh}


def texts(lang: str) -> Mapping[str, str]:
    """Return name -> text; ``{}`` in a text is replaced by a figure."""
    return _MODULES[lang].TEXTS


def stage_name(stage: str, lang: str) -> str:
    """Return the display name of a stage in ``act.json``, or its own name if there is none."""
    return _MODULES[lang].STAGES.get(stage, stage)
