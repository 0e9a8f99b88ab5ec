from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weftrain.analysis.serving.text import TextStream


def by_bytes(ids: Sequence[int]) -> str:
    """A tokenizer whose tokens are bytes: a character may take four."""
    return bytes(ids).decode(errors="replace")


def spaced(ids: Sequence[int]) -> str:
    """One whose words begin with a space, which a text does not begin with, as LLaMA's."""
    return "".join(f" {index}" for index in ids)[1:]


@given(st.text(max_size=30), st.text(max_size=5), st.lists(st.text(min_size=1, max_size=3), max_size=3))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_pieces_make_the_text_up_to_the_first_stop_word(text: str, before: str, stops: list[str]) -> None:
    stream = TextStream(by_bytes, list(before.encode()), stops)
    pieces = [stream.add(token) for token in text.encode()] + [stream.end()]
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    assert "".join(pieces) == text[: min(places, default=len(text))]
    assert stream.stopped is bool(places)


def test_what_cannot_change_is_given_out_at_once() -> None:
    stream = TextStream(by_bytes, stops=["END"])
    assert [stream.add(token) for token in "aé".encode()] == ["a", "", "é"]
    assert [stream.add(token) for token in b"ENx"] == ["", "", "ENx"]
    assert stream.end() == ""


def test_a_word_after_the_prompt_keeps_its_space_unless_asked_otherwise() -> None:
    stream = TextStream(spaced, before=[1, 2])
    assert [stream.add(7), stream.add(8), stream.end()] == [" 7", " 8", ""]
    stripped = TextStream(spaced, before=[1, 2], strip=True)
    assert [stripped.add(7), stripped.add(8)] == ["7", " 8"]


def test_half_a_character_at_the_end_is_shown_as_such() -> None:
    stream = TextStream(by_bytes)
    assert [stream.add(0xC3), stream.end()] == ["", "\N{REPLACEMENT CHARACTER}"]


@pytest.mark.parametrize("count", [300])
def test_the_cost_of_a_token_does_not_grow(count: int) -> None:
    """Only what is new is decoded, with the tokens before it."""
    sizes = []

    def measured(ids: Sequence[int]) -> str:
        sizes.append(len(ids))
        return by_bytes(ids)

    stream = TextStream(measured, before=[97] * 50)
    for _ in range(count):
        stream.add(98)
    assert max(sizes) <= 9
