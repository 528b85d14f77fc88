"""Kills children in the middle of changes of a repository; run by test_serving_versions.py in a process of its own.

A child does one change, and ends itself by SIGKILL at the n-th system call that changes the disk: before it, after it,
or with half of the bytes written. The parent then checks what is left and goes on from there.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from serving_fixtures import audit_of, make_model  # noqa: E402

from act_pipeline.serving import Repository, promote, roll_back  # noqa: E402
from act_pipeline.serving.counters import Counters  # noqa: E402

CALLS = ((os, "replace"), (os, "write"), (os, "fsync"), (os, "chmod"), (os, "unlink"), (shutil, "copyfile"))


def die_at(moment: int, how: str) -> None:
    """End this process at its ``moment``-th call; ``how`` is ``before``, ``half`` or ``after``."""
    left = [moment]

    def wrapped(call: Callable, name: str) -> Callable:
        def run(*arguments, **options):
            left[0] -= 1
            if left[0]:
                return call(*arguments, **options)
            if how == "half" and name == "write":
                call(arguments[0], arguments[1][: len(arguments[1]) // 2])
            elif how == "after":
                call(*arguments, **options)
            os.kill(os.getpid(), signal.SIGKILL)

        return run

    for module, name in CALLS:
        setattr(module, name, wrapped(getattr(module, name), name))


def child(work: Callable[[], object]) -> int:
    """Return the exit status of a child that does the work: 0, or -9."""
    pid = os.fork()
    if not pid:
        work()
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def check(folder: Path) -> None:
    """Check that the repository is whole: its pointer names versions that are there, and each change has one line."""
    repository = Repository.open(folder)
    with repository.changing() as state:
        pass
    for number in {*state.shares(), *state.previous}:
        assert (repository.version(number).model.directory / "act.json").is_file()
    entries = repository.audit.entries()
    changes = [entry["change"] for entry in entries if "change" in entry]
    assert changes == list(range(1, state.change + 1)), changes
    last = entries[-1]
    assert (last["live"], last["candidate"], last["share"]) == (state.live, state.candidate, state.share)
    assert not [path for path in folder.iterdir() if path.name.startswith(".live")]


def main() -> None:
    root = Path(sys.argv[1])
    models = [make_model(root / name, name) for name in "abc"]
    start = root / "start"
    promote(Repository.open(start, create=True), models[0])
    promote(Repository.open(start), models[1])
    works: dict[str, Callable[[Path], Callable[[], object]]] = {
        "promote": lambda folder: lambda: promote(Repository.open(folder), models[2], 10),
        "rollback": lambda folder: lambda: roll_back(Repository.open(folder)),
    }
    kills, torn = 0, 0
    for name, work in works.items():
        for how in ("before", "half", "after"):
            moment, ended = 0, -signal.SIGKILL
            while ended:
                moment += 1
                folder = root / f"{name}_{how}_{moment}"
                shutil.copytree(start, folder)
                before = Repository.open(folder).state()

                def killed(folder: Path = folder, moment: int = moment) -> None:
                    die_at(moment, how)
                    work(folder)()

                ended = child(killed)
                assert ended in (0, -signal.SIGKILL), ended
                torn += not (folder / "audit.jsonl").read_bytes().endswith(b"\n")
                after = Repository.open(folder).state()
                assert after.change - before.change in (0, 1), (name, how, moment)
                check(folder)
                assert child(lambda folder=folder: promote(Repository.open(folder), models[2], 50)) == 0
                check(folder)
                kills += ended != 0
                if ended == 0:
                    assert len(audit_of(folder)) >= 4
                shutil.rmtree(folder)
    path = root / "counters.json"
    for moment in range(1, 30):

        def counting(moment: int = moment) -> None:
            counters = Counters(path)
            die_at(moment, ("before", "half", "after")[moment % 3])
            while True:
                counters.add(1, "requests", 7)
                counters.save()

        before = Counters(path).of(1)["requests"]
        assert child(counting) == -signal.SIGKILL
        found = Counters(path).of(1)["requests"]
        assert found >= before and found % 7 == 0, (before, found)
        kills += 1
    print(f"{kills} kills, {torn} torn lines, {Counters(path).of(1)['requests']} requests")


if __name__ == "__main__":
    main()
