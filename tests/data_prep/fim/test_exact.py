"""Fill-in-the-middle: every document of the corpus and any Unicode comes back; rates, epochs; what the released way
damages.
"""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weftrain.core.errors import DataError
from weftrain.data_prep.fim import exact as fim
from weftrain.data_prep.fim.damage import damage_lines, fim_damage
from weftrain.data_prep.fim.exact import PLAIN, PSM, SPM, FimIds
from weftrain.data_prep.fim.released import released_row
from weftrain.data_prep.readers.corpus import embedded_inputs
from weftrain.data_prep.readers.documents import Document
from weftrain.data_prep.readers.read_options import ReadOptions
from weftrain.data_prep.readers.shares import read_part, split_parts
from weftrain.data_prep.tokens.tokenization import TextEncoder, make_encoder
from weftrain.data_prep.tokens.training import train_encoder

IDS = FimIds(1000, 1001, 1002, 1003)


@pytest.fixture(scope="module")
def code() -> list[str]:
    return [path.read_text() for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:50]]


@pytest.fixture(scope="module")
def coder(code: list[str]) -> TextEncoder:
    return train_encoder(code, 2000)


def test_the_order_of_the_parts() -> None:
    tokens = np.arange(6, dtype=np.uint16)
    assert fim.transform(tokens, PSM, 2, 3, IDS).tolist() == [1000, 0, 1, 1002, 3, 4, 5, 1001, 2]
    assert fim.transform(tokens, SPM, 2, 3, IDS).tolist() == [1000, 1002, 3, 4, 5, 1001, 0, 1, 2]
    assert fim.transform(tokens, PLAIN, 0, 0, IDS) is tokens


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 999), min_size=1, max_size=40), st.sampled_from([PSM, SPM]), st.data())
def test_whatever_is_cut_comes_back(ids: list[int], mode: int, data: st.DataObject) -> None:
    a, b = sorted(data.draw(st.integers(0, len(ids))) for _ in range(2))
    for dtype in (np.uint16, np.int32):
        tokens = np.array(ids, dtype)
        made = fim.transform(tokens, mode, a, b, IDS)
        assert made.dtype == dtype
        assert sorted(made.tolist()) == sorted([*ids, 1000, 1001, 1002])
        assert fim.restore(made, mode, a, b, IDS).tolist() == ids
    for wrong in (made[:-4], np.where(made == 1001, 5, made), made[::-1]):
        with pytest.raises(DataError):
            fim.restore(wrong, mode, a, b, IDS)


def test_the_draw_is_by_content_seed_and_epoch_alone() -> None:
    hashes = [hashlib.sha256(str(number).encode()).digest() for number in range(4000)]
    draws = [fim.draw(7, content, 0, 0.9, 0.5, 100) for content in hashes]
    assert draws == [fim.draw(7, content, 0, 0.9, 0.5, 100) for content in hashes]
    assert (
        sum(a != b for a, b in zip(draws, [fim.draw(7, content, 1, 0.9, 0.5, 100) for content in hashes], strict=True))
        > 3500
    )
    assert (
        sum(a != b for a, b in zip(draws, [fim.draw(8, content, 0, 0.9, 0.5, 100) for content in hashes], strict=True))
        > 3500
    )
    modes = np.array([mode for mode, _, _ in draws])
    assert abs((modes != PLAIN).mean() - 0.9) < 6 * np.sqrt(0.09 / 4000)
    assert abs((modes == SPM).sum() / (modes != PLAIN).sum() - 0.5) < 6 * np.sqrt(0.25 / 3600)
    cuts = np.array([(a, b) for mode, a, b in draws if mode != PLAIN])
    assert (cuts[:, 0] <= cuts[:, 1]).all()
    assert cuts.min() == 0
    assert cuts.max() == 100
    assert abs(cuts.mean() - 50) < 6 * 29 / np.sqrt(cuts.size)  # uniform over 0..100
    assert {fim.draw(7, content, 0, 1.0, 0.0, 9)[0] for content in hashes} == {PSM}
    assert fim.draw(7, hashes[0], 0, 1.0, 0.5, 0) == (PLAIN, 0, 0)


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=80), st.integers(0, 9))
def test_any_unicode_comes_back(coder: TextEncoder, text: str, seed: int) -> None:
    ids = fim.fim_ids(coder)
    (tokens,) = coder.encode([text], ["x"])
    drawn = fim.draw(seed, hashlib.sha256(text.encode()).digest(), 0, 1.0, 0.5, len(tokens))
    assert coder.decode(fim.restore(fim.transform(tokens, *drawn, ids), *drawn, ids)) == text


@pytest.mark.prove
def test_every_document_of_the_embedded_corpus_comes_back(coder: TextEncoder) -> None:
    files, _, _ = embedded_inputs()
    ids, count = fim.fim_ids(coder), 0
    for part in split_parts(files, 4 << 20):
        documents = [item for item in read_part(files, part, ReadOptions()) if isinstance(item, Document)]
        texts = [str(document.text) for document in documents]
        for text, tokens in zip(texts, coder.encode(texts, texts), strict=True):
            content = hashlib.sha256(text.encode()).digest()
            for epoch in (0, 1):
                drawn = fim.draw(0, content, epoch, 0.9, 0.5, len(tokens))
                assert coder.decode(fim.restore(fim.transform(tokens, *drawn, ids), *drawn, ids)) == text
            count += 1
    assert count > 900


def test_ids_in_either_spelling_and_none(code: list[str]) -> None:
    data = train_encoder(code[:5], 300).data
    other = make_encoder(data.replace(b"<|fim_", b"<fim_").replace(b"|>", b">"), "t")
    assert len(set(fim.fim_ids(other))) == 4
    with pytest.raises(DataError, match=r"has no tokens <.fim_prefix.>.* name its own with --fim-tokens"):
        fim.fim_ids(make_encoder(other.data.replace(b"<fim_", b"<mid_"), "t"))


# -- released


def test_a_released_row_is_as_long_as_it_was_and_follows_its_generator(coder: TextEncoder, code: list[str]) -> None:
    ids = fim.fim_ids(coder)
    stream = np.concatenate([np.append(tokens, coder.eos_id) for tokens in coder.encode(code, code)]).astype(
        coder.dtype
    )
    overflowed = 0
    for row in range(40):
        window = stream[row * 256 : row * 256 + 257]
        one, same, other = (
            released_row(window, coder, ids, 0.9, 0.5, np.random.default_rng([seed, row])) for seed in (1, 1, 2)
        )
        assert np.array_equal(one.tokens, same.tokens)
        assert len(one.tokens) == 257
        assert sum(one.document_lengths) + one.padding == 257
        overflowed += one.overflowed
        assert not np.array_equal(one.tokens, other.tokens) or one.segments == other.segments == 0
    assert overflowed > 20
    untouched = released_row(stream[:257], coder, ids, 1e-12, 0.5, np.random.default_rng(0))
    assert np.array_equal(untouched.tokens[:256], stream[:256])


def test_the_damage_is_counted_and_exact_does_none(coder: TextEncoder, code: list[str]) -> None:
    documents = coder.encode(code, code)
    released, exact = fim_damage(documents, coder, 256, 0.9, 0.5)
    assert released.rows > 500
    changed, overflowed, lost = released.shares
    assert changed > 0.2
    assert overflowed > 0.5
    assert 0 < lost < 0.2
    assert exact.shares == (0, 0, 0)
    assert exact.segments > 35
    lines = damage_lines(released, exact)
    assert "39%" in lines[1]
    assert lines[1].split()[-1] == "0.0%"
    with pytest.raises(DataError, match="do not fill one row"):
        fim_damage(documents[:1], coder, 10**6, 0.9, 0.5)


def test_a_broken_restoration_is_counted(coder: TextEncoder, code: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    documents = coder.encode(code[:10], code[:10])
    monkeypatch.setattr(fim, "restore", lambda tokens, mode, a, b, ids: tokens[3:])
    _, exact = fim_damage(documents, coder, 256, 1.0, 0.5)
    assert exact.changed > 0
