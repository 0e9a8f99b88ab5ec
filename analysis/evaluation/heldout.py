"""Loss over a held-out set, as a record (records.py), with its perplexity or, of objective dpo, the measures of pairs.

Perplexity is exp of the mean loss over all tokens, which is neither the mean of the batches' means nor the mean of
their perplexities.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from weftrain.analysis.evaluation.generation import PREFERENCES
from weftrain.analysis.evaluation.records import (
    EvaluatedCheckpoint,
    EvaluationRecord,
    EvaluationSettings,
    Say,
    inputs_of,
    number,
    once,
    score_fields,
)
from weftrain.core.backend import EvalResult
from weftrain.core.errors import DataError
from weftrain.core.model import Decoder, kernel_specs
from weftrain.core.objective_parts import Extras
from weftrain.core.objectives import NEXT_TOKEN
from weftrain.core.objectives_section import Objective
from weftrain.core.order.batch import Batch, EvaluationSource
from weftrain.kernels import select


@dataclass(frozen=True)
class RaggedRows:
    """An EvaluationSource over rows of two or more ids, padded on the right without loss."""

    name: str
    token_rows: Sequence[Sequence[int]]
    dataset_id: str = ""

    @property
    def sequence_length(self) -> int:
        return max(map(len, self.token_rows)) - 1

    @property
    def num_rows(self) -> int:
        return len(self.token_rows)

    @property
    def rows_available(self) -> int:
        return len(self.token_rows)

    def rows(self, first: int, count: int) -> Batch:
        part = self.token_rows[first : first + count]
        longest = max(map(len, part))
        ids = np.zeros((len(part), longest), dtype=np.int64)
        mask = np.zeros((len(part), longest - 1), dtype=np.bool_)
        for place, row in enumerate(part):
            ids[place, : len(row)] = row
            mask[place, : len(row) - 1] = True
        return Batch(ids, mask)


@torch.no_grad()
def held_out_loss(
    model: Decoder, source: EvaluationSource, batch_size: int, objective: Objective = NEXT_TOKEN
) -> EvalResult:
    """Loss over a held-out set in nats, whatever the batch size: the mean over the tokens that have one; of objective
    dpo, which the model was loaded for (load_model), the mean over pairs, with its measures.

    Raises DataError for a batch size that cannot be, or where no token has a loss.
    """
    if batch_size < 1 or (objective.name == "dpo" and batch_size % 2):
        why = "be at least 1" if batch_size < 1 else "be even, since objective dpo reads pairs of rows"
        raise DataError(f"batch size {batch_size}: it must {why}")
    device, tokens = model.embedding.weight.device, 0
    sums = np.zeros((1 + len(objective.measures), 2))  # of loss and measures, and what each is the mean over
    for first in range(0, source.num_rows, batch_size):
        batch = source.rows(first, min(batch_size, source.num_rows - first))
        ids, labels, starts = _tensors(batch, device)
        extras = () if batch.reference is None else (Extras(reference=torch.from_numpy(batch.reference).to(device)),)
        found = model(ids, labels, starts, *extras)
        bearing = int((labels >= 0).sum())
        tokens += bearing
        # sums, since batches hold unequal numbers of tokens
        sums += found.double().cpu().numpy() if found.ndim else np.array([[float(found), bearing]])
    if not tokens:
        raise DataError(f"held-out set '{source.name}' has no token that bears a loss; check its loss mask")
    measures = zip(objective.measures, sums[1:], strict=True)
    return EvalResult(
        sums[0, 0].item() / sums[0, 1].item(), tokens, {name: float(s / n) for name, (s, n) in measures if n}
    )


def attend_within_documents(model: Decoder) -> None:
    """Give a model of load_model attention that takes `document_start`, for held-out sets that need it."""
    weight = model.embedding.weight
    selection = select(kernel_specs(model.config, weight.device.type, weight.dtype, documents=True), PREFERENCES)
    for index, block in enumerate(model.layers):
        block.attention.attention = selection.function("attention", f"layers.{index}.attention")  # type: ignore[union-attr]


def _tensors(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """ids, labels int64 [B, T] (-100: no loss), document_start int32 [B, T] or None."""
    ids = torch.from_numpy(batch.ids).to(device)
    labels = ids[:, 1:]
    if batch.loss_mask is not None:
        labels = labels.masked_fill(~torch.from_numpy(batch.loss_mask).to(device), -100)
    starts = None if batch.document_start is None else torch.from_numpy(batch.document_start).to(device)
    return ids[:, :-1], labels, starts


def run_heldout(
    sources: Sequence[EvaluationSource],
    subject: EvaluatedCheckpoint,
    settings: EvaluationSettings,
    open_model: Callable[[], Decoder],
    folder: Path,
    say: Say = print,
    objective: Objective = NEXT_TOKEN,
) -> list[EvaluationRecord]:
    """A record of loss, and perplexity or the objective's measures, for each held-out set. The model is opened only if
    a record is missing. objective: of the run; only dpo has a held-out loss of its own, and names it in its records.
    """
    own = {"objective": objective.model_dump(mode="json")} if objective.name == "dpo" else {}
    records = []
    for source in sources:
        inputs = inputs_of("heldout", subject, settings) | {
            "set": source.name,
            "dataset_id": source.dataset_id,
            "rows": source.num_rows,
            **own,
        }

        def measure(source: EvaluationSource = source) -> EvaluationRecord:
            found = held_out_loss(open_model(), source, settings.batch_size, objective)
            metrics = {
                name: {"value": number(value)} for name, value in {"loss": found.loss, **found.beside_loss}.items()
            }
            return {
                "task": f"heldout/{source.name}",
                "task_version": source.dataset_id,
                "metric": "loss",
                **score_fields(found.loss, None, "loss"),
                "metrics": metrics,
                "samples": source.num_rows,
                "samples_available": source.rows_available,
                "tokens": found.tokens,
                "shots": 0,
                "decoding": {"kind": "none"},
            }

        records.append(once(folder, inputs, f"heldout-{source.name}", measure, say))
    return records
