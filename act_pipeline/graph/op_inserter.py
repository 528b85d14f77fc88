"""Insertion of new ops into a Paddle program."""

from __future__ import annotations

from typing import Any


class Inserter:
    """Inserts ops into a block, each after the previous one.

    Call ``program._sync_with_cpp()`` after the last change (see `act_pipeline.graph.static_graph`).
    """

    def __init__(self, block: Any, at: int, **attributes: Any) -> None:
        """Set the position of the new ops.

        Args:
            block: a block of a `paddle.static.Program`, changed in place.
            at: index of the op before which to insert.
            **attributes: attributes of every new op.
        """
        self._block, self._at, self._attributes = block, at, attributes

    def add(self, op_type: str, inputs: dict[str, Any], outputs: dict[str, Any], **attributes: Any) -> Any:
        """Insert an op and return it.

        Args:
            op_type: Paddle's op type.
            inputs, outputs: slot -> a variable, or a list of variables.
            **attributes: attributes of this op; Paddle sets its name scope, see `act_pipeline.graph.name_scopes`.
        """
        inputs, outputs = (
            {slot: held if isinstance(held, list) else [held] for slot, held in slots.items()}
            for slots in (inputs, outputs)
        )
        op = self._block._insert_op_without_sync(
            self._at, type=op_type, inputs=inputs, outputs=outputs, attrs={**self._attributes, **attributes}
        )
        self._at += 1
        return op
