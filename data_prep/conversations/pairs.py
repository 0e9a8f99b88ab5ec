"""From a preference to a row: a pair of prompt + answer, or the chosen one alone, each from its own start.

A pair is one row of 2T + 1 tokens that training reads in two pieces of T (data.row_length = 2T): tokens 0..T-1 are the
chosen side, tokens T..2T-1 the rejected one, both padded, and the last is padding. So nothing that orders, skips or
defers rows can separate the two. Only the answer's tokens and the token that ends it bear loss.

What is too long for T tokens is cut as in the released scripts of DPO (arXiv 2305.18290) and so of AmberSafe: if the
prompt and the longer answer do not fit, the prompt is cut to `max_prompt` tokens; if they still do not, each answer is
cut to its first T - max_prompt.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from weftrain.data_prep.choices import KeepPrompt, PreferenceRows, TooLong
from weftrain.data_prep.conversations.encode import ConversationEncoder
from weftrain.data_prep.conversations.messages import Conversation, Message
from weftrain.data_prep.conversations.preferences import Preference
from weftrain.data_prep.conversations.template import ChatTemplate, TemplateError
from weftrain.data_prep.marks import BEGINS, LOSS, PADDING
from weftrain.data_prep.tokens.tokenization import TextEncoder


class PreferenceRow(NamedTuple):
    """ids int64 [n] and marks uint8 [n] (marks.py) of a row. cut_prompt, cut_answers: whether something was cut."""

    ids: np.ndarray
    marks: np.ndarray
    cut_prompt: bool
    cut_answers: bool


class _Side(NamedTuple):
    """Ids int64 of the prompt and of the answer, with the token that ends it."""

    prompt: np.ndarray
    answer: np.ndarray


@dataclass(frozen=True)
class PreferenceEncoder:
    """template: None: prompt and answer are joined as texts, with the dataset's start and end token. width: T."""

    encoder: TextEncoder
    template: ChatTemplate | None
    rows: PreferenceRows
    width: int
    max_prompt: int
    keep_prompt: KeepPrompt
    too_long: TooLong

    def encode(self, pair: Preference) -> PreferenceRow:
        """The row of a pair. Raises TemplateError where there is nothing to learn, with why."""
        chosen = self._side(pair, pair.chosen, 1)
        others = [] if self.rows == "chosen" else [self._side(pair, pair.rejected, 2)]
        sides = [chosen, *others]
        longest = max(len(side.answer) for side in sides)
        needed = max(len(side.prompt) for side in sides) + longest
        cut_prompt = cut_answers = False
        if needed > self.width:
            if self.too_long == "drop":
                raise TemplateError(f"is {needed:,} tokens long, and a side of a row has {self.width:,}")
            cut_prompt = any(len(side.prompt) > self.max_prompt for side in sides)
            sides = [_Side(self._cut(side.prompt), side.answer) for side in sides]
            if max(len(side.prompt) for side in sides) + longest > self.width:
                most, cut_answers = self.width - self.max_prompt, True
                sides = [_Side(side.prompt, side.answer[:most]) for side in sides]
        if len(sides) > 1 and np.array_equal(sides[0].answer, sides[1].answer):
            raise TemplateError("has answers whose tokens are identical as far as they fit in a row")
        laid = [self._laid(side) for side in sides]
        # the last token of a row is no input, so each row has one more than its inputs
        ids = [*(part for part, _ in laid), np.array([self._padding])]
        marks = [*(part for _, part in laid), np.array([PADDING], np.uint8)]
        return PreferenceRow(np.concatenate(ids), np.concatenate(marks), cut_prompt, cut_answers)

    def _side(self, pair: Preference, answer: str, place: int) -> _Side:
        """place: of the answer in pair.raw."""
        if self.template is None:
            return self._raw(pair, place)
        [whole] = self._conversations.encode(Conversation((*pair.prompt, Message("assistant", answer))))
        bears = np.flatnonzero(whole.loss)
        begin, end = int(bears[0]), int(bears[-1]) + 1
        if not begin:
            raise TemplateError("has no token before its answer: its template writes no prompt")
        return _Side(whole.ids[:begin], whole.ids[begin:end])

    def _raw(self, pair: Preference, place: int) -> _Side:
        if pair.raw is None:
            raise TemplateError("holds messages, which are written by a chat template: name one with --chat-template")
        prompt, answer = (self._ids(pair.raw[number]) for number in (0, place))
        before, after = self.encoder.around()
        prompt = np.concatenate([before, prompt])
        if not len(prompt):
            raise TemplateError("has an empty prompt, and no start token stands before the answer: name it with --bos")
        return _Side(prompt, np.concatenate([answer, after]))

    def _ids(self, text: str) -> np.ndarray:
        [ids] = self.encoder.encode_each([text], ["the text"])
        if isinstance(ids, str):
            raise TemplateError(ids)
        return ids.astype(np.int64)

    def _cut(self, prompt: np.ndarray) -> np.ndarray:
        return prompt[-self.max_prompt :] if self.keep_prompt == "end" else prompt[: self.max_prompt]

    def _laid(self, side: _Side) -> tuple[np.ndarray, np.ndarray]:
        """A side's ids int64 [T] and marks uint8 [T]."""
        ids = np.full(self.width, self._padding, np.int64)
        marks = np.full(self.width, PADDING, np.uint8)
        start, stop = len(side.prompt), len(side.prompt) + len(side.answer)
        ids[:start], ids[start:stop] = side.prompt, side.answer
        marks[:start], marks[start:stop] = 0, LOSS
        marks[0] = BEGINS
        return ids, marks

    @property
    def _padding(self) -> int:
        return self.encoder.markers.separator

    @functools.cached_property
    def _conversations(self) -> ConversationEncoder:
        assert self.template is not None
        return ConversationEncoder(self.encoder, self.template, "last")
