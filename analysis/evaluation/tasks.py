"""Tasks of lm-eval on a checkpoint, each score as a record (records.py).

lm-eval gives shares: its 0.4257 is 42.57 in `value_percent` here, and a metric that is no share has no `value_percent`.
"""

from __future__ import annotations

import contextlib
import functools
import io
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from weftrain.analysis.evaluation.records import (
    EvaluatedCheckpoint,
    EvaluationRecord,
    EvaluationSettings,
    Say,
    inputs_of,
    once,
    score_fields,
    stored,
    version_of,
)
from weftrain.core.errors import DataError, one_line
from weftrain.core.formats import fsops
from weftrain.core.formats.canonical import sha256_json

if TYPE_CHECKING:
    from weftrain.analysis.evaluation.lm_eval_model import CheckpointLM

BOOTSTRAP_ROUNDS = 1000  # for the standard error of metrics that are not means
MISSING = "lm-eval is not installed, which tasks need: pip install 'weftrain[eval]'"
_MAX_INCLUDE_FILES = 10_000


@dataclass(frozen=True)
class LocalData:
    """The rows of a task in a file of the user's: JSON lines, CSV or Parquet. split: as the task names it. defined_in:
    the folder of lm-eval's own task files that defines the task.
    """

    path: Path
    split: str
    defined_in: str

    @functools.cached_property
    def sha256(self) -> str:
        return fsops.sha256_file(self.path)

    def overrides(self) -> dict[str, Any]:
        """Keys of the task's file that read this one instead of the hub's."""
        loader = {".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}[self.path.suffix]
        files = {"data_files": {self.split: str(self.path.absolute())}}
        return {"dataset_path": loader, "dataset_name": None, "dataset_kwargs": files}


@dataclass(frozen=True)
class TaskRequest:
    """A task of lm-eval. shots, metric, data: None, the task's own. published: model -> percent."""

    task: str
    shots: int | None = None
    metric: str | None = None
    published: Mapping[str, float] = field(default_factory=dict)
    data: LocalData | None = None


# The LLM360 paper's few-shot settings, those of the Open LLM Leaderboard of 2023, and its scores: arXiv 2312.06550 and
# the model cards.
PRESETS: dict[str, tuple[TaskRequest, ...]] = {
    "llm360": (
        TaskRequest("arc_challenge", 25, "acc_norm", {"amber": 42.57, "crystalcoder": 47.01}),
        TaskRequest("hellaswag", 10, "acc_norm", {"amber": 73.91, "crystalcoder": 71.97}),
        TaskRequest("mmlu", 5, "acc", {"amber": 28.53, "crystalcoder": 48.78}),
        TaskRequest("truthfulqa_mc2", 0, "acc", {"amber": 43.67, "crystalcoder": 35.91}),
        TaskRequest("winogrande", 5, "acc", {"amber": 64.35}),
    )
}


def run_tasks(
    requests: Sequence[TaskRequest],
    subject: EvaluatedCheckpoint,
    settings: EvaluationSettings,
    open_model: Callable[[], CheckpointLM],
    folder: Path,
    say: Say = print,
) -> list[EvaluationRecord]:
    """A record of each task of lm-eval, of each group with a score of its own, and of each member of other groups.

    open_model: called at most once, when a record is missing. folder: of the records. Raises DataError for a task that
    is unknown, unsupported, or whose data cannot be loaded.
    """
    return list(TaskSuite(requests, settings).records(subject, open_model, folder, say))


class TaskSuite:
    """Tasks of lm-eval and their data, which are loaded once for however many checkpoints.

    quiet: without lm-eval's own bars of progress.
    """

    def __init__(self, requests: Sequence[TaskRequest], settings: EvaluationSettings, quiet: bool = False) -> None:
        self._requests, self._settings, self._quiet = requests, settings, quiet
        self._include = None if settings.include is None else folder_sha256(settings.include)
        self._loaded: dict[tuple[str, int | None], Any] = {}

    @functools.cached_property
    def _harness(self) -> _Harness:
        folders = sorted({request.data.defined_in for request in self._requests if request.data is not None})
        return _Harness(self._settings.include, [request.task for request in self._requests], folders)

    def load(self) -> list[str]:
        """Load every task now, and what computes it; the names that will have a score. Raises DataError, as `records`
        does.
        """
        from weftrain.analysis.evaluation import lm_eval_model  # noqa: F401 - seconds, of no evaluation's time

        members = [member for request in self._requests for member in self._members(request)]
        for member in members:
            self._load(member)
        return [member.task for member in members]

    def records(
        self, subject: EvaluatedCheckpoint, open_model: Callable[[], CheckpointLM], folder: Path, say: Say = print
    ) -> Iterator[EvaluationRecord]:
        """See run_tasks."""
        model = functools.cache(open_model)
        for request in self._requests:
            inputs = self._inputs(request, subject)
            if (found := stored(folder, inputs, request.task, lambda line: None)) is not None:
                yield found
                continue
            for member in self._members(request):

                def measure(member: TaskRequest = member) -> EvaluationRecord:
                    loaded = self._load(member)
                    with contextlib.redirect_stderr(io.StringIO()) if self._quiet else contextlib.nullcontext():
                        results = self._harness.evaluate(loaded, model(), self._settings)
                    return _task_record(member, self._settings, results, loaded)

                yield once(folder, self._inputs(member, subject), member.task, measure, say)

    def _members(self, request: TaskRequest) -> list[TaskRequest]:
        return [replace(request, task=name) for name in self._harness.members(request.task)]

    def _load(self, request: TaskRequest) -> Any:
        key = request.task, request.shots
        if key not in self._loaded:
            self._loaded[key] = self._harness.load(request)
        return self._loaded[key]

    def _inputs(self, request: TaskRequest, subject: EvaluatedCheckpoint) -> dict[str, Any]:
        own = {"task": request.task, "shots": request.shots, "metric": request.metric, "include_sha256": self._include}
        own |= {} if request.data is None else {"data_sha256": request.data.sha256}
        return inputs_of("task", subject, self._settings) | own | {"lm_eval": version_of("lm_eval")}


class _Harness:
    """lm-eval's tasks. Its own 14,000 take seconds to list, so they are left out where `include`, or the folders of its
    own in `defined_in`, hold every name.
    """

    def __init__(self, include: Path | None, names: Sequence[str], defined_in: Sequence[str] = ()) -> None:
        try:
            import lm_eval.evaluator
            import lm_eval.tasks
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise DataError(f"{MISSING} ({error})") from error
        self._include, self._evaluate = include, lm_eval.evaluator.evaluate
        own = Path(lm_eval.tasks.__file__).parent
        few = [str(own / name) for name in defined_in] + ([str(include)] if include else [])
        self._manager: Any = TaskManager(include_path=few, include_defaults=False) if few else None
        if self._manager is None or not set(names) <= set(self._manager.all_tasks):
            self._manager = TaskManager(include_path=include and str(include))

    def members(self, name: str) -> list[str]:
        """The names that have a score: a task's own, a group's own, or its members'. Raises DataError."""
        from lm_eval.tasks._index import Kind

        entry = self._manager.task_index.get(name)
        if entry is None:
            import difflib

            near = difflib.get_close_matches(name, self._manager.all_tasks, 3)
            where = f" nor in {self._include}" if self._include else ""
            hint = f"; did you mean {', '.join(near)}?" if near else "; name a folder of task files with --include"
            raise DataError(f"task '{name}': there is none of this name in lm-eval{where}{hint}")
        if entry.kind is Kind.TAG:
            return sorted(found for tagged in entry.tags for found in self.members(tagged))
        if entry.kind is Kind.GROUP and not (entry.cfg or {}).get("aggregate_metric_list"):
            children = (entry.cfg or {}).get("task") or []
            if all(isinstance(child, str) for child in children):
                return [found for child in children for found in self.members(child)]
        return [name]

    def load(self, request: TaskRequest) -> Any:
        """The tasks of a name with their data, shots set. Raises DataError."""
        try:
            spec: Any = request.task
            if request.data is not None:  # a member of a group is the one form that lays keys over a task's own
                spec = {"group": "local_data", "task": [{"task": request.task, **request.data.overrides()}]}
            loaded = self._manager.load([spec])
            if request.data is not None:
                loaded = {"tasks": loaded["tasks"]}
        except Exception as error:  # whatever a task's own code, its data set's or the network says
            why = one_line(error)
            raise DataError(
                f"task '{request.task}': it cannot be loaded: {type(error).__name__}: {why}; its data comes from the "
                "Hugging Face hub or from the files that its own file names: check the network, HF_HOME, or data_files"
            ) from error
        for name, task in loaded["tasks"].items():
            own = task.get_config("num_fewshot")
            if own == 0 and request.shots:
                raise DataError(f"task '{name}': its file fixes it at 0 shots: leave --shots out, or give 0")
            if request.shots is not None or own is None:
                task.set_config(key="num_fewshot", value=request.shots or 0)
            if getattr(task, "UNSAFE_CODE", False):
                raise DataError(
                    f"task '{name}': it runs generated code outside of any sandbox: use --code FILE.jsonl for such "
                    "problems"
                )
        return loaded

    def evaluate(self, loaded: Any, model: CheckpointLM, settings: EvaluationSettings) -> Any:
        random.seed(settings.seed)  # a task's own code may draw from either
        np.random.seed(settings.seed % 2**32)
        model.seed = settings.seed
        for task in loaded["tasks"].values():  # each time: a checkpoint's examples do not depend on those before it
            task.set_fewshot_seed(seed=settings.seed)
        return self._evaluate(model, loaded, limit=settings.limit, bootstrap_iters=BOOTSTRAP_ROUNDS, log_samples=False)


def _task_record(request: TaskRequest, settings: EvaluationSettings, results: Any, loaded: Any) -> EvaluationRecord:
    name = request.task
    found = results["results"][name]
    metrics = _metrics(found)
    metric = request.metric or next(iter(metrics), "")
    if metric not in metrics:
        raise DataError(f"task '{name}': it has no metric '{metric}'; it has {', '.join(metrics) or 'none'}")
    shots = {results["n-shot"].get(task, 0) for task in loaded["tasks"]}
    counts = [results["n-samples"][task] for task in loaded["tasks"]]
    first = next(iter(loaded["tasks"].values()))
    generates = first.get_config("output_type") == "generate_until"
    subtasks = {task: _metrics(results["results"][task]).get(metric) for task in loaded["tasks"] if task != name}
    return {
        "task": name,
        "task_version": str(results["versions"].get(name)),  # a number of tasks, a text of groups
        "shots": shots.pop() if len(shots) == 1 else sorted(shots),
        "metric": metric,
        **metrics[metric],
        "metrics": metrics,
        "subtasks": subtasks,
        "samples": sum(count["effective"] for count in counts),
        "samples_available": sum(count["original"] for count in counts),
        "decoding": {"kind": "generate", **_plain(first.get_config("generation_kwargs") or {})}
        if generates
        else {"kind": "log_likelihood"},
        "bootstrap_rounds": BOOTSTRAP_ROUNDS,
        "published_percent": dict(request.published),
    }


def _metrics(found: Mapping[str, Any]) -> dict[str, EvaluationRecord]:
    """{"acc,none": 0.5, "acc_stderr,none": 0.1} -> {"acc": {value, value_percent, stderr, stderr_percent}}."""
    metrics = {}
    for key, value in found.items():
        name, comma, filtered = key.partition(",")
        if not comma or name.endswith("_stderr") or isinstance(value, str):
            continue
        shown = name if filtered == "none" else key
        metrics[shown] = score_fields(float(value), found.get(f"{name}_stderr,{filtered}"), name)
    return metrics


def folder_sha256(folder: Path) -> str:
    """Over the names and contents of all files below a folder, which stand for what its tasks are. Raises DataError."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of task files: correct --include")
    files = sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    if len(files) > _MAX_INCLUDE_FILES:
        raise DataError(
            f"{folder}: holds {len(files):,} files, more than {_MAX_INCLUDE_FILES:,}: name a folder of task files alone"
        )
    return sha256_json([[path.relative_to(folder).as_posix(), fsops.sha256_file(path)] for path in files])


def _plain(value: Any) -> Any:
    """JSON values of a task's settings; whatever else is in them as its text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
