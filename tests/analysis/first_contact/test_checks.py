"""What only a GPU runs is at least well formed: options that the backends take, recipes that load, sources and suites."""

from __future__ import annotations

from pathlib import Path

import pytest

from weftrain.analysis.first_contact import proofs, speed
from weftrain.analysis.first_contact.conditions import Conditions, small_recipe, with_order
from weftrain.backends.common.registry import get_backend
from weftrain.backends.cuda.options import CudaOptions
from weftrain.backends.local import LocalOptions
from weftrain.backends.streaming.options import StreamingOptions
from weftrain.core.recipe_file import load_recipe
from weftrain.kernels import OPS, load_catalog
from weftrain.kernels.bench.suites import SUITES
from weftrain.kernels.checks.engine import CHECKS as QUESTIONS


def test_every_way_to_run_is_one_that_the_backend_takes() -> None:
    for _, options in proofs.BITS.values():
        LocalOptions.model_validate(options)
    for options in proofs.STREAMING.values():
        StreamingOptions.model_validate(options)
    for options in proofs.RANKS.values():
        CudaOptions.model_validate(options)
    for setting in (setting for settings in speed.SETTINGS.values() for setting in settings.values()):
        LocalOptions.model_validate(setting.options)


@pytest.mark.parametrize("which", speed.SETTINGS)
def test_every_timed_recipe_loads(which: str, tmp_path: Path) -> None:
    for setting in speed.SETTINGS[which].values():
        recipe = speed._recipe(Conditions(tmp_path, get_backend), which, setting.rows, setting.rows, *setting.overrides)
        assert recipe.batch.accumulation_steps == 1
        assert recipe.data.sequence_length == {"1.2B": 4096, "7B": 2048}[which]


def test_the_small_recipes_load_as_on_a_gpu(tmp_path: Path) -> None:
    for name in ("amber_demo", "crystal_demo"):
        recipe = small_recipe(Conditions(tmp_path, get_backend), name, "precision.compute=bfloat16")
        assert with_order(recipe, Conditions(tmp_path, get_backend).order("torch")).kernels.preferences == (
            "torch",
            "triton",
            "reference",
        )
        assert recipe.model == load_recipe(name).recipe.model


def test_every_op_source_and_question_exists() -> None:
    catalog = load_catalog()
    assert set(proofs.SOURCES) <= {source for by_source in catalog.values() for source in by_source}
    assert set(proofs.QUESTIONS) <= set(QUESTIONS)
    assert speed.SUITE in SUITES
    assert set(speed.TIMED) == set(OPS)
    asked = {
        op for check in ("attention", "rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm") for op in [check]
    }
    asked |= {
        "adamw",
        "grad_norm",
        "rope",
        "swiglu",
        "cross_entropy",
        "linear_cross_entropy",
        "newton_schulz",
        "grouped_gemm",
    }
    assert asked == set(OPS)
