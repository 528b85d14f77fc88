"""The processes of ``python -m paddle.distributed.launch``: rank 0 leads, the others train with it.

Rank 0 alone holds the lock, calibrates, evaluates, writes and prints; it says what happens next, and the others wait
for its word without a timeout (`messages`: who waits hears at once that the other process is gone). A training step is

1. rank 0 says that there is one (:meth:`Ranks.go_on`), after an evaluation or a checkpoint if one is due;
2. every rank reads its batch, and says where in the data it is (:meth:`Ranks.ready`);
3. all run the step, which averages what differs between them (`averaging`), so that they are equal after it.

So what rank 0 knows after a step is the state of all, and its checkpoint is that of the run. Without a launcher there
is one process, :data:`ALONE`, for which all of this is nothing.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Optional

import numpy as np

from act_pipeline.compress.qat.distributed.messages import Link
from act_pipeline.compress.qat.resume.checkpoints import Snapshot, difference
from act_pipeline.compress.qat.training import Batches
from act_pipeline.core.errors import Interrupted, UserError, describe_os_error
from act_pipeline.core.interruption import GRACE_SECONDS

# Between the death of a rank and what a collective operation of another makes of it.
_NOTICE_SECONDS = 10.0
# In rank 0's position in the data: those of the others, by rank.
_OTHERS = "others"
_SILENT = "has ended without a word (killed, out of memory, or its host is gone)"


class Ranks:
    """The only process there is.

    Attributes:
        rank: this process, from 0.
        world: how many there are.
        on_this_host: how many of them share its cores.
        failure: what happened to another rank; empty: nothing.
        connected: whether Paddle's collective operations work between them already.
    """

    rank = 0
    world = 1
    on_this_host = 1
    failure = ""
    connected = False

    @property
    def leads(self) -> bool:
        """Whether this process evaluates, writes and prints."""
        return self.rank == 0

    def run(self, work: Callable[[Ranks], int]) -> int:
        """Return the exit code that ``work`` returns."""
        return work(self)

    def shard(self, batches: Batches) -> Batches:
        """Return the batches, of which this rank has its share from now on."""
        if self.world > 1:
            batches.shard(self.rank, self.world)
        return batches

    def go_on(self, wanted: bool) -> bool:
        """Return whether rank 0 wants another step, which it says by ``wanted``."""
        return wanted

    def ready(self, position: Mapping[str, Any]) -> Mapping[str, Any]:
        """Wait until all have their batch.

        Args:
            position: where this rank is in its share, after that batch.

        Returns:
            where this rank is, and, if it leads, where the others are.
        """
        return position

    def positions(self, position: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """Return the positions in what :meth:`ready` returned, this rank's as the last.

        Raises:
            KeyError, TypeError: it was not returned by that.
        """
        return [position]

    @contextlib.contextmanager
    def stepping(self) -> Iterator[None]:
        """Run a step; a collective operation that fails because a rank is gone becomes a line."""
        yield

    def share(self, snapshot: Callable[[], Snapshot]) -> Optional[Snapshot]:
        """Give all ranks the state of rank 0; return it where it came from there."""
        return None

    @contextlib.contextmanager
    def leading(self) -> Iterator[None]:
        """Interrupt the block, by SIGTERM to this process, when another rank fails."""
        yield

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Turn that interruption into a :class:`UserError` that says what happened to which rank."""
        yield


ALONE = Ranks()


class Leader(Ranks):
    """Rank 0 of several."""

    def __init__(self, links: Mapping[int, Link], host: str) -> None:
        """Take the connections to the other ranks, by rank, and the name that they know this host by."""
        self.host = host
        self.world = 1 + len(links)
        self._links = dict(links)
        self._inboxes: dict[int, queue.Queue[Optional[dict[str, Any]]]] = {rank: queue.Queue() for rank in links}
        self._failed = threading.Event()
        self._ended = self._interruptible = False
        for rank, link in links.items():
            link.listen(functools.partial(self._hear, rank), functools.partial(self._fail, f"rank {rank} {_SILENT}"))

    def run(self, work: Callable[[Ranks], int]) -> int:
        try:
            code = work(self)
        except BaseException as error:
            self.end(getattr(error, "exit_code", 1))
            raise
        self.end(code)
        return code

    def end(self, code: int) -> None:
        """Tell the others to leave, with an exit code, once this process has."""
        self._ended = True
        self.tell("end", code=code)

    def tell(self, kind: str, arrays: Optional[Mapping[str, np.ndarray]] = None, **fields: Any) -> None:
        """Send a message to all others."""
        for link in self._links.values():
            link.send(kind, arrays, **fields)

    def hear_all(self) -> dict[int, dict[str, Any]]:
        """Wait for a message from each of the others.

        Raises:
            UserError: one of them failed.
        """
        return {rank: self._receive(rank) for rank in self._links}

    def agree(self, identity: Mapping[str, Any]) -> None:
        """Wait until the others have started with the same.

        Raises:
            UserError: one has something else, or did not get so far.
        """
        plain = json.loads(json.dumps(identity))
        for rank, message in self.hear_all().items():
            other = difference(plain, message["identity"])
            if other:
                raise UserError(
                    f"rank {rank} does not compress the same as rank 0: {other}; start all hosts with the same "
                    "command, config, data and versions"
                )

    def go_on(self, wanted: bool) -> bool:
        self.tell("step" if wanted else "trained")
        return wanted

    def ready(self, position: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**position, _OTHERS: {str(rank): message["position"] for rank, message in self.hear_all().items()}}

    def positions(self, position: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        return [*(position[_OTHERS][str(rank)] for rank in self._links), position]

    @contextlib.contextmanager
    def stepping(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError:
            if not self._failed.wait(_NOTICE_SECONDS):
                raise
            raise UserError(self.failure) from None

    def share(self, snapshot: Callable[[], Snapshot]) -> Optional[Snapshot]:
        state = snapshot()
        positions = state.progress["position"].get(_OTHERS, {})  # none before the first step
        for rank, link in self._links.items():
            progress = {**state.progress, "position": positions.get(str(rank))}
            link.send("state", state.variables, progress=progress)
        return None

    @contextlib.contextmanager
    def leading(self) -> Iterator[None]:
        self._interruptible = True
        try:
            if self.failure:
                raise UserError(self.failure)
            yield
        finally:
            self._interruptible = False

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        try:
            yield
        except Interrupted as error:
            if not self.failure:
                raise
            raise UserError("; ".join(part for part in (self.failure, str(error)) if part)) from None

    def _receive(self, rank: int) -> dict[str, Any]:
        message = self._inboxes[rank].get()
        if message is None:
            self._inboxes[rank].put(None)
            if self._interruptible:
                time.sleep(GRACE_SECONDS)  # until the signal that `_fail` sends is handled
            raise UserError(self.failure)
        return message

    def _hear(self, rank: int, message: dict[str, Any]) -> None:
        if message["kind"] == "signal":
            os.kill(os.getpid(), message["signum"])
        elif message["kind"] == "failed":
            self._fail(f"rank {rank}: {message['words']}")
        else:
            self._inboxes[rank].put(message)

    def _fail(self, words: str) -> None:
        if self._ended or self.failure:
            return
        self.failure = words
        self._failed.set()
        for inbox in self._inboxes.values():
            inbox.put(None)
        if self._interruptible:
            os.kill(os.getpid(), signal.SIGTERM)


class _Ended(BaseException):
    """Rank 0 has said that it is over."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Follower(Ranks):
    """A rank that does what rank 0 says."""

    def __init__(self, rank: int, world: int, link: Link) -> None:
        """Take the connection to rank 0."""
        self.rank, self.world = rank, world
        self._link = link
        self._inbox: queue.Queue[Optional[dict[str, Any]]] = queue.Queue()
        self._code: Optional[int] = None
        self._over = threading.Event()
        link.listen(self._hear, self._gone)

    def run(self, work: Callable[[Ranks], int]) -> int:
        with self._signals_passed_on():
            try:
                return work(self)
            except _Ended as end:
                return self._leave(end.code)
            except (UserError, OSError, MemoryError) as error:
                if self._link.closed.is_set() and self._code is None:
                    raise
                self._link.send("failed", words=_words(error))
            except Exception as error:
                traceback.print_exc()
                self._link.send("failed", words=_words(error))
            # Rank 0 prints the line; a launcher that sees us leave first would end it before it has.
            while self._link.closed.wait(_NOTICE_SECONDS) is False:
                continue
            return self._leave(1 if self._code is None else self._code)

    def say(self, kind: str, **fields: Any) -> None:
        """Send a message to rank 0."""
        self._link.send(kind, **fields)

    def receive(self) -> dict[str, Any]:
        """Wait for rank 0's word, however long that takes.

        Raises:
            UserError: it is gone.
        """
        message = self._inbox.get()
        if message is None:
            raise UserError(f"rank 0 {_SILENT}; its log says more, and --resume goes on from its last checkpoint")
        if message["kind"] == "end":
            raise _Ended(message["code"])
        return message

    def go_on(self, wanted: bool) -> bool:
        return self.receive()["kind"] == "step"

    def ready(self, position: Mapping[str, Any]) -> Mapping[str, Any]:
        self.say("ready", position=dict(position))
        return position

    @contextlib.contextmanager
    def stepping(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError:
            # Either rank 0 is gone, or it says that another one is.
            end = time.monotonic() + _NOTICE_SECONDS
            while time.monotonic() < end:
                if self._code is not None or self._link.closed.is_set():
                    self.receive()
                time.sleep(0.05)
            raise

    def share(self, snapshot: Callable[[], Snapshot]) -> Optional[Snapshot]:
        message = self.receive()
        return Snapshot(message["progress"], message["arrays"])

    def _hear(self, message: dict[str, Any]) -> None:
        if message["kind"] == "end":
            self._code = message["code"]
        self._inbox.put(message)

    def _gone(self) -> None:
        self._inbox.put(None)
        # The main thread may be within a collective operation that waits for the dead.
        if self._over.wait(_NOTICE_SECONDS + 2):
            return
        if self._code is None:
            print(f"error: rank 0 {_SILENT}", file=sys.stderr, flush=True)
        os._exit(1 if self._code is None else self._code)

    def _leave(self, code: int) -> int:
        self._link.closed.wait(_NOTICE_SECONDS)
        self._over.set()
        return code

    @contextlib.contextmanager
    def _signals_passed_on(self) -> Iterator[None]:
        """Let rank 0 end the run in order when a signal comes here; leave by force if it does not."""

        def pass_on(signum: int) -> None:
            self._link.send("signal", signum=signum)
            if not self._over.wait(GRACE_SECONDS + 1.5):
                os._exit(128 + signum)

        def handle(signum: int, frame: Any) -> None:
            threading.Thread(target=pass_on, args=(signum,), daemon=True).start()

        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            self._over.set()
            for number, handler in before.items():
                signal.signal(number, handler)


def _words(error: BaseException) -> str:
    if isinstance(error, OSError):
        return describe_os_error(error) or str(error)
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
