"""Write ``report.html`` and ``report.json`` into the folder of an INT8 model, from records."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.atomic_files import write_text_atomically
from act_pipeline.core.errors import UserError, suggest
from act_pipeline.core.records import write_record
from act_pipeline.data.annotations import image_path
from act_pipeline.data.model_fit import with_classes_of
from act_pipeline.data.reader import Reader
from act_pipeline.report.content import REPORT_SCHEMA, ReportReader, build
from act_pipeline.report.pictures import photograph
from act_pipeline.report.render import render
from act_pipeline.report.scalars import write_scalars
from act_pipeline.report.sources import Sources
from act_pipeline.report.texts import LANGUAGES

REPORT_FILENAME, RECORD_FILENAME = "report.html", "report.json"
SCALARS_DIRECTORY = "visualdl"


def write_report(
    artifact: str | os.PathLike[str],
    reader: ReportReader,
    evals: Sequence[str | os.PathLike[str]] = (),
    *,
    lang: str = "en",
    analysis: str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] | None = None,
    benchmark: str | os.PathLike[str] | None = None,
    name: str | None = None,
    search: str | os.PathLike[str] | None = None,
) -> Path:
    """Write ``report.html`` and the record of its figures, ``report.json``, into the folder of an INT8 model.

    If VisualDL is installed, the scalars of a training are written to ``visualdl`` in the folder. No model is run: the
    figures come from ``act.json``, ``detections.npz``, ``analysis.json`` and ``search.json`` in the folder, and from
    the given records. For figures that were not measured, the page states how to measure them.

    Args:
        artifact: the folder of the INT8 model, with ``act.json``.
        reader: the data that the model was evaluated on; annotations and images are read only if detections were
            stored.
        evals: ``eval.json`` files, for FP16 and for latencies in the deployment engines.
        lang: ``en`` or ``zh``.
        analysis: an ``analysis.json`` other than the one in the folder.
        progress: is called with one line per step.
        benchmark: a ``benchmark.json``.
        name: name of the model in the page; None for its folder's name. Needed if the folder has a temporary name.
        search: a ``search.json`` other than the one in the folder.

    Returns:
        the path of ``report.html``.

    Raises:
        UserError: a record or the data is missing or has other content, or the language is not available.
    """
    if lang not in LANGUAGES:
        raise UserError(f"no report in '{lang}', expected one of {', '.join(LANGUAGES)}{suggest(lang, LANGUAGES)}")
    say = progress or (lambda line: None)
    folder = Path(artifact)
    say(f"reading the records of {folder}")
    sources = Sources.read(folder, evals, analysis, benchmark, search)
    if isinstance(reader, Reader) and reader.settings.classes is None:
        reader = with_classes_of(InferenceModel(folder), reader)
    if sources.detections is not None:
        say("scoring and comparing the detections of both models")
    record = build(sources, reader, name or folder.resolve().name)
    say(f"drawing {folder / REPORT_FILENAME}")

    def picture(entry: Mapping[str, Any]) -> Any:
        return photograph(image_path(Path(reader.image_dir("eval")), entry["file_name"]))

    page = render(record, lang, picture)
    write_record(folder / RECORD_FILENAME, REPORT_SCHEMA, record)
    write_text_atomically(folder / REPORT_FILENAME, page)
    write_scalars(sources.act.training, folder / SCALARS_DIRECTORY)
    return folder / REPORT_FILENAME
