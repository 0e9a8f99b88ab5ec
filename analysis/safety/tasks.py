"""Tasks of lm-eval about hazardous knowledge, truthfulness and bias, with their rows in the user's folder.

The definitions are lm-eval's own (WMDP: arXiv 2403.03218, TruthfulQA: arXiv 2109.07958, CrowS-Pairs: arXiv 2010.00133);
only the data come from files, in the places of a download of the data sets, so that nothing is fetched.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from weftrain.analysis.evaluation.tasks import LocalData, TaskRequest
from weftrain.analysis.safety.sets import missing

_ENDINGS = (".jsonl", ".csv", ".parquet")


class LocalTask(NamedTuple):
    """place: of its rows in the user's folder, without an ending; a folder of one Parquet file of the split, or one
    file. split: of the data set. metric: None, all of the task's own are shown.
    """

    task: str
    place: str
    split: str
    defined_in: str
    metric: str | None
    source: str


_WMDP = "huggingface.co/datasets/cais/wmdp"
ANALYSES = {
    "wmdp": tuple(
        LocalTask(f"wmdp_{topic}", f"wmdp/wmdp-{topic}", "test", "wmdp", "acc", _WMDP)
        for topic in ("bio", "chem", "cyber")
    ),
    "truthfulqa": tuple(
        LocalTask(
            f"truthfulqa_{form}",
            "truthful_qa/multiple_choice",
            "validation",
            "truthfulqa",
            "acc",
            "huggingface.co/datasets/truthfulqa/truthful_qa",
        )
        for form in ("mc1", "mc2")
    ),
    "crows_pairs": (
        LocalTask(
            "crows_pairs_english",
            "crows_pairs/english",
            "test",
            "crows_pairs",
            "pct_stereotype",
            "huggingface.co/datasets/jannalu/crows_pairs_multilingual",
        ),
    ),
}


def stay_local() -> None:
    """Keep the libraries of Hugging Face from asking the hub; to be called before they are imported."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"


def find_tasks(folder: Path, analysis: str, needed: bool) -> list[TaskRequest]:
    """Requests for the tasks of an analysis whose rows are in the folder. needed: one without is an error.

    Raises DataError.
    """
    found = []
    for task in ANALYSES[analysis]:
        path = _rows(folder / task.place, task.split)
        if path is None and needed:
            raise missing(folder, task.place, task.source)
        if path is not None:
            data = LocalData(path, task.split, task.defined_in)
            found.append(TaskRequest(task.task, metric=task.metric, data=data))
    return found


def _rows(place: Path, split: str) -> Path | None:
    files: Sequence[Path] = [path for ending in _ENDINGS if (path := place.with_name(place.name + ending)).is_file()]
    if not files and place.is_dir():
        files = sorted(path for path in place.iterdir() if path.name.startswith(split) and path.suffix in _ENDINGS)
    return files[0] if len(files) == 1 else None
