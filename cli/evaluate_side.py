"""`weftrain eval RUN --watch` without tasks of its own makes what the run's recipe leaves to a process on the side: its
`evaluations` with `where: side`, at each checkpoint for which they are due.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from weftrain.analysis.evaluation.heldout import attend_within_documents, run_heldout
from weftrain.analysis.evaluation.records import (
    EvaluatedCheckpoint,
    EvaluationRecord,
    EvaluationSettings,
    Say,
    records_folder,
)
from weftrain.analysis.evaluation.scores import enter_side_scores, open_datasets, requests_of, settings_of
from weftrain.analysis.evaluation.tasks import TaskSuite
from weftrain.core.config import Recipe
from weftrain.core.formats.tokenizer_file import panics_refused
from weftrain.exchange.release.release import RELEASE

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from weftrain.analysis.evaluation.lm_eval_model import CheckpointLM
    from weftrain.core.evaluations_section import EvaluationConfig
    from weftrain.core.formats.dataset_manifest import DatasetManifest
    from weftrain.core.model import Decoder


class Opened(Protocol):
    """What is needed of a checkpoint: cli/evaluated.py has it."""

    path: Path
    root: str
    step: int
    recipe: Recipe

    @property
    def decoder(self) -> Decoder: ...

    @property
    def tokenizer(self) -> tuple[Tokenizer, str, int]: ...

    @property
    def tokenizer_file(self) -> tuple[Path, tuple[Path, DatasetManifest] | None]: ...


class SideEvaluations:
    """The evaluations on the side of one run. Tasks and their data are loaded once. say: gets a line for the user.

    settings: of the command; batch size, limit and task files are the recipe's.
    """

    def __init__(self, run: Path, settings: EvaluationSettings, say: Say) -> None:
        self._run, self._settings, self._say = run, settings, say
        self._suites: dict[str, TaskSuite] = {}

    def of(self, recipe: Recipe) -> list[EvaluationConfig]:
        """None of a release, which is a stranger's: task files may hold code."""
        if (self._run / RELEASE).exists():
            return []
        return [one for one in recipe.evaluations if one.where == "side"]

    def records(self, opened: Opened, lm: Callable[[EvaluationSettings], CheckpointLM]) -> list[EvaluationRecord]:
        """What is due at this checkpoint. lm: gives its model for tasks. Raises DataError."""
        found: list[EvaluationRecord] = []
        for evaluation in self.of(opened.recipe):
            if opened.step % evaluation.every_steps == 0 or opened.step == opened.recipe.schedule.steps:
                found += self._records(evaluation, opened, lm)
        return found

    def _records(
        self, evaluation: EvaluationConfig, opened: Opened, lm: Callable[[EvaluationSettings], CheckpointLM]
    ) -> list[EvaluationRecord]:
        folder = records_folder(opened.path)
        more: dict[str, Any] = {"precision": self._settings.precision, "device": self._settings.device}
        settings = settings_of(evaluation, **more)
        if evaluation.datasets:
            sources = open_datasets(evaluation, opened.recipe)

            def decoder() -> Decoder:
                if opened.recipe.data.document_attention:
                    attend_within_documents(opened.decoder)
                return opened.decoder

            subject = EvaluatedCheckpoint(opened.root, opened.step)
            return run_heldout(sources, subject, settings, decoder, folder, self._say, opened.recipe.objective)
        suite = self._suites.setdefault(evaluation.name, TaskSuite(requests_of(evaluation), settings))
        subject = EvaluatedCheckpoint(opened.root, opened.step, opened.tokenizer[1])
        with panics_refused(str(opened.tokenizer_file[0])):
            return list(suite.records(subject, lambda: lm(settings), folder, self._say))

    def enter(self, recipe: Recipe) -> None:
        """Enter what the run's record lacks of them, unless the run is in use: then `train` does that."""
        if (count := enter_side_scores(self._run, [one.name for one in self.of(recipe)])) is None:
            self._say("the run is in use: its process enters the scores in metrics and ledger")
        else:
            self._say(f"{count} scores were entered in metrics and ledger")
