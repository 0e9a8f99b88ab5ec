"""What a check finds: one JSON object a line of results.jsonl, on disk before the next question is asked."""

from __future__ import annotations

import gc
import json
import math
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from weftrain.core.errors import BackendError, OutOfMemoryError
from weftrain.core.formats import fsops

RESULTS = "results.jsonl"
_MOST_CHARACTERS = 400  # of an exception's text


@dataclass(frozen=True)
class Answer:
    """The answer to one question. ok: None if it could not be asked. figures: name with unit -> number, for the table
    of figures. details: whatever else says why.
    """

    ok: bool | None = True
    figures: Mapping[str, float] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """A line of results.jsonl. what: the question; "" for a line about the check itself."""

    check: str
    what: str
    ok: bool | None
    figures: Mapping[str, float]
    details: Mapping[str, Any]
    seconds: float

    def line(self) -> str:
        """JSON without line breaks; what is not finite is its name as text."""
        return json.dumps(_finite(asdict(self)), allow_nan=False)


def read_findings(folder: Path) -> list[Finding]:
    """All of a run's findings, in the order in which they were written. A line that was cut off is passed over."""
    path = folder / RESULTS
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(Finding(**json.loads(line)))
        except (json.JSONDecodeError, TypeError):
            continue
    return found


class Findings:
    """Where one check writes. Several processes append to the same file, a whole line at a time."""

    def __init__(self, folder: Path, check: str, tell: Callable[[str], None] = lambda line: None) -> None:
        self._path, self._check, self._tell = folder / RESULTS, check, tell

    def write(self, what: str, answer: Answer, seconds: float = 0.0) -> None:
        """One finding, synced."""
        found = Finding(self._check, what, answer.ok, answer.figures, answer.details, round(seconds, 2))
        fsops.append_line(self._path, found.line(), sync=True)
        self._tell(in_words(found))

    def ask(self, what: str, question: Callable[[], Answer]) -> None:
        """Write the answer to one question, or how it failed; then the next can be asked."""
        start = time.perf_counter()
        try:
            answer = question()
        except (BackendError, OutOfMemoryError) as error:  # refused in words: too small a device, a missing package
            answer = Answer(None, details={"why": str(error)})
        except Exception as error:  # whatever the code under proof raises is what is looked for
            frames = traceback.extract_tb(error.__traceback__)[-5:]
            answer = Answer(
                False,
                details={
                    "why": f"{type(error).__name__}: {' '.join(str(error).split())[:_MOST_CHARACTERS]}",
                    "where": [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames],
                },
            )
        self.write(what, answer, time.perf_counter() - start)
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def in_words(found: Finding) -> str:
    """A finding as a line for a terminal."""
    sign = {True: "ok  ", False: "BAD ", None: "--  "}[found.ok]
    figures = ", ".join(f"{name} {number(value)}" for name, value in found.figures.items())
    why = str(found.details.get("why", "")) if found.ok is not True else ""
    return f"{sign} {found.check}: {found.what}" + "".join(f"; {text}" for text in (figures, why[:200]) if text)


def number(value: Any) -> str:
    """At most four digits that count."""
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
