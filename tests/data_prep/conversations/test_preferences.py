"""Preferences in their published forms read as one pair, and what prefers nothing is refused with its reason."""

from __future__ import annotations

from typing import Any

import pytest

from weftrain.data_prep.conversations.messages import Message, NoConversationError
from weftrain.data_prep.conversations.preferences import NoPreference, Preference, preference_columns, preference_of

ASKED, GOOD, BAD = "Which is prime?", "Seven is.", "Nine is."
MESSAGES = [{"role": "user", "content": ASKED}]


def answered(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


FORMS: list[dict[str, Any]] = [
    {"prompt": ASKED, "chosen": GOOD, "rejected": BAD},
    {"prompt": MESSAGES, "chosen": GOOD, "rejected": BAD},
    {"prompt": MESSAGES, "chosen": answered(GOOD), "rejected": answered(BAD)},
    {"prompt": ASKED, "chosen": answered(GOOD), "rejected": answered(BAD)},
    {"chosen": MESSAGES + answered(GOOD), "rejected": MESSAGES + answered(BAD), "score_chosen": 8.0},
    {"prompt": ASKED, "chosen": MESSAGES + answered(GOOD), "rejected": MESSAGES + answered(BAD)},
    {
        "chosen": f"\n\nHuman: {ASKED}\n\nAssistant: {GOOD}",
        "rejected": f"\n\nHuman: {ASKED}\n\nAssistant: {BAD}",
    },
    {"prompt": ASKED, "response_0": GOOD, "response_1": BAD, "is_response_0_safe": True, "is_response_1_safe": False},
    {"prompt": ASKED, "response_0": BAD, "response_1": GOOD, "is_response_0_safe": False, "is_response_1_safe": True},
]


@pytest.mark.parametrize("record", FORMS)
def test_every_form_reads_as_the_same_pair(record: dict[str, Any]) -> None:
    found = preference_of(record)
    assert isinstance(found, Preference)
    assert (found.prompt, found.chosen, found.rejected) == ((Message("user", ASKED),), GOOD, BAD)
    assert found.identity == preference_of(FORMS[0]).identity


def test_turns_of_a_transcript_are_messages_and_its_raw_text_stays_as_it_is() -> None:
    before = "\n\nHuman: Hi!\n\nAssistant: Hello.\n\nHuman: Bye\n\nAssistant:"
    found = preference_of({"chosen": f"{before} So long.", "rejected": f"{before} What?"})
    assert isinstance(found, Preference)
    assert [message[:2] for message in found.prompt] == [("user", "Hi!"), ("assistant", "Hello."), ("user", "Bye")]
    assert found.raw == (before, " So long.", " What?")


def test_an_answer_with_a_weight_is_refused_and_other_weights_make_no_difference() -> None:
    question = {"role": "user", "content": ASKED}
    answers = [{"role": "assistant", "content": text} for text in (GOOD, BAD)]

    def record(**of_chosen: float) -> dict[str, object]:
        return {"chosen": [question, answers[0] | of_chosen], "rejected": [question | {"weight": 0}, answers[1]]}

    found = preference_of(record())
    assert isinstance(found, Preference)
    assert found == preference_of(record(weight=1))
    with pytest.raises(NoConversationError, match="'chosen' has an answer with a weight, and preferences have none"):
        preference_of(record(weight=2))


def test_equally_safe_answers_are_no_preference_and_no_failure() -> None:
    for safe in (True, False):
        record = FORMS[-1] | {"is_response_0_safe": safe, "is_response_1_safe": safe}
        assert isinstance(preference_of(record), NoPreference)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"chosen": GOOD, "rejected": GOOD}, "has identical answers"),
        ({"chosen": "  \n"}, "has no chosen answer: it is empty or white space"),
        ({"rejected": None}, "has no rejected answer: field 'rejected' is missing"),
        ({"chosen": None, "rejected": None}, "holds 'prompt', 'chosen', 'rejected', and neither chosen nor response_0"),
        ({"chosen": 3}, "'chosen' holds int, not text"),
        ({"chosen": [], "rejected": answered(BAD)}, "'chosen' is an empty list"),
        (
            {"prompt": None, "chosen": answered(GOOD), "rejected": MESSAGES + answered(BAD)},
            "differ before their last messages",
        ),
        ({"prompt": None, "chosen": MESSAGES, "rejected": [{"role": "user", "content": "b"}]}, "do not both end with"),
        (
            {"prompt": "Who?", "chosen": MESSAGES + answered(GOOD), "rejected": MESSAGES + answered(BAD)},
            "the beginning",
        ),
        ({"prompt": None, "chosen": answered(GOOD), "rejected": answered(BAD)}, "has no prompt before its answers"),
        ({"prompt": None}, "has no 'prompt', and 'chosen' does not end with a turn"),
        (
            {"prompt": None, "chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: b"},
            "turns",
        ),
        ({"response_0": GOOD, "response_1": BAD, "is_response_0_safe": "yes", "is_response_1_safe": True}, "holds str"),
    ],
)
def test_what_is_no_pair_is_refused_with_its_reason(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(NoConversationError, match=why.replace("(", r"\(")):
        preference_of(FORMS[0] | changes)


def test_a_table_needs_a_column_of_answers() -> None:
    assert preference_columns(["id", "rejected", "prompt", "chosen"]) == ["rejected", "prompt", "chosen"]
    with pytest.raises(NoConversationError, match="has no column chosen or response_0"):
        preference_columns(["prompt", "messages"])
