"""Triton's process: found in the package nvidia-pytriton, started, watched, started again, and ended."""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import importlib.util
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from act_pipeline.core.errors import UserError
from act_pipeline.server.settings import MODEL_NAME
from act_pipeline.server.triton.bridge import Bridge

_logger = logging.getLogger(__name__)
_START_SECONDS = 60.0
# Triton starts an instance's process again by itself, within this many seconds, unless all of them have ended.
_ALONE_CHECKS = 8
_LOG_LINES = 200
_LOCAL = "127.0.0.1"
# They write files, map memory, or load models: nothing that a request may do.
_RESTRICTED = "shared-memory,model-repository,trace,logging"
_REMEDY = 'pip install "act_pipeline[serve]", or -r requirements/serve.txt'


@dataclass(frozen=True)
class TritonFiles:
    """What the package nvidia-pytriton has.

    Attributes:
        server: the program.
        libraries: folder of its shared libraries.
        backend: folder of the Python backend.
        stub: the Python backend's program for this Python.
    """

    server: Path
    libraries: Path
    backend: Path
    stub: Path


def find_triton() -> TritonFiles:
    """Return where Triton is installed; the package's Python modules are not imported.

    Raises:
        UserError: it is not, or has no program for this Python.
    """
    found = importlib.util.find_spec("pytriton")
    if found is None or not found.submodule_search_locations:
        raise UserError(f"Triton is missing (package nvidia-pytriton); install it: {_REMEDY}")
    package = Path(found.submodule_search_locations[0])
    root = package / "tritonserver"
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    files = TritonFiles(
        root / "bin" / "tritonserver",
        package.parent / "nvidia_pytriton.libs",
        root / "backends" / "python",
        root / "python_backend_stubs" / version / "triton_python_backend_stub",
    )
    for path in (files.server, files.backend, files.stub):
        if not path.exists():
            raise UserError(f"{path} is missing in the package nvidia-pytriton; install it again: {_REMEDY}")
    return files


class TritonProcess:
    """Triton with one model, which passes its batches to a :class:`Bridge`."""

    def __init__(
        self, folder: Path, config: str, bridge: Bridge, host: str, grpc_port: Optional[int], drain_seconds: float
    ) -> None:
        """Write what Triton reads, and start it.

        Args:
            folder: an empty folder for it; its path must be short, for sockets.
            config: ``config.pbtxt`` of the model.
            bridge: answers the batches.
            host: the address of gRPC.
            grpc_port: the port of gRPC; None: none.
            drain_seconds: the longest that the requests in it have when it ends.

        Raises:
            UserError: it is not installed, a port is in use, or it does not start.
        """
        self._files, self._folder = find_triton(), folder
        self._host, self._grpc_port, self._drain_seconds = host, grpc_port, drain_seconds
        self._token = secrets.token_hex(16)
        self._shm = f"act_pipeline_{os.getpid()}_"
        self._log: deque[str] = deque(maxlen=_LOG_LINES)
        self._process: Optional[subprocess.Popen[str]] = None
        self._closing = threading.Event()
        self._started = threading.Event()
        self._failure: Optional[str] = None
        self.restarts = 0
        self.http_port = self.metrics_port = 0
        self._write(config, bridge)
        # Linux ends the process with the thread that started it: this one lives as long as the server.
        self._thread = threading.Thread(target=self._supervise, name="triton", daemon=True)
        self._thread.start()
        self._started.wait()
        if self._failure is not None:
            raise UserError(self._failure)

    @property
    def pid(self) -> Optional[int]:
        """The process's id; None while it is started again."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def ready(self) -> bool:
        """Return whether it answers requests now."""
        return self.pid is not None and self._get("/v2/health/ready") == 200

    def close(self) -> None:
        """End the process when its requests are answered, or after ``drain_seconds``; a second call does nothing."""
        self._closing.set()
        process = self._process
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(self._drain_seconds + 5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._thread.join(10)
        self._clear_shared_memory()

    def _write(self, config: str, bridge: Bridge) -> None:
        model = self._folder / "models" / MODEL_NAME
        (model / "1").mkdir(parents=True)
        (model / "config.pbtxt").write_text(config, encoding="utf-8")
        shutil.copyfile(Path(__file__).with_name("stub_model.py"), model / "1" / "model.py")
        description = model / "1" / "bridge.json"
        description.touch(mode=0o600)
        description.write_text(json.dumps({"address": bridge.address, "key": bridge.key.hex()}), encoding="utf-8")
        backend = self._folder / "backends" / "python"
        backend.mkdir(parents=True)
        for path in self._files.backend.iterdir():
            (backend / path.name).symlink_to(path)
        (backend / "triton_python_backend_stub").symlink_to(self._files.stub)

    def _command(self) -> list[str]:
        flags = {
            "model-repository": self._folder / "models",
            "backend-directory": self._folder / "backends",
            "model-control-mode": "none",
            "disable-auto-complete-config": None,
            "strict-readiness": "true",
            "exit-timeout-secs": max(1, int(self._drain_seconds)),
            "log-info": "false",
            "http-address": _LOCAL,
            "http-port": self.http_port,
            "http-thread-count": 16,
            "metrics-address": _LOCAL,
            "metrics-port": self.metrics_port,
            "allow-gpu-metrics": "false",
            "allow-cpu-metrics": "false",
            "http-restricted-api": f"{_RESTRICTED}:triton-access-token={self._token}",
            "backend-config": f"python,shm-region-prefix-name={self._shm}",
        }
        if self._grpc_port is None:
            flags["allow-grpc"] = "false"
        else:
            flags.update({"grpc-address": self._host, "grpc-port": self._grpc_port})
            flags["grpc-restricted-protocol"] = f"{_RESTRICTED}:triton-access-token={self._token}"
        found = [f"--{name}" if value is None else f"--{name}={value}" for name, value in flags.items()]
        memory = [f"--backend-config=python,shm-{kind}-byte-size={1 << 20}" for kind in ("default", "growth")]
        return [str(self._files.server), *found, *memory]

    def _environment(self) -> dict[str, str]:
        # The backend's program is linked with libpython: that of this interpreter, not another of the system.
        python = sysconfig.get_config_var("LIBDIR") or ""
        libraries = [python, str(self._files.libraries), os.environ.get("LD_LIBRARY_PATH", "")]
        path = os.pathsep.join([str(Path(sys.prefix) / "bin"), os.environ.get("PATH", "")])
        return {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries)), "PATH": path}

    def _supervise(self) -> None:
        pause = 0.5
        while not self._closing.is_set():
            self._clear_shared_memory()
            began = time.monotonic()
            self._start()
            if self._started.is_set() and self._failure is not None:
                return
            self._started.set()
            process = self._process
            assert process is not None
            self._wait(process)
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)  # what a killed one leaves of its own processes
            if self._closing.is_set():
                return
            self.restarts += 1
            _logger.warning("Triton has ended (%s); it is started again", process.returncode)
            pause = 0.5 if time.monotonic() - began > 60 else min(pause * 2, 10.0)
            self._closing.wait(pause)

    def _wait(self, process: subprocess.Popen[str]) -> None:
        """Wait for the end of Triton, which is killed if all processes of its instances have ended: then it hangs."""
        alone = 0
        children: list[int] = []
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1.0)
                return
            if not any(map(_lives, children)):
                children = _children(process.pid)
            alone = 0 if self._closing.is_set() or any(map(_lives, children)) else alone + 1
            if alone == _ALONE_CHECKS:
                _logger.warning("the processes of Triton's model have ended")
                process.kill()

    def _start(self) -> None:
        self.http_port, self.metrics_port = free_port(_LOCAL), free_port(_LOCAL)
        libc = ctypes.CDLL(None)

        def end_with_parent() -> None:
            libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

        self._process = subprocess.Popen(
            self._command(),
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C is for this process, which lets Triton finish
            preexec_fn=end_with_parent,
        )
        threading.Thread(target=self._read_log, args=(self._process,), name="triton-log", daemon=True).start()
        end = time.monotonic() + _START_SECONDS
        while self._process.poll() is None and time.monotonic() < end and not self._closing.is_set():
            if self._get("/v2/health/ready") == 200:
                return
            time.sleep(0.05)
        if not self._started.is_set() and not self._closing.is_set():
            time.sleep(0.2)  # the last lines
            self._failure = f"Triton does not start: {self._last_error()}"
            if self._process.poll() is None:
                self._process.kill()
            self._process.wait()
            self._closing.set()
            self._started.set()

    def _get(self, path: str) -> int:
        connection = http.client.HTTPConnection(_LOCAL, self.http_port, timeout=2)
        with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
            connection.request("GET", path)
            return connection.getresponse().status
        return 0

    def _read_log(self, process: Any) -> None:
        for line in process.stdout:
            self._log.append(line.rstrip())
            _logger.debug("triton: %s", line.rstrip())

    def _last_error(self) -> str:
        lines = [line for line in self._log if line.strip()]
        marked = [line for line in lines if line.startswith("E") or "rror" in line]
        return (marked or lines or ["it says nothing"])[-1][:400]

    def _clear_shared_memory(self) -> None:
        for path in Path("/dev/shm").glob(f"{self._shm}*"):
            with contextlib.suppress(OSError):
                path.unlink()


def _children(pid: int) -> list[int]:
    """Return the ids of a process's children, zombies too; each thread has its own list."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, path.read_text().split())
    return found


def _lives(pid: int) -> bool:
    """Return whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def free_port(host: str) -> int:
    """Return a port of an address that nothing listens on at the moment."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as found:
        found.bind((host, 0))
        return int(found.getsockname()[1])


def check_port(host: str, port: int, flag: str) -> None:
    """Check that a port can be listened on.

    Args:
        host: the address.
        port: the port.
        flag: the flag that sets it, for the message.

    Raises:
        UserError: it is in use, or the address is none of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as found:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind((host, port))
    except (OSError, OverflowError) as error:
        raise UserError(f"{flag}={port} on {host} cannot be listened on ({error}); give another one") from None
