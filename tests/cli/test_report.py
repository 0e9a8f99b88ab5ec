"""`weftrain report`: the page of a real run and of its release, and the page in a real browser, wide, narrow, light and
dark.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from record_runs import done, prepare, trainer, weftrain

from weftrain.core.formats.canonical import canonical_json, parse_json
from weftrain.core.run.ledger import read_ledger
from weftrain.core.run.ledger_schema import LEDGER
from weftrain.core.run.lineage import lineage
from weftrain.core.run.metrics import METRICS

REASON = "the loss rose </style><script>alert(1)</script><img src=x onerror=alert(2)>"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three chunks, rolled back behind its second, which was put off, and trained to its end; its
    memorization; its release.
    """
    folder = tmp_path_factory.mktemp("report")
    run, threads = folder / "runs" / "crystal_demo", torch.get_num_threads()
    torch.set_num_threads(1)  # a model of this size waits longer for a second thread than it computes
    try:
        prepare(folder)
        train = trainer(folder)
        done(train())
        done(weftrain("rollback", run, "--to", "2", "--reason", REASON))
        done(weftrain("defer", run, "--chunk", "1", "--reason", "a spike"))
        done(train())
        done(weftrain("memorize", run / "checkpoints" / "step_00000006", "--k", "4", "--l", "4", "--samples", "4"))
        done(weftrain("release", run, "--to", folder / "release", "--licence", "Apache-2.0"))
    finally:
        torch.set_num_threads(threads)
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may edit."""
    return Path(shutil.copytree(made / "runs" / "crystal_demo", tmp_path / "crystal_demo"))


def test_the_page_of_a_run_tells_its_whole_story(run: Path) -> None:
    output = done(weftrain("report", run))
    assert f"{run / 'report.html'}: open it in a browser; it needs no network" in output
    page = (run / "report.html").read_text()
    line = lineage(read_ledger(run / LEDGER))
    for point in line.checkpoints:
        assert point.root in page
        assert point.metrics_sha256 in page
    for words in (
        "complete: 6 steps",
        "<dt>tokens</dt><dd>52 x 6 steps = 312 tokens</dd>",
        line.segments[-1].dataset_id,
        "abandoned on branch 1: the loss rose &lt;/style&gt;&lt;script&gt;",
        "chunk 1 deferred: a spike",
        "chunk_00002",
        "No evaluation was recorded",
        "held-out words",
    ):
        assert words in page, words
    links = set(re.findall(r'<a href="(\./[^"]*)"', page))
    assert links == {
        *(f"./checkpoints/step_0000000{step}/" for step in (2, 4, 6)),
        *(f"./branches/1/step_0000000{step}/" for step in (4, 6)),
    }
    assert all((run / link).is_dir() for link in links)
    assert "<script>alert" not in page
    assert "<img" not in page


def test_a_page_elsewhere_links_back_and_makes_its_folder(run: Path, tmp_path: Path) -> None:
    page = tmp_path / "pages" / "of today" / "run.html"
    done(weftrain("report", run, "--to", page))
    links = set(re.findall(r'<a href="(\.[^"]*)"', page.read_text()))
    assert "../../crystal_demo/checkpoints/step_00000002/" in links
    assert all((page.parent / link).is_dir() for link in links)
    assert not (run / "report.html").exists()


def test_a_release_is_told_and_never_written_into(made: Path, tmp_path: Path) -> None:
    release = Path(shutil.copytree(made / "release", tmp_path / "release"))
    done(weftrain("report", release))
    page = (tmp_path / "release.report.html").read_text()
    value = parse_json((release / "release.json").read_bytes())
    assert value["root"] in page
    assert "<dt>licence of the weights</dt><dd>Apache-2.0</dd>" in page
    assert "; not signed; check it with weftrain verify" in page
    assert '<a href="./release/checkpoints/step_00000006/">' in page
    assert "its folder is not here" in page  # the branch's checkpoints are not released
    assert "complete and consistent" in done(weftrain("verify", release))
    refused = weftrain("report", release, "--to", release / "analyses" / "page.html")
    assert refused.exit_code == 2
    assert "lies in the release" in refused.output
    (release / "release.json").write_bytes(canonical_json({**value, "name": "another"}) + b"\n")
    altered = weftrain("report", release)
    assert altered.exit_code == 2
    assert "does not hash to its root" in altered.output


def test_what_cannot_be_is_refused_and_nothing_is_overwritten(run: Path, tmp_path: Path) -> None:
    before = (run / LEDGER).read_bytes()
    refused = weftrain("report", run, "--to", run / LEDGER)
    assert refused.exit_code == 2
    assert "does not end in .html" in refused.output
    assert (run / LEDGER).read_bytes() == before
    (tmp_path / "empty").mkdir()
    nothing = weftrain("report", tmp_path / "empty")
    assert nothing.exit_code == 2
    assert "has neither ledger.jsonl nor metrics.jsonl nor recipe.json" in nothing.output
    (run / LEDGER).write_bytes(before.replace(b'"kind":"checkpoint"', b'"kind":"chockpoint"', 1))
    broken = weftrain("report", run)
    assert broken.exit_code == 2
    assert "ledger.jsonl:3: kind 'chockpoint'" in broken.output
    assert not (run / "report.html").exists()


def test_a_damaged_analysis_is_a_warning(run: Path) -> None:
    result = next((run / "analyses" / "memorization").rglob("heldout_words.json"))
    result.write_bytes(b"{}")
    output = done(weftrain("report", run))
    assert f"warning: left out: {result}" in output
    assert 'aria-label="warnings"' in (run / "report.html").read_text()


# In a browser

OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
]


class Browser:
    """Chromium, driven by the DevTools protocol over two pipes: JSON messages that end in a zero byte, read by it from
    3, written to 4.
    """

    def __init__(self, program: str, profile: Path) -> None:
        commands, self._out = os.pipe()
        self._in, answers = os.pipe()
        # Above 3 and 4, so that neither is overwritten while they are put there.
        high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 20) for descriptor in (commands, answers)]

        def place() -> None:
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        command = [program, *OPTIONS, f"--user-data-dir={profile}", "about:blank"]
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(
            command, stdin=quiet, stdout=quiet, stderr=quiet, pass_fds=(3, 4), preexec_fn=place, start_new_session=True
        )
        for descriptor in (commands, answers, *high):
            os.close(descriptor)
        self._buffer, self._number, self.events = b"", 0, list[dict[str, Any]]()
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {} if self._session is None else {"sessionId": self._session}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._in, 1 << 16)
            assert part, "the browser ended"
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def open(self, page: Path, width: int = 1400, scheme: str = "light") -> list[str]:
        """Load a page and wait for it. What it complained of: the console, exceptions, what was blocked or failed, and
        dialogs.
        """
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url="about:blank")
        self.call("Log.clear")
        self.events.clear()
        self.call("Page.navigate", url=page.resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())
        self.value("new Promise(done => requestAnimationFrame(() => setTimeout(done, 0)))")
        return [json.dumps(event) for event in self.events if _complains(event)]

    def value(self, expression: str) -> Any:
        """Of an expression in the page, whatever its policy is for its own scripts."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def end(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._out)  # it ends when the pipe does
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        os.close(self._in)


def _complains(event: dict[str, Any]) -> bool:
    if event.get("method") == "Log.entryAdded":
        return bool(event["params"]["entry"]["level"] in ("error", "warning"))
    if event.get("method") == "Runtime.consoleAPICalled":  # the charting library logs its version
        return bool(event["params"]["type"] in ("error", "warning", "assert"))
    return event.get("method") in ("Runtime.exceptionThrown", "Page.javascriptDialogOpening")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("there is no chromium on PATH to look at the page with (Debian: apt-get install chromium)")
    found = Browser(program, tmp_path_factory.mktemp("profile"))
    yield found
    found.end()


# Elements that reach beyond the page's edge and are not within a box that scrolls.
BEYOND = """var edge = document.documentElement.clientWidth; [...document.querySelectorAll('body *')]
  .filter(one => !one.parentElement.closest('.scroll, .timeline, .lanes, svg'))
  .filter(one => { const box = one.getBoundingClientRect(); return box.width && (box.right > edge + 0.5 || box.left < -0.5); })
  .map(one => one.outerHTML.slice(0, 120))"""
WIDER = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture
def page(run: Path) -> Path:
    """Of the run, with long names, long figures and a step that is not finite in it."""
    with (run / METRICS).open("a") as file:
        for step in range(7, 400):
            loss = "nan" if step == 50 else 123456.789 / step
            rates = {"a_parameter_group_with_a_name_of_some_length_" * 2: 1e-5 * step, "matrices": 2e-5 * step}
            record = {
                "loss": loss,
                "grad_norm": loss,
                "learning_rate": rates,
                "tokens_per_second": 1.5e6 + step,
                "skipped": step == 50,
            }
            file.write(json.dumps({"kind": "step", "time": 1.0, "step": step * 10_000, **record}) + "\n")
        file.write(
            json.dumps({"kind": "evaluation", "step": 4_000_000, "set": "a-set-with-a-long-name" * 5, "loss": 2.0})
            + "\n"
        )
    done(weftrain("report", run))
    return run / "report.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 820, 1400])
def test_no_complaint_and_no_overflow_in_a_browser(browser: Browser, page: Path, width: int, scheme: str) -> None:
    assert browser.open(page, width, scheme) == []
    assert browser.value("document.images.length") == 0
    assert browser.value("document.querySelector('h1').textContent") == "crystal_demo"
    assert browser.value("innerWidth") == width
    assert browser.value(WIDER) <= 0
    assert browser.value(BEYOND) == []
    dark = browser.value("getComputedStyle(document.body).backgroundColor") == "rgb(25, 25, 24)"
    assert dark is (scheme == "dark")


def test_on_paper_nothing_scrolls(browser: Browser, page: Path) -> None:
    assert browser.open(page, 800) == []
    browser.call("Emulation.setEmulatedMedia", media="print")
    try:
        assert browser.value("getComputedStyle(document.querySelector('.timeline')).maxHeight") == "none"
        assert browser.value("getComputedStyle(document.querySelector('nav')).display") == "none"
    finally:
        browser.call("Emulation.setEmulatedMedia", media="")


@pytest.mark.parametrize(
    ("added", "words"),
    [
        ("<script>alert(1)</script>", "Content Security Policy"),
        ('<img src="x.png">', "Content Security Policy"),
        ('<link rel="stylesheet" href="https://example.org/x.css">', "Content Security Policy"),
    ],
)
def test_the_check_sees_what_is_wrong_and_the_policy_forbids_it(
    added: str, words: str, browser: Browser, page: Path
) -> None:
    broken = page.with_name("broken.html")
    broken.write_text(page.read_text().replace("<main>", f"<main>{added}"))
    complaints = browser.open(broken)
    assert any(words in complaint for complaint in complaints), complaints
    assert not any("javascriptDialogOpening" in complaint for complaint in complaints)


def test_the_check_sees_an_exception_and_an_overflow(browser: Browser, page: Path) -> None:
    broken = page.with_name("broken.html")
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    broken.write_text(text.replace("<main>", '<main><script>undefined.x</script><div style="width:900px">x</div>'))
    assert any("exceptionThrown" in complaint for complaint in browser.open(broken, 360))
    assert browser.value(WIDER) > 0
    assert len(browser.value(BEYOND)) >= 1
