"""Preferences in the forms that they are published in: a prompt, the answer that was chosen, and the one rejected.

| form           | fields                                                                                          |
|----------------|-------------------------------------------------------------------------------------------------|
| texts          | `prompt`, `chosen`, `rejected`, and perhaps `system`                                            |
| messages       | `chosen` and `rejected`: lists of {role, content}, whole conversations or what follows `prompt` |
| Anthropic-HH   | `chosen` and `rejected`: texts with `\\n\\nHuman:` and `\\n\\nAssistant:` before each turn         |
| PKU-SafeRLHF   | `prompt`, `response_0`, `response_1`, `is_response_0_safe`, `is_response_1_safe`                |

The two conversations of a pair are equal up to their last answers. Of PKU-SafeRLHF the safe answer is chosen, and pairs
whose answers are both safe or both unsafe say nothing: they are left out and counted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weftrain.core.formats.canonical import canonical_json
from weftrain.data_prep.conversations.messages import (
    MAX_MESSAGES,
    Message,
    NoConversationError,
    is_answer,
    messages_of,
    text_of,
)

FIELDS = ("chosen", "response_0")  # by which a record is known to hold a preference
_SAFE = ("is_response_0_safe", "is_response_1_safe")
_COLUMNS = ("prompt", "chosen", "rejected", "system", "response_0", "response_1", *_SAFE)  # all that are read
_TURN = re.compile("\n\n(Human|Assistant):")


@dataclass(frozen=True)
class Preference:
    """prompt: messages up to the answers. raw: prompt and answers as texts to be joined, where a record holds texts."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    raw: tuple[str, str, str] | None

    @property
    def identity(self) -> str:
        """One text for all that is read, so that equal pairs are duplicates."""
        return canonical_json([self.prompt_identity, self.chosen, self.rejected]).decode()

    @property
    def prompt_identity(self) -> str:
        """One text for the prompt: all pairs of a prompt are on the same side of the held-out split."""
        return canonical_json([[message.role, message.content] for message in self.prompt]).decode()


@dataclass(frozen=True)
class NoPreference:
    """A record whose two answers are equally good: it is no failure, and nothing can be learned from it."""

    identity: str


def preference_columns(names: Sequence[str]) -> list[str]:
    """Which columns of a table are read. Raises NoConversationError if none can hold a preference."""
    if not any(name in FIELDS for name in names):
        raise NoConversationError(f"has no column {' or '.join(FIELDS)}")
    return [name for name in names if name in _COLUMNS]


def preference_of(record: Mapping[str, Any]) -> Preference | NoPreference:
    """The preference of a record. Raises NoConversationError."""
    if record.get("response_0") is not None:
        return _safety(record)
    if record.get("chosen") is None and record.get("rejected") is None:
        names = ", ".join(map(repr, list(record)[:8])) or "nothing"
        raise NoConversationError(f"holds {names}, and neither {' nor '.join(FIELDS)}, by which a preference is known")
    for key in ("chosen", "rejected"):
        if record.get(key) is None:
            raise NoConversationError(f"has no {key} answer: field '{key}' is missing")
    if isinstance(record["chosen"], list) or isinstance(record["rejected"], list):
        return _of_messages(record)
    if record.get("prompt") is None:
        return _of_transcripts(record)
    return _of_texts(record, *(text_of(key, record[key]) for key in ("chosen", "rejected")))


def _safety(record: Mapping[str, Any]) -> Preference | NoPreference:
    """Of PKU-SafeRLHF."""
    answers = [text_of(key, record.get(key)) for key in ("response_0", "response_1")]
    safe = [record.get(key) for key in _SAFE]
    for key, value in zip(_SAFE, safe, strict=True):
        if not isinstance(value, bool):
            raise NoConversationError(f"field '{key}' holds {type(value).__name__}, not whether that answer is safe")
    if safe[0] == safe[1]:
        prompt = text_of("prompt", record.get("prompt"))
        return NoPreference(canonical_json([prompt, *answers, *safe]).decode())
    return _of_texts(record, *(answers if safe[0] else answers[::-1]))


def _of_texts(record: Mapping[str, Any], chosen: str, rejected: str) -> Preference:
    before = _system(record)
    if isinstance(record.get("prompt"), list):
        return _checked([*before, *_messages("prompt", record["prompt"])], chosen, rejected, None)
    prompt = text_of("prompt", record.get("prompt"))
    raw = None if before else (prompt, chosen, rejected)
    return _checked([*before, Message("user", prompt)], chosen, rejected, raw)


def _of_messages(record: Mapping[str, Any]) -> Preference:
    """Lists of messages: what follows `prompt`, or whole conversations, of which `prompt` may repeat the beginning."""
    sides = [_messages(key, record[key]) for key in ("chosen", "rejected")]
    prompt = record.get("prompt")
    for key, side in zip(("chosen", "rejected"), sides, strict=True):
        if not side:
            raise NoConversationError(f"has no {key} answer: '{key}' is an empty list")
    before, given = _system(record), []
    if prompt is not None:
        given = [Message("user", prompt)] if isinstance(prompt, str) else _messages("prompt", prompt)
    if given and all(side[0].role == "assistant" for side in sides):
        sides = [[*given, *side] for side in sides]
    elif given and given not in (
        sides[0][: len(given)],
        sides[0][1 : len(given) + 1],
    ):  # perhaps after a system message
        raise NoConversationError("'prompt' is not the beginning of 'chosen': take one of them out")
    shared, chosen, rejected = sides[0][:-1], sides[0][-1], sides[1][-1]
    if shared != sides[1][:-1]:
        raise NoConversationError("'chosen' and 'rejected' differ before their last messages: split the conversation")
    if not chosen.role == rejected.role == "assistant":
        raise NoConversationError("'chosen' and 'rejected' do not both end with an answer of the assistant")
    return _checked([*before, *shared], chosen.content, rejected.content, None)


def _of_transcripts(record: Mapping[str, Any]) -> Preference:
    """Anthropic's texts: the prompt goes up to the last `Assistant:`, which both share."""
    texts = [text_of(key, record[key]) for key in ("chosen", "rejected")]
    prompts, answers = [], []
    for key, text in zip(("chosen", "rejected"), texts, strict=True):
        turns = list(_TURN.finditer(text))
        if not turns or turns[-1][1] != "Assistant":
            raise NoConversationError(f"has no 'prompt', and '{key}' does not end with a turn '\\n\\nAssistant:'")
        prompts.append(text[: turns[-1].end()])
        answers.append(text[turns[-1].end() :])
    if prompts[0] != prompts[1]:
        raise NoConversationError("'chosen' and 'rejected' differ before their last turns: split the conversation")
    turns = list(_TURN.finditer(prompts[0]))
    ends = [turn.start() for turn in turns[1:]]
    messages = [
        Message("user" if turn[1] == "Human" else "assistant", prompts[0][turn.end() : end].strip())
        for turn, end in zip(turns[:-1], ends, strict=True)
    ]
    chosen, rejected = answers
    return _checked(messages, chosen.strip(), rejected.strip(), (prompts[0], chosen, rejected))


def _messages(key: str, value: Any) -> list[Message]:
    """A list of messages, none of which weighs anything in a comparison of two answers."""
    found = messages_of(key, value)
    if any(message.role == "assistant" and message.weight != 1 for message in found):
        raise NoConversationError(f"'{key}' has an answer with a weight, and preferences have none: take it out")
    return [message._replace(weight=1.0) for message in found]


def _system(record: Mapping[str, Any]) -> list[Message]:
    given = record.get("system")
    return [] if given in (None, "") else [Message("system", text_of("system", given))]


def _checked(prompt: list[Message], chosen: str, rejected: str, raw: tuple[str, str, str] | None) -> Preference:
    """Raises NoConversationError for a pair that prefers nothing."""
    if len(prompt) > MAX_MESSAGES:
        raise NoConversationError(f"has {len(prompt):,} messages, and at most {MAX_MESSAGES:,} are read: split it")
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not is_answer(Message("assistant", answer)):
            raise NoConversationError(f"has no {name} answer: it is empty or white space")
    if chosen == rejected:
        raise NoConversationError("has identical answers: nothing is preferred")
    if not prompt:
        raise NoConversationError("has no prompt before its answers")
    return Preference(tuple(prompt), chosen, rejected, raw)
