"""From a conversation to token ids and to what of them bears loss.

The template's text is encoded as a whole, as a tokenizer does it, so that ids do not depend on where an answer begins.
A token bears loss if one of its characters was written by the assistant, or if it is the control token that ends the
answer. Control tokens are looked for in the template's own text only: there each is replaced by an alias that nothing
else can spell, and the tokenizer knows the aliases alone.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer

from weftrain.core.errors import DataError, one_line
from weftrain.data_prep.choices import Loss, TooLong
from weftrain.data_prep.conversations.messages import Conversation, Message, is_answer
from weftrain.data_prep.conversations.template import BEGIN, BREAK, END, ChatTemplate, TemplateError
from weftrain.data_prep.tokens.tokenization import TextEncoder

_OPEN, _CLOSE = "\ufdd3", "\ufdd4"  # around the name of a control token: its alias
_ALIAS = re.compile(f"{_OPEN}([^{_CLOSE}]*){_CLOSE}")
_TO_ALIGN = re.compile(f"[{BEGIN}{END}{BREAK}]")
_BEHIND = re.compile(rf"\s*{_OPEN}([^{_CLOSE}]*){_CLOSE}")


@dataclass(frozen=True)
class Encoded:
    """Ids, loss mask and weights of a row or of a part of one: ids int64 [n], loss bool [n], weights float32 [n], 1
    where there is no loss, or None if all are 1. cut: it lost its end.
    """

    ids: np.ndarray
    loss: np.ndarray
    weights: np.ndarray | None = None
    cut: bool = False


@dataclass(frozen=True)
class ConversationEncoder:
    """Encodes conversations for rows of `width` tokens; None: they may be of any length."""

    encoder: TextEncoder
    template: ChatTemplate
    loss: Loss = "answers"
    too_long: TooLong = "cut"
    width: int | None = None

    def encode(self, conversation: Conversation) -> list[Encoded]:
        """One or, if it is divided, several parts. Raises TemplateError where there is nothing to learn, with why."""
        whole = self._encoded(conversation.messages)
        if self.width is None or len(whole.ids) <= self.width:
            return [_to_learn(whole)]
        if self.too_long == "drop":
            raise TemplateError(f"is {len(whole.ids):,} tokens long, and a row has {self.width:,}")
        if self.too_long == "cut":
            return [self._cut(whole)]
        parts = self._parts(conversation.messages)
        # a part of which every answer has the weight 0 is left out
        return [self._cut(part) for part in [one for one in parts if one.loss[1:].any()] or parts]

    def prompt(self, messages: Sequence[Message]) -> np.ndarray:
        """The ids [n] of a conversation up to where the next answer begins. Raises TemplateError."""
        return self._of_text(self.template.prompt(messages, self._names.special, self._names.spelled), ()).ids

    def _parts(self, messages: Sequence[Message]) -> list[Encoded]:
        """The conversation cut before questions that follow an answer, each part as long as fits in a row. What follows
        the last answer is left out; a part whose only turn is too long comes whole.
        """
        assert self.width is not None
        first = int(messages[0].role == "system")
        last = max(place for place, message in enumerate(messages) if is_answer(message))
        system, turns = messages[:first], messages[first : last + 1]
        begins = [
            place
            for place, message in enumerate(turns)
            if place and message.role == "user" and turns[place - 1].role == "assistant"
        ]
        parts: list[Encoded] = []
        start, before, held = 0, 0, None
        for stop in (*begins, len(turns)):
            longer = self._encoded([*system, *turns[start:stop]])
            if held is not None and len(longer.ids) > self.width:
                parts.append(held)
                start = before
                longer = self._encoded([*system, *turns[start:stop]])
            held, before = longer, stop
        return parts if held is None else [*parts, held]

    def _cut(self, whole: Encoded) -> Encoded:
        if self.width is None or len(whole.ids) <= self.width:
            return _to_learn(whole)
        weights = None if whole.weights is None else whole.weights[: self.width]
        kept = Encoded(whole.ids[: self.width], whole.loss[: self.width], weights, cut=True)
        if not kept.loss[1:].any():
            raise TemplateError(
                f"is {len(whole.ids):,} tokens long, and the first {self.width:,}, which fit in a row, hold nothing of "
                "an answer"
            )
        return kept

    def _encoded(self, messages: Sequence[Message]) -> Encoded:
        rendered = self.template.render(messages, self._names.special, self._names.spelled)
        answers = sum(map(is_answer, messages))
        found = rendered.count(BEGIN)
        if rendered.count(END) != found or (found != answers and not self.template.marks_answers) or not found:
            raise TemplateError(
                f"has {answers} answers, and its template shows {min(found, rendered.count(END))} of them whole"
            )
        return self._of_text(rendered, messages)

    def _of_text(self, rendered: str, messages: Sequence[Message]) -> Encoded:
        """Ids of a rendered text with marks."""
        text, answers = self._aligned(rendered)
        encoding = self._names.tokenizer.encode(text, add_special_tokens=False)
        ids = self._names.original[np.array(encoding.ids, np.int64)]
        places = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        self._check_ids(ids, places, text)
        if self.loss == "all":
            if any(message.weight != 1 for message in messages):
                raise TemplateError("has weights, and with --loss all every token bears loss: leave one of them out")
            return Encoded(ids, np.ones(len(ids), bool))
        weighted = any(message.weight != 1 for message in messages if message.role == "assistant")
        each = self._weights(messages, len(answers)) if weighted else [1.0] * len(answers)
        loss, weights = np.zeros(len(ids), bool), np.ones(len(ids), np.float32)
        chosen = list(zip(answers, each, strict=True))
        for (begin, end), weight in chosen[-1:] if self.loss == "last" else chosen:
            if weight:
                touched = (places[:, 0] < end) & (places[:, 1] > begin)
                loss |= touched
                weights[touched] = weight
        return Encoded(ids, loss, None if (weights == 1).all() else weights)

    def _weights(self, messages: Sequence[Message], answers: int) -> list[float]:
        """The weight of each answer, in the order in which the template writes them. Raises TemplateError."""
        said = [message for message in messages if message.role == "assistant"]
        if not self.template.marks_answers:
            said = [message for message in said if is_answer(message)]
        if len(said) != answers:
            raise TemplateError(
                f"has weights, and {len(said)} messages of the assistant, of which its template marks {answers} parts: "
                "which weight is whose cannot be told"
            )
        return [message.weight for message in said]

    def _aligned(self, rendered: str) -> tuple[str, list[tuple[int, int]]]:
        """The text to encode, without marks and with aliases, and the answers [begin, end) in it."""
        aliased = self._names.spelled.sub(lambda found: f"{_OPEN}{found[0]}{_CLOSE}", rendered)
        pieces, length, place = [], 0, 0
        begins, answers = [], []
        for mark in _TO_ALIGN.finditer(aliased):
            piece = aliased[place : mark.start()]
            pieces.append(piece)
            length, place = length + len(piece), mark.end()
            if mark[0] == BEGIN:
                begins.append(length)
            elif mark[0] == END and begins:
                answers.append((begins.pop(), length))
        text = "".join([*pieces, aliased[place:]])
        if self.template.marks_answers:
            return text, answers
        return text, [(begin, self._turn_end(text, end)) for begin, end in answers]

    def _turn_end(self, text: str, end: int) -> int:
        """Where an answer ends with the control token right behind it, if that is one which ends answers."""
        behind = _BEHIND.match(text, end)
        if behind is None or (self.template.turn_end and behind[1] not in self.template.turn_end):
            return end
        return behind.end()

    def _check_ids(self, ids: np.ndarray, places: np.ndarray, text: str) -> None:
        """Every control id must be the template's own. Raises TemplateError."""
        aliases = sum(1 for _ in _ALIAS.finditer(text))
        if int(np.isin(ids, self.encoder.control_ids).sum()) != aliases:
            raise TemplateError("has text that the tokenizer turns into a control token: it cannot be spelled as text")
        if (ids == self._names.unspelled).any():
            raise TemplateError("has text that the tokenizer's vocabulary cannot spell")

    @functools.cached_property
    def _names(self) -> _ControlNames:
        return control_names(self.encoder, self.template.turn_end)


@dataclass(frozen=True)
class _ControlNames:
    """tokenizer: with aliases in place of control tokens. original: int64, its ids -> those of the tokenizer.json.
    spelled: the names of control tokens. special: `bos_token` and others. unspelled: an id for what has none.
    """

    tokenizer: Tokenizer
    original: np.ndarray
    spelled: re.Pattern[str]
    special: dict[str, str]
    unspelled: int


def control_names(encoder: TextEncoder, turn_end: Sequence[str]) -> _ControlNames:
    """Of a tokenizer. Raises DataError for a `turn_end` that is no control token of it."""
    names = dict(zip(encoder.names_of(encoder.control_ids.tolist()), encoder.control_ids.tolist(), strict=True))
    if unknown := [name for name in turn_end if name not in names]:
        raise DataError(f"--turn-end {unknown[0]}: is no control token of the tokenizer; there is {', '.join(names)}")
    tree = encoder.tree
    added = {token["content"]: token for token in tree.get("added_tokens") or ()}
    # An unknown token's name is text, too, and has no alias: no template writes it.
    taken_out = {*names.values(), encoder.unknown_id}
    tree = tree | {"added_tokens": [token for token in added.values() if token["id"] not in taken_out]}
    try:
        tokenizer = Tokenizer.from_str(json.dumps(tree))
    except Exception as error:  # the library's own kinds
        raise DataError(f"the tokenizer cannot be used for conversations: {one_line(error)}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    aliases = {name: f"{_OPEN}{name}{_CLOSE}" for name in names}
    tokenizer.add_special_tokens([_alias(added.get(name), alias) for name, alias in aliases.items()])
    original = np.arange(max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1, dtype=np.int64)
    for index, token in tokenizer.get_added_tokens_decoder().items():  # numbered anew where some were taken out
        found = _ALIAS.fullmatch(token.content)
        original[index] = added[token.content]["id"] if found is None else names[found[1]]
    spelled = re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or "(?!)")
    return _ControlNames(tokenizer, original, spelled, _special(encoder, names), encoder.vocab_size)


def _alias(token: dict[str, Any] | None, alias: str) -> AddedToken:
    """An added token with the flags of the one that it stands for."""
    flags = {} if token is None else {key: token[key] for key in ("lstrip", "rstrip", "single_word")}
    return AddedToken(alias, normalized=False, special=True, **flags)


def _special(encoder: TextEncoder, names: dict[str, int]) -> dict[str, str]:
    """What templates call by name. The start token is the dataset's, else LLaMA's if the tokenizer has it."""
    markers = encoder.markers
    start = "<s>" if "<s>" in names else ""
    if markers.bos is not None:
        start = encoder.names_of([markers.bos])[0]
    end = "" if markers.eos is None else encoder.names_of([markers.eos])[0]
    return {"bos_token": start, "eos_token": end, "pad_token": end}


def _to_learn(whole: Encoded) -> Encoded:
    """Raises TemplateError where no label bears loss; a row's first token is none."""
    if not whole.loss[1:].any():
        raise TemplateError("has no token that bears loss")
    return whole
