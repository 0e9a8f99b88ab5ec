"""The page of a run in a real browser: every chart is drawn, no script fails, nothing overflows, light and dark,
narrow and wide.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from made_runs import Made, hostile_run

from weftrain.analysis.markup import document
from weftrain.analysis.report import page as report_page
from weftrain.analysis.report.chart import scripts
from weftrain.analysis.report.collect import collect
from weftrain.analysis.report.page import page_html

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt-get install chromium")
# Bokeh's own layout notices, which browsers log as errors and which have no effect.
HARMLESS = ("ResizeObserver loop", "[bokeh")

# Runs behind the page's own scripts: what can be asked of a document only from within. Bokeh draws in shadow trees.
PROBE = """
const canvases = node => [...node.querySelectorAll("*")].flatMap(one => [
  ...(one instanceof HTMLCanvasElement ? [one] : []), ...(one.shadowRoot ? canvases(one.shadowRoot) : [])]);
const inked = canvas => canvas.width && canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height)
  .data.some(value => value > 0);
const change = (name, value, kind) => {
  Object.assign(document.getElementById(name), {value}).dispatchEvent(new Event(kind)); };
setTimeout(() => { for (const value of [9, 5, 0, 8]) change("smoothing", value, "input"); }, 1000);
setTimeout(() => { for (const value of ["log", "clipped", "linear"]) change("axis", value, "change"); }, 1500);
// Zoom into one chart, as a tool does; what the others then show.
const drawn = () => Bokeh.documents.flatMap(one => one.roots()).slice(-4).map(plot => plot.x_range);
const steps = () => [...new Set(drawn().map(range => `${range.start}..${range.end}`))].join(" ");
setTimeout(() => {
  drawn()[2].setv({start: 6, end: 12});
  document.documentElement.dataset.zoomed = steps();
  change("smoothing", 8, "input");  // draws all of them again
}, 2200);
setTimeout(() => Object.assign(document.documentElement.dataset, {
  steps: steps(),
  charts: [...document.querySelectorAll(".plot")].filter(plot => canvases(plot).some(inked)).length,
  plots: [...document.querySelectorAll(".plot")].map(plot => plot.querySelectorAll(".bk-Figure").length).join(" "),
  smoothing: document.getElementById("smoothed").textContent,
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  ground: getComputedStyle(document.body).backgroundColor,
}), 3400);
"""


def opened(page: str, folder: Path, width: int, dark: bool) -> tuple[str, list[str]]:
    """The document after its scripts ran, and what they and the browser logged."""
    path = folder / "page.html"
    path.write_text(page, encoding="utf-8", errors="strict")
    options = [
        *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr", "--dump-dom"),
        f"--user-data-dir={folder / 'profile'}",
        f"--window-size={width},1000",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        "--virtual-time-budget=5000",
    ]
    assert CHROMIUM is not None
    done = subprocess.run([CHROMIUM, *options, path.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, [line for line in said if not any(words in line for words in HARMLESS)]


@pytest.mark.parametrize(("width", "dark"), [(400, False), (1400, True)])
def test_the_page_is_drawn(
    eventful: Made, tmp_path: Path, width: int, dark: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded = scripts()
    assert embedded is not None
    monkeypatch.setattr(report_page, "scripts", lambda: (*embedded, PROBE))
    page = page_html(collect(eventful.run, lambda recipe: ["tokens       52 x 6 = 312"]), eventful.run)
    dom, said = opened(page, tmp_path, width, dark)
    assert said == []
    facts = dict(re.findall(r'data-([a-z-]+)="([^"]*)"', dom[: dom.index("<head")]))
    assert facts.pop("smoothing") == "half-life 13 % of the run"
    assert facts.pop("plots") == "1 1 1 1"  # drawn again in place
    assert (facts.pop("zoomed"), facts.pop("steps")) == ("6..12", "6..12")  # of all charts, since one was zoomed
    assert facts == {"charts": "4", "overflow": "0", "ground": "rgb(25, 25, 24)" if dark else "rgb(250, 249, 245)"}


def test_a_stranger_s_words_run_nowhere(tmp_path: Path) -> None:
    made = hostile_run(tmp_path)
    page = page_html(collect(made.run, lambda recipe: []), made.run)
    dom, said = opened(page, tmp_path, 1000, False)
    assert said == []
    assert "alert(1)" in dom


def test_a_script_that_the_page_was_not_given_is_refused(tmp_path: Path) -> None:
    """The check of the checks: text that escaped its escaping would not run, and the log says so."""
    body = "<p>page</p><script>document.title = 'ran'</script>"
    dom, said = opened(document("quiet", "", body, ["document.body.dataset.ours = 'ran'"]), tmp_path, 1000, False)
    assert 'data-ours="ran"' in dom
    assert "<title>quiet</title>" in dom
    assert any("Content Security Policy" in line for line in said)
