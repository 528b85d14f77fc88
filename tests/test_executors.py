"""Work units in processes and on Ray: their results, and that no process hangs or remains, however it ends."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import work_fixtures
from work_fixtures import Die, Fail, NoteClosing, Refuse, Sleep, Times, Unsendable

from act_pipeline.core.errors import EXIT_INTERRUPTED, UserError
from act_pipeline.core.process_pool import run_work
from act_pipeline.core.work import Work

SOON = 20  # seconds; a sleeping unit takes sixty


def until(condition, seconds: float = SOON) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def started(folder: Path) -> dict[int, Path]:
    """Return process id -> temporary folder of the process."""
    return {int(file.stem): Path(file.read_text()) for file in folder.glob("*.pid") if file.read_text()}


def test_processes_return_what_one_does() -> None:
    units = list(range(8))
    here = sorted(run_work(Work(Times, 3), units))
    there = list(run_work(Work(Times, 3, environment={"WORK_FIXTURES": "set"}), units, workers=2))
    assert [found[0] for found in here] == sorted(found[0] for found in there) == [3 * unit for unit in units]
    assert {found[1] for found in here} == {os.getpid()} and os.getpid() not in {found[1] for found in there}
    assert {found[2] for found in there} == {"set"} and "WORK_FIXTURES" not in os.environ
    assert not multiprocessing.active_children()


def test_a_session_here_is_closed() -> None:
    closed: list[bool] = []

    class Closing(Times):
        def close(self) -> None:
            closed.append(True)

    with contextlib.closing(run_work(Work(Closing, 1), [1, 2])) as results:
        next(results)
        assert not closed
    assert closed == [True]


def test_a_session_in_a_process_is_closed(tmp_path: Path) -> None:
    work = Work(NoteClosing, 3, environment={"WORK_FIXTURES": str(tmp_path)})
    workers = {found[1] for found in run_work(work, range(8), workers=2)}
    assert {int(file.stem) for file in tmp_path.iterdir()} == workers


def test_an_error_in_a_process_comes_with_its_traceback() -> None:
    with pytest.raises(ValueError, match="^unit 1 fails$") as error:
        list(run_work(Work(Fail, None), [1, 1, 1], workers=2))
    assert "work_fixtures.py" in str(error.value.__cause__) and not multiprocessing.active_children()


def test_a_result_that_cannot_be_sent_is_said_to_be_one() -> None:
    with pytest.raises(RuntimeError, match="the result cannot be sent: "):
        list(run_work(Work(Unsendable, None), [1, 2], workers=2))


def test_a_process_that_outlives_a_work_takes_another_session(on_ray) -> None:
    """As Ray's do: what is kept of a work is of this work alone."""
    keys = [(3, "a"), (4, "b"), (5, "b"), (3, "a")]
    found = [on_ray(StandInRay(), Work(Times, shared, key), [10])[0][0] for shared, key in keys]
    assert found == [30, 40, 40, 30]


def test_a_users_error_in_a_process_is_the_commands() -> None:
    with pytest.raises(UserError, match="^unit 2 is refused$"):
        list(run_work(Work(Refuse, None), [1, 2, 3], workers=2))
    assert not multiprocessing.active_children()


def test_a_process_that_is_killed_is_one_line() -> None:
    work = Work(Die, None, name="the evaluation", fewer="--shards", kept="; all is kept")
    with pytest.raises(UserError) as error:
        list(run_work(work, list(range(6)), workers=2))
    assert str(error.value) == (
        "a process of the evaluation ended without a word, most likely for want of memory; run it again with a smaller "
        "--shards; all is kept"
    )
    assert not multiprocessing.active_children()


def test_whoever_stops_reading_ends_the_processes_at_once(tmp_path: Path) -> None:
    start = time.monotonic()
    with contextlib.closing(run_work(Work(Sleep, str(tmp_path)), [0, 1, 2, 3], workers=2)) as results:
        assert next(results) == 0
        assert until(lambda: len(started(tmp_path)) == 2)
    assert time.monotonic() - start < 2 * SOON and not multiprocessing.active_children()
    assert not any(folder.exists() for folder in started(tmp_path).values())


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
def test_no_process_outlives_the_command(tmp_path: Path, signum: int) -> None:
    command = subprocess.Popen(
        [sys.executable, work_fixtures.__file__, str(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert until(lambda: len(started(tmp_path)) == 2)
        if signum == signal.SIGINT:  # to the whole process group, as a terminal sends it
            os.killpg(command.pid, signum)
        else:
            command.send_signal(signum)
        _, said = command.communicate(timeout=SOON)
        assert until(lambda: all(map(is_gone, started(tmp_path))))
        if signum == signal.SIGINT:
            assert said == "interrupted: nothing half-written is left behind\n"
            assert command.returncode == EXIT_INTERRUPTED
            assert not any(folder.exists() for folder in started(tmp_path).values())
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(command.pid, signal.SIGKILL)
        command.wait()


# ---- Ray -------------------------------------------------------------------------------------------------------------


class StandInRay:
    """A test double of Ray in this process: objects are held by reference, tasks run when they are awaited."""

    def __init__(self, cpus: tuple[int, ...] = (2,), gpus: int = 0, lost: int = 0) -> None:
        self.calls: list[str] = []
        self.options: dict = {}
        self.most = 0
        self._cpus, self._gpus, self._lost = cpus, gpus, lost

    def init(self, address, **options):
        if address == "nowhere":
            raise ConnectionError("could not connect\nno head node")
        self.calls.append(f"init {address}")

    def shutdown(self):
        self.calls.append("shutdown")

    def nodes(self):
        dead = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
        return [dead, *({"Alive": True, "Resources": {"CPU": float(each), "GPU": self._gpus}} for each in self._cpus)]

    def put(self, value):
        return ("object", value)

    def remote(self, **options):
        self.options = options
        return lambda function: SimpleNamespace(remote=lambda shared, unit: _Reference(function, shared, unit))

    def wait(self, references, num_returns):
        self.most = max(self.most, len(references))
        return references[-1:], references[:-1]

    def get(self, reference):
        if self._lost:
            self._lost -= 1
            raise RuntimeError("The worker died unexpectedly")
        try:
            return reference.function(reference.shared[1], reference.unit)
        except Exception as error:
            wrapped = RuntimeError("RayTaskError: a long text\nof many lines")
            wrapped.cause = error
            raise wrapped from error


class _Reference:
    def __init__(self, function, shared, unit) -> None:
        self.function, self.shared, self.unit = function, shared, unit


@pytest.fixture
def on_ray(monkeypatch: pytest.MonkeyPatch):
    def run(ray, work: Work, units, workers=None, address="auto"):
        monkeypatch.setitem(sys.modules, "ray", ray)
        return list(run_work(work, units, "ray", workers, address))

    return run


def test_ray_runs_the_same_function_a_few_units_at_a_time(on_ray) -> None:
    ray = StandInRay(cpus=(2, 1))
    found = on_ray(ray, Work(Times, 3), range(20))
    assert sorted(result[0] for result in found) == [3 * unit for unit in range(20)]
    assert ray.most == 6 and ray.calls == ["init auto", "shutdown"] and ray.options["num_cpus"] == 1
    on_ray(ray := StandInRay(), Work(Times, 3), range(20), workers=3)
    assert ray.most == 3


def test_ray_is_asked_for_what_a_unit_takes(on_ray) -> None:
    on_ray(ray := StandInRay((8, 4), gpus=1), Work(Times, 3, cpus=2, gpus=1), range(20))
    assert (ray.options["num_cpus"], ray.options["num_gpus"], ray.most) == (2, 1, 4)
    with pytest.raises(UserError, match="no machine of the Ray cluster has the 4 CPUs that one unit of the work takes"):
        on_ray(StandInRay((2, 3)), Work(Times, 3, cpus=4), range(2))


def test_what_a_machine_loses_is_done_again_but_not_for_ever(on_ray) -> None:
    assert [found[0] for found in on_ray(StandInRay(lost=2), Work(Times, 3), [5])] == [15]
    with pytest.raises(UserError, match="a unit of the work failed on the Ray cluster: The worker died .*; kept"):
        on_ray(ray := StandInRay(lost=3), Work(Times, 3, kept="; kept"), [5])
    assert ray.calls[-1] == "shutdown"


def test_a_users_error_on_ray_is_the_commands(on_ray) -> None:
    with pytest.raises(UserError, match="^unit 2 is refused$"):
        on_ray(StandInRay(), Work(Refuse, None), [1, 2, 3])


def test_where_nobody_listens_it_is_said_soon(on_ray) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = time.monotonic()
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
        with pytest.raises(UserError, match=f"no Ray cluster answers at --ray_address {address}: .*refused.*ray start"):
            on_ray(ray := StandInRay(), Work(Times, 3), [1], address=address)
        assert ray.calls == []
    assert time.monotonic() - start < 15
    with pytest.raises(UserError, match="no Ray cluster answers at --ray_address nowhere: no head node"):
        on_ray(StandInRay(), Work(Times, 3), [1], address="nowhere")
    with pytest.raises(UserError, match="--ray_address auto"):
        on_ray(StandInRay(), Work(Times, 3), [1], address=None)


def test_without_ray_one_line_says_what_to_do(on_ray) -> None:
    with pytest.raises(UserError, match=r"needs the package ray.*pip install 'act_pipeline\[ray\]'"):
        on_ray(None, Work(Times, 3), [1])
