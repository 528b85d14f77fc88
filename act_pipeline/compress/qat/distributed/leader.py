"""Rank 0 of several ranks: it sends commands to the followers and listens to them."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Optional

import numpy as np

from act_pipeline.compress.qat.distributed.messages import Link, Message
from act_pipeline.compress.qat.distributed.ranks import NOTICE_SECONDS, SILENT, Ranks
from act_pipeline.compress.qat.resume.checkpoints import Snapshot, difference
from act_pipeline.core.errors import Interrupted, UserError
from act_pipeline.core.interruption import GRACE_SECONDS

# Key in rank 0's position in the data that holds the positions of the other ranks.
_OTHERS = "others"


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
        self._inboxes: dict[int, queue.Queue[Optional[Message]]] = {rank: queue.Queue() for rank in links}
        self._failed = threading.Event()
        self._ended = self._interruptible = False
        for rank, link in links.items():
            link.listen(functools.partial(self._hear, rank), functools.partial(self._fail, f"rank {rank} {SILENT}"))

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

    def hear_all(self) -> dict[int, Message]:
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
            other = difference(plain, message.fields["identity"])
            if other:
                raise UserError(
                    f"rank {rank} does not compress the same as rank 0: {other}; start all hosts with the same "
                    "command, config, data and versions"
                )

    def go_on(self, wanted: bool) -> bool:
        self.tell("step" if wanted else "trained")
        return wanted

    def ready(self, position: Mapping[str, Any]) -> Mapping[str, Any]:
        return {
            **position,
            _OTHERS: {str(rank): message.fields["position"] for rank, message in self.hear_all().items()},
        }

    def positions(self, position: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        return [*(position[_OTHERS][str(rank)] for rank in self._links), position]

    @contextlib.contextmanager
    def stepping(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError:
            if not self._failed.wait(NOTICE_SECONDS):
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

    def _receive(self, rank: int) -> Message:
        message = self._inboxes[rank].get()
        if message is None:
            self._inboxes[rank].put(None)
            if self._interruptible:
                time.sleep(GRACE_SECONDS)  # until the signal that `_fail` sends is handled
            raise UserError(self.failure)
        return message

    def _hear(self, rank: int, message: Message) -> None:
        if message.kind == "signal":
            os.kill(os.getpid(), message.fields["signum"])
        elif message.kind == "failed":
            self._fail(f"rank {rank}: {message.fields['words']}")
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
