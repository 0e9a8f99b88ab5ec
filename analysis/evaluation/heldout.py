"""Perplexity over a held-out set, as a record (records.py).

Perplexity is exp of the mean loss over all tokens, which is neither the mean of the batches' means nor the mean of
their perplexities.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

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
from weftrain.core.errors import DataError
from weftrain.core.model import Decoder, kernel_specs
from weftrain.core.order.batch import Batch, EvaluationSource
from weftrain.kernels import select


@dataclass(frozen=True)
class Perplexity:
    """loss: mean over tokens, in nats. tokens: those with a loss."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return perplexity_of(self.loss)


def perplexity_of(loss: float) -> float:
    """exp(loss), infinite where a float cannot hold it."""
    return math.exp(loss) if loss < 709 else math.inf


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
def perplexity(
    model: Decoder, source: EvaluationSource, batch_size: int, progress: Callable[[int, int], None] | None = None
) -> Perplexity:
    """Mean loss over a held-out set's tokens that have one, whatever the batch size. progress(rows done, rows).

    Raises DataError where no token has a loss or batch_size is below 1.
    """
    if batch_size < 1:
        raise DataError(f"batch size {batch_size}: it must be at least 1")
    device = model.embedding.weight.device
    sums, tokens = [], 0
    for first in range(0, source.num_rows, batch_size):
        batch = source.rows(first, min(batch_size, source.num_rows - first))
        ids, labels, starts = _tensors(batch, device)
        # the sum over tokens: batches of unequal numbers of tokens add up
        sums.append(float(model(ids, labels, starts)))
        tokens += int((labels >= 0).sum())
        if progress is not None:
            progress(min(first + batch_size, source.num_rows), source.num_rows)
    if not tokens:
        raise DataError(f"held-out set '{source.name}' has no token that bears a loss; check its loss mask")
    return Perplexity(math.fsum(sums) / tokens, tokens)


def attend_within_documents(model: Decoder) -> None:
    """Give a model of load_model attention that takes `document_start`, for held-out sets that need it."""
    weight = model.embedding.weight
    selection = select(kernel_specs(model.config, weight.device.type, weight.dtype, documents=True), PREFERENCES)
    for index, block in enumerate(model.layers):
        block.attention.attention = selection.function("attention", f"layers.{index}.attention")  # type: ignore[union-attr]


def _tensors(batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
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
) -> list[EvaluationRecord]:
    """A record of loss and perplexity for each held-out set. The model is opened only if a record is missing."""
    records = []
    for source in sources:
        inputs = inputs_of("heldout", subject, settings) | {
            "set": source.name,
            "dataset_id": source.dataset_id,
            "rows": source.num_rows,
        }

        def measure(source: EvaluationSource = source) -> EvaluationRecord:
            found = perplexity(open_model(), source, settings.batch_size)
            metrics = {
                name: {"value": number(value)}
                for name, value in (("loss", found.loss), ("perplexity", found.perplexity))
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
