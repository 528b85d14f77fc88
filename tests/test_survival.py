"""Runs that are killed, interrupted, or short of disk, data or memory: what is saved, and identical resumption."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tiny_training

from act_pipeline.compress.qat.resume.checkpoints import Checkpoints, Snapshot, difference
from act_pipeline.compress.qat.zero_points import lowest_with_zero_points
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError, run_command
from act_pipeline.core.locking import hold_lock
from act_pipeline.core.output_folders import clear_leftovers, new_artifact
from act_pipeline.demo import COMPRESS_CONFIG, READER_CONFIG
from act_pipeline.evaluation.batches import NotFinite
from act_pipeline.graph.static_graph import static_mode

REPOSITORY = Path(__file__).resolve().parents[1]
TINY = [sys.executable, str(REPOSITORY / "tests" / "tiny_training.py")]


class Run:
    """A training process whose progress is read from stderr, a terminal: elsewhere there is no bar."""

    def __init__(self, command: list[str], **options) -> None:
        self._terminal, end = os.openpty()
        fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
        self.process = subprocess.Popen(
            command, stderr=end, stdout=subprocess.DEVNULL, start_new_session=True, **options
        )
        os.close(end)
        self.text = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # what a terminal reports when the last process has closed it
            while chunk := os.read(self._terminal, 4096):
                self.text += chunk.decode("utf-8", "replace")
        os.close(self._terminal)

    def iteration(self) -> int:
        shown = re.findall(r"(\d+)/\d+ \[", self.text.split("train:", 1)[-1]) if "train:" in self.text else []
        return int(shown[-1]) if shown else -1

    def wait_for(self, iteration: int, seconds: float = 300) -> None:
        end = time.monotonic() + seconds
        while self.iteration() < iteration and self.process.poll() is None:
            assert time.monotonic() < end, self.text
            time.sleep(0.005)

    def send(self, signum: int) -> None:
        if self.process.poll() is None:
            os.kill(self.process.pid, signum)

    def end(self, seconds: float = 300) -> int:
        code = self.process.wait(seconds)
        self._reader.join(10)
        return code

    def lines(self) -> list[str]:
        return [line for line in re.split(r"[\r\n]+", self.text) if line.strip() and not line.startswith("train:")]


def train_tiny(directory: Path, **settings) -> Run:
    return Run([*TINY, str(directory), json.dumps(settings)])


def tiny_result(directory: Path) -> dict:
    return json.loads((directory / "result.json").read_text())


SETTINGS = {"iterations": 20, "seconds": 0.03}


# The other optimizers have less state, saved by the same code.
@pytest.mark.parametrize(
    ("optimizer", "loss"),
    [
        ("Adam", "detection"),
        *(pytest.param(name, "l2", marks=pytest.mark.slow) for name in ("SGD", "Momentum", "Adam")),
    ],
)
def test_a_killed_run_goes_on_to_the_same_result(tmp_path: Path, optimizer: str, loss: str) -> None:
    """SIGKILL twice, at arbitrary times: between steps, in a checkpoint or in an evaluation."""
    settings = {**SETTINGS, "optimizer": optimizer, "loss": loss}
    whole = tiny_training.run(tmp_path / "unbroken", optimizer=optimizer, iterations=20, loss=loss)
    unbroken = tiny_training.result(whole)
    broken = tmp_path / "broken"
    for number, iteration in enumerate((6, 13)):
        run = train_tiny(broken, resume=bool(number), **settings)
        run.wait_for(iteration)
        time.sleep(random.uniform(0, 0.1))
        run.send(signal.SIGKILL)
        assert run.end() == -signal.SIGKILL, run.text
    again = train_tiny(broken, resume=True, **settings)
    assert again.end() == 0, again.text
    assert "resuming from iteration" in again.text
    assert tiny_result(broken) == unbroken
    for name in ("model.pdmodel", "model.pdiparams"):
        assert (broken / "int8" / name).read_bytes() == (tmp_path / "unbroken" / "int8" / name).read_bytes()
    assert sorted(path.name for path in broken.iterdir()) == ["config.yml", "float", "int8", "result.json"]


def test_the_order_of_the_data_goes_on_without_reading_it_again(tmp_path: Path) -> None:
    numbers = tiny_training.Numbers()
    unbroken = tiny_training.result(tiny_training.run(tmp_path / "unbroken", iterations=12, batches=numbers))
    stopping = tiny_training.Numbers()

    def stop(model: InferenceModel) -> float:
        scored.append(model)
        if len(scored) > 1:  # the first is before any step
            raise OSError(errno.EIO, "the power is gone")
        return tiny_training.near(model)

    scored: list[InferenceModel] = []
    with pytest.raises(OSError):
        tiny_training.run(tmp_path / "broken", iterations=12, score=stop, every=2)
    again = tiny_training.run(tmp_path / "broken", iterations=12, resume=True, batches=stopping)
    assert tiny_training.result(again) == unbroken
    # PaddleSlim reads the first batch of an epoch to inspect it; then one per iteration, of which 4 of 12 are done.
    assert stopping.drawn == 1 + 8 and numbers.drawn == 1 + 12


def test_least_values_of_the_start_are_kept_when_a_run_is_resumed(tmp_path: Path) -> None:
    """A resumed run does not calibrate again, and its models have the zero points of the uninterrupted one."""
    start = tiny_training.calibrate(tmp_path / "calibrated")
    whole = tiny_training.run(tmp_path / "unbroken", iterations=6, start=start)
    with static_mode():
        assert len(lowest_with_zero_points(start)) == 3
        assert lowest_with_zero_points(whole.model) == lowest_with_zero_points(start)
    symmetric = tiny_training.calibrate(tmp_path / "symmetric", zero_points=False)
    # With twice as many steps the first loss, the distance from the teacher, is smaller.
    assert tiny_training.run(tmp_path / "other", 1, start=symmetric).losses[0][1] > 2 * whole.losses[0][1]
    scored: list[InferenceModel] = []

    def stop(model: InferenceModel) -> float:
        scored.append(model)
        if len(scored) > 1:
            raise OSError(errno.EIO, "the power is gone")
        return tiny_training.near(model)

    with pytest.raises(OSError):
        tiny_training.run(tmp_path / "broken", iterations=6, score=stop, every=2, start=start)
    again = tiny_training.run(tmp_path / "broken", iterations=6, resume=True)
    assert tiny_training.result(again) == tiny_training.result(whole)


def test_a_loader_goes_on_within_an_epoch(tmp_path: Path) -> None:
    from act_pipeline.data.loader import Loader

    class Samples:
        def __len__(self) -> int:
            return 20

        def __getitem__(self, index: int):
            return None if index % 6 == 0 else {"im_id": index}

        def batch(self, samples):
            return {"im_id": np.array([sample["im_id"] for sample in samples])}

        def readable(self) -> int:
            return 16

    def batches(loader: Loader, epochs: int) -> list[tuple[list[int], dict]]:
        return [(batch["im_id"].tolist(), dict(loader.position)) for _ in range(epochs) for batch in loader]

    for workers in (0, 2):
        for drop_last in (False, True):
            whole = batches(Loader(Samples(), 3, True, drop_last, workers, 5), 3)
            for index, (_, position) in enumerate(whole):
                loader = Loader(Samples(), 3, True, drop_last, workers, 5)
                loader.seek(position)
                assert batches(loader, 3)[: len(whole) - index - 1] == whole[index + 1 :]


@pytest.mark.parametrize("signum", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_signal_ends_a_run_with_a_checkpoint_and_a_line(tmp_path: Path, signum: int) -> None:
    settings = {**SETTINGS, "iterations": 400, "every": None}
    run = train_tiny(tmp_path, **settings)
    run.wait_for(7)
    sent = time.monotonic()
    run.send(signum)
    assert run.end() == 128 + signum, run.text
    assert time.monotonic() - sent < 10
    assert re.fullmatch(
        r"interrupted: saved up to iteration (\d+): the same command with --resume continues from there; the best INT8 "
        r"model so far \(agreement 0\.\d+, iteration [05]\) is .*int8.checkpoint/best",
        run.lines()[-1],
    )
    assert "Traceback" not in run.text
    InferenceModel.load(tmp_path / "int8.checkpoint" / "best")
    saved = int(re.search(r"iteration (\d+)", run.lines()[-1]).group(1))
    again = train_tiny(tmp_path, resume=True, **settings)
    again.wait_for(saved + 1)
    again.send(signum)
    assert again.end() == 128 + signum, again.text
    assert f"resuming from iteration {saved} " in again.text
    # No process of the two sessions remains.
    for session in (run, again):
        assert subprocess.run(["ps", "-o", "pid=", "-s", str(session.process.pid)], stdout=-1).stdout == b""


def test_a_step_that_does_not_end_is_not_waited_for(tmp_path: Path) -> None:
    code = """
import signal, sys, time
sys.path.insert(0, sys.argv[1])
from act_pipeline.core.interruption import interruptible
with interruptible(lambda: "saved up to iteration 3", grace_seconds=0.5) as interruption:
    with interruption.held():
        print("step", file=sys.stderr, flush=True)
        while True:
            time.sleep(1)
"""
    run = Run([sys.executable, "-c", code, str(REPOSITORY)])
    while "step" not in run.text:
        time.sleep(0.01)
    run.send(signal.SIGTERM)
    assert run.end(10) == 143
    assert run.lines()[-1] == "interrupted: saved up to iteration 3"


def test_signals_are_as_before_after_a_run(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    tiny_training.run(tmp_path, iterations=2)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert signal.set_wakeup_fd(-1) == -1
    assert "interruption" not in [thread.name for thread in threading.enumerate()]


def test_resume_without_a_checkpoint_starts_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training = tiny_training.run(tmp_path, iterations=2, resume=True)
    assert training.iterations == 2
    assert "there is no checkpoint in" in capsys.readouterr().err


def left_by_a_broken_run(directory: Path, **settings) -> None:
    def stop(model: InferenceModel) -> float:
        scored.append(model)
        if len(scored) > 1:  # the first is before any step
            raise OSError(errno.EIO, "the power is gone")
        return tiny_training.near(model)

    scored: list[InferenceModel] = []
    with pytest.raises(OSError):
        tiny_training.run(directory, score=stop, every=2, **settings)
    assert (directory / "int8.checkpoint" / "checkpoint.json").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"iterations": 13}, "TrainConfig.train_iter was 12, is 13"),
        ({"optimizer": "SGD"}, "TrainConfig.optimizer_builder.optimizer.type was Adam, is SGD"),
        ({"overrides": ("TrainConfig.learning_rate=0.5",)}, "TrainConfig.learning_rate"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, settings: dict, words: str) -> None:
    left_by_a_broken_run(tmp_path, iterations=12)
    with pytest.raises(UserError, match=re.escape(words)):
        tiny_training.run(tmp_path, resume=True, **{"iterations": 12, **settings})
    assert (tmp_path / "int8.checkpoint" / "checkpoint.json").exists()


@pytest.mark.parametrize("name", ["checkpoint.json", "variables.npz"])
def test_a_damaged_checkpoint_is_one_line(tmp_path: Path, name: str) -> None:
    left_by_a_broken_run(tmp_path, iterations=12)
    file = tmp_path / "int8.checkpoint" / name
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(UserError, match="checkpoint"):
        tiny_training.run(tmp_path, resume=True, iterations=12)


def test_difference_names_the_key() -> None:
    assert difference({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}) == "a.c was 2, is 3"
    assert difference({"a": 1}, {"a": 1, "b": 2}) == "b was None, is 2"
    assert difference({"the data": {"train": "x" * 80}}, {"the data": {"train": "y" * 80}}) == "the data.train differs"
    assert difference({"a": [1]}, {"a": [1]}) == ""


def test_a_full_disk_is_one_line_and_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"iterations": 12, "overrides": ("TrainConfig.eval_iter=100",)}  # a new best would write a checkpoint
    unbroken = tiny_training.result(tiny_training.run(tmp_path / "unbroken", **settings))
    save, written = np.savez, []

    def fill(path, **arrays) -> None:
        written.append(path)
        if len(written) == 3:
            save(path, **dict(list(arrays.items())[:3]))
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save(path, **arrays)

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", fill)
        assert run_command(lambda argv: tiny_training.run(tmp_path / "broken", **settings)) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the disk is full" in line and "saved up to iteration 6" in line and ", iteration 0) is" in line
    assert sorted(path.name for path in (tmp_path / "broken").iterdir()) == [
        "config.yml",
        "float",
        "int8",
        "int8.checkpoint",
    ]
    assert tiny_training.result(tiny_training.run(tmp_path / "broken", resume=True, **settings)) == unbroken


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "set EvalReader.batch_size to 1 in the reader"),
        (RuntimeError("ResourceExhaustedError: Fail to alloc memory of 8 GB"), "set EvalReader.batch_size to 1"),
    ],
)
def test_lacking_memory_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], error: Exception, words: str
) -> None:
    class Large(tiny_training.Numbers):
        def __call__(self):
            for batch in super().__call__():
                if self.drawn > 8:
                    raise error
                yield batch

    assert run_command(lambda argv: tiny_training.run(tmp_path, batches=Large())) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in line and re.search(", iteration [05]\\) is", line)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        ("image", "iteration 8 leaves weights that are not finite .*: the input image holds NaN; "),
        ("rate", "are not finite|the loss is (nan|inf) at iteration"),
    ],
)
def test_a_diverging_training_says_the_step_and_keeps_the_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: str, words: str
) -> None:
    class Spoilt(tiny_training.Numbers):
        def __call__(self):
            for batch in super().__call__():
                if self.drawn == 9 and spoil == "image":
                    batch["image"] = batch["image"] * np.nan
                yield batch

    overrides = ("TrainConfig.learning_rate=1.0e+38", "TrainConfig.eval_iter=1") if spoil == "rate" else ()
    optimizer = "SGD" if spoil == "rate" else "Adam"
    code = run_command(
        lambda argv: tiny_training.run(tmp_path, batches=Spoilt(), overrides=overrides, optimizer=optimizer)
    )
    assert code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(words, line) and "lower TrainConfig.learning_rate" in line
    if spoil == "image":
        assert re.search(", iteration [05]\\) is", line)
        best = InferenceModel.load(tmp_path / "int8.checkpoint" / "best")
        assert np.isfinite(best.bytes)
        assert all(np.isfinite(value).all() for value in variables_of(tmp_path).values() if value.dtype.kind == "f")


def test_a_training_that_makes_the_model_worse_ends_and_the_model_of_before_is_kept(tmp_path: Path) -> None:
    agreements, kept = iter([0.95, 0.6, 0.99]), []

    def score(model: InferenceModel) -> float:
        kept.append(model.content_hash())
        return next(agreements)

    training = tiny_training.run(tmp_path, iterations=40, score=score, overrides=("TrainConfig.eval_iter=30",))
    assert [iteration for iteration, _ in training.evaluations] == [0, 10]
    assert training.iterations == 10 and training.best == (0, 0.95)
    assert (
        "was 0.9500 before it, and is 0.6000 after 10 iterations; lower TrainConfig.learning_rate" in training.stopped
    )
    assert training.model.content_hash() == kept[0] != kept[1]


@pytest.mark.parametrize("survives", [True, False])
def test_an_int8_model_whose_boxes_are_not_finite_is_a_diverged_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], survives: bool
) -> None:
    scored, tried = [], []

    def score(model: InferenceModel) -> float:
        scored.append(model)
        if len(scored) == 2:
            raise NotFinite("the model's boxes are not finite")
        return 0.5

    with mock.patch("act_pipeline.execution.finite_checks.check_outputs", lambda *arguments: tried.append(arguments)):
        code = run_command(
            lambda argv: tiny_training.run(tmp_path, score=score, score_survives_nan=lambda graph: survives)
        )
    assert code == 2 and len(tried) == (0 if survives else 2)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the INT8 model after iteration 5: the model's boxes are not finite; lower TrainConfig" in line
    assert ", iteration 0) is" in line


def variables_of(directory: Path) -> dict[str, np.ndarray]:
    with np.load(directory / "int8.checkpoint" / "variables.npz") as archive:
        return {name: archive[name] for name in archive.files}


def test_grid_sample_survives_a_grid_that_is_nan() -> None:
    """Without the guard, Paddle 2.6.2's CPU kernel crashes with SIGSEGV; finite grids are sampled as before."""
    import paddle

    from act_pipeline.execution.finite_checks import guard_grids
    from act_pipeline.graph.static_graph import static_mode

    def sample(grid: np.ndarray, guarded: bool) -> list[np.ndarray]:
        main, startup = paddle.static.Program(), paddle.static.Program()
        with paddle.static.scope_guard(paddle.static.Scope()), paddle.static.program_guard(main, startup):
            x = paddle.static.data("x", [1, 2, 5, 5], "float32")
            place = paddle.static.data("grid", [1, 3, 3, 2], "float32")
            x.stop_gradient = place.stop_gradient = False
            out = paddle.nn.functional.grid_sample(x, place)
            gradients = paddle.static.gradients([paddle.mean(out * out)], [x, place])
            if guarded:
                assert guard_grids(main) == 1
            feed = {"x": np.random.default_rng(0).random((1, 2, 5, 5), dtype=np.float32), "grid": grid}
            return paddle.static.Executor(paddle.CPUPlace()).run(main, feed=feed, fetch_list=[out, *gradients])

    grid = np.random.default_rng(1).uniform(-1.5, 1.5, (1, 3, 3, 2)).astype(np.float32)
    with static_mode():
        for stock, guarded in zip(sample(grid, False), sample(grid, True)):
            assert stock.tobytes() == guarded.tobytes()
        spoilt = grid.copy()
        spoilt[0, 1, 1] = np.nan
        values = sample(spoilt, True)
    assert np.isnan(values[0]).any()


def test_the_second_run_on_a_folder_is_refused(tmp_path: Path) -> None:
    code = """
import sys, time
sys.path.insert(0, sys.argv[1])
from act_pipeline.core.locking import hold_lock
with hold_lock(sys.argv[2]):
    print("held", file=sys.stderr, flush=True)
    time.sleep(60)
"""
    target = tmp_path / "int8"
    run = Run([sys.executable, "-c", code, str(REPOSITORY), str(target)])
    while "held" not in run.text:
        time.sleep(0.01)
    with pytest.raises(UserError, match=f"process {run.process.pid} is writing there"):
        with hold_lock(target):
            pass
    with hold_lock(tmp_path / "other"):
        pass
    run.send(signal.SIGKILL)
    run.end()
    with hold_lock(target):  # a dead process holds no lock
        assert (tmp_path / ".int8.lock").read_text().strip() == str(os.getpid())
    assert list(tmp_path.iterdir()) == []


def test_a_lock_file_unlinked_meanwhile_is_not_taken_for_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, calls = fcntl.flock, []

    def unlinked_before(handle: int, operation: int) -> None:
        calls.append(handle)
        if len(calls) == 1:
            (tmp_path / ".int8.lock").unlink()
        flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", unlinked_before)
    with hold_lock(tmp_path / "int8"):
        assert len(calls) == 2 and (tmp_path / ".int8.lock").exists()


def test_leftovers_of_killed_runs_are_removed_and_the_retired_put_back(tmp_path: Path) -> None:
    for name in (".int8.abcd_123", ".int8.old.abcd_123/was", ".int8.more.abcd_123", "int8.checkpoint"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / ".int8.old.abcd_123" / "was" / "act.json").write_text("{}")
    (tmp_path / ".int8.lock").write_text("1")
    clear_leftovers(tmp_path / "int8")
    assert (tmp_path / "int8" / "act.json").read_text() == "{}"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".int8.lock",
        ".int8.more.abcd_123",
        "int8",
        "int8.checkpoint",
    ]


def test_a_checkpoint_is_whole_or_the_last_one(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "int8", {"a": 1}, 1)
    assert checkpoints.how_to_continue() == "nothing is saved: start it again"  # a ptq run has no iterations either
    checkpoints.save(Snapshot({"iteration": 1, "best": None, "lowest": {}}, {"x": np.ones(3)}))
    with pytest.raises(KeyboardInterrupt):
        with new_artifact(checkpoints.directory):
            raise KeyboardInterrupt
    again = Checkpoints(tmp_path / "int8", {"a": 1}, 1)
    with again.open(resume=True):
        assert again.resumed.progress["iteration"] == 1 and again.resumed.variables["x"].tolist() == [1, 1, 1]
        assert again.how_to_continue().startswith("saved up to iteration 1")
    assert not again.directory.exists()


@pytest.mark.slow
def test_memory_does_not_grow(tmp_path: Path) -> None:
    """Resident memory after 1,000 iterations, with a checkpoint every 50, equals that after 200."""
    seen: dict[int, int] = {}

    class Counting(tiny_training.Numbers):
        def __call__(self):
            for batch in super().__call__():
                if self.drawn in (200, 1000):
                    fields = Path("/proc/self/statm").read_text().split()
                    seen[self.drawn] = int(fields[1]) * os.sysconf("SC_PAGE_SIZE")
                yield batch

    tiny_training.run(tmp_path, iterations=1000, every=50, evaluate=False, batches=Counting())
    assert seen[1000] - seen[200] < 8 << 20, seen


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command that compresses the sample's RT-DETR on a few scenes."""
    from act_pipeline.data.builtin_sample import make_sample
    from act_pipeline.demo import MODEL_CONFIG, WEIGHTS
    from act_pipeline.export import export_model

    root = tmp_path_factory.mktemp("small")
    make_sample(root / "data", 16, 4, seed=0, size=256)
    model = export_model(MODEL_CONFIG, root, [f"weights={WEIGHTS}", "trt=True"])
    reader = root / "reader.yml"
    reader.write_text(READER_CONFIG.read_text().replace("dataset/sample", str(root / "data")))
    return [
        sys.executable,
        str(REPOSITORY / "tools" / "compress.py"),
        "-c",
        str(COMPRESS_CONFIG),
        "--devices=cpu",
        "-o",
        f"Global.model_dir={model.directory}",
        f"Global.reader_config={reader}",
        "TrainConfig.snapshot_iter=3",
        "TrainConfig.eval_iter=7",
        "Strategy={name: qat_dis, max_drop: null}",
    ]


def comparable(record):
    """Return a record without entries that differ in every run; the second run has the float model's mAP cached."""
    if isinstance(record, dict):
        own = ("seconds", "latency", "latency_ms", "images_per_second", "fp32_cached")
        return {name: comparable(value) for name, value in record.items() if name not in own}
    return [comparable(value) for value in record] if isinstance(record, list) else record


def files_and_figures(save_dir: Path) -> tuple[dict, bytes, bytes]:
    return (
        comparable(json.loads((save_dir / "act.json").read_text())),
        (save_dir / "model.pdmodel").read_bytes(),
        (save_dir / "model.pdiparams").read_bytes(),
    )


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_kills_of_the_real_thing_change_nothing(small: list[str], tmp_path: Path) -> None:
    command = [*small, "TrainConfig.train_iter=20"]
    unbroken = Run([*command, "--save_dir", str(tmp_path / "unbroken")])
    seed = int(os.environ.get("ACT_PIPELINE_TEST_SEED", "0")) or random.randrange(1, 1 << 30)
    print(f"ACT_PIPELINE_TEST_SEED={seed}")
    moments = random.Random(seed)
    broken = [*command, "--save_dir", str(tmp_path / "broken"), "--resume"]
    assert unbroken.end(600) == 0, unbroken.text
    kills = 0
    while kills < 10:
        run = Run(broken)
        run.wait_for(0)
        start = max(run.iteration(), 0)
        run.wait_for(min(start + moments.randint(0, 4), 20))
        time.sleep(moments.uniform(0, 1.5))
        where = run.iteration()
        run.send(signal.SIGKILL)
        code = run.end()
        print(f"kill {kills + 1}: {[line for line in run.lines() if 'iteration' in line]} to {where}, code {code}")
        if code != -signal.SIGKILL:
            break
        kills += 1
    last = Run(broken)
    assert last.end(600) == 0, last.text
    assert files_and_figures(tmp_path / "broken") == files_and_figures(tmp_path / "unbroken")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "unbroken"]
    assert kills >= 5


@pytest.mark.slow
def test_data_that_vanishes_is_one_line_and_the_best_is_kept(small: list[str], tmp_path: Path) -> None:
    reader = Path(next(word for word in small if word.startswith("Global.reader_config=")).split("=", 1)[1])
    data = reader.parent / "data"
    copied = tmp_path / "data"
    shutil.copytree(data, copied)
    own = tmp_path / "reader.yml"
    own.write_text(reader.read_text().replace(str(data), str(copied)))
    command = [*small, f"Global.reader_config={own}", "TrainConfig.train_iter=60", "--save_dir", str(tmp_path / "int8")]
    run = Run(command)
    run.wait_for(8)
    copied.rename(tmp_path / "elsewhere")
    assert run.end() == 2, run.text
    line = run.lines()[-1]
    assert line.startswith("error: ") and "cannot be used" in line or "is gone" in line, run.text
    assert "--resume continues" in line and ", iteration 7) is" in line
    (tmp_path / "elsewhere").rename(copied)
    again = Run([*command[:-2], "--save_dir", str(tmp_path / "int8"), "--resume"])
    again.wait_for(10)
    again.send(signal.SIGTERM)
    assert again.end() == 143
    assert "resuming from iteration" in again.text


def test_a_float_model_of_nan_is_one_line(demo, tmp_path: Path) -> None:
    """In its own process, since SIGSEGV would end it."""
    code = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import act_pipeline
import numpy as np
from act_pipeline.execution.finite_checks import check_float_model
from act_pipeline.core.errors import run_command
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.graph.static_graph import StaticGraph, static_mode
with static_mode():
    graph = StaticGraph.load(InferenceModel.load(sys.argv[2]))
    sampler = next(op for op in graph.program.global_block().ops if op.type == "grid_sampler")
    weights = [n for n in graph.program.global_block().vars if graph.is_parameter(n) and graph.parameter(n).ndim == 2]
    for name in weights:
        factor = np.nan if sys.argv[3] == "nan" else 1e37
        graph.set_parameter(name, graph.parameter(name) * np.float32(factor))
    model = graph.save(Path(sys.argv[4]))
    batch = {
        "image": np.random.rand(1, 3, 224, 224).astype("float32"), "im_shape": np.full((1, 2), 224, "float32"),
        "scale_factor": np.ones((1, 2), "float32"),
    }
    sys.exit(run_command(lambda argv: check_float_model(model, batch)))
"""
    for kind, words in (("nan", "holds NaN, expected numbers"), ("huge", "holds NaN or infinity, expected numbers")):
        target = tmp_path / kind
        target.mkdir()
        run = Run([sys.executable, "-c", code, str(REPOSITORY), str(demo.fp32.directory), kind, str(target)])
        assert run.end() == 2, run.text
        assert words in run.lines()[-1]
