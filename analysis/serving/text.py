"""Token ids to text as they come: what can no longer change is given out, and a stop word ends it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_CONTEXT = 8  # tokens before the first one, which decide how it is spelled: a space, or the rest of a character
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text that follows `before`, from its tokens. decode: ids to text, control tokens spelled out. stops: words of
    which the first that appears ends the text, and is not part of it. strip: without white space at its beginning,
    which many templates and tokenizers put before an answer.

    A text that ends in the middle of a character, or could be the beginning of a stop word, is held back.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        before: Sequence[int] = (),
        stops: Sequence[str] = (),
        strip: bool = False,
    ) -> None:
        self._decode, self._stops, self._strip = decode, tuple(stops), strip
        self._ids = list(before[-_CONTEXT:])
        self._from, self._spelled = 0, len(self._ids)  # ids[from:spelled] is context whose text was given out
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """What this token adds to the text; "" where nothing is certain, or the text has ended."""
        if self.stopped:
            return ""
        self._ids.append(token)
        return self._out(self._spell(whole=False), whole=False)

    def end(self) -> str:
        """What was held back."""
        return "" if self.stopped else self._out(self._spell(whole=True), whole=True)

    def _spell(self, whole: bool) -> str:
        """The text of the ids since the last call; context and new ids are decoded together."""
        known = self._decode(self._ids[self._from : self._spelled])
        text = self._decode(self._ids[self._from :])
        if text.endswith(_UNFINISHED) and not whole:
            return ""
        self._from, self._spelled = self._spelled, len(self._ids)
        return text[len(known) :]

    def _out(self, text: str, whole: bool) -> str:
        if self._strip:
            text = text.lstrip()
            self._strip = not text
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.stopped = True
            return self._held[: min(places)]
        kept = 0 if whole else max((_overlap(self._held, stop) for stop in self._stops), default=0)
        out, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return out


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` with which `stop` begins."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[len(text) - length :]):
            return length
    return 0
