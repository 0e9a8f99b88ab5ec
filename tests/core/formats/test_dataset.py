"""Datasets that are missing, damaged or forged are refused when they are opened."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import pytest
from written_datasets import VOCAB, change_manifest, config, make_dataset

from weftrain.core.data import open_training
from weftrain.core.errors import DataError
from weftrain.core.formats import dataset as datasets
from weftrain.core.formats.dataset import (
    MANIFEST,
    TOKENIZER,
    read_dataset_manifest,
)


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


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


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
        lambda folder: change_manifest(folder, lambda value: value.update(version=5)),
        "version 5 is not one",
    ),
    "weights in a version without": (
        lambda folder: change_manifest(folder, lambda value: value["tokenization"].update(weighted_documents=2)),
        "version 3: 2 documents have weights",
    ),
    "a version with weights without": (
        lambda folder: change_manifest(folder, lambda value: value.update(version=4)),
        "version 4: 0 documents have weights",
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


def test_the_manifest_written_is_the_manifest_read(tmp_path: Path) -> None:
    make_dataset(tmp_path / "a", [5], heldout=[2])
    manifest = read_dataset_manifest(tmp_path / "a")
    assert list(manifest.sets) == ["train", "heldout"]
    before = (tmp_path / "a" / MANIFEST).read_bytes()
    datasets.write_dataset_manifest(tmp_path / "a", manifest)
    assert (tmp_path / "a" / MANIFEST).read_bytes() == before
