"""Texts that a run's model wrote (log.sample_prompts), as the run's page shows them: some steps, newest first.

A file of metrics may be untrusted and long, so few texts are kept: of at most MAX_PROMPTS prompts, at steps that are
about evenly apart, and no more than MAX_CHARACTERS of each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from weftrain.core.run.metrics_lines import MetricsRecord

MAX_PROMPTS = 16  # as a recipe may have
MAX_ROWS = 12  # of the table; twice as many are kept at most while the file is read
MAX_CHARACTERS = 4_000


@dataclass
class Samples:
    """Prompts in the order of the file; rows: step -> prompt -> text, of every `stride`-th step with texts, and the
    newest; steps: at how many steps texts were written.
    """

    prompts: list[str] = field(default_factory=list)
    rows: dict[int, dict[str, str]] = field(default_factory=dict)
    steps: int = 0
    stride: int = 1

    def add(self, record: MetricsRecord) -> None:
        """A record of kind `sample` that counts."""
        step, prompt = record["step"], _cut(record["prompt"])
        if prompt not in self.prompts:
            if len(self.prompts) == MAX_PROMPTS:
                return
            self.prompts.append(prompt)
        if step not in self.rows:
            if self.rows and (self.steps - 1) % self.stride:
                self.rows.popitem()  # it was kept as the newest
            if len(self.rows) == 2 * MAX_ROWS:
                self.rows, self.stride = dict(list(self.rows.items())[::2]), 2 * self.stride
            self.rows[step] = {}
            self.steps += 1
        self.rows[step][prompt] = _cut(record.get("problem") or record["text"])

    def shown(self) -> Iterator[tuple[int, Sequence[str | None]]]:
        """(step, a text or None for each prompt), newest first: the first and the last step, and some between."""
        steps = sorted(self.rows, reverse=True)
        count = min(len(steps), MAX_ROWS)
        for place in range(count):
            step = steps[place * (len(steps) - 1) // max(1, count - 1)]
            yield step, [self.rows[step].get(prompt) for prompt in self.prompts]


def _cut(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]}…"
