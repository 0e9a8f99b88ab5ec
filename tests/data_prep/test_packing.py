"""Packing: the shards, put together again, are the documents, each followed by eos; only the declared tail is missing."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from weftrain.data_prep.packing import PackedShard, Packer

EOS = 0


def pack(lengths: list[int], sequence_length: int, rows_per_shard: int) -> tuple[list[np.ndarray], list[PackedShard], Packer]:
    documents = [np.arange(1, length + 1, dtype=np.uint16) + 100 * (index % 500) for index, length in enumerate(lengths)]
    packer = Packer(sequence_length, rows_per_shard, EOS, ("even", "odd"))
    stream = ((tokens, index.to_bytes(16, "big"), index % 2) for index, tokens in enumerate(documents))
    return documents, list(packer.pack(stream)), packer


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(0, 60), max_size=30), sequence_length=st.integers(1, 20), rows_per_shard=st.integers(1, 9))
def test_shards_are_the_documents(lengths: list[int], sequence_length: int, rows_per_shard: int) -> None:
    documents, shards, packer = pack(lengths, sequence_length, rows_per_shard)
    stream = np.concatenate([np.append(tokens, EOS) for tokens in documents]) if documents else np.empty(0)
    together: list[int] = []
    owners: list[int] = []
    for number, shard in enumerate(shards):
        tokens, table = shard.tokens, shard.documents
        rows, remainder = divmod(len(tokens) - 1, sequence_length)
        assert remainder == 0
        assert rows == rows_per_shard or (number == len(shards) - 1 and 0 < rows < rows_per_shard)
        ids = [int.from_bytes(identity.tobytes(), "big") for identity in table.id]
        assert np.array_equal(table.source, np.array(ids) % 2)
        assert table.end[-1] == len(tokens)
        owner = np.repeat(ids, np.diff(table.end, prepend=0))
        skip = 1 if number else 0  # the token shared with the shard before
        if number:
            assert tokens[0] == together[-1]
            assert owner[0] == owners[-1]
        together += tokens[skip:].tolist()
        owners += owner[skip:].tolist()
    assert together == stream[: len(together)].tolist()
    assert owners == np.repeat(np.arange(len(lengths)), np.array(lengths, dtype=int) + 1)[: len(owners)].tolist()
    assert packer.dropped_tokens == len(stream) - len(together)
    assert packer.dropped_tokens < sequence_length + (0 if shards else 1)


def test_one_long_document_over_many_shards() -> None:
    documents, shards, packer = pack([1000], 10, 3)
    assert len(shards) == 34  # 100 rows in threes
    assert np.array_equal(np.concatenate([shards[0].tokens, *(shard.tokens[1:] for shard in shards[1:])]), np.append(documents[0], EOS))
    assert all(len(shard.documents.end) == 1 for shard in shards)
    assert packer.dropped_tokens == 0
