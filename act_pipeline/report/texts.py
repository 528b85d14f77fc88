"""The words of a report, by language; ``texts_en.py`` says what each is for."""

from __future__ import annotations

from collections.abc import Mapping

from act_pipeline.report import texts_en, texts_zh

LANGUAGES = ("en", "zh")
_MODULES = {"en": texts_en, "zh": texts_zh}


def texts(lang: str) -> Mapping[str, str]:
    """Return name -> text; ``{}`` in a text is where a figure goes."""
    return _MODULES[lang].TEXTS


def stage_name(stage: str, lang: str) -> str:
    """Return what a stage of ``act.json`` is called; its own name where we have none."""
    return _MODULES[lang].STAGES.get(stage, stage)
