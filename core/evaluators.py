"""What a run measures between two steps: each `Evaluator` says when it is due, and gives lines of metrics.jsonl.

`fit` (core/trainer.py) goes through one sequence of them: texts that the model writes, loss on held-out sets, scores of
tasks. The recorder adds to each line how long it took (`evaluation_s`), which is in no step's time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any, Protocol

from weftrain.core.backend import Plan, Run
from weftrain.core.order.batch import EvaluationSource

MetricsRecord = Mapping[str, Any]


class Evaluator(Protocol):
    def is_due(self, plan: Plan, completed: int) -> bool:
        """Whether it is due after a step, which made so many complete."""
        ...

    def is_due_at_start(self, plan: Plan, scored: Set[str]) -> bool:
        """Whether it is due before the first step of this process, at plan.start_step completed steps.

        scored: the sets whose score at this step is in the record.
        """
        ...

    def measure(self, run: Run, completed: int) -> Iterator[MetricsRecord]:
        """Lines of metrics.jsonl with their `kind` and `step`, each as soon as it is known.

        A state that it exports must be given back before it ends: the next step would copy what is still held.
        """
        ...


class HeldOutLoss:
    """Loss of the recipe's held-out sets, by the backend's own forward pass: of next_token with the perplexity, of
    other objectives with their measures.
    """

    def __init__(self, sets: Sequence[EvaluationSource]) -> None:
        self._sets = sets

    def is_due(self, plan: Plan, completed: int) -> bool:
        return plan.wants_evaluation(completed)

    def is_due_at_start(self, plan: Plan, scored: Set[str]) -> bool:
        """Not where a run resumes: a checkpoint is made after the evaluation of its step."""
        return plan.start_step == 0 and plan.evaluate_at_start

    def measure(self, run: Run, completed: int) -> Iterator[MetricsRecord]:
        for held in self._sets:
            result = run.evaluate(held)
            yield {
                "kind": "evaluation",
                "step": completed,
                "set": held.name,
                "loss": result.loss,
                **result.beside_loss,
                "tokens": result.tokens,
                "rows": held.num_rows,
                "rows_available": held.rows_available,
                "dataset_id": held.dataset_id,
            }
