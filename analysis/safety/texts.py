"""Text in, text out: what the safety analyses need of a checkpoint, and the scores of samples that they report."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from weftrain.analysis.evaluation.continuation import TokenModel, derived_seed
from weftrain.analysis.evaluation.records import EvaluationRecord, score_fields
from weftrain.core.errors import DataError

ROWS_A_CALL = 256  # prompts continued between two words of progress; constant, since sampled rows depend on it

Progress = Callable[[int, int, str], None]  # done, of how many, what


@dataclass(frozen=True)
class Decoding:
    """temperature 0: greedy. max_prompt_tokens: longer prompts are cut; top_p: of sampling alone."""

    max_new_tokens: int
    max_prompt_tokens: int
    temperature: float = 0.0
    top_p: float | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "kind": "generate",
            "max_new_tokens": self.max_new_tokens,
            "max_prompt_tokens": self.max_prompt_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
        }


@dataclass(frozen=True)
class TextModel:
    """A checkpoint with its tokenizer. open_model: called when something is to be generated. max_length: positions."""

    open_model: Callable[[], TokenModel]
    tokenizer: Tokenizer
    eos_id: int
    max_length: int
    batch_size: int = 16
    seed: int = 0
    report: Progress = lambda done, total, what: None

    def room(self, decoding: Decoding) -> int:
        """Tokens that a prompt may have. Raises DataError where there is no room for one."""
        room = min(decoding.max_prompt_tokens, self.max_length - decoding.max_new_tokens)
        if room < 1:
            raise DataError(
                f"the model's {self.max_length} positions leave no room for a prompt and {decoding.max_new_tokens} "
                "new tokens: this analysis needs a longer model"
            )
        return room

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text).ids
        return ids or [self.eos_id]

    def continued(self, prompts: Sequence[Sequence[int]], decoding: Decoding, what: str) -> list[str]:
        """The text that follows each prompt, without special tokens. what: names the set, and is part of the seed."""
        model, texts = self.open_model(), []
        for first in range(0, len(prompts), ROWS_A_CALL):
            part = prompts[first : first + ROWS_A_CALL]
            rows = model.generate(
                part,
                decoding.max_new_tokens,
                temperature=decoding.temperature,
                top_p=decoding.top_p,
                seed=derived_seed(self.seed, what, first),
                stop_ids=(self.eos_id,),
                batch_size=self.batch_size,
            )
            for ids, row in zip(part, rows, strict=True):
                before = str(self.tokenizer.decode(list(ids)))
                texts.append(str(self.tokenizer.decode([*ids, *row]))[len(before) :])
            self.report(first + len(part), len(prompts), what)
        return texts


def cut_from_left(ids: Sequence[int], room: int) -> tuple[list[int], bool]:
    """The last `room` tokens of a prompt, and whether that left any out."""
    return list(ids[-room:]), len(ids) > room


def share_fields(count: int, samples: int, name: str) -> EvaluationRecord:
    """The fields of a share of samples, with the standard error of a mean of zeros and ones."""
    share = count / samples
    stderr = math.sqrt(share * (1 - share) / (samples - 1)) if samples > 1 else None
    return score_fields(share, stderr, name)


def mean_fields(values: Sequence[float], name: str) -> EvaluationRecord:
    """The fields of a mean, with its standard error."""
    stderr = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return score_fields(statistics.fmean(values), stderr, name)


def record_fields(
    name: str,
    version: str,
    metric: str,
    metrics: dict[str, EvaluationRecord],
    samples: int,
    available: int,
    decoding: Decoding,
    shots: int = 0,
) -> EvaluationRecord:
    """The fields that every safety record has. metric: the one of `metrics` that stands for it in tables."""
    return {
        "task": name,
        "task_version": version,
        "shots": shots,
        "metric": metric,
        **metrics[metric],
        "metrics": metrics,
        "samples": samples,
        "samples_available": available,
        "decoding": decoding.as_json(),
    }
