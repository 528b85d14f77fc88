"""What a training needs to go on as if it had never been broken off, in a folder beside its ``save_dir``.

The folder ``NAME.checkpoint`` holds ``checkpoint.json`` (what was being trained, and how far it is), ``variables.npz``
(weights, optimizer, scales) and ``best`` (the best INT8 model so far, which can be run as it is). It is whole or
absent, and is removed when the run has ended well.
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
from act_pipeline.core.records import clear_leftovers, hash_files, new_artifact, read_record, write_record

CHECKPOINT_SCHEMA = "act_pipeline.checkpoint/3"
_RECORD, _VARIABLES, _BEST = "checkpoint.json", "variables.npz", "best"


@dataclass
class Snapshot:
    """The state of a training between two steps.

    Attributes:
        progress: what JSON holds: ``iteration``, ``best`` (``[iteration, mAP]`` or None), and what else
            `act.Compression` wants back.
        variables: name -> value of every variable that training changes.
        best_model: folder of the best INT8 model so far; None: there was no evaluation yet.
    """

    progress: dict[str, Any]
    variables: dict[str, np.ndarray]
    best_model: Optional[Path] = None


class Checkpoints:
    """The checkpoint of one run.

    Attributes:
        directory: its folder, there or not.
        every: iterations between checkpoints; None: only at each new best and at the end.
        resumed: what a broken run left, if it is to go on.
    """

    def __init__(
        self, save_dir: Path, identity: Mapping[str, Any], every: Optional[int], infer_cfg: Optional[Path] = None
    ) -> None:
        """Say what is trained, and where.

        Args:
            save_dir: where the INT8 model will be.
            identity: all that decides the result, in types that JSON has.
            every: iterations between checkpoints.
            infer_cfg: the float model's ``infer_cfg.yml``, to lie beside the best model.
        """
        target = self._save_dir = Path(save_dir)
        self.directory = target.with_name(f"{target.name}.checkpoint")
        self.every = every
        self.resumed: Optional[Snapshot] = None
        self._identity = dict(identity)
        self._infer_cfg = infer_cfg
        self._iteration: Optional[int] = None
        self._best: Optional[list[Any]] = None

    @contextlib.contextmanager
    def open(self, resume: bool) -> Iterator[None]:
        """Take up what an earlier run left, or only say that it is there; remove the folder if the block ends well.

        Raises:
            UserError: the checkpoint to go on from is damaged, or is of another run.
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
            _say(f"{self.directory} holds an unfinished run, which this one will replace; --resume goes on with it")
            return
        self.resumed = self._load()
        try:
            self._iteration = int(self.resumed.progress["iteration"])
            best = self.resumed.progress["best"]
            if best is not None:
                iteration, score = best
                self._best = [int(iteration), float(score)]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise self.damaged(error) from None
        _say(f"going on from iteration {self._iteration} ({self.directory})")

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
            ):  # np.load gives other files as bytes
                raise ValueError(f"{_VARIABLES} holds more than arrays")
            progress = record["progress"]
            best = self.directory / _BEST if progress["best"] else None
            if best is not None and not best.is_dir():
                raise ValueError(f"{best} is missing")
        except Exception as error:  # zipfile and NumPy's header reader raise whatever comes up
            raise self.damaged(error) from None
        return Snapshot(progress, variables, best)

    def damaged(self, error: Exception) -> UserError:
        """Return the error of a checkpoint that does not hold what it should."""
        reason = f"{type(error).__name__}: {error}"
        return UserError(
            f"{self.directory}: the checkpoint is damaged ({reason}); delete it and start from the beginning"
        )

    @property
    def written(self) -> bool:
        """Whether there is a checkpoint of this run, by it or by the one it goes on with."""
        return self._iteration is not None

    def due(self, iteration: int) -> bool:
        """Return whether a checkpoint is to be written after ``iteration``."""
        return self.every is not None and iteration % self.every == 0 and iteration != self._iteration

    def save(self, snapshot: Snapshot) -> None:
        """Write a checkpoint over the last one, which stays if this one does not become whole."""
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

    def way_on(self) -> str:
        """Return how to go on, for a message."""
        if self._iteration is None:
            return "no iteration is saved yet: start it again"
        return f"saved up to iteration {self._iteration}: the same command with --resume goes on from there"

    def best(self) -> str:
        """Return where the best model is, for a message; empty if there is none."""
        if not self._best:
            return ""
        iteration, score = self._best
        return f"the best INT8 model so far (agreement {score:.4f}, iteration {iteration}) is {self.directory / _BEST}"


def difference(before: Any, now: Any) -> str:
    """Return the first difference of two identities in words (``TrainConfig.train_iter was 6, is 8``), or nothing."""
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
    """Link, since both lie beside the save_dir and neither is written to again; copy where links are refused."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
