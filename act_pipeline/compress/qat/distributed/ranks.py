"""Coordinate the processes of ``python -m paddle.distributed.launch``: rank 0 is the leader, the others are followers.

Only rank 0 holds the lock, calibrates, evaluates, writes and prints. It sends commands to the followers, which wait for
them without a timeout (`messages`: the end of another process is detected at once). A training step is:

1. rank 0 announces the step (:meth:`Ranks.go_on`), after an evaluation or a checkpoint if one is due;
2. every rank reads its batch and sends its position in the data to rank 0 (:meth:`Ranks.ready`);
3. all ranks run the step, which averages all values that differ between them (`averaging`).

The state of rank 0 after a step is therefore the state of all ranks, and its checkpoint is valid for all. Without a
launcher there is one process, :data:`ALONE`, whose methods do nothing or return their argument.
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

# Time between the end of a rank and the failure of a collective operation on another rank.
_NOTICE_SECONDS = 10.0
# Key in rank 0's position in the data that holds the positions of the other ranks.
_OTHERS = "others"
_SILENT = "has ended without a word (killed, out of memory, or its host is gone)"


class Ranks:
    """A single process; base class of :class:`Leader` and :class:`Follower`.

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
        """Run the program of this rank, and end together with the other ranks.

        Args:
            work: the program; it returns an exit code.

        Returns:
            The exit code of this process.
        """
        return work(self)

    def shard(self, batches: Batches) -> Batches:
        """Restrict batches to this rank's share, and return them."""
        if self.world > 1:
            batches.shard(self.rank, self.world)
        return batches

    def go_on(self, wanted: bool) -> bool:
        """Return whether rank 0 runs another step; on rank 0, ``wanted`` decides and is sent to the followers."""
        return wanted

    def ready(self, position: Mapping[str, Any]) -> Mapping[str, Any]:
        """Report that this rank has read its batch; on rank 0, wait until all ranks have.

        Args:
            position: this rank's position in its share of the data, after that batch.

        Returns:
            This rank's position; on rank 0, also those of the others.

        Raises:
            UserError: another rank failed.
        """
        return position

    def positions(self, position: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """Return the positions of all ranks that are known here, this rank's last.

        Args:
            position: an output of :meth:`ready`.

        Raises:
            KeyError, TypeError: ``position`` is not an output of :meth:`ready`.
        """
        return [position]

    @contextlib.contextmanager
    def stepping(self) -> Iterator[None]:
        """Run a step in the ``with`` block; raise UserError if it fails because another rank has ended."""
        yield

    def share(self, snapshot: Callable[[], Snapshot]) -> Optional[Snapshot]:
        """Send the state of rank 0 to all ranks.

        Args:
            snapshot: returns the state; called on rank 0 only.

        Returns:
            The state, on a follower; None on rank 0 and without several ranks.
        """
        return None

    @contextlib.contextmanager
    def leading(self) -> Iterator[None]:
        """Interrupt the ``with`` block on rank 0, by SIGTERM to this process, when another rank fails."""
        yield

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Turn the interruption of :meth:`leading` into a :class:`UserError` that names the failed rank."""
        yield


ALONE = Ranks()


class Leader(Ranks):
    """Rank 0 of several ranks.

    Attributes:
        host: the name by which the other ranks reach this host.
    """

    def __init__(self, links: Mapping[int, Link], host: str) -> None:
        """Start to listen to the other ranks.

        Args:
            links: rank -> connection.
            host: the name by which the other ranks reach this host.
        """
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
        """Tell the followers to end with an exit code once this process has ended."""
        self._ended = True
        self.tell("end", code=code)

    def tell(self, kind: str, arrays: Optional[Mapping[str, np.ndarray]] = None, **fields: Any) -> None:
        """Send a message to all followers; the arguments are those of :meth:`Link.send`."""
        for link in self._links.values():
            link.send(kind, arrays, **fields)

    def hear_all(self) -> dict[int, dict[str, Any]]:
        """Wait for a message from each follower.

        Returns:
            Rank -> message.

        Raises:
            UserError: a follower failed.
        """
        return {rank: self._receive(rank) for rank in self._links}

    def agree(self, identity: Mapping[str, Any]) -> None:
        """Wait until all followers have started, and check that they compress the same.

        Args:
            identity: the output of `compress.identity.shared_identity` on this rank.

        Raises:
            UserError: a follower has another identity, or failed.
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
        positions = state.progress["position"].get(_OTHERS, {})  # empty before the first step
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
    """Rank 0 has ended the run, with an exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Follower(Ranks):
    """A rank that follows the commands of rank 0."""

    def __init__(self, rank: int, world: int, link: Link) -> None:
        """Start to listen to rank 0.

        Args:
            rank: rank of this process.
            world: the number of ranks.
            link: the connection to rank 0.
        """
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
            # Rank 0 prints the error. If this process ended first, the launcher would kill rank 0 before that.
            while self._link.closed.wait(_NOTICE_SECONDS) is False:
                continue
            return self._leave(1 if self._code is None else self._code)

    def say(self, kind: str, **fields: Any) -> None:
        """Send a message of a kind to rank 0, with fields in JSON types."""
        self._link.send(kind, **fields)

    def receive(self) -> dict[str, Any]:
        """Wait for a message from rank 0, without a timeout.

        Raises:
            UserError: rank 0 has ended unexpectedly.
        """
        message = self._inbox.get()
        if message is None:
            raise UserError(f"rank 0 {_SILENT}; its log says more, and --resume continues from its last checkpoint")
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
            # Either rank 0 has ended, or it reports within this time that another rank has.
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
        # The main thread may be in a collective operation that waits for an ended rank.
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
        """Forward SIGINT and SIGTERM to rank 0, which ends the run; exit by force if it does not end in time."""

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
