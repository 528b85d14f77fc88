"""The search as the last step of a compression: a faster variant as a second result (``Strategy.search``)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from act_pipeline.calibration.feeds import open_reader
from act_pipeline.compress import Compressed
from act_pipeline.config import Config
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.command_names import name_commands
from act_pipeline.core.errors import Interrupted, UserError
from act_pipeline.core.interruption import interruptible
from act_pipeline.core.locking import hold_lock
from act_pipeline.core.records import SEARCH_FILENAME
from act_pipeline.engines.float_model import require_float
from act_pipeline.report import write_report
from act_pipeline.search.outcome import SearchOutcome
from act_pipeline.search.search import search
from act_pipeline.search.variants import Source

# Suffix of the folder of the search, beside the compression's --save_dir.
SEARCH_SUFFIX = ".search"


def check_search(config: Config, save_dir: str | os.PathLike[str], reader_overrides: Sequence[str] = ()) -> None:
    """Check, before a compression, that its model can be searched afterwards.

    Args:
        config: the compression config, with ``Strategy.search``.
        save_dir: the folder for the INT8 model.
        reader_overrides: ``Section.key=value`` each, set over the values of the reader's file.

    Raises:
        UserError: the model was not made by ``tools/export_model.py``, has no variants, or EvalDataset has no labels;
            or the folder of the search is a file.
    """
    places, folder = config.global_, search_folder(save_dir)
    model = InferenceModel.load(places.model_dir, places.model_filename, places.params_filename)
    require_float(model)
    try:
        source = Source.of(model)
        if source.full.layers is None:
            raise UserError(
                f"{model.directory} has no decoder layers and queries to leave out; tools/search.py --sizes tries "
                "other input sizes"
            )
        source.variants()
        reader, _ = open_reader(config, model, reader_overrides)
        reader.require_labels("eval", "the search")
    except UserError as error:
        raise UserError(f"{config.path}: Strategy.search is true, but {error}; or set it to false") from None
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, expected a folder for the search; choose another --save_dir")


def second_result(
    config: Config,
    compressed: Compressed,
    device: str = "auto",
    *,
    progress: bool = True,
    reader_overrides: Sequence[str] = (),
    report: str | None = None,
) -> SearchOutcome:
    """Search for a variant that is faster than a finished compression's INT8 model, which is left as it is.

    The search is in ``<save_dir>.search``. Its ``search.json`` is copied into ``save_dir``, and the report there is
    written again with it.

    Args:
        config: the compression config, checked by :func:`check_search`.
        compressed: the result of the compression, the full model in INT8 of the search.
        device: ``CPU``, ``GPU`` or ``auto``.
        progress: show progress bars on stderr.
        reader_overrides: those of the compression.
        report: language of the compression's report; None: it has none.

    Raises:
        UserError: a variant cannot be made, or another process writes into the folder of the search.
        Interrupted: the process received SIGINT or SIGTERM.
    """
    save_dir = compressed.model.directory
    folder = search_folder(save_dir)
    finished = f"the INT8 model in {save_dir} is finished"
    stopped = name_commands(
        f"the search for a faster variant is not finished, {finished}; tools/search.py with the same config and "
        f"--save_dir={folder} goes on"
    )
    with interruptible(lambda: stopped):
        try:
            with hold_lock(folder):
                outcome = search(
                    config, folder, device, full_int8=compressed.model, progress=progress,
                    reader_overrides=reader_overrides,
                )  # fmt: skip
                shutil.copyfile(folder / SEARCH_FILENAME, save_dir / SEARCH_FILENAME)
            if report is not None:
                model = InferenceModel.load(
                    config.global_.model_dir, config.global_.model_filename, config.global_.params_filename
                )
                write_report(save_dir, open_reader(config, model, reader_overrides)[0], lang=report)
        except Interrupted as error:
            raise Interrupted(error.signum, stopped) from None
        except UserError as error:
            raise UserError(f"the search for a faster variant: {error}; {finished}") from error
    return outcome


def search_folder(save_dir: str | os.PathLike[str]) -> Path:
    """Return the folder of the search that follows a compression into ``save_dir``."""
    return Path(f"{Path(save_dir)}{SEARCH_SUFFIX}")


def second_result_lines(outcome: SearchOutcome, config: Config) -> list[str]:
    """Return the text to print: the table of the search, and one line with the second result."""
    lines = ["", "search for a faster variant", *outcome.table]
    found = outcome.faster
    if found is None:
        return [*lines, f"second result: none, no variant within {outcome.limits} is faster"]
    agreed = "" if found.agreement is None else f", agreement {found.agreement:.4f}"
    return [
        *lines,
        f"second result: {found.words}: {found.ratio:.2f} times as fast as the INT8 model above, mAP {found.map:.4f} "
        f"({-(found.map_drop or 0.0):+.4f} against the float model){agreed}: {found.folder}",
        *outcome.how_to_ship,
    ]
