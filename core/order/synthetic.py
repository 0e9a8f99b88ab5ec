"""A batch source without a dataset: a few rows of uniform random ids that repeat, for measuring speed.

Only a recipe with `synthetic_rows` uses it; nothing falls back to it. The loss on such rows must fall.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np

from weftrain.core.formats.dataset_manifest import SourceCursor
from weftrain.core.order.batch import Batch


@dataclass(frozen=True)
class SyntheticSource:
    """Implements BatchSource over `ids`, int64 [rows, sequence_length + 1], read in order, cyclically.

    reference: of each row, for objective dpo. first_sample: that of step `first_step`, from which a run continues with
    another batch size.
    """

    ids: np.ndarray
    global_batch_size: int
    first_step: int = 0
    first_sample: int = 0
    reference: np.ndarray | None = None
    forget: bool = False  # every second row, for objectives of unlearning

    @property
    def sequence_length(self) -> int:
        return self.ids.shape[1] - 1

    @property
    def dataset_id(self) -> str:
        return "synthetic-" + hashlib.sha256(self.ids.tobytes()).hexdigest()

    def rows(self, step: int, first: int, count: int) -> Batch:
        start = self._sample(step) + first
        marks = np.arange(len(self.ids)) % 2 == 1 if self.forget else None
        return Batch(self.ids, reference=self.reference, forget=marks).take(
            np.arange(start, start + count) % len(self.ids)
        )

    def sample_names(self, step: int, first: int, count: int) -> list[str]:
        start = self._sample(step) + first
        return [f"synthetic:{index % len(self.ids)}" for index in range(start, start + count)]

    def cursors(self, step: int) -> dict[str, SourceCursor]:
        """Empty: rows that follow from the seed need only the run's position."""
        return {}

    def _sample(self, step: int) -> int:
        return self.first_sample + (step - self.first_step) * self.global_batch_size


def uniform_reference(rows: int, sequence_length: int, vocab_size: int) -> np.ndarray:
    """float64 [rows]: the log-probabilities of rows under a model to which every id is as likely."""
    return np.full(rows, -sequence_length * math.log(vocab_size))


def synthetic_source(
    vocab_size: int,
    sequence_length: int,
    rows: int,
    global_batch_size: int,
    seed: int,
    first_step: int = 0,
    first_sample: int = 0,
    *,
    pairs: bool = False,
) -> SyntheticSource:
    """Random rows, a function of the arguments alone. first_step, first_sample: see SyntheticSource. pairs: of rows,
    for objective dpo, with the log-probabilities of a reference to which every id is as likely.
    """
    ids = np.random.default_rng(seed).integers(0, vocab_size, (rows, sequence_length + 1), dtype=np.int64)
    reference = uniform_reference(rows, sequence_length, vocab_size) if pairs else None
    return SyntheticSource(ids, global_batch_size, first_step, first_sample, reference)
