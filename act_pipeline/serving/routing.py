"""Which requests a share of them is: decided by a hash of the request's id, the same in every process."""

from __future__ import annotations

import hashlib

from act_pipeline.serving.state import State

_PARTS = 1 << 32


def position(request_id: str, purpose: str, seed: int = 0) -> float:
    """Return a request's place in [0, 100), uniform over ids and independent for each purpose.

    Args:
        request_id: any text.
        purpose: what is decided, such as ``canary``.
        seed: another seed gives other places.
    """
    text = f"{seed}:{purpose}:{request_id}".encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(text, digest_size=4).digest()
    return int.from_bytes(digest, "big") * 100 / _PARTS


def choose_version(state: State, request_id: str, seed: int = 0) -> int | None:
    """Return the version that answers a request; None: nothing is live.

    A request that the candidate answers at 10% is answered by it at 50% too.

    Args:
        state: the versions in use.
        request_id: the request's id, or that of a camera or user whose requests are to have one version.
        seed: see :func:`position`.
    """
    if state.candidate is not None and position(request_id, "canary", seed) < state.share:
        return state.candidate
    return state.live


def is_shadowed(request_id: str, share: float, seed: int = 0) -> bool:
    """Return whether a request runs in the float model too.

    Args:
        request_id: the request's id.
        share: the share of the requests, percent.
        seed: see :func:`position`.
    """
    return position(request_id, "shadow", seed) < share
