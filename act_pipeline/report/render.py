"""Rendering of a report's record as one HTML page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from act_pipeline.core.command_names import name_commands
from act_pipeline.core.tables import BYTES_PER_MB
from act_pipeline.report import figures
from act_pipeline.report.texts import stage_name, texts

_FOLDER = Path(__file__).resolve().parent
_NOTHING = "–"
_MINUS = "\N{MINUS SIGN}"

Photograph = Callable[[Mapping[str, Any]], "tuple[str, int, int] | None"]


def number(value: float | None, digits: int = 0, sign: bool = False, scale: float = 1.0) -> Markup:
    """Format a number, with its full value in the markup: ``<data value="0.6419605">0.6420</data>``.

    Args:
        value: the value in the record; None gives a dash.
        digits: number of decimals.
        sign: show a plus sign for positive values.
        scale: the displayed value is ``value * scale``.
    """
    if value is None:
        return Markup(f'<span class="none">{_NOTHING}</span>')
    shown = round(value * scale, digits)
    text = f"{abs(shown):,.{digits}f}"
    if shown < 0:
        text = _MINUS + text
    elif sign and shown > 0:
        text = "+" + text
    return Markup('<data value="{}">{}</data>').format(repr(value), text)


def percent(value: float | None, digits: int = 0) -> Markup:
    """Format a share in [0, 1] as a percentage."""
    return number(value, digits, scale=100) + Markup("&#8239;%") if value is not None else number(None)


def megabytes(value: float | None) -> Markup:
    """Format a number of bytes in MB."""
    return number(value, 2, scale=1 / BYTES_PER_MB)


def render(record: Mapping[str, Any], lang: str, photograph: Photograph) -> str:
    """Render a record as an HTML page.

    Args:
        record: the content of ``report.json``.
        lang: ``en`` or ``zh``.
        photograph: returns data URI, width and height for an entry of ``pictures``, or None.
    """
    words = texts(lang)
    environment = Environment(
        loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    drawn: list[str] = []

    def say(text: str, /, **values: Any) -> Markup:
        return Markup(escape(words[text])).format(**values)

    def chart(drawing: str, label: str) -> Markup:
        drawn.append(drawing)
        body = figures.with_ids(drawing, f"c{len(drawn)}-")
        return Markup(body.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" class="chart" ', 1))

    environment.globals.update(
        t=say, n=number, pct=percent, mb=megabytes, chart=chart, words=words, lang=lang,
        stage=lambda name: stage_name(name, lang), photograph=photograph, as_yaml=_as_yaml, figures=figures,
        style=Markup((_FOLDER / "page.css").read_text(encoding="utf-8")), short=short_name,
        label_y=_label_y,
    )  # fmt: skip
    return name_commands(environment.get_template("page.html").render(record=record, r=record))


def _label_y(status: str, y: float, box_height: float, size: float, height: float) -> float:
    """Return the y of a box's label: above common boxes, below those of one model, so that labels do not overlap."""
    if status == "both":
        return y - size * 0.25 if y > size else min(y + size, height - 2)
    below = y + box_height + size
    return below if below < height - 2 else min(y + box_height, height) - size * 0.3


def short_name(name: str, length: int = 12) -> str:
    """Return a hash (without ``sha256:``) or a name, truncated to ``length`` characters."""
    bare = str(name).partition("sha256:")[2] or str(name)
    return bare if len(bare) <= length else bare[:length]


def _as_yaml(config: Mapping[str, Any]) -> str:
    return yaml.safe_dump(
        {key: value for key, value in config.items() if key != "path"}, sort_keys=False, allow_unicode=True
    )
