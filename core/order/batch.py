"""What a backend reads: batches of training rows as a function of the step, and rows of a held-out set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from weftrain.core.formats.dataset_manifest import SourceCursor


@dataclass(frozen=True)
class Batch:
    """Rows of one batch. ids: int64 [rows, sequence_length + 1], inputs are ids[:, :-1] and labels ids[:, 1:].

    loss_mask: bool [rows, sequence_length], False for labels without loss; None if all have it. document_start: int32
    [rows, sequence_length], where in its row each input's document begins: query t attends to keys
    document_start[t]..t. None if attention crosses documents. token_weights: float32 [rows, sequence_length], by which
    each label's loss is multiplied; None unless the objective asks for them. reference: float64 [rows], the
    log-probability of each row's labels with loss under the frozen reference of the objective dpo, whose pairs are two
    rows each, chosen and rejected; None for other objectives. forget: bool [rows], of objectives of unlearning.
    """

    ids: np.ndarray
    loss_mask: np.ndarray | None = None
    document_start: np.ndarray | None = None
    token_weights: np.ndarray | None = None
    reference: np.ndarray | None = None
    forget: np.ndarray | None = None

    def take(self, rows: slice | np.ndarray) -> Batch:
        """Some of the rows: views of a slice, copies of numbers."""
        found = {name: None if array is None else array[rows] for name, array in vars(self).items()}
        return Batch(**found)  # type: ignore[arg-type]  # a batch always has ids

    @property
    def bearing_tokens(self) -> int:
        """The number of labels with loss."""
        rows, length = self.ids.shape
        return rows * (length - 1) if self.loss_mask is None else int(np.count_nonzero(self.loss_mask))


class BatchSource(Protocol):
    """Picklable and stateless: row r of step s is a pure function of (dataset, seed, s, r)."""

    @property
    def sequence_length(self) -> int: ...
    @property
    def global_batch_size(self) -> int: ...
    @property
    def dataset_id(self) -> str:
        """Merkle root over the shards' hashes."""
        ...

    def rows(self, step: int, first: int, count: int) -> Batch:
        """Rows first..first+count-1 of the batch of step `step`, from 0."""
        ...

    def sample_names(self, step: int, first: int, count: int) -> list[str]:
        """Where each of those rows is stored, as 'set/shard.h5:row'; for messages."""
        ...

    def cursors(self, step: int) -> Mapping[str, SourceCursor]:
        """How far each source has been read after `step` steps; for the record."""
        ...


class EvaluationSource(Protocol):
    """A held-out set, read in order, once."""

    @property
    def name(self) -> str: ...
    @property
    def sequence_length(self) -> int: ...
    @property
    def num_rows(self) -> int:
        """Rows that are read."""
        ...

    @property
    def rows_available(self) -> int:
        """Rows in the set: a loss over fewer of them is another figure."""
        ...

    @property
    def dataset_id(self) -> str: ...

    def rows(self, first: int, count: int) -> Batch: ...
