"""A rank that follows the commands of rank 0."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Optional

from act_pipeline.compress.qat.distributed.messages import Link, Message
from act_pipeline.compress.qat.distributed.ranks import NOTICE_SECONDS, SILENT, Ranks
from act_pipeline.compress.qat.resume.checkpoints import Snapshot
from act_pipeline.core.errors import UserError, describe_os_error
from act_pipeline.core.interruption import GRACE_SECONDS


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
        self._inbox: queue.Queue[Optional[Message]] = queue.Queue()
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
            while self._link.closed.wait(NOTICE_SECONDS) is False:
                continue
            return self._leave(1 if self._code is None else self._code)

    def say(self, kind: str, **fields: Any) -> None:
        """Send a message of a kind to rank 0, with fields in JSON types."""
        self._link.send(kind, **fields)

    def receive(self) -> Message:
        """Wait for a message from rank 0, without a timeout.

        Raises:
            UserError: rank 0 has ended unexpectedly.
        """
        message = self._inbox.get()
        if message is None:
            raise UserError(f"rank 0 {SILENT}; its log says more, and --resume continues from its last checkpoint")
        if message.kind == "end":
            raise _Ended(message.fields["code"])
        return message

    def go_on(self, wanted: bool) -> bool:
        return self.receive().kind == "step"

    def ready(self, position: Mapping[str, Any]) -> Mapping[str, Any]:
        self.say("ready", position=dict(position))
        return position

    @contextlib.contextmanager
    def stepping(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError:
            # Either rank 0 has ended, or it reports within this time that another rank has.
            end = time.monotonic() + NOTICE_SECONDS
            while time.monotonic() < end:
                if self._code is not None or self._link.closed.is_set():
                    self.receive()
                time.sleep(0.05)
            raise

    def share(self, snapshot: Callable[[], Snapshot]) -> Optional[Snapshot]:
        message = self.receive()
        return Snapshot(message.fields["progress"], message.arrays)

    def _hear(self, message: Message) -> None:
        if message.kind == "end":
            self._code = message.fields["code"]
        self._inbox.put(message)

    def _gone(self) -> None:
        self._inbox.put(None)
        # The main thread may be in a collective operation that waits for an ended rank.
        if self._over.wait(NOTICE_SECONDS + 2):
            return
        if self._code is None:
            print(f"error: rank 0 {SILENT}", file=sys.stderr, flush=True)
        os._exit(1 if self._code is None else self._code)

    def _leave(self, code: int) -> int:
        self._link.closed.wait(NOTICE_SECONDS)
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
