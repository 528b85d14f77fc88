"""A checkpoint to go on from: ``checkpoint.json`` and ``variables.npz``, hash right or not."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from act_pipeline.compress.plan.op_inventory import OpInventory
from act_pipeline.compress.qat.distributed.leader import Leader
from act_pipeline.compress.qat.distributed.ranks import ALONE
from act_pipeline.compress.qat.resume.checkpoints import CHECKPOINT_SCHEMA, Checkpoints
from act_pipeline.compress.qat.resume.training_checkpoint import TrainingCheckpoint
from act_pipeline.compress.qat.state import read_random_states
from act_pipeline.compress.qat.training import Training
from act_pipeline.core.hashing import hash_files
from act_pipeline.data.loader import Loader
from tests.fuzz.harness import Target
from tests.fuzz.mutate import json_files, raw

_IDENTITY = {"TrainConfig": {"train_iter": 20, "learning_rate": {"type": "StepDecay"}}, "device": "CPU"}


def _examples(folder: Path) -> st.SearchStrategy[Any]:
    import paddle  # it starts processes when it is imported: before anybody watches

    (folder / "int8.checkpoint" / "best").mkdir(parents=True)
    paddle.static.global_scope().var("weight").get_tensor().set(np.ones((2, 3), np.float32), paddle.CPUPlace())
    buffer = io.BytesIO()
    np.savez(buffer, weight=np.ones((2, 3), np.float32))
    variables = buffer.getvalue()
    (folder / "valid.npz").write_bytes(variables)
    progress = {
        **Training(None, OpInventory({}, []), 3, [(2, 0.5)], [(1, 0.1)], "", (2, 0.5), {"image": -0.2}).progress(),
        "seconds": 1.0,
        "position": {"epoch": 0, "images": 3},
        "random": read_random_states(),
        "scheduler": {"last_epoch": 3, "last_lr": 0.1},
    }
    seed = {
        "schema": CHECKPOINT_SCHEMA,
        "identity": _IDENTITY,
        "progress": progress,
        "versions": {},
        "variables_hash": hash_files([folder / "valid.npz"]),
    }
    position = {**progress["position"], "others": {"1": {"epoch": 0, "images": 3}}}
    of_two_ranks = {**seed, "progress": {**progress, "position": position}}
    digest = seed["variables_hash"].encode()

    def agreeing(variables: bytes) -> tuple[bytes, bytes]:
        (folder / "broken.npz").write_bytes(variables)
        found = hash_files([folder / "broken.npz"]).encode()
        return json.dumps(seed).encode().replace(digest, found), variables

    return st.one_of(
        st.tuples(
            json_files([seed, of_two_ranks], keys=("iteration", "random", "best", "lowest", "others")),
            st.just(variables),
        ),
        st.tuples(json_files([seed]), raw([variables])),
        raw([variables]).map(agreeing),
    )


class _Silent:
    """A connection to another rank that says nothing."""

    def listen(self, heard: Any, gone: Any) -> None:
        pass


class _Batches:
    """Takes a position as the loader does."""

    position: dict[str, Any] = {}
    seek = Loader.seek


def _read(folder: Path, example: tuple[bytes, bytes]) -> None:
    import paddle

    record, variables = example
    directory = folder / "int8.checkpoint"
    (directory / "best").mkdir(parents=True, exist_ok=True)
    (directory / "variables.npz").write_bytes(variables)
    (directory / "checkpoint.json").write_bytes(record)
    checkpoints = Checkpoints(folder / "int8", _IDENTITY, 3)
    with contextlib.redirect_stderr(io.StringIO()), checkpoints.open(resume=True):
        checkpoints.how_to_continue()
        checkpoints.best()
        # What the constructor sets of Paddle's programs is left out: a checkpoint is taken up before it is looked at.
        keeper = TrainingCheckpoint.__new__(TrainingCheckpoint)
        keeper._training, keeper._batches, keeper._names = (
            Training(None, OpInventory({}, [])),
            _Batches(),
            {"weight": "weight"},
        )
        keeper._learning_rate, keeper._best_dir = paddle.optimizer.lr.StepDecay(0.1, 5), folder / "best"
        keeper._ranks = Leader({1: _Silent()}, "host") if b'"others"' in record else ALONE
        shutil.rmtree(folder / "best", ignore_errors=True)
        if checkpoints.resumed is not None:
            keeper._take_up(checkpoints.resumed, checkpoints.damaged, paddle.CPUPlace())


CHECKPOINT = Target("checkpoint", _examples, _read)
