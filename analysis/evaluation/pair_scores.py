"""Log-probabilities of both answers of every preference pair of a dataset under one model: what DPO's frozen reference
is, and how often a model finds the chosen answer the likelier one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from weftrain.core.errors import DataError
from weftrain.core.formats.shard_set import ShardSet
from weftrain.core.model import Decoder


@torch.no_grad()
def pair_log_probabilities(
    model: Decoder,
    shards: ShardSet,
    batch_size: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    pairs: range | None = None,
) -> np.ndarray:
    """float64 [pairs, 2]: of each pair's chosen and rejected answer, summed over their tokens that bear a loss.

    batch_size: rows computed at once; two are a pair. progress(pairs done, pairs). pairs: these alone. Raises DataError
    for a dataset without pairs.
    """
    manifest = shards.manifest
    if not manifest.pairs:
        raise DataError(
            f"{shards.folder}: holds no preference pairs: prepare it with `weftrain prep --preferences pairs`"
        )
    length, device = manifest.sequence_length // 2, model.embedding.weight.device
    pairs = range(shards.num_rows) if pairs is None else pairs
    found = np.empty((len(pairs), 2), np.float64)
    at_once = max(1, batch_size // 2)
    for first in range(pairs.start, pairs.stop, at_once):
        stop = min(first + at_once, pairs.stop)
        ids, mask = shards.rows(np.arange(first, stop))
        assert mask is not None  # prompts bear no loss
        # the last label of the chosen side is the rejected side's first token, which bears no loss
        sides = np.stack([ids[:, : length + 1], ids[:, length:]], axis=1).reshape(-1, length + 1)
        rows = torch.from_numpy(sides).to(device)
        bears = torch.from_numpy(mask.reshape(-1, length)).to(device)
        labels = rows[:, 1:].masked_fill(~bears, -100)
        values = model.row_log_probabilities(rows[:, :-1].contiguous(), labels)
        found[first - pairs.start : stop - pairs.start] = values.cpu().numpy().reshape(-1, 2)
        progress(stop, shards.num_rows)
    return found
