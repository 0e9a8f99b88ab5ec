"""Context-level FIM: rows are full, every piece is whole within its row, and the pieces of a document give it back."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weftrain.core.data import open_training
from weftrain.core.errors import DataError
from weftrain.core.formats.dataset_manifest import FimSettings
from weftrain.core.formats.shard_set import ShardSet
from weftrain.core.order.data_section import DataConfig
from weftrain.data_prep.fim import exact as fim
from weftrain.data_prep.fim.context import ContextPiece, Draws, context_pieces, context_tokens
from weftrain.data_prep.pipeline import Prepared, prepare
from weftrain.data_prep.readers.listing import list_inputs
from weftrain.data_prep.readers.read_options import ReadOptions
from weftrain.data_prep.stages import plan
from weftrain.data_prep.stages.settings import Inputs
from weftrain.data_prep.tokens.markers import FimIds
from weftrain.data_prep.tokens.tokenization import TextEncoder

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
def test_rows_are_full_and_documents_come_back(
    lengths: list[int], width: int, around: tuple[int, int], rate: float, seed: int
) -> None:
    bos, eos = around
    documents = [np.arange(length, dtype=np.int32) for length in lengths]
    for together in (True, False):
        pieces = context_pieces(
            lengths, contents(len(lengths)), width, Draws(seed, 0, rate, 0.5), bos, eos, together=together
        )
        assert pieces == context_pieces(
            lengths, contents(len(lengths)), width, Draws(seed, 0, rate, 0.5), bos, eos, together=together
        )
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
        # a row's last three tokens have no room for control tokens
        able = [piece for piece in pieces if piece.stop - piece.start > 3]
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


# -- through prepare()

S = 24
CONTEXT = FimSettings(rate=0.9, spm_share=0.5, mode="context")


@pytest.fixture
def texts(texts: list[str]) -> list[str]:
    return texts[:60]


@pytest.fixture
def run(tmp_path: Path, encoder: TextEncoder, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """prepare() of the test texts with context-level FIM, in several parts and buckets."""
    monkeypatch.setattr(plan, "_MEBI", 600)
    (tmp_path / "tokenizer.json").write_bytes(encoder.data)
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    inputs = Inputs(tuple(list_inputs([str(tmp_path / "t.jsonl")], source=None)), "text", "none", ReadOptions())

    def call(name: str, **changes: Any) -> Prepared:
        given: dict[str, Any] = {
            "sequence_length": S,
            "heldout_fraction": 0.2,
            "rows_per_shard": 20,
            "fim": CONTEXT,
            "bos": "<s>",
        }
        prepared = prepare(
            inputs, tmp_path / "out", name=name, tokenizer=tmp_path / "tokenizer.json", **given | changes
        )
        assert prepared is not None
        return prepared

    return call


def documents_of(prepared: Prepared, encoder: TextEncoder, set_name: str) -> dict[bytes, list[list[int]]]:
    """The pieces of each document, restored, in the order of the rows; bos and eos stand where its pieces begin and
    end.
    """
    ids, manifest = fim.fim_ids(encoder), prepared.manifest
    found: dict[bytes, list[list[int]]] = defaultdict(list)
    for reader in ShardSet(prepared.folder, manifest, set_name).readers():  # type: ignore[arg-type]
        table = reader.documents()
        assert table.fim is not None
        starts = np.append(0, table.end[:-1])
        assert np.array_equal(starts // (S + 1), (table.end - 1) // (S + 1))  # no piece lies across a row's end
        for index in np.flatnonzero(table.file >= 0).tolist():
            tokens = reader.tokens(int(starts[index]), int(table.end[index]))
            own = slice(int(tokens[0] == manifest.bos_id), len(tokens) - int(tokens[-1] == manifest.eos_id))
            restored = fim.restore(tokens[own], int(table.fim.mode[index]), *map(int, table.fim.split[index]), ids)
            found[table.id[index].tobytes()].append(restored.tolist())
    return found


def test_every_document_comes_back_from_its_rows(run: Any, texts: list[str], encoder: TextEncoder) -> None:
    prepared = run("d", epochs=2)
    manifest = prepared.manifest
    assert (manifest.row_stride, manifest.train.dropped_tokens, manifest.fim.mode) == (S + 1, 0, "context")
    own = {
        hashlib.sha256(text.encode()).digest()[:16]: ids.tolist()
        for text, ids in zip(texts, encoder.encode(texts, texts), strict=True)
    }
    train, heldout = (documents_of(prepared, encoder, name) for name in ("train", "heldout"))
    assert train.keys() | heldout.keys() == own.keys()
    assert not train.keys() & heldout.keys()
    for identity, pieces in (train | heldout).items():
        together = [token for piece in pieces for token in piece]
        assert together == own[identity] * (2 if identity in train else 1)  # two epochs, one after the other
    assert any(len(pieces) > 2 for pieces in train.values())
    assert 0 < manifest.train.padding_tokens < 2 * 16 * (S + 1)  # at most a row an epoch and bucket
    ids, mask = ShardSet(prepared.folder, manifest, "train").rows(np.arange(manifest.train.n_examples))
    assert mask is not None
    assert int((~mask).sum()) == manifest.train.padding_tokens
    transformed = int((ids == fim.fim_ids(encoder).middle).sum())
    assert transformed > 0.7 * manifest.documents.train


def test_best_fit_rows_hold_whole_pieces(run: Any, texts: list[str], encoder: TextEncoder) -> None:
    prepared = run("d", packing="best_fit", heldout_fraction=0.0)
    own = {
        hashlib.sha256(text.encode()).digest()[:16]: ids.tolist()
        for text, ids in zip(texts, encoder.encode(texts, texts), strict=True)
    }
    for identity, pieces in documents_of(prepared, encoder, "train").items():
        assert sorted(token for piece in pieces for token in piece) == sorted(own[identity])
        if len(pieces) == 1:
            assert pieces[0] == own[identity]


def test_a_training_recipe_says_the_mode(run: Any, tmp_path: Path) -> None:
    run("d")
    source = {"name": "d", "path": "d", "weight": 1.0, "fim": CONTEXT.model_dump()}
    value: dict[str, Any] = {
        "root": str(tmp_path / "out"),
        "sequence_length": S,
        "shuffle_seed": 0,
        "sources": [source],
    }
    assert open_training(DataConfig.model_validate(value), 4, vocab_size=352).rows(0, 0, 4).ids.shape == (4, S + 1)
    source["fim"] = CONTEXT.model_dump() | {"mode": "exact"}
    with pytest.raises(DataError, match=r"prepared with fim .*'context'"):
        open_training(DataConfig.model_validate(value), 4, vocab_size=352)
