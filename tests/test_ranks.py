"""Two CPU processes that train together, as under ``python -m paddle.distributed.launch``."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tiny_training

from act_pipeline.compress.qat.distributed.averaging import average
from act_pipeline.compress.qat.distributed.launch import _gather
from act_pipeline.compress.qat.distributed.leader import Leader
from act_pipeline.compress.qat.distributed.messages import Link
from act_pipeline.core.errors import UserError
from act_pipeline.data.loader import Loader
from act_pipeline.graph.static_graph import static_mode

PROGRAM = Path(__file__).with_name("tiny_ranks.py")
SECONDS = 240


class Silent:
    """A connection that sends nothing."""

    def listen(self, heard, gone) -> None:
        pass


def test_a_damaged_position_of_another_rank_is_found_by_rank_0() -> None:
    leader = Leader({1: Silent()}, "localhost")
    own, other = {"epoch": 1, "images": 4}, {"epoch": 1, "images": 3}
    assert leader.positions({**own, "others": {"1": other}}) == [other, {**own, "others": {"1": other}}]
    for others in ({}, [other], None):
        with pytest.raises((KeyError, TypeError)):
            leader.positions({**own, "others": others})


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"\0" * 7 + b"\3" + b"\0" * 8 + b"[1]"])
def test_another_program_at_the_port_is_no_rank(said: bytes) -> None:
    class Store:
        """Connects another program, and then rank 1, as soon as the address is known."""

        def set(self, key: str, value: str) -> None:
            host, port, token = value.rsplit(" ", 2)
            self.stranger, self.rank = (socket.create_connection((host, int(port))) for _ in range(2))
            self.stranger.sendall(said)
            Link(self.rank).send("hello", rank=1, token=token)

    store = Store()
    links = _gather(store, "127.0.0.1", 2)
    Link(store.rank).send("ready", {"weights": np.arange(3)}, position=[4])
    message = links[1].receive()
    assert list(links) == [1] and (message.kind, message.fields) == ("ready", {"position": [4]})
    assert message.arrays["weights"].tolist() == [0, 1, 2]
    for connection in (store.stranger, store.rank):
        connection.close()
    links[1].close()


class Launch:
    """The ranks of a run, started as by the launcher."""

    def __init__(self, directory: Path, world: int = 2, **settings) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self.logs = [directory / f"log{rank}" for rank in range(world)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            launched = {
                "PADDLE_TRAINERS_NUM": str(world),
                "PADDLE_TRAINER_ID": str(rank),
                "PADDLE_TRAINER_ENDPOINTS": ",".join(f"127.0.0.1:{1 + number}" for number in range(world)),
                "PADDLE_CURRENT_ENDPOINT": f"127.0.0.1:{1 + rank}",
                "PADDLE_MASTER": f"127.0.0.1:{port}",
                "OMP_NUM_THREADS": "1",
            }
            with log.open("w") as output:
                command = [sys.executable, str(PROGRAM), str(directory), json.dumps(settings)]
                self.processes.append(
                    subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **launched})
                )

    def iteration(self) -> int:
        shown = re.findall(r"(\d+)/\d+ \[", self.logs[0].read_text())
        return int(shown[-1]) if shown else -1

    def wait_for(self, iteration: int) -> None:
        end = time.monotonic() + SECONDS
        while self.iteration() < iteration and time.monotonic() < end:
            assert self.processes[0].poll() is None, self.lines(0)
            time.sleep(0.02)

    def end(self) -> list[int]:
        try:
            return [process.wait(SECONDS) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def lines(self, rank: int) -> list[str]:
        found = re.split(r"[\r\n]+", self.logs[rank].read_text())
        # Paddle's C++ code warns about an interrupted collective operation on ranks other than the first.
        return [line for line in found if line.strip() and not re.match(r"train:|W\d{4} .*c_allreduce_sum", line)]


def result(directory: Path) -> dict:
    return json.loads((directory / "result.json").read_text())


def variables(directory: Path, rank: int) -> dict[str, np.ndarray]:
    with np.load(directory / f"rank{rank}.npz") as archive:
        return {name: archive[name] for name in archive.files}


def test_two_processes_are_equal_and_one_writes(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    launch = Launch(whole, iterations=8, optimizer="Adam", loss="detection")
    assert launch.end() == [0, 0], launch.lines(0) + launch.lines(1)
    first, second = variables(whole, 0), variables(whole, 1)
    assert sorted(first) == sorted(second) and any("moving_average" in name for name in first)
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)
    assert launch.lines(1) == []
    # Two processes read six of seven batches per epoch, three each. Only rank 0 writes files.
    assert sorted(path.name for path in whole.iterdir() if path.is_dir()) == ["float", "int8"]
    # The losses are averaged over both processes; a single process has different ones.
    alone = tiny_training.result(
        tiny_training.run(tmp_path / "alone", iterations=8, optimizer="Adam", loss="detection")
    )
    assert [loss for _, loss in alone["losses"]] != [loss for _, loss in result(whole)["losses"]]


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_run_which_goes_on_to_the_same_result(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    settings = {"iterations": 8, "optimizer": "Adam", "loss": "detection"}
    launch = Launch(whole, **settings)
    assert launch.end() == [0, 0], launch.lines(0) + launch.lines(1)
    launch = Launch(broken, **settings, seconds=0.2, every=1)
    launch.wait_for(4)
    launch.processes[1].send_signal(signal.SIGKILL)
    assert launch.end() == [2, -signal.SIGKILL]
    line = launch.lines(0)[-1]
    assert re.fullmatch(r"error: rank 1 has ended without a word .*; saved up to iteration \d+: .*", line), line
    assert "Traceback" not in launch.logs[0].read_text()
    launch = Launch(broken, **settings, every=1, resume=True)
    assert launch.end() == [0, 0], launch.lines(0) + launch.lines(1)
    assert result(broken) == result(whole)


@pytest.mark.slow
def test_rank_0_that_is_killed_while_others_wait_ends_them(tmp_path: Path) -> None:
    launch = Launch(tmp_path, iterations=8, slow_score=600.0)
    launch.wait_for(5)
    launch.processes[0].send_signal(signal.SIGKILL)
    assert launch.end() == [-signal.SIGKILL, 2]
    assert len(launch.lines(1)) == 1 and launch.lines(1)[0].startswith("error: rank 0 has ended without a word")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_ends_all_with_a_checkpoint(tmp_path: Path, rank: int) -> None:
    launch = Launch(tmp_path, iterations=400, seconds=0.05, every=None)
    launch.wait_for(7)
    sent = time.monotonic()
    launch.processes[rank].send_signal(signal.SIGTERM)
    assert launch.end() == [143, 143], launch.lines(0) + launch.lines(1)
    assert time.monotonic() - sent < 10
    assert launch.lines(0)[-1].startswith("interrupted: saved up to iteration") and launch.lines(1) == []


def test_the_averaging_is_one_operation_between_gradients_and_optimizer() -> None:
    import paddle

    class Info:
        """The attributes of PaddleSlim's object that are used."""

    main, startup = paddle.static.Program(), paddle.static.Program()
    with static_mode(), paddle.static.program_guard(main, startup):
        x = paddle.static.data("x", [None, 4])
        loss = paddle.mean(paddle.static.nn.fc(x, 3) ** 2)
        paddle.optimizer.Momentum(0.1, weight_decay=0.1).minimize(loss)
        info = Info()
        info.program, info.fetch_targets = main, [loss]
        walk = type(main.global_block())._sync_with_cpp
        with mock.patch.object(type(main.global_block()), "_sync_with_cpp", autospec=True, side_effect=walk) as walks:
            names = average(info, 2)
    assert walks.call_count == 1  # a walk over all ops, which takes minutes if repeated for each inserted op
    kinds = [op.type for op in main.global_block().ops]
    assert kinds.count("c_allreduce_sum") == 1
    place = kinds.index("c_allreduce_sum")
    assert max(index for index, kind in enumerate(kinds) if kind.endswith("_grad")) < place < kinds.index("momentum")
    assert len([name for name in names if name.endswith("@GRAD")]) == 2 and names[-1] == loss.name


class Samples:
    def __len__(self) -> int:
        return 23

    def __getitem__(self, index: int):
        return {"im_id": index}

    def batch(self, samples):
        return {"im_id": np.array([sample["im_id"] for sample in samples])}

    def readable(self) -> int:
        return 23


def test_shares_are_those_of_the_larger_batch_and_go_on_within_an_epoch() -> None:
    def batches(rank: int, world: int, size: int) -> list[list[int]]:
        loader = Loader(Samples(), size, True, True, 0, 5)
        if world > 1:
            loader.shard(rank, world)
        found = [(batch["im_id"].tolist(), dict(loader.position)) for _ in range(2) for batch in loader]
        assert len(found) == 2 * len(loader)
        again = Loader(Samples(), size, True, True, 0, 5)
        if world > 1:
            again.shard(rank, world)
        again.seek(found[1][1])
        assert [batch["im_id"].tolist() for batch in again] == [ids for ids, _ in found[2 : len(loader)]]
        return [ids for ids, _ in found]

    assert [one + two for one, two in zip(batches(0, 2, 3), batches(1, 2, 3))] == batches(0, 1, 6)
    with pytest.raises(UserError, match="23 images, expected at least 24 for 2 processes"):
        Loader(Samples(), 12, True, True, 0, 5).shard(0, 2)
