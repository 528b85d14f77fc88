"""The report in a real browser at two widths: no overflow, no overlap, no broken image."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest
from report_fixtures import make_artifact, make_data, search_record, write_eval

from act_pipeline.core.records import SEARCH_SCHEMA, write_record
from act_pipeline.report import write_report
from act_pipeline.report.texts import LANGUAGES

WIDTHS = (1280, 420)
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "chrome-headless-shell")
# Loads the report in frames of both widths, and outputs measurements.
_PROBE = """<!doctype html><meta charset="utf-8"><style>body{margin:0}iframe{border:0;display:block}</style>
%(frames)s<pre id="out"></pre><script>
const overlap = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1.5
  && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1.5;
const name = e => e.tagName + (e.id ? '#' + e.id : '') + (typeof e.className === 'string' && e.className ? '.' + e.className : '')
  + ': ' + (e.textContent || '').trim().slice(0, 40);
function measure(frame) {
  const page = frame.contentDocument, root = page.documentElement, width = root.clientWidth, found = {};
  found.width = width;
  found.height = root.scrollHeight;
  found.overflow = root.scrollWidth - width;
  const shown = e => e.getClientRects().length > 0 && e.getBoundingClientRect().width > 0;
  found.broken = [...page.images].filter(i => !i.complete || !i.naturalWidth).map(name);
  found.images = page.images.length;
  found.outside = [...page.querySelectorAll('body *')].filter(e => shown(e) && !e.closest('.scroll') && !e.closest('pre')
    && !e.closest('svg') && !e.matches('.skip')
    && (e.getBoundingClientRect().right > width + 0.5 || e.getBoundingClientRect().left < -0.5)).map(name);
  found.clipped = [...page.querySelectorAll('h1,h2,h3,p,td,th,li,figcaption,summary,.tile,.badge')].filter(e => shown(e)
    && e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display !== 'inline').map(name);
  const blocks = [...page.querySelectorAll(
    'h1,h2,h3,p,nav,.tile,.scroll,.card,.shot,.legend,details,pre,footer,figcaption,td,th,li')].filter(shown);
  found.overlapping = [];
  for (let i = 0; i < blocks.length; i++) for (let j = i + 1; j < blocks.length; j++) {
    const a = blocks[i], b = blocks[j];
    if (a.contains(b) || b.contains(a) || (a.closest('.scroll') !== b.closest('.scroll'))) continue;
    if ([a, b].some(e => getComputedStyle(e).position === 'sticky')) continue;
    if (overlap(a.getBoundingClientRect(), b.getBoundingClientRect())) found.overlapping.push(name(a) + ' | ' + name(b));
  }
  found.cut = [...page.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 1).map(name);
  found.charts = 0;
  found.letters = [];
  for (const chart of page.querySelectorAll('svg.chart')) {
    found.charts++;
    const frame = chart.getBoundingClientRect(), texts = [...chart.querySelectorAll('text')];
    texts.forEach((a, i) => {
      const box = a.getBoundingClientRect();
      if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1 || box.bottom > frame.bottom + 1)
        found.letters.push('outside: ' + a.textContent);
      for (const b of texts.slice(i + 1)) if (overlap(box, b.getBoundingClientRect()))
        found.letters.push(a.textContent + ' | ' + b.textContent);
    });
  }
  found.smallest = Math.min(...[...page.querySelectorAll('td,th,p,figcaption,summary')].filter(shown)
    .map(e => parseFloat(getComputedStyle(e).fontSize)));
  return found;
}
window.onload = () => {
  document.getElementById('out').textContent = JSON.stringify([...document.querySelectorAll('iframe')].map(measure));
};
</script>"""


@pytest.fixture(scope="session")
def browser() -> str:
    named = os.environ.get("CHROMIUM")
    program = named or next(filter(None, map(shutil.which, _NAMES)), None)
    if program is None:
        pytest.skip("no Chromium or Chrome is on the PATH; install one, or set CHROMIUM to its path")
    return program


@pytest.fixture(scope="module", params=LANGUAGES)
def report(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    reader = make_data(folder / "data")
    artifact = make_artifact(folder / "model_int8", reader)
    write_record(artifact / "search.json", SEARCH_SCHEMA, search_record())
    evals = [
        write_eval(folder / f"{precision}.json", "openvino", precision, p50)
        for precision, p50 in (("fp32", 20.0), ("int8", 8.0), ("bf16", 11.0))
    ]
    return write_report(artifact, reader, evals, lang=request.param)


def run(browser: str, folder: Path, *options: str) -> str:
    command = [
        browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-extensions",
        "--no-first-run", "--disable-background-networking", "--allow-file-access-from-files",
        f"--user-data-dir={folder / 'profile'}", *options,
    ]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    if ended.returncode != 0:
        pytest.skip(f"{browser} does not run here: {ended.stderr.strip()[-300:]}")
    return ended.stdout


def frames(report: Path) -> str:
    return "\n".join(f'<iframe src="{report.name}" width="{width}" height="900"></iframe>' for width in WIDTHS)


def measure(browser: str, report: Path, folder: Path) -> list[dict]:
    probe = report.with_name(f"probe_{report.name}")
    probe.write_text(_PROBE % {"frames": frames(report)}, encoding="utf-8")
    dom = run(browser, folder, "--virtual-time-budget=20000", "--window-size=1400,2000", "--dump-dom", probe.as_uri())
    written = re.search(r'<pre id="out">(.*?)</pre>', dom, re.DOTALL)
    assert written and written.group(1), "the report did not load"
    return json.loads(unescape(written.group(1)))


def test_it_fits_at_both_widths(browser, report, tmp_path):
    for width, found in zip(WIDTHS, measure(browser, report, tmp_path), strict=False):
        assert found["width"] == width and found["height"] > 3000
        assert found["overflow"] <= 0, f"at {width} the page can be pushed sideways"
        assert found["images"] >= 4 and found["charts"] >= 8
        for trouble in ("broken", "outside", "clipped", "overlapping", "letters"):
            assert found[trouble] == [], f"{trouble} at {width}: {found[trouble][:5]}"
        assert found["smallest"] >= 12
        assert width < 1000 or found["cut"] == [], "a table does not fit though there is room"


def test_the_measuring_sees_what_is_wrong(browser, report, tmp_path):
    """A page with one deliberate defect of each kind is found defective in each way."""
    text = report.read_text(encoding="utf-8")
    broken = report.with_name("broken.html")
    wide = '<div style="width:3000px">wide</div><p>under</p><p id="on" style="margin-top:-40px">on it</p>'
    image = '<img alt="none" src="data:image/png;base64,AAAA">'
    broken.write_text(text.replace('<main id="main">', f'<main id="main">{wide}{image}'), encoding="utf-8")
    for found in measure(browser, broken, tmp_path):
        assert found["overflow"] > 1000 and len(found["broken"]) == 1
        assert any("wide" in item for item in found["outside"])
        assert any("on it" in item for item in found["overlapping"])


@pytest.mark.slow
def test_the_pictures_of_it_have_ink_and_margins(browser, report, tmp_path):
    """Screenshots at both widths, light and dark, have empty margins and content between them."""
    import cv2
    import numpy as np

    light: dict[int, float] = {}
    for dark in (False, True):
        for width in WIDTHS:
            # A window of Chromium is at least 500 pixels wide; a frame can be narrower.
            page = report.with_name(f"frame_{width}.html")
            page.write_text(
                f'<body style="margin:0"><iframe src="{report.name}" style="border:0;width:{width}px;height:2400px">',
                encoding="utf-8",
            )
            shot = tmp_path / f"{width}_{dark}.png"
            scheme = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if dark else []
            run(
                browser,
                tmp_path,
                f"--screenshot={shot}",
                f"--window-size={max(width, 520)},2400",
                *scheme,
                page.as_uri(),
            )
            picture = cv2.imread(str(shot))[:, :width].astype(int)
            background = picture[1200, 4]
            margin = np.abs(picture[:, :12] - background).max()
            assert margin < 12, f"something lies in the margin at {width}"
            ink = (np.abs(picture - background).max(axis=2) > 60).mean()
            assert 0.01 < ink < 0.5, f"{ink:.1%} of the page at {width} is ink"
            if dark:
                assert background.mean() < 60 and light[width] > 200, "dark is not dark"
            else:
                light[width] = float(background.mean())
