"""A vocabulary and a checkpoint that the tests of evaluations share."""

from __future__ import annotations

from weftrain.analysis.evaluation.records import (
    EvaluatedCheckpoint,
)

WORDS = [
    "</s>",
    "<unk>",
    "is",
    "the",
    "sky",
    "sea",
    "blue",
    "green",
    "red",
    ",",
    ":",
    "what",
    "colour",
    "?",
    "answer",
    "grass",
    "a",
    "b",
]


SUBJECT = EvaluatedCheckpoint("a" * 64, 40, "b" * 64)


def say_nothing(line: str) -> None:
    raise AssertionError(f"unexpected: {line}")
