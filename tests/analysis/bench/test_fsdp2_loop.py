"""The FSDP2 program trains what the local backend trains, and refuses what it would train otherwise."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from places import ROOT

from weftrain.analysis.bench.train import REQUIRED, BenchError, bench_source, plain_weights, run_program
from weftrain.backends.common.registry import get_backend
from weftrain.core.backend import Job, Plan
from weftrain.core.config import Recipe

SCRIPT = ROOT / "analysis" / "bench" / "fsdp2_loop.py"
STEPS = 6
TORCH_EPSILON = "optimizer.eps_placement=after_bias_correction"


def command(recipe: Recipe, folder: Path) -> list[str]:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True)))
    return [sys.executable, str(SCRIPT), str(path), "--steps", str(STEPS), "--warmup", "2", "--threads", "2"]


@pytest.mark.parametrize(
    ("family", "overrides", "tolerance"),
    [
        ("amber", [], 1e-5),
        # Tied weight, biases, LayerNorm, muP's learning rates, norms and biases without decay; two micro-batches.
        pytest.param("crystal", [TORCH_EPSILON, "batch.micro_batch_size=2"], 1e-5, marks=pytest.mark.prove),
        # A bf16 gradient is rounded before it is clipped by other sums; with norms in bf16 the last losses differ by
        # more.
        pytest.param("amber", ["precision.compute=bfloat16"], 1e-4, marks=pytest.mark.prove),
    ],
)
def test_the_local_backend_trains_the_same_model(
    family: str, overrides: list[str], tolerance: float, tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = tiny_recipe(family, *overrides)
    found = run_program(command(recipe, tmp_path), 120)
    backend = get_backend("local")
    options = backend.options.model_validate({"device": "cpu", "threads": 2, "huge_pages": False})
    run = backend.prepare(Job(recipe, Plan(0, STEPS), options, plain_weights(recipe.model)))
    losses = [float(result.loss) for result in run.train(bench_source(recipe))]
    assert found["loss_first"] == pytest.approx(losses[0], rel=tolerance)
    assert found["loss_last"] == pytest.approx(losses[-1], rel=tolerance)
    assert losses[-1] < 0.97 * losses[0]
    assert {*REQUIRED, "peak_rss_gib"} <= found.keys()
    assert found["name"] == f"fsdp2-offload-{recipe.precision.compute}"
    assert found["threads"] == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.eps_placement=before_bias_correction", "torch.optim.AdamW knows after_bias_correction alone"),
        ("optimizer.non_finite=skip", "skips no step"),
    ],
)
def test_another_optimizer_is_refused(
    override: str, message: str, tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    with pytest.raises(BenchError, match=f"Error: optimizer.*{message}"):
        run_program(command(tiny_recipe("amber", override), tmp_path), 120)
