"""Connect the processes that ``python -m paddle.distributed.launch`` starts."""

from __future__ import annotations

import os
import secrets
import socket
from typing import Any, Optional

from act_pipeline.compress.qat.distributed.follower import Follower
from act_pipeline.compress.qat.distributed.leader import Leader
from act_pipeline.compress.qat.distributed.messages import Link, Message
from act_pipeline.compress.qat.distributed.ranks import ALONE, Ranks
from act_pipeline.core.errors import UserError

_KEY = "act_pipeline/leader"
# Timeout of the connections; the processes import Paddle at different speeds.
_MEETING_SECONDS = 300


def join() -> Ranks:
    """Connect this process to the others of its launch.

    The environment variables of Paddle's launcher are read.

    Returns:
        This process's part: a :class:`Leader` on rank 0, else a :class:`Follower`; :data:`ALONE` without a launcher.

    Raises:
        UserError: the processes do not find each other within five minutes.
    """
    world = int(os.environ.get("PADDLE_TRAINERS_NUM", "1"))
    if world < 2:
        return ALONE
    rank = int(os.environ["PADDLE_TRAINER_ID"])
    endpoints = os.environ["PADDLE_TRAINER_ENDPOINTS"].split(",")
    hosts = [endpoint.rpartition(":")[0] for endpoint in endpoints]
    from paddle.base import core

    try:
        # The store of Paddle's `init_parallel_env`, which handles the address variables of all launchers.
        store = core.create_or_get_global_tcp_store()
        if rank:
            host, port, token = store.get(_KEY).decode().rsplit(" ", 2)
            link = Link(socket.create_connection((host, int(port)), timeout=_MEETING_SECONDS))
            link.send("hello", rank=rank, token=token)
            ranks: Ranks = Follower(rank, world, link)
        else:
            ranks = Leader(_gather(store, hosts[0], world), hosts[0])
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"rank {rank} does not find the other processes of the launch ({str(error).strip().splitlines()[-1]}); "
            "start all hosts within five minutes, and let them reach each other's ports"
        ) from None
    ranks.on_this_host = hosts.count(hosts[rank])
    return ranks


def _gather(store: Any, host: str, world: int) -> dict[int, Link]:
    token = secrets.token_hex(16)
    links: dict[int, Link] = {}
    with socket.create_server((host, 0), backlog=world) as server:
        server.settimeout(_MEETING_SECONDS)
        store.set(_KEY, f"{host} {server.getsockname()[1]} {token}")
        while len(links) < world - 1:
            link = Link(server.accept()[0])
            hello = _hello(link)
            if hello is not None and secrets.compare_digest(str(hello.fields.get("token")), token):
                links[int(hello.fields["rank"])] = link
            else:
                link.close()
    return dict(sorted(links.items()))


def _hello(link: Link) -> Optional[Message]:
    """Return the first message of a connection; None if it is closed, or another program has connected."""
    try:
        return link.receive()
    except ValueError:
        return None
