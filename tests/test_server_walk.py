"""The walk of docs/serving.md as it stands there: from the sample's model to a version that is rolled back."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from act_pipeline.server.triton.process import free_port

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("pytriton") is None or shutil.which("curl") is None,
    reason="nvidia-pytriton (requirements/serve.txt) or curl is missing",
)


def commands() -> list[str]:
    """Return the lines of the first block of the page."""
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"## The walk:.*?```\n(.*?)```", text, re.DOTALL)
    return block.splitlines()


@pytest.mark.parametrize("second", ["copied", pytest.param("compressed", marks=pytest.mark.slow)])
def test_the_walk(demo: Any, tmp_path: Path, second: str) -> None:
    """``copied``: the second version is the first one's model again, which saves a compression."""
    lines = commands()
    assert len(lines) == 10 and lines[0] == "make demo" and "requirements/serve.txt" in lines[2]
    port = free_port("127.0.0.1")
    (tmp_path / "output").mkdir()
    for model in (demo.fp32.directory, demo.compressed.model.directory):
        shutil.copytree(model, tmp_path / "output" / model.name)
    if second == "copied":
        copied = tmp_path / "output" / "second_int8"
        shutil.copytree(demo.compressed.model.directory, copied)
        with (copied / "infer_cfg.yml").open("a") as file:
            file.write("# another version\n")
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "sample").symlink_to(demo.root / "data")
    for name in ("deploy", "tools", "configs", "act_pipeline"):
        (tmp_path / name).symlink_to(ROOT / name)
    printed = {}
    environment = {**os.environ, "COLUMNS": "100"}
    server = None
    try:
        for line in [*([lines[1]] if second == "compressed" else []), *lines[3:]]:
            line = line.replace("8000", str(port)).replace("python ", f"{sys.executable} ")
            if line.endswith("&"):
                # Two free ports: the one of gRPC is the next.
                command = [*line.removesuffix("&").split(), "--port", str(port), "--grpc_port", "0"]
                server = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
                continue
            if "rollback" in line:
                wait_for_version_2(port, tmp_path)
            ended = subprocess.run(
                line,
                shell=True,
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                timeout=600,
                check=False,
            )
            assert ended.returncode == 0, f"{line}\n{ended.stderr}"
            printed[line.split("--repository")[0].split("/")[-1].strip()] = ended.stdout
    finally:
        if server is not None:
            server.send_signal(signal.SIGTERM)
            _, said = server.communicate(timeout=90)
    assert server is not None and server.returncode == 0, said
    detected = next(json.loads(text) for text in printed.values() if text.startswith('{"id"'))
    assert detected["version"] == 1 and detected["detections"][0]["score"] >= 0.5
    words = re.findall(r"(promote|roll_back) +version (\d)", printed["history.py"])
    assert words == [("promote", "1"), ("promote", "2"), ("roll_back", "2")], printed["history.py"]
    state = json.loads((tmp_path / "serving" / "live.json").read_text())
    assert state["live"] == 1 and state["candidate"] is None
    counters = json.loads((tmp_path / "serving" / "counters.json").read_text())["versions"]
    assert counters["1"]["requests"] > 0 and counters["2"]["requests"] > 0, "the canary had its share"


def wait_for_version_2(port: int, folder: Path) -> None:
    """Send pictures until the candidate has answered one."""
    import http.client

    data = next((folder / "dataset" / "sample" / "images" / "val").iterdir()).read_bytes()
    end = time.monotonic() + 120
    while time.monotonic() < end:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", "/detect", data)
        found = json.loads(connection.getresponse().read())
        connection.close()
        if found.get("version") == 2:
            return
        time.sleep(0.2)
    raise AssertionError("the candidate has answered nothing")
