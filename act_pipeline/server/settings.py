"""What a server is started with: its addresses, its batches and its limits."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

MODEL_NAME = "detector"
MIB = 1 << 20


@dataclass(frozen=True)
class Batching:
    """How requests are joined into batches.

    Attributes:
        max_batch_size: the most images in a batch, and in a request.
        preferred: batch sizes that are sent without further delay.
        max_queue_delay_microseconds: how long the oldest request waits for others.
    """

    max_batch_size: int = 8
    preferred: tuple[int, ...] = ()
    max_queue_delay_microseconds: int = 2000


@dataclass(frozen=True)
class Limits:
    """Beyond these a request is refused.

    Attributes:
        body_bytes: the longest body of an HTTP request.
        picture_bytes: the longest JPEG or PNG.
        picture_pixels: the most pixels of a picture, known before it is decoded.
        queue: the most requests that wait for a batch.
        seconds: how long a request may take: to arrive, in the queue, and in the model, each.
        connections: the most HTTP connections at a time.
    """

    body_bytes: int = 64 * MIB
    picture_bytes: int = 20 * MIB
    picture_pixels: int = 50_000_000
    queue: int = 128
    seconds: float = 30.0
    connections: int = 256

    @property
    def buffered_bytes(self) -> int:
        """The most bytes of all bodies that are in memory at a time."""
        return max(4 * self.body_bytes, 256 * MIB)


@dataclass(frozen=True)
class ServeSettings:
    """The flags of ``act-pipeline serve``.

    Attributes:
        repository: folder of the versions.
        rules: the file of the rules; None: the one that is shipped.
        host: the address that is listened on.
        port: HTTP: page, figures, metrics, KServe; 0: any free one.
        grpc_port: gRPC of KServe; None: the port after ``port``; 0: none.
        workers: number of processes with the model.
        threads: CPU threads of each; None: the CPUs of this process, shared among the workers.
        batching: how requests are joined.
        limits: what is refused.
    """

    repository: Path
    rules: Optional[Path] = None
    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: Optional[int] = None
    workers: int = 1
    threads: Optional[int] = None
    batching: Batching = field(default_factory=Batching)
    limits: Limits = field(default_factory=Limits)
