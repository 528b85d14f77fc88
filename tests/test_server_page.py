"""The page in a real browser at two widths: it fits, shows both models' boxes and the figures of the monitor."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from server_fixtures import FakeTriton, Front, picture
from test_report_browser import browser, run  # noqa: F401
from test_server import make_service

from act_pipeline.server.http.handler import Handler
from act_pipeline.server.settings import Limits

WIDTHS = (1280, 420)
_PROBE = """<!doctype html><meta charset="utf-8"><style>body{margin:0}iframe{border:0;display:block}</style>
%(frames)s<pre id="out"></pre><script>
const wait = async (what) => { for (let i = 0; i < 200 && !what(); i++) await new Promise(done => setTimeout(done, 50)); };
async function measure(frame) {
  const page = frame.contentDocument, root = page.documentElement, width = root.clientWidth, id = name => page.getElementById(name);
  await wait(() => id('versions').rows.length);
  await frame.contentWindow.show(new File([await (await fetch('/picture')).blob()], 'a.png', {type: 'image/png'}));
  const shown = e => e.getClientRects().length > 0 && e.getBoundingClientRect().width > 0;
  const colors = ['fp32', 'int8'].map(side => {
    const canvas = id(side), data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data, found = new Set();
    for (let i = 0; i < data.length; i += 4) found.add(data[i] + ',' + data[i + 1] + ',' + data[i + 2]);
    return [...found];
  });
  const sides = ['fp32', 'int8'].map(side => { const box = id(side).getBoundingClientRect(); return [box.left, box.top, box.right, box.bottom]; });
  const edge = [...id('int8').getContext('2d').getImageData(125, 150, 1, 1).data.slice(0, 3)].join();
  return {
    edge, width, overflow: root.scrollWidth - width, colors, sides,
    texts: ['fp32-text', 'int8-text', 'message', 'machine', 'alarm'].map(name => id(name).textContent),
    rows: [...id('versions').rows].map(row => [...row.cells].map(cell => cell.textContent)),
    head: [...id('versions-head').cells].map(cell => cell.textContent),
    outside: [...page.querySelectorAll('body *')].filter(e => shown(e) && !e.closest('.scroll')
      && (e.getBoundingClientRect().right > width + 0.5 || e.getBoundingClientRect().left < -0.5)).map(e => e.tagName + '#' + e.id),
    smallest: Math.min(...[...page.querySelectorAll('td,th,p,label,figcaption')].map(e => parseFloat(getComputedStyle(e).fontSize))),
  };
}
window.onload = async () => {
  const found = [];
  for (const frame of document.querySelectorAll('iframe')) found.push(await measure(frame));
  document.getElementById('out').textContent = JSON.stringify(found);
};
</script>"""


class WithProbe(Handler):
    """The server's handler, and a page that looks at its page."""

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path == "/probe":
            frames = "".join(f'<iframe src="/" width="{width}" height="1200"></iframe>' for width in WIDTHS)
            self._send(200, (_PROBE % {"frames": frames}).encode(), "text/html; charset=utf-8")
        elif path == "/picture":
            self._send(200, picture(90, (200, 300)), "image/png")
        else:
            super().do_GET()


@pytest.fixture
def front(tmp_path: Path) -> Iterator[Front]:
    service, pool, _ = make_service(tmp_path, 1)
    pool.box = [50, 50, 200, 150]
    pool.score, service.floats.score = 0.9, 0.2  # type: ignore[attr-defined]
    triton = FakeTriton(service)
    made = Front(service, triton, Limits(), WithProbe)
    yield made
    made.close()
    triton.close()
    service.close()


def test_it_shows_both_models_and_the_figures_at_both_widths(
    browser: str,  # noqa: F811
    front: Front,
    tmp_path: Path,
) -> None:
    for number in range(30):
        front.request("POST", f"/detect?id={number}", picture())
    url = f"http://127.0.0.1:{front.port}"
    dom = run(browser, tmp_path, "--virtual-time-budget=20000", "--window-size=1400,2500", "--dump-dom", f"{url}/probe")
    written = re.search(r'<pre id="out">(.*?)</pre>', dom, re.DOTALL)
    assert written and written.group(1), "the page did not load"
    wide, narrow = json.loads(unescape(written.group(1)))
    for found, width in ((wide, WIDTHS[0]), (narrow, WIDTHS[1])):
        assert found["width"] == width and found["overflow"] <= 0 and found["outside"] == []
        fp32, int8, message, machine, alarm = found["texts"]
        assert fp32.startswith("4.5 ms") and int8.startswith("1.5 ms") and int8.endswith("version 1")
        assert message == "" and alarm == "" and "1: openvino int8" in machine and "not available here" in machine
        # FP32's only box is below the least score, 0.3.
        assert found["colors"][0] == ["90,90,90"] and fp32.endswith("0 objects")
        assert found["edge"] == "10,125,79" and "1 objects" in int8
        (row,) = found["rows"]
        assert dict(zip(found["head"], row))["requests"] >= "30" and dict(zip(found["head"], row))["role"] == "live"
        assert found["smallest"] >= 12
    assert wide["sides"][0][2] <= wide["sides"][1][0], "side by side"
    assert narrow["sides"][0][3] <= narrow["sides"][1][1], "one below the other"


@pytest.mark.parametrize("width", WIDTHS)
def test_a_screenshot_is_not_empty(
    browser: str,  # noqa: F811
    front: Front,
    width: int,
    tmp_path: Path,
) -> None:
    from PIL import Image

    file = tmp_path / "page.png"
    run(
        browser, tmp_path, f"--screenshot={file}", f"--window-size={width},900", "--virtual-time-budget=3000",
        f"http://127.0.0.1:{front.port}/",
    )  # fmt: skip
    with Image.open(file) as image:
        assert image.width == width and len(image.convert("RGB").getcolors(1 << 20) or []) > 20
