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
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Optional

from act_pipeline.compress.qat.resume.checkpoints import Snapshot
from act_pipeline.compress.qat.training import Batches

# Time between the end of a rank and the failure of a collective operation on another rank.
NOTICE_SECONDS = 10.0
# What happened to a rank whose connection closed.
SILENT = "has ended without a word (killed, out of memory, or its host is gone)"


class Ranks:
    """A single process; base class of :class:`.leader.Leader` and :class:`.follower.Follower`.

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
