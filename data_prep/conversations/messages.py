"""Conversations in the forms that they are published in, read as messages with roles.

| form              | fields                                                                                    |
|-------------------|-------------------------------------------------------------------------------------------|
| messages          | `messages` (or `conversation`): a list of {role, content}                                 |
| ShareGPT          | `conversations`: a list of {from, value}; human is the user, gpt the assistant            |
| Alpaca            | `instruction`, `output`, and perhaps `input` and `system`                                 |
| prompt/completion | `prompt` and `completion` (or `response`): texts, or lists of {role, content} that follow |

The content of a message is a text, or a list of text parts. `weight` is by what the loss of an assistant's message is
multiplied; 0 means that it bears none. Other fields of a record and of a message are not read, but a message that calls
tools is a failure, because the call would be lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from weftrain.core.formats.canonical import canonical_json
from weftrain.data_prep.weights import weight_in

Role = Literal["system", "user", "assistant", "tool"]
_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
}
# a list of messages; the first that a record has is read
_LISTS = ("messages", "conversations", "conversation")
FIELDS = (*_LISTS, "instruction", "prompt")  # by which a record is known to hold a conversation
_COLUMNS = (*FIELDS, "input", "output", "system", "completion", "response")  # all that are read
MAX_MESSAGES = 10_000


class Message(NamedTuple):
    role: Role
    content: str
    weight: float = 1.0  # of its loss


class NoConversationError(ValueError):
    """A record that holds no conversation to learn from. The text says why, and what to do."""


@dataclass(frozen=True)
class Conversation:
    """Messages in order, at least one of them an answer: an assistant's message that is not blank."""

    messages: tuple[Message, ...]

    @property
    def identity(self) -> str:
        """One text for all that is read, so that equal conversations are duplicates in whatever form they came."""
        if not self.weighted:
            return self.words
        weights = [message.weight if message.role == "assistant" else 1.0 for message in self.messages]
        said = zip(self.messages, weights, strict=True)
        return canonical_json([[message.role, message.content, weight] for message, weight in said]).decode()

    @property
    def words(self) -> str:
        """One text for what is said, whatever it weighs: it decides on which side of the held-out split it is."""
        return canonical_json([[message.role, message.content] for message in self.messages]).decode()

    @property
    def weighted(self) -> bool:
        """Whether an answer has a weight; that of other messages, 0 or 1, makes no difference."""
        return any(message.weight != 1 for message in self.messages if message.role == "assistant")


def is_answer(message: Message) -> bool:
    return message.role == "assistant" and not message.content.isspace() and message.content != ""


def columns_of(names: list[str]) -> list[str]:
    """Which columns of a table are read. Raises NoConversationError if none can hold a conversation."""
    if not any(name in FIELDS for name in names):
        raise NoConversationError(f"has no column {', '.join(FIELDS[:-1])} or {FIELDS[-1]}")
    return [name for name in names if name in _COLUMNS]


def conversation_of(record: Mapping[str, Any]) -> Conversation:
    """The conversation of a record. Raises NoConversationError."""
    messages = _messages(record)
    if len(messages) > MAX_MESSAGES:
        raise NoConversationError(f"has {len(messages):,} messages, and at most {MAX_MESSAGES:,} are read: split it")
    if not any(map(is_answer, messages)):
        raise NoConversationError("has no answer: no message of the assistant that is more than white space")
    return Conversation(tuple(messages))


def _messages(record: Mapping[str, Any]) -> list[Message]:
    for key in _LISTS:
        if record.get(key) is not None:
            return messages_of(key, record[key])
    if record.get("instruction") is not None:
        return _alpaca(record)
    if record.get("prompt") is not None:
        return _completed(record)
    names = ", ".join(map(repr, list(record)[:8])) or "nothing"
    raise NoConversationError(f"holds {names}, and none of {', '.join(FIELDS)}, by which a conversation is known")


def messages_of(key: str, value: Any) -> list[Message]:
    """A list of messages, answers or none among them. key: the field, for messages. Raises NoConversationError."""
    if not isinstance(value, list):
        raise NoConversationError(f"field '{key}' holds {type(value).__name__}, not a list of messages")
    return [_message(f"{key}.{number}", entry) for number, entry in enumerate(value)]


def _message(where: str, entry: Any) -> Message:
    if not isinstance(entry, Mapping):
        raise NoConversationError(f"'{where}' holds {type(entry).__name__}, not a message")
    role_key, text_key = ("from", "value") if "from" in entry else ("role", "content")
    role = entry.get(role_key)
    if not isinstance(role, str) or role not in _ROLES:
        raise NoConversationError(f"'{where}.{role_key}' is {str(role)[:40]!r}: the roles are {', '.join(_ROLES)}")
    if entry.get("tool_calls"):
        raise NoConversationError(f"'{where}' calls tools, which no template here shows: leave such messages out")
    try:
        weight = weight_in(f"{where}.weight", entry.get("weight"))
    except ValueError as error:
        raise NoConversationError(str(error)) from None
    if _ROLES[role] != "assistant" and weight not in (0, 1):
        raise NoConversationError(
            f"'{where}.weight' is {weight:g}, and only what the assistant says bears a loss: take it out"
        )
    return Message(_ROLES[role], text_of(f"{where}.{text_key}", entry.get(text_key)), weight)


def text_of(where: str, value: Any) -> str:
    """A message's text; parts of a list are joined as they stand."""
    if isinstance(value, list) and value and all(isinstance(part, Mapping) for part in value):
        if other := next((part.get("type") for part in value if part.get("type") != "text"), None):
            raise NoConversationError(f"'{where}' has a part of type {str(other)[:40]!r}: only text is read")
        value = "".join(text_of(f"{where}.text", part.get("text")) for part in value)
    if not isinstance(value, str):
        raise NoConversationError(f"'{where}' holds {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise NoConversationError(f"'{where}' holds a lone surrogate, or bytes that are not UTF-8: repair it") from None
    return value


def _alpaca(record: Mapping[str, Any]) -> list[Message]:
    instruction, given = text_of("instruction", record["instruction"]), record.get("input")
    asked = instruction if given in (None, "") else f"{instruction}\n\n{text_of('input', given)}"
    before = [] if record.get("system") in (None, "") else [Message("system", text_of("system", record["system"]))]
    return [*before, Message("user", asked), Message("assistant", text_of("output", record.get("output")))]


def _completed(record: Mapping[str, Any]) -> list[Message]:
    key = "completion" if record.get("completion") is not None else "response"
    prompt, completion = record["prompt"], record.get(key)
    if isinstance(prompt, list) or isinstance(completion, list):
        return [*messages_of("prompt", prompt), *messages_of(key, completion)]
    before = [] if record.get("system") in (None, "") else [Message("system", text_of("system", record["system"]))]
    return [*before, Message("user", text_of("prompt", prompt)), Message("assistant", text_of(key, completion))]
