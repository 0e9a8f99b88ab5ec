import contextlib
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weftrain.data_prep.conversations.messages import Message, NoConversationError, columns_of, conversation_of

ASKED, ANSWERED = Message("user", "how?"), Message("assistant", "so.")


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "user", "content": "how?"}, {"role": "assistant", "content": "so."}]},
        {"conversation": [{"role": "user", "content": "how?"}, {"role": "assistant", "content": "so."}]},
        {"id": 7, "conversations": [{"from": "human", "value": "how?"}, {"from": "gpt", "value": "so."}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "how"}, {"type": "text", "text": "?"}]},
                      {"role": "assistant", "content": "so.", "weight": 1}]},
        {"instruction": "how?", "input": "", "output": "so."},
        {"prompt": "how?", "completion": "so."},
        {"prompt": "how?", "response": "so.", "messages": None},
        {"prompt": [{"role": "user", "content": "how?"}], "completion": [{"role": "assistant", "content": "so."}]},
    ],
)  # fmt: skip
def test_every_form_is_the_same_conversation(record: dict[str, object]) -> None:
    found = conversation_of(record)
    assert found.messages == (ASKED, ANSWERED)
    assert found.identity == '[["user","how?"],["assistant","so."]]'


def said(weight: object, of: str = "assistant") -> dict[str, object]:
    roles = {"user": "how?", "assistant": "so."}
    messages = [
        {"role": role, "content": text} | ({"weight": weight} if role == of else {}) for role, text in roles.items()
    ]
    return {"messages": messages}


@pytest.mark.parametrize(("weight", "read"), [(None, 1), (1, 1), (0, 0), (-0.0, 0), (0.5, 0.5), (3, 3), (1e6, 1e6)])
def test_an_answer_has_the_weight_of_its_message(weight: object, read: float) -> None:
    found = conversation_of(said(weight))
    assert found.messages[1].weight == read
    assert found.weighted == (read != 1)
    # others with the same words are other examples, but on the same side of the held-out split
    assert (found.identity == conversation_of(said(1)).identity) == (read == 1)
    assert found.words == conversation_of(said(1)).words


@pytest.mark.parametrize("weight", [0, 1, None])
def test_a_question_bears_no_loss_whatever_it_weighs(weight: object) -> None:
    assert conversation_of(said(weight, "user")).identity == conversation_of(said(1)).identity


@pytest.mark.parametrize(
    ("weight", "why"),
    [
        ("1", "'messages.1.weight' holds str, not a number: a weight is 0, or from 0.000001 to 1,000,000"),
        (True, "'messages.1.weight' holds bool, not a number"),
        ([1], "'messages.1.weight' holds list, not a number"),
        (-1, "'messages.1.weight' is -1: a weight is 0, or from"),
        (float("nan"), "'messages.1.weight' is nan"),
        (float("inf"), "'messages.1.weight' is inf"),
        (10**400, "'messages.1.weight' is 10000000000000000000: a weight is 0"),
        (1_000_001, "'messages.1.weight' is 1000001"),
        (1e-7, "'messages.1.weight' is 1e-07"),
    ],
)
def test_what_is_no_weight_says_why(weight: object, why: str) -> None:
    with pytest.raises(NoConversationError, match=re.escape(why)):
        conversation_of(said(weight))


def test_a_weight_of_a_question_is_refused() -> None:
    with pytest.raises(
        NoConversationError, match=r"'messages\.0\.weight' is 2, and only what the assistant says bears"
    ):
        conversation_of(said(2, "user"))


def test_a_system_message_and_alpacas_input_are_kept() -> None:
    found = conversation_of({"instruction": "add", "input": "1 2", "output": "3", "system": "count"})
    assert found.messages == (Message("system", "count"), Message("user", "add\n\n1 2"), Message("assistant", "3"))
    assert conversation_of({"prompt": "p", "completion": "c", "system": "s"}).messages[0] == Message("system", "s")


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"text": "a"}, "holds 'text', and none of messages, conversations, conversation, instruction, prompt"),
        ({}, "holds nothing"),
        ({"messages": "a"}, "field 'messages' holds str, not a list of messages"),
        ({"messages": ["a"]}, "'messages.0' holds str, not a message"),
        ({"messages": [{"role": "narrator", "content": "a"}]}, "'messages.0.role' is 'narrator': the roles are system"),
        ({"messages": [{"content": "a"}]}, "'messages.0.role' is 'None'"),
        ({"messages": [{"role": "user", "content": None}]}, "'messages.0.content' holds NoneType, not text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a part of type 'image': only text is read"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "lone surrogate"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "calls tools"),
        ({"messages": []}, "has no answer"),
        ({"messages": [{"role": "user", "content": "a"}]}, "has no answer"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " \n"}]}, "has no answer"),
        ({"prompt": "a"}, "'completion' holds NoneType|'response' holds NoneType"),
        ({"instruction": "a", "output": 3}, "'output' holds int, not text"),
        ({"messages": [{"role": "user", "content": "a"}] * 10_001}, "has 10,001 messages"),
    ],
)  # fmt: skip
def test_what_is_no_conversation_says_why(record: dict[str, object], why: str) -> None:
    with pytest.raises(NoConversationError, match=why):
        conversation_of(record)


def test_of_a_table_only_columns_of_conversations_are_read() -> None:
    assert columns_of(["id", "prompt", "score", "completion"]) == ["prompt", "completion"]
    with pytest.raises(NoConversationError, match="has no column messages, conversations"):
        columns_of(["id", "text"])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "type", "text", "messages", "prompt", "x"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.sampled_from(["messages", "conversations", "prompt", "completion", "instruction", "output"]),
        JSON,
        max_size=4,
    )
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_record_is_read_or_refused_with_a_reason(record: dict[str, object]) -> None:
    with contextlib.suppress(NoConversationError):
        found = conversation_of(record)
        assert json.loads(found.identity) == [list(message) for message in found.messages]
