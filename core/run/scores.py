"""Scores of tasks and datasets in a run's record: a line of kind `score` in metrics.jsonl, and `evaluation` in the
ledger.

Whoever holds the run's lock enters them, `train` or, after the run's end, `weftrain eval --watch`. The ledger's line
has the hash of what the score says, and comes second: a crash between the two makes the score be entered again, and of
two lines of the same step and set the last counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from weftrain.core.config import Recipe
from weftrain.core.formats.canonical import sha256_json
from weftrain.core.run.ledger import Ledger
from weftrain.core.run.lineage import lineage
from weftrain.core.run.metrics import MetricsWriter, finite

SCORE = "score"
RECORD = "record"  # of a score: the root of its record in analyses/evaluations; those of datasets have none
_NOT_MEASURED = ("kind", "time", "evaluation_s")  # of a score: what differs between two equal ones


def score_sha256(line: Mapping[str, Any]) -> str:
    """The hash of what a line of kind `score` says, apart from clock and duration."""
    return sha256_json(finite({key: value for key, value in line.items() if key not in _NOT_MEASURED}))


def score_numbers(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of kind `score` with each of its metrics under its own name, as lines of kind `evaluation` have them;
    another line as it is.
    """
    if line["kind"] != SCORE:
        return dict(line)
    return {key: value for key, value in line.items() if key not in ("metrics", "value")} | dict(line["metrics"])


def lacks_scores(recipe: Recipe, scores: Iterable[tuple[int, str]], step: int) -> bool:
    """Whether an evaluation on the training processes, due after the last step, was not finished there.

    scores: completed steps and set of those in the ledger.
    """
    there = [name.partition("/")[0] for at, name in scores if at == step]
    return any(
        there.count(one.name) < max(1, len(one.tasks) + len(one.datasets))
        for one in recipe.evaluations
        if one.where == "train"
    )


class ScoreBook:
    """Enters scores in the metrics and the ledger of a run, whose lock is held, each once."""

    def __init__(self, metrics: MetricsWriter, ledger: Ledger) -> None:
        self._metrics, self._ledger = metrics, ledger
        self._entered = set(lineage(ledger.entries).scores)

    def entered(self, step: int) -> frozenset[str]:
        """The sets whose score at this step is in the record."""
        return frozenset(name for at, name in self._entered if at == step)

    def enter(self, line: Mapping[str, Any]) -> bool:
        """Whether the line was new. A score of a checkpoint that is not on the run's line is not entered."""
        place, root = (line["step"], line["set"]), line.get("checkpoint")
        if place in self._entered:
            return False
        if root is not None and all(point.root != root for point in lineage(self._ledger.entries).checkpoints):
            return False
        self._metrics.measured(line)
        self._metrics.flush()
        self._ledger.add(
            "evaluation",
            step=line["step"],
            set=line["set"],
            sha256=score_sha256(line),
            **{key: line[key] for key in ("record", "checkpoint", "weights_sha256") if key in line},
        )
        self._entered.add(place)
        return True
