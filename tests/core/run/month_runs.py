"""A run folder as a month of training leaves it: many checkpoints, a long ledger and long metrics, all of them valid.

Of a run that was really trained for a few steps `grow` makes one of many: it writes what the other steps would have
left: the ledger's chain, metrics whose digests the ledger holds, and checkpoints whose tensors are hard links to the
trained one's.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weftrain.core.config import Recipe
from weftrain.core.formats.canonical import canonical_json, parse_json, sealed, sha256_json
from weftrain.core.formats.checkpoint_manifest import MANIFEST, folder_name, read_checkpoint_manifest
from weftrain.core.run.ledger_schema import LEDGER
from weftrain.core.run.metrics import METRICS, Digest, effective_records


@dataclass(frozen=True)
class Month:
    """How much there is. saves: checkpoints made, of which the evenly spaced `kept` are still there. skips: steps
    skipped. starts: the first and every restart, after which the steps since the last save are made again.
    """

    steps: int
    saves: int
    kept: int
    skips: int
    starts: int

    @property
    def keep(self) -> str:
        """The recipe's rule of retention by which so many are kept."""
        return f"checkpoint.keep={{last: 1, every_steps: {self.steps // self.kept}}}"


SMALL = Month(steps=2_000, saves=40, kept=8, skips=50, starts=5)
FULL = Month(steps=940_000, saves=20_000, kept=400, skips=58_000, starts=1_000)


def grow(run: Path, recipe: Recipe, month: Month) -> None:
    """Make of `run`, which was trained for some steps and saved, one of month.steps completed steps."""
    model = max((run / "checkpoints").iterdir())
    shutil.move(model, run / "model")
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    writer = _Writer(run, recipe, month)
    for step in range(1, month.steps + 1):
        if step % writer.start_every == writer.start_every // 2 and step - writer.saved[0] > 1:
            writer.restart(step)
        writer.step(step)
        if step % writer.save_every == 0:
            writer.save(step)
    writer.close()
    shutil.rmtree(run / "model")


class _Writer:
    """Writes ledger, metrics and checkpoints; not with `Ledger`, which makes each line durable by itself."""

    def __init__(self, run: Path, recipe: Recipe, month: Month) -> None:
        self._run, self._month, self._batch = run, month, recipe.batch.global_batch_size
        self._tokens = recipe.tokens_per_step
        self._manifest = read_checkpoint_manifest(run / "model")
        records = list(effective_records(run))
        self._template = next(one for one in reversed(records) if one["kind"] == "step")
        self._told = next(one for one in records if one["kind"] == "start")
        self._last = parse_json((run / LEDGER).read_bytes().split(b"\n")[0])
        self._begin = {key: self._last[key] for key in ("recipe_sha256", "dataset_id", "environment")}
        self._clock = self._last["time"]
        self._ledger, self._metrics = (run / LEDGER).open("wb"), (run / METRICS).open("w")
        self._ledger.write(canonical_json(self._last) + b"\n")
        self._digest, self._losses = Digest(), random.Random(1)
        self.saved: tuple[int, str | None] = (0, None)
        self.save_every, self.start_every = month.steps // month.saves, month.steps // month.starts
        self._skip_every = max(1, month.steps // max(1, month.skips))
        self._measure(**{**self._told, "step": 0})

    def _enter(self, kind: str, step: int, **fields: Any) -> None:
        before, self._clock = self._last, self._clock + 0.25
        line = {"n": before["n"] + 1, "previous": before["hash"], "time": self._clock, "kind": kind, "step": step}
        line |= fields
        line["hash"] = sha256_json(line)
        self._last = line
        self._ledger.write(canonical_json(line) + b"\n")

    def _measure(self, **line: Any) -> dict[str, Any]:
        self._clock += 0.01
        told = {key: value for key, value in line.items() if key not in ("kind", "time")}
        self._metrics.write(json.dumps({"kind": line["kind"], "time": self._clock, **told}) + "\n")
        return line

    def step(self, step: int) -> None:
        figures = {"loss": 2 + 8 / math.sqrt(step), "grad_norm": 1 + 1 / step, "tokens": self._tokens * step}
        skipped = step % self._skip_every == 0
        self._digest.add(self._measure(**{**self._template, "step": step, **figures, "skipped": skipped}))
        if skipped:
            self._enter("skip", step, samples=[self._batch * (step - 1), self._batch * step])

    def restart(self, step: int) -> None:
        """A start from the last checkpoint, after which the steps up to `step` are made again."""
        saved, root = self.saved
        self._enter("resume", saved, parent=root, **self._begin)
        self._measure(kind="resume", step=saved)
        self._measure(**{**self._told, "step": saved})
        self._digest = Digest()
        for again in range(saved + 1, step):
            self.step(again)

    def save(self, step: int) -> None:
        held = {"step": step, "set": "words", "loss": 3 + self._losses.random(), "perplexity": 20.5, "tokens": 64}
        self._digest.add(self._measure(kind="evaluation", **held, rows=4, rows_available=9, dataset_id="d" * 64))
        (before, parent), keep_every = self.saved, self.save_every * (self._month.saves // self._month.kept)
        root = self._checkpoint(step, parent, link=step % keep_every == 0)
        digest = self._digest.hexdigest()
        self._enter("checkpoint", step, root=root, parent=parent, metrics_after=before, metrics_sha256=digest)
        self._measure(kind="checkpoint", step=step, root=root)
        if before % keep_every:
            self._enter("remove", step, removed=[[before, parent, None]], rule={"last": 1})
        self.saved, self._digest = (step, root), Digest()

    def _checkpoint(self, step: int, parent: str | None, *, link: bool) -> str:
        """The root of the checkpoint of `step`, which lies in the run's folder if `link`."""
        if not link:
            return sha256_json([step, parent])
        place = {"step": step, "optimizer_updates": step, "position": step * self._batch, "tokens": step * self._tokens}
        text = sealed({**self._manifest, **place, "parent": parent})
        folder = self._run / "checkpoints" / folder_name(step)
        folder.mkdir()
        for name in self._manifest["files"]:
            os.link(self._run / "model" / name, folder / name)
        (folder / MANIFEST).write_bytes(text)
        return str(parse_json(text)["root"])

    def close(self) -> None:
        self._ledger.close()
        self._metrics.close()
