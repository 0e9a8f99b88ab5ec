"""Rows of pairs: two sides of T tokens, each from its own start, cut as the released scripts of DPO cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weftrain.data_prep.choices import KeepPrompt
from weftrain.data_prep.conversations.messages import Message
from weftrain.data_prep.conversations.pairs import PreferenceEncoder
from weftrain.data_prep.conversations.preferences import Preference
from weftrain.data_prep.conversations.template import TemplateError, load_template
from weftrain.data_prep.marks import LOSS, PADDING
from weftrain.data_prep.tokens.tokenization import TextEncoder

WORDS = st.lists(st.sampled_from(["the cat", " sat", " on", " a mat", " 17", "é"]), min_size=1, max_size=12)


def pair(prompt: str, chosen: str, rejected: str) -> Preference:
    return Preference((Message("user", prompt),), chosen, rejected, (prompt, chosen, rejected))


def rows(encoder: TextEncoder, width: int, most: int, keep: KeepPrompt = "end", template: str | None = None):  # type: ignore[no-untyped-def]
    found = None if template is None else load_template(template)
    return PreferenceEncoder(encoder, found, "pairs", width, most, keep, "cut")


def released(prompt: list[int], answers: list[list[int]], width: int, most: int, keep: str) -> list[list[int]]:
    """The rule as the released scripts state it, on lists of ids; answers end with the end token."""
    longest = max(map(len, answers))
    if len(prompt) + longest > width:
        prompt = prompt[:most] if keep == "start" else prompt[-most:]
    if len(prompt) + longest > width:
        answers = [answer[: width - most] for answer in answers]
    return [[*prompt, *answer] for answer in answers]


@settings(deadline=None, max_examples=60)
@given(WORDS, WORDS, WORDS, st.integers(8, 40), st.floats(0.1, 0.9), st.sampled_from(["end", "start"]))
def test_texts_are_joined_and_cut_as_released(
    prompt: list[str], chosen: list[str], rejected: list[str], width: int, share: float, keep: KeepPrompt
) -> None:
    encoder = _encoder()
    most = max(1, int(width * share))
    texts = ["".join(words) for words in (prompt, chosen, rejected)]
    ids = [[*map(int, found)] for found in encoder.encode(texts, texts)]
    eos = encoder.markers.eos
    expected = released(ids[0], [[*ids[1], eos], [*ids[2], eos]], width, most, keep)
    if expected[0] == expected[1]:
        with pytest.raises(TemplateError, match="identical"):
            rows(encoder, width, most, keep).encode(pair(*texts))
        return
    row = rows(encoder, width, most, keep).encode(pair(*texts))
    assert len(row.ids) == len(row.marks) == 2 * width + 1
    for side, wanted in enumerate(expected):
        part = slice(side * width, (side + 1) * width)
        found, marks = row.ids[part], row.marks[part]
        assert found[marks != PADDING].tolist() == wanted
        kept = len(wanted) - int((marks == LOSS).sum())
        assert (marks[kept : len(wanted)] == LOSS).all()
        assert kept == min(len(ids[0]), most) if row.cut_prompt else kept == len(ids[0])
        assert not marks[0] & LOSS  # nothing stands before a side's first token
    assert row.marks[-1] == PADDING


def _encoder() -> TextEncoder:
    from made_texts import sentences

    from weftrain.data_prep.tokens.training import train_encoder

    if not _MADE:
        _MADE.append(train_encoder([*sentences(100), "the cat sat on a mat 17 é"], 320))
    return _MADE[0]


_MADE: list[TextEncoder] = []


def test_a_template_writes_both_sides_and_what_ends_the_answer_bears_loss() -> None:
    encoder = _encoder()
    row = rows(encoder, 60, 30, template="chatml").encode(pair("the cat?", "sat", "ran on a mat"))
    for side, answer in enumerate(("sat", "ran on a mat")):
        ids, marks = row.ids[side * 60 : side * 60 + 60], row.marks[side * 60 : side * 60 + 60]
        assert encoder.decode(ids[marks != PADDING]).startswith("<|im_start|>user\nthe cat?<|im_end|>\n<|im_start|>")
        assert encoder.decode(ids[marks == LOSS]) == f"{answer}<|im_end|>"
        assert encoder.decode(ids[marks != PADDING]).endswith(f"{answer}<|im_end|>")  # nothing after it
    assert not row.cut_prompt
    assert not row.cut_answers


def test_what_cannot_be_a_row_is_refused_with_its_reason() -> None:
    encoder = _encoder()
    with pytest.raises(TemplateError, match="holds messages, which are written by a chat template"):
        rows(encoder, 20, 10).encode(Preference((Message("user", "a"),), "b", "c", None))
    with pytest.raises(TemplateError, match="has an empty prompt"):
        rows(encoder, 20, 10).encode(pair("", "b", "c"))
    with pytest.raises(TemplateError, match="identical as far as they fit"):
        rows(encoder, 8, 4).encode(pair("a", "17 17 17 17 17 17", "17 17 17 17 17 16"))
    drop = PreferenceEncoder(encoder, None, "pairs", 8, 4, "end", "drop")
    with pytest.raises(TemplateError, match=r"is \d+ tokens long, and a side of a row has 8"):
        drop.encode(pair("a", "17 17 17 17 17 17", "b"))


def test_the_chosen_answer_alone_is_a_row_of_one_side() -> None:
    encoder = _encoder()
    alone = PreferenceEncoder(encoder, None, "chosen", 16, 8, "end", "cut").encode(pair("the cat", " sat", " 17"))
    both = rows(encoder, 16, 8).encode(pair("the cat", " sat", " 17"))
    assert np.array_equal(alone.ids[:16], both.ids[:16])
    assert len(alone.ids) == 17
