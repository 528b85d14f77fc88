"""What keeps Paddle and PaddleSlim from speaking up, and from meeting what another run has left."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def own_scope() -> Iterator[None]:
    """Give the run a scope of its own: ACT keeps its variables in the global one, where the next would find them."""
    import paddle

    with paddle.static.scope_guard(paddle.static.Scope()):
        yield


@contextlib.contextmanager
def quiet_upstream() -> Iterator[None]:
    """Keep the log lines and warnings of Paddle and PaddleSlim below the level of errors, except where asked for."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
