"""What a tokenizer is trained on: the texts of the lowest keys, each once, in a bounded number of bytes and
documents.
"""

from __future__ import annotations

import hashlib
import random

import pytest

from weftrain.data_prep.stages import sample as sample_stage


def lowest(entries: list[tuple[bytes, int]]) -> list[tuple[bytes, int]]:
    kept = sample_stage._Lowest()
    for place, (key, num_bytes) in enumerate(entries):
        kept.add(key, place, num_bytes, None)
        assert len(kept._heap) <= sample_stage._TRAINING_DOCUMENTS
    return [(key, num_bytes) for key, num_bytes, _ in kept.by_place()]


def test_the_lowest_keys_are_kept_in_whichever_order_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_stage, "TRAINING_BYTES", 1000)
    entries = [(hashlib.sha256(b"%d" % number).digest(), number % 90) for number in range(300)]
    twice = [*entries, *entries[:50]]
    held, expected = 0, []
    for entry in sorted(entries):
        if held >= 1000:
            break
        held += entry[1]
        expected.append(entry)
    for seed in range(4):
        random.Random(seed).shuffle(twice)
        assert sorted(lowest(twice)) == expected
    monkeypatch.setattr(sample_stage, "_TRAINING_DOCUMENTS", 7)
    assert sorted(lowest(twice)) == expected[:7]


def test_a_long_text_comes_in_pieces_that_end_with_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_stage, "_PIECE_CHARACTERS", 10)
    text = "one\ntwo three\nfourfourfourfour\nfive"
    pieces = list(sample_stage._cut(text))
    assert "".join(pieces) == text
    assert pieces[0] == "one\n"
    assert max(map(len, pieces)) <= 10
