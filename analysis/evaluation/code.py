"""pass@k of a checkpoint on a file of programming problems, as a record beside those of tasks.

A program is `prompt + completion`, and white space between the two is Python. Many tokenizers, Llama's among them, drop
the first space of what they decode, so a completion is the decoded whole minus the decoded prompt.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from weftrain.analysis.evaluation.continuation import TokenModel, continue_in_pieces, derived_seed
from weftrain.analysis.evaluation.pass_at_k import PassAtK, pass_at_k, read_problems, score
from weftrain.analysis.evaluation.records import (
    EvaluatedCheckpoint,
    EvaluationRecord,
    EvaluationSettings,
    Say,
    inputs_of,
    once,
)
from weftrain.analysis.evaluation.sandbox import SandboxLimits
from weftrain.analysis.evaluation.sandbox_judge import JUDGE
from weftrain.core.errors import DataError
from weftrain.core.formats import fsops


@dataclass(frozen=True)
class CodeSettings:
    """How programs are written: `samples` for each problem, pass@k for each of ks. temperature 0: greedy."""

    samples: int = 1
    ks: tuple[int, ...] = (1,)
    temperature: float = 0.0
    top_p: float | None = None
    max_new_tokens: int = 512

    def __post_init__(self) -> None:
        """Raises DataError for settings that contradict each other."""
        if not self.ks or not all(1 <= k <= self.samples for k in self.ks):
            raise DataError(
                f"--k {', '.join(map(str, self.ks))}: each must lie in 1..{self.samples}, the --samples of each problem"
            )
        if self.temperature == 0 and self.samples > 1:
            raise DataError(
                f"--samples {self.samples}: greedy programs are all the same; set --temperature above 0, 0.2 for one"
            )


def run_code(
    path: Path,
    code: CodeSettings,
    subject: EvaluatedCheckpoint,
    settings: EvaluationSettings,
    tokenizer: Tokenizer,
    eos_id: int,
    max_length: int,
    open_model: Callable[[], TokenModel],
    folder: Path,
    say: Say = print,
    progress: Callable[[int, int], None] | None = None,
) -> EvaluationRecord:
    """The record of a file of problems (pass_at_k.read_problems); settings.limit: only the first problems.

    max_length: positions of the model. open_model: called when something is to be generated. Raises DataError, and
    SandboxError where programs cannot be confined, before any is generated.
    """
    if code.max_new_tokens >= max_length:
        raise DataError(
            f"--max-new-tokens {code.max_new_tokens} leaves no room for a problem in the model's {max_length} "
            "positions: lower it"
        )
    problems = read_problems(path)
    limits = SandboxLimits()
    settled = asdict(code) | {"ks": sorted(set(code.ks))}
    own: dict[str, Any] = {"problems": path.stem, "problems_sha256": fsops.sha256_file(path)}
    own |= {"code": settled, "sandbox": asdict(limits), "judge": JUDGE}

    def measure() -> EvaluationRecord:
        chosen = problems[: settings.limit]
        stops = {problem.prompt: problem.stops for problem in chosen}

        def complete(prompt: str, samples: int) -> list[str]:
            return _completions(
                open_model(), tokenizer, eos_id, max_length, prompt, stops[prompt], samples, code, settings
            )

        report = score(chosen, complete, code.samples, code.ks, limits, progress)
        metrics = {f"pass@{k}": _metric(report, k) for k in report.pass_at_k_percent}
        metric = f"pass@{min(report.pass_at_k_percent)}"
        return {
            "task": path.stem,
            "task_version": own["problems_sha256"],
            "shots": 0,
            "metric": metric,
            **metrics[metric],
            "metrics": metrics,
            "samples": len(chosen),
            "samples_available": len(problems),
            "decoding": {"kind": "generate", **settled},
            "report": report.as_json(),
        }

    return once(folder, inputs_of("code", subject, settings) | own, path.stem, measure, say)


def _metric(report: PassAtK, k: int) -> EvaluationRecord:
    """pass@k as a share and in percent, each with the standard error of a mean over problems."""
    percent = report.pass_at_k_percent[k]
    each = [100 * pass_at_k(one.samples, one.correct, k) for one in report.problems]
    error = statistics.stdev(each) / math.sqrt(len(each)) if len(each) > 1 else None
    shares = {"value": percent / 100, "stderr": None if error is None else error / 100}
    return {**shares, "value_percent": percent, "stderr_percent": error}


def _completions(
    model: TokenModel,
    tokenizer: Tokenizer,
    eos_id: int,
    max_length: int,
    prompt: str,
    stops: Sequence[str],
    samples: int,
    code: CodeSettings,
    settings: EvaluationSettings,
) -> list[str]:
    """`samples` texts that follow a prompt, which is cut from the left where it leaves no room."""
    ids: list[int] = tokenizer.encode(prompt).ids[-(max_length - code.max_new_tokens) :] or [eos_id]
    before = str(tokenizer.decode(ids))

    def text(row: Sequence[int]) -> str:
        return str(tokenizer.decode([*ids, *row]))[len(before) :]

    rows = continue_in_pieces(
        model,
        [ids] * samples,
        code.max_new_tokens,
        lambda _, row: any(stop in text(row) for stop in stops),
        stop_ids=(eos_id,),
        batch_size=settings.batch_size,
        temperature=code.temperature,
        top_p=code.top_p,
        seed=derived_seed(settings.seed, prompt),
    )
    return [text(row) for row in rows]
