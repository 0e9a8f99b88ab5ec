"""The section `evaluations` of a recipe: what is measured every so many steps besides the recipe's own held-out sets.

`where: train` measures on the training processes, between two steps; `where: side` leaves it to `weftrain eval RUN
--watch`, another process that follows the run's checkpoints.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from weftrain.core.formats.safe_names import PlainName, RelativePath
from weftrain.core.formats.strict_model import Count, PositiveInt, StrictModel

EvaluationName = Annotated[PlainName, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=80)]
TaskName = Annotated[str, Field(min_length=1, max_length=200)]


class EvaluationConfig(StrictModel):
    """Tasks of lm-eval, or datasets whose held-out rows give a perplexity; due at each multiple of every_steps and
    after the last step, and before the first one with log.evaluate_at_start.
    """

    name: EvaluationName  # its scores are <name>/<task or dataset>
    every_steps: PositiveInt
    tasks: Annotated[tuple[TaskName, ...], Field(max_length=100, strict=False)] = ()
    preset: Literal["llm360"] | None = None  # tasks, shots and metrics of the LLM360 paper
    datasets: Annotated[tuple[RelativePath, ...], Field(max_length=100, strict=False)] = ()  # folders in data.root
    shots: Count | None = None  # of tasks; null: each task's own
    include: Annotated[str, Field(min_length=1, max_length=4096)] | None = None  # folder of task files; runs their code
    limit: PositiveInt | None = None  # documents of each task, rows of each dataset; null: all
    batch_size: Annotated[int, Field(gt=0, le=1 << 20)] = 16  # sequences at once, of tasks
    where: Literal["train", "side"] = "train"

    @model_validator(mode="after")
    def _check(self) -> EvaluationConfig:
        if (bool(self.tasks) + (self.preset is not None) + bool(self.datasets)) != 1:
            raise ValueError("give exactly one of 'tasks', 'preset' and 'datasets'")
        if self.datasets and (self.shots is not None or self.include is not None):
            raise ValueError("'shots' and 'include' are of tasks: leave them out with 'datasets'")
        if self.preset is not None and self.shots is not None:
            raise ValueError("a preset says how many 'shots': name its tasks in 'tasks' instead")
        if len(set(self.tasks)) < len(self.tasks) or len(set(self.datasets)) < len(self.datasets):
            raise ValueError("a task or dataset is named twice: take one of them out")
        return self


def check_evaluations(evaluations: tuple[EvaluationConfig, ...], checkpoint_every_steps: int) -> None:
    """Raises ValueError for two of one name, and for one on the side whose steps have no checkpoint."""
    names = [one.name for one in evaluations]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"evaluations: two have the name '{twice}': give one another")
    for one in evaluations:
        if one.where == "side" and (not checkpoint_every_steps or one.every_steps % checkpoint_every_steps):
            raise ValueError(
                f"evaluations '{one.name}': a process on the side evaluates checkpoints, and every_steps "
                f"{one.every_steps} is no multiple of checkpoint.every_steps {checkpoint_every_steps}: change one of "
                "them, or set where: train"
            )
