"""What a preparation records of how its inputs were read."""

from __future__ import annotations

from weftrain.data_prep.readers.read_options import ReadOptions


def test_keys_that_came_later_leave_the_record_of_older_datasets_as_it_was() -> None:
    assert ReadOptions().record() == {"text_key": "text", "source_key": None, "normalise": (), "sequence_length": None}
    assert ReadOptions(tokens_key="ids").record()["tokens_key"] == "ids"


def test_of_a_tokenizer() -> None:
    for vocab_size, dtype in ((1 << 16, "uint16"), ((1 << 16) + 1, "uint32")):
        assert ReadOptions().of_tokenizer(vocab_size, 7) == ReadOptions(stream_dtype=dtype, end_id=7)
    assert ReadOptions(tokens_dtype="int64").of_tokenizer(300, 7).stream_dtype == "int64"
