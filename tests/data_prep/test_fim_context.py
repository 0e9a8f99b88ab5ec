"""Context-level FIM: rows are full, every piece is whole within its row, and the pieces of a document give it back."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weftrain.data_prep import fim
from weftrain.data_prep.fim_context import ContextPiece, Draws, context_pieces, context_tokens
from weftrain.data_prep.markers import FimIds

IDS = FimIds(1000, 1001, 1002, None)
BOS, EOS = 1003, 1004


def contents(count: int) -> list[bytes]:
    return [hashlib.sha256(str(number).encode()).digest() for number in range(count)]


def made(pieces: list[ContextPiece], documents: list[np.ndarray], bos: int, eos: int) -> list[np.ndarray]:
    before, after = np.array([BOS] * bos, np.int32), np.array([EOS] * eos, np.int32)
    return [np.concatenate(context_tokens(documents[piece.document], piece, before, after, IDS)) for piece in pieces]


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=12),
    st.integers(1, 40),
    st.sampled_from([(0, 1), (1, 1), (1, 0)]),
    st.sampled_from([0.5, 1.0]),
    st.integers(0, 5),
)
def test_rows_are_full_and_documents_come_back(lengths: list[int], width: int, around: tuple[int, int], rate: float, seed: int) -> None:
    bos, eos = around
    documents = [np.arange(length, dtype=np.int32) for length in lengths]
    for together in (True, False):
        pieces = context_pieces(lengths, contents(len(lengths)), width, Draws(seed, 0, rate, 0.5), bos, eos, together=together)
        assert pieces == context_pieces(lengths, contents(len(lengths)), width, Draws(seed, 0, rate, 0.5), bos, eos, together=together)
        tokens = made(pieces, documents, bos, eos)
        sizes = [piece.length(bos, eos) for piece in pieces]
        assert sizes == [len(part) for part in tokens]
        assert 0 < min(sizes) <= max(sizes) <= width
        if together:  # row after row is filled to its last token, and no piece lies across a row's end
            ends = np.cumsum(sizes)
            assert set(range(width, int(ends[-1]) + 1, width)) <= set(ends.tolist())
        back: list[list[int]] = [[] for _ in lengths]
        for piece, part in zip(pieces, tokens, strict=True):
            own = part[piece.begins * bos : len(part) - piece.ends * eos]
            back[piece.document] += fim.restore(own, piece.mode, piece.a, piece.b, IDS).tolist()
        assert back == [document.tolist() for document in documents]
        assert sum(piece.begins for piece in pieces) == sum(piece.ends for piece in pieces) == len(lengths)
        total = sum(lengths) + len(lengths) * (bos + eos) + 3 * sum(piece.mode != fim.PLAIN for piece in pieces)
        assert total == sum(sizes)


def test_draws_follow_rate_seed_and_epoch() -> None:
    lengths = [100] * 3000
    for rate, spm_share in ((0.9, 0.5), (0.3, 0.0)):
        pieces = context_pieces(lengths, contents(3000), 65, Draws(1, 0, rate, spm_share), 0, 1, together=True)
        able = [piece for piece in pieces if piece.stop - piece.start > 3]  # a row's last three tokens have no room for control tokens
        modes = np.array([piece.mode for piece in able])
        assert abs((modes != fim.PLAIN).mean() - rate) < 6 * np.sqrt(rate * (1 - rate) / len(able))
        assert abs((modes == fim.SPM).sum() - spm_share * (modes != fim.PLAIN).sum()) < 6 * np.sqrt(0.25 * len(able))
    first, *others = (
        context_pieces(lengths[:50], contents(50), 65, draws, 0, 1, together=True)
        for draws in (Draws(1, 0, 0.9, 0.5), Draws(2, 0, 0.9, 0.5), Draws(1, 1, 0.9, 0.5))
    )
    assert all(first != other for other in others)


def test_a_whole_document_is_transformed_as_one_piece() -> None:
    (piece,) = context_pieces([10], contents(1), 64, Draws(0, 0, 1.0, 0.0), 1, 1, together=True)
    assert (piece.start, piece.stop, piece.mode, piece.begins, piece.ends) == (0, 10, fim.PSM, True, True)
    tokens = made([piece], [np.arange(10, dtype=np.int32)], 1, 1)[0].tolist()
    a, b = piece.a, piece.b
    assert tokens == [BOS, 1000, *range(a), 1002, *range(b, 10), 1001, *range(a, b), EOS]


@pytest.mark.parametrize("together", [True, False])
def test_no_document_is_no_piece(together: bool) -> None:
    assert context_pieces([], [], 8, Draws(0, 0, 1.0, 0.5), 0, 1, together=together) == []
