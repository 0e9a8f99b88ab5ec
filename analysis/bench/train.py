"""Training throughput on fixed random rows as one RESULT line, and a comparison with any program that prints one.

Programs are interleaved (A B A B ...), each round in processes of its own, and the result is the ratio, since the clock
of a machine drifts. Both start from the same weights and rows, so the losses show whether they trained the same model.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from weftrain.analysis.bench.report import BenchReport, BenchRound
from weftrain.core.backend import Run
from weftrain.core.config import Recipe
from weftrain.core.errors import WeftrainError
from weftrain.core.model_config import ModelConfig
from weftrain.core.order.batch import BatchSource
from weftrain.core.order.synthetic import SyntheticSource, uniform_reference
from weftrain.kernels.host_memory import peak_resident_bytes

RESULT_PREFIX = "RESULT "
REQUIRED = ("name", "tokens_per_second", "step_ms", "loss_first", "loss_last")


def _number(value: Any) -> bool:
    return type(value) in (int, float)


def _positive(value: Any) -> bool:
    return _number(value) and 0 < value < math.inf


def _list_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and bool(value) and all(map(check, value))


# What a RESULT line may hold beside other keys, each with its check and the check in words.
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "name": (lambda value: isinstance(value, str) and bool(value), "a text"),
    "tokens_per_second": (_positive, "a number above 0"),
    "step_ms": (_positive, "a number above 0"),
    "loss_first": (_number, "a number"),
    "loss_last": (_number, "a number"),
    "losses": (_list_of(_number), "the loss of each step, from the first"),
    "last_step": (
        lambda value: type(value) is int and value >= 1,
        "the number of the step, from 1, that loss_last is of",
    ),
    "step_times_ms": (_list_of(_positive), "numbers above 0, one for each counted step"),
}


class BenchError(WeftrainError):
    """A program under comparison that failed or printed no valid RESULT line."""


def bench_source(recipe: Recipe, seed: int = 0) -> SyntheticSource:
    """Rows from torch.randint with manual_seed(seed): two batches unless the recipe sets synthetic_rows."""
    generator = torch.Generator().manual_seed(seed)
    rows = recipe.data.synthetic_rows or 2 * recipe.batch.global_batch_size
    ids = torch.randint(0, recipe.model.vocab_size, (rows, recipe.data.sequence_length + 1), generator=generator)
    reference = None
    if recipe.objective.name == "dpo":
        reference = uniform_reference(rows, recipe.data.sequence_length, recipe.model.vocab_size)
    return SyntheticSource(ids.numpy(), recipe.batch.global_batch_size, reference=reference)


def plain_weights(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor] | None:
    """The weights that an ordinary LLaMA-like torch.nn program of this shape has after torch.manual_seed(seed).

    Such a program builds nn.Embedding, then per layer nn.Linear q-k-v in one, o, gate, up and down, then the head, each
    drawing its default initialization, and then redraws every matrix, in that order, from N(0, std). None for a model
    that is not LLaMA-like.
    """
    given = config.initialization
    if given is None or given.distribution != "normal":
        return None
    if config.linear_bias or config.tie_embeddings or config.norm != "rms_norm" or config.later_fields():
        return None
    hidden, inner = config.hidden_size, config.intermediate_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        modules: dict[str, nn.Module] = {"embedding": nn.Embedding(config.vocab_size, hidden)}
        for layer in range(config.num_layers):
            shapes = {"attention.qkv": (hidden, 3 * hidden), "attention.o_proj": (hidden, hidden)}
            shapes |= {
                "ffn.gate_proj": (hidden, inner),
                "ffn.up_proj": (hidden, inner),
                "ffn.down_proj": (inner, hidden),
            }
            for name, (inputs, outputs) in shapes.items():
                modules[f"layers.{layer}.{name}"] = nn.Linear(inputs, outputs, bias=False)
        modules["head"] = nn.Linear(hidden, config.vocab_size, bias=False)
        weights: dict[str, torch.Tensor] = {}
        for name, module in modules.items():
            weight = nn.init.normal_(module.weight, 0, given.matrix_std).detach()  # type: ignore[arg-type]
            if name.endswith("attention.qkv"):
                for projection, part in zip(("q_proj", "k_proj", "v_proj"), weight.chunk(3), strict=True):
                    weights[name.replace("qkv", projection) + ".weight"] = part
            else:
                weights[f"{name}.weight"] = weight
    norms = [
        f"layers.{layer}.{norm}.weight" for layer in range(config.num_layers) for norm in ("attention_norm", "ffn_norm")
    ]
    return weights | {name: torch.ones(hidden) for name in (*norms, "final_norm.weight")}


def take_steps(
    run: Run,
    source: BatchSource,
    tell: Callable[[int, float], None] = lambda step, ms: None,
    probe: Callable[[], float] | None = None,
) -> BenchRound:
    """Train to the plan's end. The clock runs from result to result and includes reading the loss.

    probe: called between steps while the clock is stopped; returns how long a fixed amount of work takes just now.
    """
    found = BenchRound(step_ms=[], losses=[], phases_ms=[], inside_ms=[], data_wait_ms=[], stats={}, probe_ms=[])
    if probe is not None:
        found.probe_ms.append(probe())
    start = time.perf_counter()
    for result in run.train(source):
        found.losses.append(float(result.loss))  # on an accelerator this synchronises
        now = time.perf_counter()
        found.step_ms.append((now - start) * 1e3)
        found.phases_ms.append(dict(result.phases_ms or {}))
        found.inside_ms.append(result.step_ms)
        found.data_wait_ms.append(result.data_wait_ms)
        tell(result.step + 1, found.step_ms[-1])
        start = now
        if probe is not None:
            found.probe_ms.append(probe())
            start = time.perf_counter()
        if result.skipped or result.step != len(found.losses) - 1:
            raise BenchError(
                f"step {result.step} was skipped or is out of order: what did not happen has no speed; look at its loss"
            )
    return found.model_copy(update={"stats": dict(run.stats())})


def plain_result(measured: BenchRound, tokens_per_step: int, warmup: int, name: str) -> dict[str, Any]:
    """The RESULT line of a program without a report: the median step after `warmup` steps."""
    step_ms = statistics.median(measured.step_ms[warmup:])
    return {
        "name": name,
        "threads": torch.get_num_threads(),
        "tokens_per_second": round(tokens_per_step / step_ms * 1e3, 1),
        "step_ms": round(step_ms, 2),
        "steps": len(measured.step_ms) - warmup,
        "loss_first": measured.losses[0],
        "loss_last": measured.losses[-1],
        "losses": measured.losses,
        "step_times_ms": [round(value, 3) for value in measured.step_ms[warmup:]],
        "peak_rss_gib": round(peak_resident_bytes() / 2**30, 2),
    }


def result_line(report: BenchReport) -> dict[str, Any]:
    """The RESULT line of a report: medians, and the losses that show whether two programs train alike."""
    speed, efficiency = report.speed, report.efficiency
    return {
        "name": report.name,
        "threads": torch.get_num_threads(),
        "tokens_per_second": round(speed.tokens_per_second, 1),
        "step_ms": round(speed.step_ms_p50, 2),
        "steps": speed.counted_steps,
        "warm_up_steps": speed.warm_up_steps,
        "gflop_per_second": round(efficiency.flops_per_second / 1e9, 1),
        "first_step_s": round(report.rounds[0][0] / 1e3, 2),
        "loss_first": round(report.losses[0], 4),
        "loss_last": round(report.losses[-1], 4),
        "losses": report.losses,
        "step_times_ms": [round(value, 3) for values in report.counted for value in values],
        "peak_rss_gib": round(peak_resident_bytes() / 2**30, 2),
        "model_flops_utilization": efficiency.mfu_measured,
        "peak_origin": efficiency.measured_peak_origin,
        "remainder_share": round(report.breakdown_ms["remainder"] / speed.step_ms_mean, 4),
        "correct": report.correctness.passed,
        **{name: round(value, 4) for name, value in report.backend_stats.items() if name.endswith("_share")},
    }


def run_program(command: Sequence[str], timeout_s: float) -> dict[str, Any]:
    """Run a program to its end and return its RESULT line. Raises BenchError with the program's last line of output."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except FileNotFoundError:
        raise BenchError(
            f"{command[0]}: no such program; give --against a command that prints a line '{RESULT_PREFIX}{{json}}'"
        ) from None
    except subprocess.TimeoutExpired:
        raise BenchError(f"{' '.join(command)}: did not finish within {timeout_s:.0f} s") from None
    lines = [line for line in done.stdout.splitlines() if line.startswith(RESULT_PREFIX)]
    if done.returncode != 0 or not lines:
        last = (done.stderr.strip() or done.stdout.strip() or "it printed nothing").splitlines()[-1]
        raise BenchError(
            f"{' '.join(command)}: exit code {done.returncode}, {len(lines)} RESULT lines; its last words: {last}"
        )
    try:
        found = json.loads(lines[-1].removeprefix(RESULT_PREFIX))
    except json.JSONDecodeError as error:
        raise BenchError(f"{' '.join(command)}: its RESULT line is not JSON: {error}") from None
    missing = [key for key in REQUIRED if key not in found] if isinstance(found, dict) else list(REQUIRED)
    if missing:
        raise BenchError(f"{' '.join(command)}: its RESULT line lacks {', '.join(missing)}")
    if wrong := [key for key, (fits, _) in _FIELDS.items() if key in found and not fits(found[key])]:
        shown = json.dumps(found[wrong[0]])[:80]
        raise BenchError(f"{' '.join(command)}: its RESULT line has {wrong[0]} = {shown}: {_FIELDS[wrong[0]][1]}")
    return dict(found)
