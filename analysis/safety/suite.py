"""The safety analyses of a folder of sets, opened once for however many checkpoints.

SETS/toxicity_detection/sbf.csv, dynahate.csv, toxigen.jsonl     with sbf.shots.jsonl and so on beside them
SETS/toxigen/hate_black_1k.txt, ..                               prompts, one file a group
SETS/bold/gender_prompt.jsonl, ..                                prompts, one file a domain
SETS/wmdp/.., SETS/truthful_qa/.., SETS/crows_pairs/..           rows of lm-eval's tasks
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from weftrain.analysis.evaluation.records import EvaluatedCheckpoint, EvaluationRecord, EvaluationSettings, Say
from weftrain.analysis.evaluation.tasks import TaskRequest, TaskSuite
from weftrain.analysis.safety import continuations, detection, tasks
from weftrain.analysis.safety.classifiers import Classifier, find_classifier
from weftrain.analysis.safety.continuations import Prompts
from weftrain.analysis.safety.detection import DetectionSet
from weftrain.analysis.safety.texts import TextModel
from weftrain.core.errors import DataError

if TYPE_CHECKING:
    from weftrain.analysis.evaluation.lm_eval_model import CheckpointLM

ANALYSES = (detection.ANALYSIS, continuations.TOXIGEN, continuations.BOLD, *tasks.ANALYSES)
_NO_CLASSIFIER = "toxigen needs --classifier, a Hugging Face folder of a sequence classifier or a package's entry point"


@dataclass
class SafetySuite:
    """Sets that were read, with the classifier that one of them needs. left_out: analyses without a set, and why."""

    settings: EvaluationSettings
    detection: list[DetectionSet] = field(default_factory=list)
    toxigen: list[Prompts] = field(default_factory=list)
    classifier: Classifier | None = None
    bold: list[Prompts] = field(default_factory=list)
    tasks: TaskSuite | None = None
    left_out: list[str] = field(default_factory=list)

    def records(
        self,
        subject: EvaluatedCheckpoint,
        model: TextModel,
        lm: Callable[[], CheckpointLM],
        folder: Path,
        say: Say = print,
    ) -> list[EvaluationRecord]:
        """Every score of one checkpoint: read from its record in `folder`, or computed and recorded."""
        given = (subject, self.settings, model, folder, say)
        found = [detection.run_detection(one, *given) for one in self.detection]
        if self.classifier is not None:
            found += [continuations.run_toxigen(one, self.classifier, *given) for one in self.toxigen]
        if self.bold:
            found.append(continuations.run_bold(self.bold, *given))
        if self.tasks is not None:
            found += self.tasks.records(subject, lm, folder, say)
        return found


def open_suite(
    sets: Path, analyses: Sequence[str] | None, classifier: str | None, settings: EvaluationSettings
) -> SafetySuite:
    """Read every set of these analyses; None: of those that are there. Raises DataError before any model is opened."""
    if not sets.is_dir():
        raise DataError(f"{sets}: no such folder of sets: make it, and put the sets there that docs/safety.md names")
    needed = analyses is not None
    wanted = ANALYSES if analyses is None else tuple(dict.fromkeys(analyses))
    if unknown := [name for name in wanted if name not in ANALYSES]:
        raise DataError(f"--analyses: there is no '{unknown[0]}'; there are {', '.join(ANALYSES)}")
    suite = SafetySuite(settings)
    if detection.ANALYSIS in wanted:
        _open_detection(suite, sets / detection.ANALYSIS, needed)
    if continuations.TOXIGEN in wanted:
        _open_toxigen(suite, sets / continuations.TOXIGEN, needed, classifier)
    elif classifier is not None:
        raise DataError("--classifier: none of --analyses uses it: add toxigen, or leave it out")
    if continuations.BOLD in wanted:
        suite.bold = continuations.find_prompts(sets / continuations.BOLD, "prompt", continuations.BOLD_SOURCE, needed)
        if suite.bold:
            continuations.check_vader()
        else:
            suite.left_out.append(f"bold: {continuations.BOLD_SOURCE}")
    _open_tasks(suite, sets, [name for name in wanted if name in tasks.ANALYSES], needed)
    if not (suite.detection or suite.toxigen or suite.bold or suite.tasks):
        raise DataError(f"{sets}: holds none of the sets that docs/safety.md names ({', '.join(ANALYSES)})")
    return suite


def _open_detection(suite: SafetySuite, folder: Path, needed: bool) -> None:
    suite.detection = detection.find_sets(folder)
    if not suite.detection and needed:
        raise DataError(f"{folder}: holds none of {', '.join(one.name for one in detection.FORMATS)}: {_sources()}")
    there = {one.format.name for one in suite.detection}
    suite.left_out += [
        f"{detection.ANALYSIS}/{one.name}: {one.source}" for one in detection.FORMATS if one.name not in there
    ]


def _sources() -> str:
    return "; ".join(one.source for one in detection.FORMATS)


def _open_toxigen(suite: SafetySuite, folder: Path, needed: bool, classifier: str | None) -> None:
    suite.toxigen = continuations.find_prompts(
        folder, "text", continuations.TOXIGEN_SOURCE, needed or classifier is not None
    )
    if not suite.toxigen:
        suite.left_out.append(f"toxigen: {continuations.TOXIGEN_SOURCE}")
    elif classifier is not None:
        suite.classifier = find_classifier(classifier, suite.settings.device)
    elif needed:
        raise DataError(_NO_CLASSIFIER)
    else:
        suite.left_out.append(_NO_CLASSIFIER)
        suite.toxigen = []


def _open_tasks(suite: SafetySuite, sets: Path, analyses: Sequence[str], needed: bool) -> None:
    requests: list[TaskRequest] = []
    for analysis in analyses:
        found = tasks.find_tasks(sets, analysis, needed)
        requests += found
        there = {one.task for one in found}
        suite.left_out += [f"{one.task}: {one.source}" for one in tasks.ANALYSES[analysis] if one.task not in there]
    if requests:
        suite.tasks = TaskSuite(requests, suite.settings, quiet=True)
        suite.tasks.load()
