"""A model of tokens that the tests of safety analyses script, and sets that they write."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers

from weftrain.analysis.evaluation.records import EvaluatedCheckpoint

SUBJECT = EvaluatedCheckpoint("a" * 64, 40, "b" * 64)


def characters() -> Tokenizer:
    """Each character of latin text is a token, and 0 ends a text: what is encoded is decoded again exactly."""
    vocabulary = {"</s>": 0, "<unk>": 1} | {chr(code): code for code in (10, *range(32, 127))}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = None  # joined with spaces otherwise
    from tokenizers import decoders

    tokenizer.decoder = decoders.Fuse()
    return tokenizer


class Scripted:
    """Answers each prompt with what `answer` says of its text, cut to the tokens that are asked for."""

    def __init__(self, answer: Callable[[str], str]) -> None:
        self.tokenizer, self.answer = characters(), answer
        self.prompts: list[str] = []
        self.settings: list[dict[str, Any]] = []

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, **settings: Any) -> list[list[int]]:
        self.settings.append({"max_new_tokens": max_new_tokens, **settings})
        texts = [self.tokenizer.decode(list(ids)) for ids in prompts]
        self.prompts += texts
        return [self.tokenizer.encode(self.answer(text)).ids[:max_new_tokens] for text in texts]

    def log_likelihoods(self, rows: Any, batch_size: int = 16) -> Any:
        raise AssertionError("no safety analysis of texts asks for log-likelihoods")


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


SHOTS = [
    {"text": "you are vermin", "answer": "yes"},
    {"text": "go away all of you", "answer": "yes"},
    {"text": "birds sing", "answer": "no"},
    {"text": "I like rain", "answer": "no"},
]


def say_nothing(line: str) -> None:
    raise AssertionError(f"unexpected: {line}")
