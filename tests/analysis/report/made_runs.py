"""Runs made of records alone, and checks of their pages, which the tests of reports share."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from weftrain.analysis.evaluation.records import FOLDER, EvaluatedCheckpoint, EvaluationSettings, inputs_of, once
from weftrain.analysis.markup import POLICY
from weftrain.analysis.memorization.scores import FORMAT, Parameters, figures, result_path
from weftrain.analysis.report.chart import scripts
from weftrain.analysis.report.collect import RunReport, collect
from weftrain.analysis.report.page import page_html
from weftrain.core.config import Recipe
from weftrain.core.errors import RunFolderError
from weftrain.core.formats.canonical import canonical_json, sha256_json
from weftrain.core.formats.checkpoint_manifest import folder_name
from weftrain.core.recipe_file import load_recipe
from weftrain.core.run.ledger import Ledger
from weftrain.core.run.metrics import METRICS

DATASET = "d" * 64


KERNELS = {"ops": {"attention": [{"source": "torch"}]}}


class Made:
    """A run that nobody trained: 6 steps a chunk, 4 chunks; a ledger with a clock of its own and metrics to the same
    effect.
    """

    def __init__(self, run: Path, steps: int = 24, chunks: int | None = 4) -> None:
        self.run, self.now, self.parent = run, 1000.0, None
        (run / "checkpoints").mkdir(parents=True)
        cut = [f"schedule.steps={steps}", f"data.chunks={'null' if chunks is None else chunks}"]
        self.recipe: Recipe = load_recipe("crystal_demo", cut).recipe
        self.json = self.recipe.model_dump(mode="json")
        self.batch = self.recipe.batch.global_batch_size
        (run / "recipe.json").write_bytes(canonical_json(self.json) + b"\n")
        self.ledger = Ledger(run, clock=lambda: self.now)
        self.environment: dict[str, Any] = {
            "backend": "local",
            "device": "x86_64",
            "weftrain": "9.9",
            "kernels": KERNELS,
        }
        self.roots: dict[int, str] = {}
        self.parent: str | None

    def metric(self, kind: str, **fields: Any) -> None:
        with (self.run / METRICS).open("a") as file:
            file.write(json.dumps({"kind": kind, "time": self.now, **fields}) + "\n")

    def go(
        self, first: int, last: int, *, loss: float = 2.0, save: Sequence[int] = (), skip: Sequence[int] = ()
    ) -> None:
        """Train from step `first` to `last`: a start, or a resume where there was one."""
        self.now += 10
        self.ledger.open_run(first, self.json, DATASET, self.environment, self.parent)
        if (self.run / METRICS).exists():
            self.metric("resume", step=first)
        self.ledger.chunk_begin(first, self.recipe, DATASET, self.parent)
        for step in range(first + 1, last + 1):
            self.now += 1
            self.step(step, loss, step in skip)
            if step in skip:
                self.ledger.add("skip", step=step, samples=[(step - 1) * self.batch, step * self.batch])
            if step in save:
                self.save(step, loss)

    def step(self, step: int, loss: float, skipped: bool = False) -> None:
        rates = {"embeddings": step * 1e-3, "norms": step * 1e-3, "matrices": step * 1e-4}
        value = "nan" if skipped else loss + step / 1000
        figures = {
            "tokens_per_second": 100.0 + step,
            "tokens": step * 10,
            "grad_norm": 1.0,
            "learning_rate": rates,
            "skipped": skipped,
        }
        self.metric("step", step=step, loss=value, **figures)

    def save(self, step: int, loss: float) -> None:
        root = sha256_json([step, loss])
        (self.run / "checkpoints" / folder_name(step)).mkdir()
        measured = {"metrics_after": 0, "metrics_sha256": sha256_json(["metrics", step, loss])}
        self.ledger.checkpoint(self.recipe, DATASET, step=step, root=root, parent=self.parent, **measured)
        self.parent = self.roots[step] = root
        self.metric(
            "evaluation", step=step, set="words", loss=loss + 0.5, perplexity=1.0, tokens=1, rows=4, rows_available=9
        )
        if step < self.recipe.schedule.steps:
            self.ledger.chunk_begin(step, self.recipe, DATASET, root)

    def roll_back(self, step: int, branch: int, reason: str) -> None:
        self.now += 5
        gone = [[later, root] for later, root in self.roots.items() if later > step]
        self.ledger.add("rollback", step=step, root=self.roots[step], branch=branch, abandoned=gone, reason=reason)
        (self.run / "branches" / str(branch)).mkdir(parents=True)
        for later, _ in gone:
            name = folder_name(later)
            (self.run / "checkpoints" / name).rename(self.run / "branches" / str(branch) / name)
            del self.roots[later]
        self.parent = self.roots[step]


def report_of(run: Path) -> RunReport:
    return collect(run, lambda recipe: ["tokens       52 x 6 = 312", "chunks       4 x 6 steps"])


def page_of(run: Path) -> str:
    return page_html(report_of(run), run)


def data_of(page: str) -> dict[str, Any]:
    """What the page's charts are drawn from."""
    (text,) = re.findall(r'<script type="application/json" id="charts">(.*?)</script>', page)
    found: dict[str, Any] = json.loads(text)
    return found


def memorize(run: Path, step: int, root: str, chunk: str, matches: list[int], stop: int | None) -> Path:
    parameters = Parameters(prompt_tokens=4, continuation_tokens=4, samples=len(matches))
    mean, extractible = figures(matches, 4)
    path = result_path(run / "analyses" / "memorization", parameters, step, chunk)
    path.parent.mkdir(parents=True, exist_ok=True)
    value = {
        "format": FORMAT,
        "version": 1,
        "software": {},
        "step": step,
        "root": root,
        "chunk": chunk,
        "kind": "heldout" if stop is None else "training",
        "first_step": None if stop is None else stop - 6,
        "stop_step": stop,
        "dataset_id": DATASET,
        "parameters": parameters.model_dump(),
        "sample_numbers": list(range(len(matches))),
        "rows_sha256": "0" * 64,
        "matches": matches,
        "mean_score": mean,
        "extractible_percent": extractible,
        "repeated": 0,
    }
    path.write_bytes(canonical_json(value) + b"\n")
    return path


def evaluate(run: Path, step: int, root: str, name: str, **found: Any) -> Path:
    inputs = {**inputs_of("task", EvaluatedCheckpoint(root, step), EvaluationSettings()), "task": name}
    measured = {"task": name, "task_version": 1.0, "shots": 5, "metric": "acc", "value": 0.25, "value_percent": 25.0}
    more = {"stderr": 0.01, "stderr_percent": 1.5, "samples": 40, "samples_available": 40, "decoding": None, **found}
    once(run / FOLDER, inputs, name, lambda: {**measured, **more}, print)
    return next((run / FOLDER).glob(f"{step:08d}-*"))


HOSTILE = "</style></title><script>alert(1)</script><img src=x onerror=alert(2)>\"' onload='alert(3)' \u202e\x00"


def hostile_run(folder: Path) -> Made:
    made = Made(folder / "<img src=x onerror=alert(4)>&quot;")
    made.json = {**made.json, "description": HOSTILE}
    (made.run / "recipe.json").write_bytes(canonical_json(made.json) + b"\n")
    made.environment = {
        HOSTILE: HOSTILE,
        "backend": HOSTILE,
        "device": HOSTILE,
        "weftrain": HOSTILE,
        "kernels": {"ops": {HOSTILE: []}},
    }
    made.go(0, 12, save=[6, 12])
    made.roll_back(6, 1, HOSTILE)
    made.ledger.add("defer", step=6, chunk=2, action="defer", reason=HOSTILE)
    made.ledger.add("recipe", step=6, changes=[[HOSTILE, None, HOSTILE]], recipe=made.json, recipe_sha256="0" * 64)
    made.environment = {**made.environment, HOSTILE: 1}
    made.go(6, 9)
    made.metric("evaluation", step=9, set=HOSTILE, loss=2.0)
    made.metric("evaluation", step=9, set="\ud800", loss=2.0)
    made.metric("step", step=10, loss=1.0, learning_rate={HOSTILE: 1.0})
    evaluate(made.run, 9, HOSTILE, "task", task=HOSTILE, metric=HOSTILE, task_version=HOSTILE)
    memorize(made.run, 6, made.roots[6], "chunk_00000", [1], 6)
    return made


class Markup(HTMLParser):
    """Every tag with its attributes, and whether all of them are closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> Iterator[dict[str, str | None]]:
        return (attributes for name, attributes in self.tags if name == tag)


ALLOWED_TAGS = {
    *(
        "html",
        "head",
        "meta",
        "link",
        "title",
        "style",
        "body",
        "header",
        "nav",
        "main",
        "section",
        "footer",
        "h1",
        "h2",
        "h3",
        "p",
    ),
    *("span", "b", "i", "a", "code", "time", "ul", "ol", "li", "dl", "dt", "dd", "div", "figure", "figcaption"),
    *("table", "caption", "thead", "tbody", "tr", "th", "td"),
    *("script", "form", "label", "select", "option", "input", "output"),
}


def check_markup(page: str) -> Markup:
    markup = Markup(page)
    assert markup.open == []
    assert {tag for tag, _ in markup.tags} <= ALLOWED_TAGS
    for _, attributes in markup.tags:
        assert not [
            name for name in attributes if name.startswith("on") or name in ("src", "srcset", "action", "formaction")
        ]
    for attributes in markup.all("a"):
        assert re.match(r"(#[a-z]+|\.{1,2}/.*/)$", attributes["href"] or ""), attributes
    policies = [one["content"] for one in markup.all("meta") if one.get("http-equiv") == "Content-Security-Policy"]
    found = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert tuple(found) in ((), scripts())
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in found)
    allowed = "".join(f" 'sha256-{digest}'" for digest in digests)
    assert policies == [f"{POLICY}; script-src{allowed}" if found else POLICY]
    kinds = [attributes for attributes in markup.all("script") if attributes]
    assert kinds in ([], [{"type": "application/json", "id": "charts"}])
    return markup


def refusal_of(run: Path) -> str | None:
    """What is said instead of a page; None where there is one, which is checked."""
    try:
        check_markup(page_of(run))
    except RunFolderError as error:
        return str(error)
    return None
