"""Putting ops of our own into a program that Paddle made."""

from __future__ import annotations

from typing import Any


class Inserter:
    """Puts ops into a block, each behind the one before.

    Call ``program._sync_with_cpp()`` when all is done (see `act_pipeline.graph.static_graph`).
    """

    def __init__(self, block: Any, at: int, **attributes: Any) -> None:
        """Begin.

        Args:
            block: of a `paddle.static.Program`, changed in place.
            at: index of the op before which the new ones come.
            attributes: every new op has them.
        """
        self._block, self._at, self._attributes = block, at, attributes

    def add(self, op_type: str, inputs: dict[str, Any], outputs: dict[str, Any], **attributes: Any) -> None:
        """Insert an op.

        Args:
            op_type: as Paddle calls it.
            inputs, outputs: slot -> a variable, or a list of them.
            attributes: of the op.
        """
        inputs, outputs = (
            {slot: held if isinstance(held, list) else [held] for slot, held in slots.items()}
            for slots in (inputs, outputs)
        )
        self._block._insert_op_without_sync(
            self._at, type=op_type, inputs=inputs, outputs=outputs, attrs={**self._attributes, **attributes}
        )
        self._at += 1
