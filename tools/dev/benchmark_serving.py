"""Time a running server under concurrent clients: images a second, latency, memory of its processes."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from act_pipeline.cli.flags import Parser, at_least
from act_pipeline.core.errors import UserError

_MODEL = "detector"
_MIB = 1 << 20


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, print."""
    parser = Parser(description=__doc__)
    parser.add_argument("--url", default="127.0.0.1:8000", help="HTTP port, or gRPC port; default: %(default)s")
    parser.add_argument("--protocol", choices=("http", "grpc"), default="http", help="default: %(default)s")
    parser.add_argument("--pictures", required=True, help="folder of JPEG or PNG files, sent in turns")
    parser.add_argument("--clients", type=_counts, default=[1, 32], help="numbers of clients; default: 1,32")
    parser.add_argument("--seconds", type=at_least(1), default=30, help="for each number; default: %(default)s")
    parser.add_argument("--warmup", type=at_least(0), default=5, help="seconds before; default: %(default)s")
    parser.add_argument("--pid", type=int, help="the server's process, for the memory of it and of its children")
    parser.add_argument("--json", help="write the figures here")
    arguments = parser.parse(argv)
    paths = sorted(
        path for path in Path(arguments.pictures).iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png")
    )
    if not paths:
        raise UserError(f"--pictures={arguments.pictures} has no JPEG or PNG, expected some")
    pictures = [path.read_bytes() for path in paths[:200]]
    connect = _connector(arguments.protocol, arguments.url)
    rows = []
    print("clients  images/s      p50      p99      max  errors  MiB first, last, most")
    for clients in arguments.clients:
        _measure(connect, pictures, clients, arguments.warmup, None)
        row = _measure(connect, pictures, clients, arguments.seconds, arguments.pid)
        rows.append(row)
        memory = ", ".join(f"{size:.0f}" for size in row["mib"]) if row["mib"] else "not asked for (--pid)"
        print(
            f"{clients:7} {row['images_per_second']:9.1f} {row['p50_ms']:8.0f} {row['p99_ms']:8.0f} "
            f"{row['max_ms']:8.0f} {row['errors']:7}  {memory}",
            flush=True,
        )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"arguments": vars(arguments), "rows": rows}, indent=1) + "\n")
    return 0 if not any(row["errors"] for row in rows) else 1


def _measure(
    connect: Callable[[], Callable[[bytes], None]],
    pictures: Sequence[bytes],
    clients: int,
    seconds: float,
    pid: int | None,
) -> dict[str, Any]:
    """Return the figures of a number of clients, each of which sends its next picture when its last is answered."""
    start = threading.Barrier(clients + 1)
    taken: list[float] = []
    errors: list[str] = []
    end = 0.0

    def work(number: int) -> None:
        send = connect()
        start.wait()
        for place in itertools.count(number):
            began = time.perf_counter()
            if began > end:
                return
            try:
                send(pictures[place % len(pictures)])
                taken.append((time.perf_counter() - began) * 1000)
            except Exception as error:
                errors.append(str(error))
                time.sleep(0.05)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    end = time.perf_counter() + seconds
    start.wait()
    began = time.perf_counter()
    memory = []
    while any(thread.is_alive() for thread in threads):
        if pid is not None:
            memory.append(_mib(pid))
        threads[0].join(min(5.0, seconds / 4))
        for thread in threads if time.perf_counter() > end else ():
            thread.join()
    spent = time.perf_counter() - began
    for reason in sorted(set(errors))[:3]:
        print(f"error: {reason}", file=sys.stderr)
    times = np.array(taken or [0.0])
    return {
        "clients": clients,
        "images": len(taken),
        "seconds": spent,
        "images_per_second": len(taken) / spent,
        "p50_ms": float(np.percentile(times, 50)),
        "p99_ms": float(np.percentile(times, 99)),
        "max_ms": float(times.max()),
        "errors": len(errors),
        "mib": [memory[0], memory[-1], max(memory)] if memory else [],
        "mib_all": memory,
    }


def _connector(protocol: str, url: str) -> Callable[[], Callable[[bytes], None]]:
    """Return what makes the client of a thread: a function that sends a picture and waits for the answer."""
    try:
        if protocol == "http":
            import tritonclient.http as client
        else:
            import tritonclient.grpc as client
    except ImportError as error:
        raise UserError(f"tritonclient cannot be imported ({error}); install requirements/serve.txt") from None

    def connect() -> Callable[[bytes], None]:
        connection = client.InferenceServerClient(url)
        picture = client.InferInput("picture", [1, 1], "BYTES")

        def send(data: bytes) -> None:
            picture.set_data_from_numpy(np.array([[data]], object))
            boxes = connection.infer(_MODEL, [picture]).as_numpy("boxes")
            assert boxes is not None and boxes.shape[0] == 1

        return send

    return connect


def _mib(pid: int) -> float:
    """Return the memory of a process and its descendants that they share with no other (PSS), MiB."""
    total = 0
    for number in _tree(pid):
        try:
            rollup = Path(f"/proc/{number}/smaps_rollup").read_text()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    return total * 1024 / _MIB


def _tree(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            parent = int(Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        children.setdefault(parent, []).append(int(name))
    found = [pid]
    for number in found:
        found += children.get(number, [])
    return found


def _counts(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected numbers of clients such as 1,32")
    return [int(part) for part in parts]
