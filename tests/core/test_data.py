"""Order and position of a run's rows."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from written_datasets import VOCAB, S, change_manifest, config, make_dataset, weight_of

from weftrain.core.config import Recipe
from weftrain.core.data import TokenSource, open_training, training_source
from weftrain.core.errors import DataError
from weftrain.core.formats.dataset import (
    MANIFEST,
    read_dataset_manifest,
)
from weftrain.core.formats.dataset_manifest import merkle_root
from weftrain.core.formats.shard_set import ShardSet
from weftrain.core.order.mixture import MIXTURE_BLOCK


def first_tokens(source: TokenSource, first: int, stop: int) -> np.ndarray:
    """First token of samples first..stop-1, one at a time through steps of any batch size."""
    size = source.global_batch_size
    return np.array([source.rows(n // size, n % size, 1).ids[0, 0] for n in range(first, stop)])


# -- order and position


def test_every_row_once_an_epoch_in_another_order_each_time(tmp_path: Path) -> None:
    make_dataset(tmp_path / "a", [5, 7, 3])
    source = open_training(config(tmp_path, {"name": "a"}), 4, vocab_size=VOCAB)
    epochs = [first_tokens(source, epoch * 15, (epoch + 1) * 15) for epoch in range(3)]
    for epoch in epochs:
        assert np.array_equal(np.sort(epoch), np.arange(15) * S)
    assert not np.array_equal(epochs[0], epochs[1])
    whole = np.concatenate([source.rows(step, 0, 4).ids for step in range(5)])
    assert whole.dtype == np.int64
    assert np.array_equal(whole, whole[:, :1] + np.arange(S + 1))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(step=st.integers(0, 10**9), cuts=st.lists(st.integers(0, 37), max_size=5))
def test_a_batch_read_in_pieces_is_the_batch(mixed: TokenSource, step: int, cuts: list[int]) -> None:
    whole = mixed.rows(step, 0, 37)
    edges = [0, *sorted(cuts), 37]
    pieces = [mixed.rows(step, low, high - low) for low, high in pairwise(edges) if high > low]
    assert np.array_equal(np.concatenate([piece.ids for piece in pieces]), whole.ids)
    names = [name for low, high in pairwise(edges) for name in mixed.sample_names(step, low, high - low)]
    assert names == mixed.sample_names(step, 0, 37)


@pytest.fixture
def mixed(tmp_path: Path) -> TokenSource:
    return make_mixed(tmp_path, 37)


def make_mixed(root: Path, global_batch_size: int, seed: int = 1) -> TokenSource:
    if not (root / "a").exists():
        make_dataset(root / "a", [50, 31])
        make_dataset(root / "b", [20], first_id=20_000, masked=True)
    data = config(root, {"name": "a", "weight": 0.75}, {"name": "b", "weight": 0.25, "subset": [0.25, 0.75]}, seed=seed)
    return open_training(data, global_batch_size, vocab_size=VOCAB)


def test_position_is_one_integer_whatever_the_batch_size(tmp_path: Path) -> None:
    small, large = make_mixed(tmp_path, 3), make_mixed(tmp_path, 50)
    assert np.array_equal(first_tokens(small, 0, 200), first_tokens(large, 0, 200))


def test_the_seed_changes_the_order(tmp_path: Path) -> None:
    one, other = make_mixed(tmp_path, 37, seed=1), make_mixed(tmp_path, 37, seed=2)
    assert not np.array_equal(one.rows(0, 0, 37).ids, other.rows(0, 0, 37).ids)
    assert one.dataset_id == other.dataset_id


def test_subset_and_counts(mixed: TokenSource) -> None:
    """b's middle half is its rows 5..14, each as often as the other; counts say how many samples each source gave."""
    steps = 2 * MIXTURE_BLOCK // 37
    starts = np.concatenate([mixed.rows(step, 0, 37).ids[:, 0] for step in range(steps)])
    from_b, times = np.unique(starts[starts >= 20_000], return_counts=True)
    assert np.array_equal(from_b, 20_000 + S * np.arange(5, 15))
    assert times.max() - times.min() <= 1
    assert mixed.counts(steps) == {"a": int((starts < 20_000).sum()), "b": int((starts >= 20_000).sum())}
    assert mixed.counts(0) == {"a": 0, "b": 0}


def test_the_loss_mask_comes_with_the_rows_that_have_one(mixed: TokenSource) -> None:
    batch = mixed.rows(0, 0, 37)
    assert batch.loss_mask is not None
    labels = batch.ids[:, 1:]
    assert np.array_equal(batch.loss_mask, (labels % 3 > 0) | (labels < 20_000))
    only_a = next(row for row in range(37) if batch.ids[row, 0] < 20_000)
    assert mixed.rows(0, only_a, 1).loss_mask is None


@pytest.fixture
def weighted(tmp_path: Path) -> TokenSource:
    """Two sources, of which one has weights in one of its shards."""
    make_dataset(tmp_path / "a", [50, 31], masked=True, weighted=[1])
    make_dataset(tmp_path / "b", [20], first_id=20_000)
    data = config(tmp_path, {"name": "a", "weight": 0.75}, {"name": "b", "weight": 0.25})
    return replace(open_training(data, 37, vocab_size=VOCAB), token_weights=True)


def test_weights_come_with_the_rows_in_every_order_and_those_without_any_weigh_one(weighted: TokenSource) -> None:
    """Whatever is read together, at every step of two epochs."""
    for step in (0, 1, 5):
        batch = weighted.rows(step, 0, 37)
        labels = batch.ids[:, 1:]
        weights, mask = batch.token_weights, batch.loss_mask
        assert weights is not None
        assert mask is not None
        assert weights.dtype == np.float32
        # a shard ends with the label that the next one begins with
        in_second = (batch.ids[:, :1] >= 50 * S) & (labels < 20_000)
        assert np.array_equal(weights, np.where(in_second, weight_of(labels) * mask, 1).astype(np.float32))
        for row in range(37):
            alone = weighted.rows(step, row, 1)
            assert alone.token_weights is not None
            assert np.array_equal(alone.token_weights[0], weights[row])
    assert replace(weighted, token_weights=False).rows(0, 0, 37).token_weights is None


def test_a_shard_with_weights_that_the_manifest_does_not_know_of_is_refused(tmp_path: Path) -> None:
    make_dataset(tmp_path / "a", [4], weighted=[0])

    def unweighted(value: dict[str, Any]) -> None:
        del value["tokenization"]["weighted_documents"]
        value["version"] = 3

    change_manifest(tmp_path / "a", unweighted)
    with pytest.raises(DataError, match=r"00000\.h5: token_weights: the manifest knows of no weights"):
        open_training(config(tmp_path, {"name": "a"}), 4, vocab_size=VOCAB)


@pytest.mark.parametrize(
    ("weighted", "objective", "words"),
    [
        ([0], {}, r"a: holds weights of tokens, and the recipe does not say whether they count: set objective\.tok"),
        ([], {"token_weights": True}, r"a: objective\.token_weights is true, and no source has weights of tokens: lea"),
        (
            [0],
            {"name": "max_entropy", "forget": ["a"], "retain_weight": 0.0},
            "a: holds weights of tokens, which objective max_entropy does",
        ),
        ([0], {"token_weights": False}, None),
        ([], {"token_weights": False}, None),
        ([0], {"token_weights": True}, None),
    ],
)
def test_a_recipe_says_whether_weights_count(
    tmp_path: Path,
    weighted: list[int],
    objective: dict[str, Any],
    words: str | None,
    tiny_recipe: Callable[..., Recipe],
) -> None:
    make_dataset(tmp_path / "a", [4, 4], weighted=weighted)
    more = {"synthetic_rows": None, "root": str(tmp_path), "sources": [{"name": "a", "path": "a", "weight": 1.0}]}
    told = [f"data.{key}={json.dumps(value)}" for key, value in more.items()]
    told += [f"data.sequence_length={S}", f"model.vocab_size={VOCAB}", f"objective={json.dumps(objective)}"]
    recipe = tiny_recipe("amber", *told)
    if words is not None:
        with pytest.raises(DataError, match=words) as refused:
            training_source(recipe)
        assert "\n" not in str(refused.value)
        return
    weights = training_source(recipe).rows(0, 0, 4).token_weights
    assert (weights is not None) == bool(objective["token_weights"])


def test_rows_of_a_shard_without_mask_bear_loss_beside_masked_ones(tmp_path: Path) -> None:
    make_dataset(tmp_path / "a", [4, 4])
    make_dataset(tmp_path / "masked", [4, 4], masked=True)
    shutil.copy(tmp_path / "masked" / "train" / "00001.h5", tmp_path / "a" / "train" / "00001.h5")
    masked = json.loads((tmp_path / "masked" / MANIFEST).read_bytes())["train"]["shards"]

    def change(value: dict[str, Any]) -> None:
        value["train"]["shards"][1] = masked[1]
        value["train"]["id"] = merkle_root([shard["digest"] for shard in value["train"]["shards"]])

    change_manifest(tmp_path / "a", change)
    ids, mask = ShardSet(tmp_path / "a", read_dataset_manifest(tmp_path / "a"), "train").rows(np.array([7, 0, 4]))
    assert mask is not None
    assert mask[1].all()
    assert np.array_equal(mask[[0, 2]], ids[[0, 2], 1:] % 3 > 0)


def test_names_say_where_a_row_lies(mixed: TokenSource, tmp_path: Path) -> None:
    ids, names = mixed.rows(3, 0, 37).ids, mixed.sample_names(3, 0, 37)
    sets = {name: ShardSet(tmp_path / name, read_dataset_manifest(tmp_path / name), "train") for name in ("a", "b")}
    for row, name in zip(ids, names, strict=True):
        place, number = name.split(":")
        dataset, file = place.split("/", 1)
        reader = next(reader for reader in sets[dataset].readers() if str(reader.path).endswith(file))
        assert np.array_equal(reader.rows(np.array([int(number)]))[0], row)


def test_a_pickled_source_reads_the_same(mixed: TokenSource) -> None:
    expected = mixed.rows(5, 0, 37)
    copy = pickle.loads(pickle.dumps(mixed))
    assert len(pickle.dumps(mixed)) < 20_000
    assert np.array_equal(copy.rows(5, 0, 37).ids, expected.ids)
    assert copy.dataset_id == mixed.dataset_id


def test_rows_outside_the_batch(mixed: TokenSource) -> None:
    for step, first, count in ((-1, 0, 1), (0, -1, 1), (0, 37, 1), (0, 0, 38)):
        with pytest.raises(ValueError, match="of a batch of 37"):
            mixed.rows(step, first, count)


@pytest.mark.parametrize(
    ("subset", "rows"), [([0.0, 0.3], 3), ([0.3, 0.6], 3), ([0.6, 1.0], 4), ([0.0, 0.1], 1), ([0.25, 0.55], 3)]
)
def test_subsets_are_cut_as_written_in_decimal(tmp_path: Path, subset: list[float], rows: int) -> None:
    """0.3 x 10 is 3, though the double next to 0.3 lies below it."""
    make_dataset(tmp_path / "a", [10])
    component = open_training(config(tmp_path, {"name": "a", "subset": subset}), 2, vocab_size=VOCAB).sources[0]
    assert component.num_rows == rows


def test_a_damaged_token_is_named_when_it_is_read(tmp_path: Path) -> None:
    make_dataset(tmp_path / "a", [5])
    path = tmp_path / "a" / "train" / "00000.h5"
    data = bytearray(path.read_bytes())
    data[data.index(np.arange(12, 20, dtype="<u2").tobytes())] ^= 64
    path.write_bytes(data)
    source = open_training(config(tmp_path, {"name": "a"}), 5, vocab_size=VOCAB)
    with pytest.raises(DataError, match=r"train/00000\.h5: data: block 0"):
        source.rows(0, 0, 5)
