"""Which op writes a tensor, which ops read it, and what lies between two ops."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any


class GraphIndex:
    """An index over the ops of a block; it does not follow later changes of the block.

    Attributes:
        ops: in the order of the block.
        producer: tensor -> the op that writes it (the last one).
        readers: tensor -> the ops that read it, in order; an op that reads it twice is there once.
    """

    def __init__(self, ops: Iterable[Any]) -> None:
        """Index ops of ``paddle.static`` (with ``input_arg_names`` and ``output_arg_names``)."""
        self.ops: Sequence[Any] = list(ops)
        self.producer: dict[str, Any] = {}
        self.readers: dict[str, list[Any]] = {}
        for op in self.ops:
            for name in dict.fromkeys(op.input_arg_names):
                self.readers.setdefault(name, []).append(op)
            self.producer.update(dict.fromkeys(op.output_arg_names, op))

    def upstream(self, name: str, through: Collection[str]) -> Iterator[str]:
        """Yield a tensor, then the one that it was computed from, and so on through ops of the given types.

        An op is followed by its input ``X``, or ``Input``; the walk ends before one with several tensors there.
        """
        while True:
            yield name
            op = self.producer.get(name)
            if op is None or op.type not in through:
                return
            sources = op.input("X" if "X" in op.input_names else "Input")
            if len(sources) != 1:
                return
            name = sources[0]

    def origin(self, name: str, through: Collection[str]) -> str:
        """Return the last tensor of :meth:`upstream`."""
        *_, last = self.upstream(name, through)
        return last

    def downstream(self, names: Iterable[str], wanted: Callable[[Any], bool], through: Collection[str]) -> Any:
        """Return the nearest wanted op that reads the tensors, directly or through ops of the given types; or None."""
        waiting = deque(names)
        seen = set(waiting)
        while waiting:
            for reader in self.readers.get(waiting.popleft(), ()):
                if wanted(reader):
                    return reader
                fresh = [name for name in reader.output_arg_names if reader.type in through and name not in seen]
                seen.update(fresh)
                waiting.extend(fresh)
        return None
