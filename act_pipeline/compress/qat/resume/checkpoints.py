"""Training checkpoints on disk, in a folder next to ``save_dir``.

The folder ``NAME.checkpoint`` contains ``checkpoint.json`` (identity and progress of the training), ``variables.npz``
(weights, optimizer state, scales) and ``best`` (the best INT8 model so far, ready to run). It is written atomically,
and removed after a successful run.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np

from act_pipeline.core.artifacts import INFER_CFG_FILENAME
from act_pipeline.core.errors import UserError
from act_pipeline.core.hashing import hash_files
from act_pipeline.core.output_folders import clear_leftovers, new_artifact
from act_pipeline.core.records import read_record, write_record

CHECKPOINT_SCHEMA = "act_pipeline.checkpoint/4"
_RECORD, _VARIABLES, _BEST = "checkpoint.json", "variables.npz", "best"


@dataclass
class Snapshot:
    """The state of a training between two steps.

    Attributes:
        progress: JSON types: ``iteration``, ``best`` (``[iteration, agreement]`` or None), and the other entries that
            `compress.qat.resume.training_checkpoint` writes.
        variables: name -> value of every variable that training changes.
        best_model: folder of the best INT8 model so far; None: no model has been evaluated.
    """

    progress: dict[str, Any]
    variables: dict[str, np.ndarray]
    best_model: Optional[Path] = None


class Checkpoints:
    """Read and write the checkpoint of one run.

    Attributes:
        directory: folder of the checkpoint; it need not exist.
        every: iterations between checkpoints; None: only at each new best and at the end.
        resumed: the state of the interrupted run to resume; None: a new run.
        lowest: the ``lowest`` of `compress.qat.training.Training` of that run; empty in a new run.
    """

    def __init__(
        self, save_dir: Path, identity: Mapping[str, Any], every: Optional[int], infer_cfg: Optional[Path] = None
    ) -> None:
        """Store the settings; nothing is read or written yet.

        Args:
            save_dir: folder for the INT8 model.
            identity: everything that determines the result, in JSON types.
            every: iterations between checkpoints; None: only at each new best and at the end.
            infer_cfg: the float model's ``infer_cfg.yml``, which is copied next to the best model.
        """
        target = self._save_dir = Path(save_dir)
        self.directory = target.with_name(f"{target.name}.checkpoint")
        self.every = every
        self.resumed: Optional[Snapshot] = None
        self.lowest: dict[str, float] = {}
        self._identity = dict(identity)
        self._infer_cfg = infer_cfg
        self._iteration: Optional[int] = None
        self._best: Optional[list[Any]] = None

    @contextlib.contextmanager
    def open(self, resume: bool) -> Iterator[None]:
        """Read the checkpoint of an earlier run, and remove the folder after the ``with`` block unless it raises.

        Args:
            resume: resume from the checkpoint. If False, an existing checkpoint is only reported on stderr.

        Raises:
            UserError: the checkpoint to resume from is damaged or belongs to another run.
        """
        clear_leftovers(self._save_dir)
        clear_leftovers(self.directory)
        self._look(resume)
        yield
        shutil.rmtree(self.directory, ignore_errors=True)

    def _look(self, resume: bool) -> None:
        if not self.directory.exists():
            if resume:
                _say(f"there is no checkpoint in {self.directory}: starting from the beginning")
            return
        if not resume:
            _say(f"{self.directory} holds an unfinished run, which this one will replace; --resume continues it")
            return
        self.resumed = self._load()
        try:
            self._iteration = int(self.resumed.progress["iteration"])
            best = self.resumed.progress["best"]
            if best is not None:
                iteration, score = best
                self._best = [int(iteration), float(score)]
            self.lowest = {str(name): float(value) for name, value in self.resumed.progress["lowest"].items()}
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise self.damaged(error) from None
        _say(f"resuming from iteration {self._iteration} ({self.directory})")

    def _load(self) -> Snapshot:
        path = self.directory / _RECORD
        record = read_record(path, CHECKPOINT_SCHEMA)
        other = difference(record.get("identity"), self._identity)
        if other:
            raise UserError(
                f"{path}: the checkpoint is of another run: {other}; give it what it was started with, or leave "
                "--resume out to start from the beginning"
            )
        try:
            if hash_files([self.directory / _VARIABLES]) != record["variables_hash"]:
                raise ValueError("its hash is not the recorded one")
            with np.load(self.directory / _VARIABLES, allow_pickle=False) as archive:
                variables = {name: archive[name] for name in archive.files}
            if not all(
                isinstance(value, np.ndarray) for value in variables.values()
            ):  # np.load returns other files as bytes
                raise ValueError(f"{_VARIABLES} holds more than arrays")
            progress = record["progress"]
            best = self.directory / _BEST if progress["best"] else None
            if best is not None and not best.is_dir():
                raise ValueError(f"{best} is missing")
        except Exception as error:  # zipfile and NumPy's header reader raise exceptions of many types
            raise self.damaged(error) from None
        return Snapshot(progress, variables, best)

    def damaged(self, error: Exception) -> UserError:
        """Return the error of a damaged checkpoint, for the exception that reading it raised."""
        reason = f"{type(error).__name__}: {error}"
        return UserError(
            f"{self.directory}: the checkpoint is damaged ({reason}); delete it and start from the beginning"
        )

    @property
    def written(self) -> bool:
        """Whether this run, or the interrupted run that it resumes, has written a checkpoint."""
        return self._iteration is not None

    def due(self, iteration: int) -> bool:
        """Return whether a regular checkpoint is due after ``iteration``."""
        return self.every is not None and iteration % self.every == 0 and iteration != self._iteration

    def save(self, snapshot: Snapshot) -> None:
        """Replace the checkpoint atomically; if writing fails, the last one remains.

        Args:
            snapshot: the state of the training.

        Raises:
            OSError: the checkpoint cannot be written.
        """
        with new_artifact(self.directory) as staging:
            np.savez(staging / _VARIABLES, **{name: value for name, value in snapshot.variables.items()})
            if snapshot.best_model is not None:
                shutil.copytree(snapshot.best_model, staging / _BEST, copy_function=_link_or_copy)
                if self._infer_cfg is not None and self._infer_cfg.exists():
                    shutil.copyfile(self._infer_cfg, staging / _BEST / INFER_CFG_FILENAME)
            record = {
                "identity": self._identity,
                "progress": snapshot.progress,
                "variables_hash": hash_files([staging / _VARIABLES]),
            }
            write_record(staging / _RECORD, CHECKPOINT_SCHEMA, record)
        self._iteration, self._best = snapshot.progress["iteration"], snapshot.progress["best"]

    def how_to_continue(self) -> str:
        """Return how to resume the run, for a message."""
        if self._iteration is None:
            return "nothing is saved: start it again"
        return f"saved up to iteration {self._iteration}: the same command with --resume continues from there"

    def best(self) -> str:
        """Return the location of the best INT8 model, for a message; empty if there is none."""
        if not self._best:
            return ""
        iteration, score = self._best
        return f"the best INT8 model so far (agreement {score:.4f}, iteration {iteration}) is {self.directory / _BEST}"


def difference(before: Any, now: Any) -> str:
    """Return the first difference of two identities, as ``TrainConfig.train_iter was 6, is 8``; empty: equal.

    Args:
        before: the identity of the checkpoint or of rank 0, nested mappings in JSON types.
        now: the other identity.
    """
    first, second = dict(_flatten(before)), dict(_flatten(now))
    for name in [*second, *first]:
        if first.get(name) != second.get(name):
            was, is_ = first.get(name), second.get(name)
            return f"{name} was {was}, is {is_}" if len(f"{was}{is_}") < 100 else f"{name} differs"
    return ""


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, value


def _link_or_copy(source: str, target: str) -> None:
    """Make a hard link, since the files are on one disk and never change; copy where links are not supported."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
