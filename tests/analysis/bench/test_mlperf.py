"""MLPerf's result log of a run: every key that the benchmark's checker asks for, and runs that are none of its."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from weftrain.analysis.bench.mlperf import MlperfError, Submission, result_lines
from weftrain.core.recipe_file import load_recipe
from weftrain.core.run.metrics import METRICS
from weftrain.core.run.run_folder import RECIPE

SUBMISSION = Submission("weftrain", "8xH200", caches_cleared=True)
# key -> the value that mlcommons/logging (training_5.1.0, 6.0.0 and 6.1.0, closed_llama31_8b.yaml) asks for, or any
WANTED: dict[str, Any] = {
    "submission_org": ...,
    "submission_platform": ...,
    "submission_division": "closed",
    "submission_benchmark": "llama31_8b",
    "cache_clear": True,
    "global_batch_size": 32,
    "max_sequence_length": 8192,
    "opt_name": "adamw",
    "opt_base_learning_rate": 5e-4,
    "opt_end_learning_rate": 5e-5,
    "opt_learning_rate_warmup_steps": 512,
    "opt_learning_rate_decay_steps": 1_200_000 - 512,
    "opt_learning_rate_decay_schedule": "cosine with linear warmup",
    "opt_adamw_beta_1": 0.9,
    "opt_adamw_beta_2": 0.95,
    "opt_adamw_epsilon": 1e-5,
    "opt_adamw_weight_decay": 0.1,
    "opt_gradient_clip_norm": 1.0,
    "gradient_accumulation_steps": 2,
    "eval_samples": 1024,
    "max_steps": 1_200_000,
    "train_samples": 24_576,
    "init_stop": None,
    "run_start": None,
    "run_stop": None,
    "lowest_numerical_precision_in_linear": "bfloat16",  # from here on 6.1.0 alone
    "lowest_numerical_precision_in_attn": "bfloat16",
    "lowest_numerical_precision_in_comm": "bfloat16",
    "tensor_parallelism": 1,
    "pipeline_parallelism": 1,
    "context_parallelism": 1,
    "expert_parallelism": 1,
    "micro_batch_size": 2,
    "config_filename": "recipe.yaml",
}


def evaluation(step: int, loss: float, time: float, name: str = "c4") -> dict[str, Any]:
    return {"kind": "evaluation", "time": time, "step": step, "set": name, "loss": loss, "rows": 1024}


def run_of(folder: Path, *records: dict[str, Any], recipe: str = "llama31_8b", overrides: tuple[str, ...] = ()) -> Path:
    """A run's folder with these metrics after its start."""
    tree = load_recipe(recipe, overrides).recipe.model_dump(mode="json")
    (folder / RECIPE).write_text(json.dumps(tree))
    start = {"kind": "start", "time": 100.0, "step": 0, "preparation_s": 60.0}
    (folder / METRICS).write_text("".join(f"{json.dumps(one)}\n" for one in (start, *records)))
    return folder


def steps_and_evaluations(last_loss: float) -> list[dict[str, Any]]:
    return [
        {"kind": "step", "time": 500.0, "step": 384, "loss": 3.6},
        evaluation(384, 3.5, 520.0),
        {"kind": "step", "time": 900.0, "step": 768, "loss": 3.4},
        evaluation(768, last_loss, 920.0),
        {"kind": "end", "time": 960.0, "step": 768},
    ]


def entries(lines: list[str]) -> list[dict[str, Any]]:
    assert all(line.startswith(":::MLLOG {") for line in lines)
    return [json.loads(line.removeprefix(":::MLLOG ")) for line in lines]


def test_every_key_of_the_checker_once_and_in_order(tmp_path: Path) -> None:
    found = entries(result_lines(run_of(tmp_path, *steps_and_evaluations(3.3)), SUBMISSION))
    for key, value in WANTED.items():
        (entry,) = (one for one in found if one["key"] == key)
        assert value is ... or entry["value"] == value, key
    times = [one["time_ms"] for one in found]
    assert times == sorted(times)
    assert [one["value"] for one in found if one["key"] == "eval_accuracy"] == [3.5, 3.3]
    assert [one["metadata"]["samples_count"] for one in found if one["key"] == "eval_start"] == [12_288, 24_576]
    order = [one["key"] for one in found if one["event_type"] != "POINT_IN_TIME"]
    part = ["block_start", "block_stop", "eval_start", "eval_stop"]
    assert order == ["init_start", "init_stop", "run_start", *part, *part, "run_stop"]
    (start, stop) = (next(one for one in found if one["key"] == key) for key in ("run_start", "run_stop"))
    assert (start["time_ms"], stop["time_ms"]) == (100_000, 920_000)  # saving the last checkpoint does not count
    assert stop["metadata"] == {"status": "success"}
    (begun,) = (one for one in found if one["key"] == "init_start")
    assert begun["time_ms"] == 40_000


def test_the_benchmarks_own_checker_accepts_it(tmp_path: Path) -> None:
    checker = pytest.importorskip("mlperf_logging.compliance_checker.mlp_compliance")
    log = tmp_path / "result_0.txt"
    log.write_text("\n".join(result_lines(run_of(tmp_path, *steps_and_evaluations(3.3)), SUBMISSION)))
    for ruleset in ("5.1.0", "6.0.0", "6.1.0"):
        found = checker.ComplianceChecker("training", ruleset, quiet=False, werror=True)
        assert found.check_file(str(log), f"training_{ruleset}/common.yaml"), ruleset


def test_a_run_that_missed_the_target_is_aborted(tmp_path: Path) -> None:
    found = entries(result_lines(run_of(tmp_path, *steps_and_evaluations(3.31)), SUBMISSION))
    (stop,) = (one for one in found if one["key"] == "run_stop")
    assert (stop["metadata"], stop["time_ms"]) == ({"status": "aborted"}, 960_000)


def test_caches_are_not_said_to_be_cleared_unasked(tmp_path: Path) -> None:
    run = run_of(tmp_path, *steps_and_evaluations(3.3))
    assert all("cache_clear" not in line for line in result_lines(run, Submission("weftrain", "8xH200")))


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([], "no evaluation is recorded"),
        ([{"kind": "resume", "time": 200.0, "step": 0}, evaluation(384, 3.2, 520.0)], "this one has 2 starts"),
        ([evaluation(384, 3.2, 520.0), evaluation(384, 3.2, 520.0, "b")], "one held-out set: "),
    ],
)
def test_what_is_no_measurement_is_refused(tmp_path: Path, records: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(MlperfError, match=words):
        result_lines(run_of(tmp_path, *records), SUBMISSION)


def test_another_schedule_is_refused(tmp_path: Path) -> None:
    run = run_of(tmp_path, *steps_and_evaluations(3.3), recipe="bench_70m")
    with pytest.raises(MlperfError, match="a linear warm-up from 0 and a cosine"):
        result_lines(run, SUBMISSION)
