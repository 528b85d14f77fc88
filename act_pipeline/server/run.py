"""The server from its start to its end: `act-pipeline serve`."""

from __future__ import annotations

import contextlib
import signal
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Optional

from act_pipeline.core.cpus import available_cpus
from act_pipeline.core.errors import Interrupted, UserError
from act_pipeline.server.float_models import FloatModels
from act_pipeline.server.http.handler import Handler, make_backend
from act_pipeline.server.http.listener import LimitedServer
from act_pipeline.server.pool import WorkerPool
from act_pipeline.server.service import Service
from act_pipeline.server.settings import MODEL_NAME, Batching, ServeSettings
from act_pipeline.server.triton.bridge import Bridge
from act_pipeline.server.triton.process import TritonProcess, check_port, find_triton
from act_pipeline.server.triton.tensors import model_config
from act_pipeline.server.worker import BATCHES_AT_ONCE
from act_pipeline.serving import Repository, load_rules

Say = Callable[[str], None]


def serve(settings: ServeSettings, say: Say, stop: Optional[threading.Event] = None) -> None:
    """Serve until a signal, or ``stop``, ends it; then the requests that have arrived are answered.

    Args:
        settings: the flags.
        say: is called with one line per step.
        stop: ends the server when it is set; None: SIGTERM and Ctrl-C do.

    Raises:
        UserError: Triton is missing, a port is in use, or nothing can be served.
        Interrupted: a signal came before the server had started.
    """
    find_triton()
    repository = Repository.open(settings.repository)
    rules = load_rules() if settings.rules is None else load_rules(settings.rules)
    limits, grpc_port = settings.limits, _grpc_port(settings)
    threads = settings.threads or max(1, available_cpus() // settings.workers)
    with contextlib.ExitStack() as stack:
        stop = stop or stack.enter_context(_signals())
        http = LimitedServer((settings.host, settings.port), Handler, limits)
        stack.callback(http.server_close)
        if grpc_port is not None:
            check_port(settings.host, grpc_port, "--grpc_port")
        # The workers end with the stack, also when something below fails.
        pool = WorkerPool(settings.workers, threads, settings.batching.max_batch_size, limits)
        stack.callback(pool.close)
        floats = FloatModels(repository, threads, limits)
        stack.callback(floats.close)
        say(f"loading the live version of {repository.folder}: {settings.workers} x {threads} CPU threads")
        service = Service(repository, rules, pool, limits, settings.batching.max_batch_size, floats)
        stack.callback(service.close)
        model = service.live_model
        say(f"version {repository.state().live}: {model.engine} {model.precision} on {model.device}, {model.why}")
        batching = _batching(settings.batching, model.fixed_batch, say)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="act_serve_", dir=_short_folder())))
        bridge = Bridge(folder, service.answer)
        stack.callback(bridge.close)
        config = model_config(MODEL_NAME, model.input_size, batching, limits, BATCHES_AT_ONCE * settings.workers)
        triton = TritonProcess(folder, config, bridge, settings.host, grpc_port, limits.seconds)
        stack.callback(triton.close)
        http.RequestHandlerClass = type("BoundHandler", (Handler,), {"backend": make_backend(service, triton)})
        http.begin()
        grpc = "none" if grpc_port is None else f"{_host(settings.host)}:{grpc_port}"
        say(f"ready: http://{_host(settings.host)}:{http.server_port} (page, /metrics, KServe v2 at /v2), gRPC {grpc}")
        stop.wait()
        say("ending: no further connections; the requests that have arrived are answered")
        if not http.drain(limits.seconds):
            say(f"requests that took more than {limits.seconds:g} seconds are cut off")


def _batching(asked: Batching, fixed: Optional[int], say: Say) -> Batching:
    if fixed is None or asked.max_batch_size <= fixed:
        return asked
    say(
        f"--max_batch_size is {fixed} instead of {asked.max_batch_size}: the graph of the live version has this batch "
        "fixed; export it with a dynamic batch"
    )
    return Batching(fixed, (), asked.max_queue_delay_microseconds)


def _grpc_port(settings: ServeSettings) -> Optional[int]:
    if settings.grpc_port == 0:
        return None
    if settings.grpc_port is None:
        if settings.port == 0:
            raise UserError("--port=0 takes any free port, then --grpc_port must be given, or 0 for no gRPC")
        return settings.port + 1
    return settings.grpc_port


def _short_folder() -> Optional[str]:
    """Return where the temporary folder is made; None: where they are. The path of a socket has at most 107 bytes."""
    return "/tmp" if len(tempfile.gettempdir().encode()) > 70 else None


def _host(host: str) -> str:
    return f"[{host}]" if ":" in host else host


@contextlib.contextmanager
def _signals() -> Any:
    """Set an event on SIGTERM and Ctrl-C; a second one, or one before the event is waited for, interrupts."""

    class Stop(threading.Event):
        waiting = False

        def wait(self, timeout: Optional[float] = None) -> bool:
            self.waiting = True
            return super().wait(timeout)

    stop = Stop()

    def note(signum: int, frame: Optional[FrameType]) -> None:
        if stop.is_set() or not stop.waiting:
            raise Interrupted(signum, "the server is not running")
        stop.set()

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
