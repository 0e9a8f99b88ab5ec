"""Mixture, order and position; and datasets that are missing, damaged or not the recipe's, refused before step 0."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weftrain.core.data import TokenSource, open_heldout, open_training
from weftrain.core.errors import DataError
from weftrain.core.formats import dataset as datasets
from weftrain.core.formats.canonical import canonical_json, sha256_json
from weftrain.core.formats.dataset import (
    MANIFEST,
    TOKENIZER,
    VERSION,
    read_dataset_manifest,
    write_dataset_manifest,
    write_inputs,
    write_sources,
)
from weftrain.core.formats.dataset_manifest import DatasetManifest, InputEntry, SourceEntry, merkle_root, shard_file
from weftrain.core.formats.shard_format import Documents, num_tokens, write_shard
from weftrain.core.formats.shard_set import ShardSet
from weftrain.core.order.data_section import DataConfig
from weftrain.core.order.mixture import MAX_MIXTURE_BLOCK, MIXTURE_BLOCK, Mixture, largest_remainder, make_mixture

S = 8
VOCAB = 60_000


def write_set(
    folder: Path, set_name: str, rows: list[int], first_id: int, tokenizer_sha256: str, masked: bool
) -> dict[str, Any]:
    """Shards whose tokens count up from first_id, so that a row says where it is from."""
    (folder / set_name).mkdir(parents=True)
    shards, position = [], first_id
    for index, count in enumerate(rows):
        tokens = np.arange(position, position + num_tokens(count, S, S))
        position += count * S
        zero = np.array([0])
        table = Documents(np.array([len(tokens)]), np.full((1, 16), index, np.uint8), zero, 1, zero, zero)
        file = shard_file(set_name, index)
        mask = tokens % 3 > 0 if masked else None
        info = write_shard(
            folder / file,
            tokens,
            table,
            sequence_length=S,
            row_stride=S,
            vocab_size=VOCAB,
            tokenizer_sha256=tokenizer_sha256,
            loss_mask=mask,
        )
        shards.append(
            {
                "file": file,
                "num_bytes": info.num_bytes,
                "sha256": info.sha256,
                "digest": info.digest,
                "n_examples": count,
            }
        )
    return {
        "id": merkle_root([shard["digest"] for shard in shards]),
        "n_examples": sum(rows),
        "tokens": sum(rows) * S,
        "documents": len(rows),
        "dropped_tokens": 0,
        "padding_tokens": 0,
        "epochs": [sum(rows)],
        "shards": shards,
    }


def make_dataset(
    folder: Path,
    rows: list[int],
    heldout: list[int] | None = None,
    first_id: int = 0,
    masked: bool = False,
    **changes: Any,
) -> None:
    folder.mkdir(parents=True)
    (folder / TOKENIZER).write_bytes(b"{}")
    tokenizer_sha256 = hashlib.sha256(b"{}").hexdigest()
    value: dict[str, Any] = {
        "format": "weftrain-dataset",
        "version": VERSION,
        "name": folder.name,
        "tokenizer_sha256": tokenizer_sha256,
        "vocab_size": VOCAB,
        "eos_id": 0,
        "sequence_length": S,
        "row_stride": S,
        "packing": "concatenate",
        "fim": None,
        "corpus": {"sha256": "0" * 64, "description": "counting", "licence": "none", "files": 1, "num_bytes": 9},
        "inputs_sha256": write_inputs(folder, [InputEntry(name="counting", num_bytes=9, sha256=("0" * 64,))]).sha256,
        "tokenization": {
            "engine": "tokenizers",
            "engine_version": "0",
            "reference_documents": 9,
            "checked_documents": 0,
        },
        "preparation": {"seed": 0, "eos": None},
        "documents": {"read": 9, "failed": 0, "duplicates": 0, "train": 9, "heldout": 0},
        "num_sources": 1,
        "sources_sha256": write_sources(
            folder, [SourceEntry(name="counting", documents=9, num_bytes=9, tokens=9)]
        ).sha256,
        "chunks": None,
        "train": write_set(folder, "train", rows, first_id, tokenizer_sha256, masked),
        "heldout": write_set(folder, "heldout", heldout, 50_000, tokenizer_sha256, masked) if heldout else None,
    }
    write_dataset_manifest(folder, DatasetManifest.model_validate(value | changes))


def config(root: Path, *sources: dict[str, Any], seed: int = 1, sequence_length: int = S) -> DataConfig:
    total = sum(source.get("weight", 1.0) for source in sources)
    full = [{"path": source["name"]} | source for source in sources]
    for source in full:
        if not {"tokens", "epochs"} & source.keys():
            source["weight"] = source.get("weight", 1.0) / total
    return DataConfig.model_validate(
        {"root": str(root), "sequence_length": sequence_length, "shuffle_seed": seed, "sources": full}
    )


def first_tokens(source: TokenSource, first: int, stop: int) -> np.ndarray:
    """First token of samples first..stop-1, one at a time through steps of any batch size."""
    size = source.global_batch_size
    return np.array([source.rows(n // size, n % size, 1).ids[0, 0] for n in range(first, stop)])


# -- mixture


@settings(max_examples=100, deadline=None)
@given(shares=st.lists(st.integers(1, 10**20), min_size=1, max_size=12).map(tuple), total=st.integers(0, 2**62))
def test_largest_remainder_is_exact(shares: tuple[int, ...], total: int) -> None:
    parts, whole = largest_remainder(shares, total), sum(shares)
    assert sum(parts) == total
    assert all(
        part in (total * share // whole, -(-total * share // whole)) for part, share in zip(parts, shares, strict=True)
    )


def test_largest_remainder_gives_to_the_largest() -> None:
    assert largest_remainder((47, 16, 15, 12, 9, 1), 100) == [47, 16, 15, 12, 9, 1]
    assert largest_remainder((53, 24, 23), 10) == [5, 3, 2]  # remainders .3, .4, .3
    assert largest_remainder((1, 1, 1), 2) == [1, 1, 0]  # equal remainders: the first


def mixture_of(*weights: float, seed: int = 0) -> Mixture:
    return make_mixture(
        config(
            Path(), *({"name": str(index), "weight": weight} for index, weight in enumerate(weights)), seed=seed
        ).sources,
        seed,
    )


@settings(max_examples=25, deadline=None)
@given(
    weights=st.lists(st.floats(0.001, 1.0), min_size=2, max_size=8),
    block=st.integers(0, 2**40),
    seed=st.integers(0, 99),
)
def test_counts_keep_within_one_of_the_weights(weights: list[float], block: int, seed: int) -> None:
    mixture = mixture_of(*weights, seed=seed)
    samples = block * mixture.block
    low, high = mixture.counts(samples), mixture.counts(samples + mixture.block)
    assert sum(low) == samples
    for index, share in enumerate(mixture.shares):
        # |count - weight x samples| < 1
        assert abs(low[index] * sum(mixture.shares) - share * samples) < sum(mixture.shares)
        assert high[index] >= low[index]


@settings(max_examples=15, deadline=None)
@given(
    weights=st.lists(st.floats(0.01, 1.0), min_size=1, max_size=6), start=st.integers(0, 2**50), seed=st.integers(0, 9)
)
def test_each_source_is_read_in_order_without_gaps(weights: list[float], start: int, seed: int) -> None:
    """From any sample on, the k of each source count up by one from counts(start)."""
    mixture = mixture_of(*weights, seed=seed)
    samples = np.arange(start, start + 2 * MIXTURE_BLOCK + 100)
    source, k = mixture.locate(samples)
    for index, (low, high) in enumerate(zip(mixture.counts(start), mixture.counts(start + len(samples)), strict=True)):
        assert np.array_equal(k[source == index], np.arange(low, high))


def test_a_rare_source_gets_a_larger_block_and_too_rare_a_one_is_refused() -> None:
    assert mixture_of(1, 1).block == MIXTURE_BLOCK
    assert mixture_of(1, 4095).block == MIXTURE_BLOCK
    assert mixture_of(1, 4096).block == 2 * MIXTURE_BLOCK
    with pytest.raises(DataError, match=f"share of '1' is below 1/{MAX_MIXTURE_BLOCK:,}"):
        mixture_of(1, 1e-7)


def test_weights_are_shares() -> None:
    assert mixture_of(0.25, 0.75) == mixture_of(1, 3)
    of_tokens = config(Path(), {"name": "0", "tokens": 10**12}, {"name": "1", "tokens": 3 * 10**12}).sources
    assert make_mixture(of_tokens, 0) == mixture_of(1, 3)
    of_epochs = config(Path(), {"name": "0", "epochs": 2.0}, {"name": "1", "epochs": 0.5}).sources
    assert make_mixture(of_epochs, 0, [100, 1200]) == mixture_of(1, 3)


def test_the_order_within_a_block_is_mixed() -> None:
    source, _ = mixture_of(1, 1).locate(np.arange(MIXTURE_BLOCK))
    runs = 1 + int((np.diff(source) != 0).sum())
    assert abs(runs - MIXTURE_BLOCK / 2) < 200  # a fair order has 2048 runs, give or take 32


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


def test_heldout_is_read_in_order_and_cut(tmp_path: Path) -> None:
    make_dataset(tmp_path / "a", [4], heldout=[3, 6])
    make_dataset(tmp_path / "none", [4])
    data = config(tmp_path, {"name": "a"}, {"name": "none"})
    (whole,) = open_heldout(data, VOCAB, 100)
    assert (whole.name, whole.num_rows, whole.sequence_length) == ("a", 9, S)
    assert np.array_equal(whole.rows(2, 5).ids[:, 0], 50_000 + S * np.arange(2, 7))
    assert whole.dataset_id == read_dataset_manifest(tmp_path / "a").heldout.id  # type: ignore[union-attr]
    (cut,) = open_heldout(data, VOCAB, 4)
    assert cut.num_rows == 4
    with pytest.raises(ValueError, match="of 4"):
        cut.rows(0, 5)


def test_dataset_ids(tmp_path: Path) -> None:
    """One source keeps its own id, several have the root over theirs; and the root is RFC 6962's."""
    make_dataset(tmp_path / "a", [4, 2, 3])
    make_dataset(tmp_path / "b", [4], first_id=100)
    ids = [open_training(config(tmp_path, {"name": name}), 1, vocab_size=VOCAB).dataset_id for name in "ab"]
    digests = [shard.digest for shard in read_dataset_manifest(tmp_path / "a").train.shards]

    def leaf(text: str) -> bytes:
        return hashlib.sha256(b"\0" + bytes.fromhex(text)).digest()

    def node(left: bytes, right: bytes) -> bytes:
        return hashlib.sha256(b"\1" + left + right).digest()

    assert ids[0] == node(node(leaf(digests[0]), leaf(digests[1])), leaf(digests[2])).hex()
    both = open_training(config(tmp_path, {"name": "a"}, {"name": "b"}), 1, vocab_size=VOCAB)
    assert both.dataset_id == node(leaf(ids[0]), leaf(ids[1])).hex()


# -- what is refused before step 0


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads((folder / MANIFEST).read_bytes())
    del value["root"]
    change(value)
    (folder / MANIFEST).write_bytes(canonical_json(value | {"root": sha256_json(value)}) + b"\n")


def swap_for_another_valid_shard(folder: Path) -> None:
    """Same size, consistent in itself, other tokens."""
    make_dataset(folder.parent / "other", [5, 4], first_id=9000)
    shutil.copy(folder.parent / "other" / "train" / "00001.h5", folder / "train" / "00001.h5")


def link_out(folder: Path) -> None:
    shutil.move(folder / "train", folder.parent / "elsewhere")
    (folder / "train").symlink_to(folder.parent / "elsewhere")


def alter_a_table(folder: Path) -> None:
    with h5py.File(folder / "train" / "00000.h5", "r+", libver="latest") as file:
        file["doc_id"][0, 0] ^= 1


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (
        shutil.rmtree,
        r"a: no dataset for source 'a'; make it with `weftrain prep INPUTS --name a --sequence-length 8 --output .*`",
    ),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), r"manifest\.json: is missing"),
    "no tokenizer": (lambda folder: (folder / TOKENIZER).unlink(), r"tokenizer\.json: is missing"),
    "another tokenizer": (
        lambda folder: (folder / TOKENIZER).write_bytes(b"{ }"),
        r"tokenizer\.json: SHA-256 .* is not the manifest's",
    ),
    "a missing shard": (lambda folder: (folder / "train/00001.h5").unlink(), r"train/00001\.h5: the shard is missing"),
    "a truncated shard": (
        lambda folder: truncate(folder / "train/00001.h5"),
        r"00001\.h5: the shard has .* the manifest says .*truncated",
    ),
    "a shard of another dataset": (swap_for_another_valid_shard, r"00001\.h5: digest is .* belongs to another dataset"),
    "a damaged shard": (alter_a_table, r"00000\.h5: digest: "),
    "shards elsewhere": (link_out, r"a/train: leads out of the dataset's folder through a symbolic link"),
    "a folder for a file": (
        lambda folder: ((folder / MANIFEST).unlink(), (folder / MANIFEST).mkdir()),
        r"manifest\.json: is not a regular file",
    ),
    "no JSON": (lambda folder: (folder / MANIFEST).write_bytes(b"{"), r"manifest\.json: "),
    "a duplicate key": (
        lambda folder: (folder / MANIFEST).write_bytes(
            (folder / MANIFEST).read_bytes().replace(b'"eos_id"', b'"eos_id":1,"eos_id"')
        ),
        "appears twice",
    ),
    "white space": (
        lambda folder: (folder / MANIFEST).write_bytes(b" " + (folder / MANIFEST).read_bytes()),
        "canonical",
    ),
    "a newer version": (
        lambda folder: change_manifest(folder, lambda value: value.update(version=4)),
        "version 4 is not one",
    ),
    "an unknown key": (lambda folder: change_manifest(folder, lambda value: value.update(more=2)), "key 'more'"),
    "a string for a number": (
        lambda folder: change_manifest(folder, lambda value: value.update(eos_id="2")),
        "key 'eos_id'",
    ),
    "a path out": (
        lambda folder: change_manifest(
            folder, lambda value: value["train"]["shards"][0].update(file="../../etc/passwd")
        ),
        r"key 'train\.shards\.0\.file'",
    ),
    "shards out of order": (
        lambda folder: change_manifest(folder, lambda value: value["train"]["shards"][0].update(file="train/00001.h5")),
        "do not count up",
    ),
    "another id": (
        lambda folder: change_manifest(folder, lambda value: value["train"].update(id="0" * 64)),
        "Merkle root",
    ),
    "rows that do not add up": (
        lambda folder: change_manifest(folder, lambda value: value["train"].update(n_examples=8)),
        "not the sum",
    ),
    "another tokenizer in the manifest": (
        lambda folder: change_manifest(folder, lambda value: value.update(tokenizer_sha256="0" * 64)),
        r"tokenizer\.json: SHA-256",
    ),
    "another vocabulary in the manifest": (
        lambda folder: change_manifest(folder, lambda value: value.update(vocab_size=VOCAB - 1)),
        "vocab_size is 60000, the manifest says 59999",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_datasets_are_refused_on_opening(tmp_path: Path, case: str) -> None:
    make_dataset(tmp_path / "a", [5, 4])
    damage, message = BROKEN[case]
    damage(tmp_path / "a")
    with pytest.raises(DataError, match=message) as caught:
        open_training(config(tmp_path, {"name": "a"}), 2, vocab_size=VOCAB)
    assert "\n" not in str(caught.value)


def test_a_dataset_that_is_not_the_recipes(tmp_path: Path) -> None:
    make_dataset(tmp_path / "a", [5])
    with pytest.raises(
        DataError, match=r"prepared with sequence_length 8, the recipe says 16: set data\.sequence_length=8"
    ):
        open_training(config(tmp_path, {"name": "a"}, sequence_length=16), 2, vocab_size=VOCAB)
    with pytest.raises(DataError, match="a vocabulary of 60000, the model has 32000"):
        open_training(config(tmp_path, {"name": "a"}), 2, vocab_size=32_000)
    with pytest.raises(
        DataError, match=r"fim None, the recipe's source 'a' says \{'rate': 0.9, 'spm_share': 0.5, 'mode': 'exact'\}"
    ):
        open_training(config(tmp_path, {"name": "a", "fim": {"rate": 0.9, "spm_share": 0.5}}), 2, vocab_size=VOCAB)
    with pytest.raises(DataError, match=r"subset \[0.1, 0.15\] of source 'a' holds no row of 5"):
        open_training(config(tmp_path, {"name": "a", "subset": [0.1, 0.15]}), 2, vocab_size=VOCAB)
    make_dataset(tmp_path / "fim", [5], fim={"rate": 0.9, "spm_share": 0.5, "mode": "exact", "seed": 0})
    with pytest.raises(DataError, match="says None"):
        open_heldout(config(tmp_path, {"name": "fim"}), VOCAB, 4)
    assert open_training(config(tmp_path, {"name": "a"}), 2, vocab_size=VOCAB + 9).sources[0].num_rows == 5


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


def test_the_manifest_written_is_the_manifest_read(tmp_path: Path) -> None:
    make_dataset(tmp_path / "a", [5], heldout=[2])
    manifest = read_dataset_manifest(tmp_path / "a")
    assert list(manifest.sets) == ["train", "heldout"]
    before = (tmp_path / "a" / MANIFEST).read_bytes()
    datasets.write_dataset_manifest(tmp_path / "a", manifest)
    assert (tmp_path / "a" / MANIFEST).read_bytes() == before
