"""Writing shards: twice the same bytes, contradictions refused, and a file that is whole or absent."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from fault_injection import DEATHS, Death, Faults, injected
from shard_cases import TOKENIZER, few_documents, make

from weftrain.core.errors import DataError
from weftrain.core.formats import fsops
from weftrain.core.formats.shard_format import FimRecord, write_shard
from weftrain.core.formats.shard_reader import ShardReader


def test_two_writes_give_the_same_bytes_and_data_is_page_aligned(tmp_path: Path) -> None:
    for name in ("a.h5", "b.h5"):
        make(tmp_path / name, rows=400, vocab_size=70_000)
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["data"].id.get_offset() % 4096 == 0
        assert not any(file[name].id.get_create_plist().get_obj_track_times() for name in file)


def test_what_the_writer_says_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "s.h5"
    tokens = np.arange(33)
    table = few_documents([33], [0], 1)
    info = write_shard(
        path, tokens, table, sequence_length=16, row_stride=16, vocab_size=33, tokenizer_sha256=TOKENIZER
    )
    assert info.num_bytes == path.stat().st_size
    assert info.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert info.num_rows == 2
    assert info.digest == ShardReader(path).digest


def test_the_digest_commits_to_everything(tmp_path: Path) -> None:
    """Two shards that differ in one token, one mask entry, one document or one attribute have different digests."""
    tokens, mask = np.arange(33), np.ones(33, dtype=np.uint8)
    base: dict[str, Any] = {
        "tokens": tokens,
        "documents": few_documents([9, 33], [0, 0], 2),
        "sequence_length": 16,
        "row_stride": 16,
        "vocab_size": 40,
        "tokenizer_sha256": TOKENIZER,
        "loss_mask": mask,
    }
    documents = base["documents"]
    other_mask = mask.copy()
    other_mask[5] = 0
    changes: list[dict[str, Any]] = [
        {"tokens": np.append(tokens[:-1], 0)},
        {"loss_mask": other_mask},
        {"loss_mask": None},
        {"token_weights": np.ones(33)},
        {"token_weights": np.where(np.arange(33) == 5, 2.0, 1.0)},
        {"loss_mask": None, "token_weights": np.ones(33)},
        {"vocab_size": 41},
        {"tokenizer_sha256": "cd" * 32},
        {"sequence_length": 8, "row_stride": 8},
        {"documents": dataclasses.replace(documents, end=np.array([8, 33]))},
        {"documents": dataclasses.replace(documents, id=documents.id + 1)},
        {"documents": dataclasses.replace(documents, source=np.array([0, 1]))},
        {"documents": dataclasses.replace(documents, num_sources=3)},
        {"documents": dataclasses.replace(documents, file=np.array([0, 1]))},
        {"documents": dataclasses.replace(documents, record=np.array([0, 1]))},
        {"documents": dataclasses.replace(documents, fim=FimRecord(np.zeros(2), np.zeros((2, 2))))},
    ]
    digests = {
        write_shard(tmp_path / f"{index}.h5", **base | change).digest for index, change in enumerate([{}, *changes])
    }
    assert len(digests) == len(changes) + 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": np.arange(32)}, "n_examples"),
        ({"tokens": np.arange(16)}, "n_examples"),
        ({"tokens": np.arange(33) - 1}, "vocabulary"),
        ({"vocab_size": 32}, "vocabulary"),
        ({"row_stride": 15}, "row_stride"),
        ({"loss_mask": np.ones(32)}, "loss_mask"),
        ({"loss_mask": np.full(33, 2)}, "loss_mask"),
        ({"token_weights": np.ones(32)}, "token_weights must be [33]"),
        ({"token_weights": np.full(33, np.nan)}, "token_weights: the weight of a token that bears loss lies outside"),
        ({"token_weights": np.full(33, -1.0)}, "lies outside 1e-06 to 1e+06"),
        ({"token_weights": np.full(33, 1e39)}, "lies outside 1e-06 to 1e+06"),
        ({"token_weights": np.full(33, 9e-7)}, "lies outside 1e-06 to 1e+06"),
        ({"token_weights": np.arange(33.0)}, "lies outside 1e-06 to 1e+06"),
        ({"documents": few_documents([32], [0], 1)}, "document ends"),
        ({"documents": few_documents([33], [1], 1)}, "sources"),
        ({"documents": few_documents([33], [0], 1, id_bytes=8)}, "shapes"),
        ({"documents": few_documents([33], [-1], 1)}, "a file and no source"),
        ({"documents": few_documents([33], [0], 1, file=[-1])}, "no source, or a source and no file"),
        ({"documents": few_documents([33], [0], 1, file=[-2])}, "doc_file"),
        ({"documents": few_documents([33], [0], 1, record=[0, 0])}, "shapes"),
        ({"documents": few_documents([33], [0], 1, fim=FimRecord(np.array([3]), np.array([[0, 1]])))}, "0..2"),
        (
            {"documents": few_documents([33], [0], 1, fim=FimRecord(np.array([1]), np.array([[2, 1]])))},
            "cuts do not rise",
        ),
        (
            {"documents": few_documents([33], [0], 1, fim=FimRecord(np.array([1]), np.array([[0, 1], [0, 1]])))},
            "doc_fim",
        ),
    ],
)
def test_the_writer_refuses_contradictions(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "tokens": np.arange(33),
        "documents": few_documents([33], [0], 1),
        "sequence_length": 16,
        "row_stride": 16,
        "vocab_size": 40,
        "tokenizer_sha256": TOKENIZER,
    }
    with pytest.raises(ValueError, match=r"s\.h5") as caught:
        write_shard(tmp_path / "s.h5", **arguments | change)
    assert message in str(caught.value) or "n_examples" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def operations_of_a_write(path: Path) -> int:
    with injected(Faults()) as faults:
        make(path)
    path.unlink()
    return len(faults.trace)


def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "s.h5"
    for operation in range(operations_of_a_write(path) - 1):  # all before the last, the sync of the folder
        with (
            injected(Faults("ENOSPC", operation)),
            pytest.raises(DataError, match=r"s\.h5: the shard cannot be written: No space left on device.*: make room"),
        ):
            make(path)
        assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_nothing_that_is_taken_for_a_shard(tmp_path: Path) -> None:
    path, outcomes = tmp_path / "s.h5", set()
    for operation in range(operations_of_a_write(path)):
        for kind in DEATHS:
            with injected(Faults(kind, operation)), pytest.raises(Death):
                make(path)
            outcomes.add(path.exists())
            if path.exists():
                ShardReader(path).verify()
            for left in tmp_path.iterdir():
                assert left == path or left.name.startswith(fsops.TEMPORARY_PREFIX)
                left.unlink()
    assert outcomes == {False, True}
