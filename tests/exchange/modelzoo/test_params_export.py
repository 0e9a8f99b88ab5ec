"""Recipes as params files: CrystalCoder's shipped recipes give the released files, and a round trip loses nothing."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from params_cases import PHASES, base, differing, released, shipped, written

from weftrain.core.config import Recipe
from weftrain.core.errors import RecipeError
from weftrain.core.formats.strict_yaml import LineMap, parse
from weftrain.core.recipe_file import load_recipe
from weftrain.exchange.modelzoo.params_export import dump, export_params
from weftrain.exchange.modelzoo.params_import import import_params


@PHASES
def test_an_exported_recipe_is_the_released_file_but_for_these_keys(phase: int) -> None:
    """Model, optimizer, weights, subsets and batch are equal to the last bit; every key that differs stands here."""
    theirs, ours = yaml.safe_load(released(phase).read_text()), export_params(shipped(phase))
    differences = differing(ours, theirs)
    assert {key for key in differences if key.startswith("train_input.")} == {
        "train_input.mixture.*.data_dir",  # folders are weftrain's
        *(f"train_input.{key}" for key in ("num_workers", "persistent_workers", "prefetch_factor", "use_worker_cache")),
    }
    redundant = {"optimizer.learning_rate.*.base_lr", "optimizer.learning_rate.*.learning_rate"}
    defaults = {
        "optimizer.loss_scaling_factor",
        "optimizer.learning_rate.*.steps",
        "optimizer.learning_rate.*.decay_steps",
    }
    softmax = {"model.attention_softmax_fp32"}  # its default, which phase 3 leaves out
    assert {key for key in differences if key.startswith(("model.", "optimizer."))} == (
        {"model.attention_kernel", "optimizer.log_summaries"} | (defaults | softmax if phase == 3 else redundant)
    )
    ours_only = {"runconfig.mode", "runconfig.num_csx"} if phase == 3 else set()
    for key in (key for key in differences if key.startswith("runconfig.")):
        assert (key.split(".")[1] in ours["runconfig"]) == (key in ours_only)
    assert {key.split(".")[0] for key in differences} <= {
        "model",
        "optimizer",
        "train_input",
        "runconfig",
        "eval_input",
        "cerebras",
    }


# Round trip: a recipe that the form can hold, through a file and back.

RATES = st.floats(0, 1, allow_nan=False, width=32)
POSITIVE = st.floats(1e-12, 1e3, allow_nan=False)
FEW_DIGITS = st.integers(1, 10**6).map(lambda number: number / 1000)  # as a person writes it; see params._shortest


@st.composite
def models(draw: st.DrawFn) -> dict[str, Any]:
    heads, pairs = draw(st.integers(1, 8)), draw(st.integers(1, 32))
    hidden = heads * 2 * pairs
    model: dict[str, Any] = {
        name: draw(st.integers(1, 5000)) for name in ("vocab_size", "num_layers", "intermediate_size")
    }
    model |= {"hidden_size": hidden, "num_heads": heads, "max_position_embeddings": draw(st.integers(1, 5000))}
    model |= {
        "norm": "layer_norm",
        "norm_eps": draw(POSITIVE),
        "linear_bias": draw(st.booleans()),
        "qkv_bias": draw(st.booleans()),
        "num_kv_heads": draw(st.sampled_from([1, heads])),
        "feed_forward": draw(st.sampled_from(["swiglu", "gelu"])),
        "rope_theta": 10000.0,
    }
    model |= {
        "rotary_dim": 2 * draw(st.integers(1, pairs)),
        "rotary_interleaved": True,
        "tie_embeddings": draw(st.booleans()),
    }
    model["attention_scale"] = draw(st.sampled_from(["inverse_sqrt_head_dim", "inverse_head_dim"]))
    distribution = draw(st.sampled_from(["normal", "truncated_normal"]))
    if draw(st.booleans()):
        model["mup"] = {
            "base_hidden_size": draw(st.integers(1, 2 * hidden)),
            "distribution": distribution,
            "base_std": draw(POSITIVE),
        }
        model["mup"] |= {"embedding_scale": draw(POSITIVE), "base_logits_scale": draw(FEW_DIGITS)}
        return model
    stds = {name: draw(POSITIVE) for name in ("embedding_std", "matrix_std", "output_matrix_std")}
    model["initialization"] = {"distribution": distribution, **stds}
    for name in ("embedding_scale", "logits_scale"):
        if draw(st.booleans()):
            model[name] = draw(POSITIVE.filter(lambda scale: scale != 1))
    return model


@st.composite
def schedules(draw: st.DrawFn) -> dict[str, Any]:
    segments = []
    for shape in draw(st.lists(st.sampled_from(["linear", "cosine", "constant"]), min_size=1, max_size=4)):
        segment = {"shape": shape, "steps": draw(st.integers(1, 10**6)), "start": draw(RATES)}
        segments.append(segment if shape == "constant" else segment | {"end": draw(RATES)})
    return {"steps": draw(st.integers(1, sum(segment["steps"] for segment in segments))), "learning_rate": segments}


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    model = draw(models())
    optimizer = {
        "name": "adamw",
        "beta1": draw(st.floats(0, 0.999)),
        "beta2": draw(st.floats(0, 0.9999)),
        "eps": draw(POSITIVE),
    }
    optimizer |= {"eps_placement": "before_bias_correction", "decay": "matrices_and_embeddings"}
    optimizer |= {"weight_decay": draw(RATES), "clip_norm": draw(st.none() | POSITIVE)}
    sources = []
    for index in range(draw(st.integers(1, 3))):
        source: dict[str, Any] = {"name": f"source{index}", "path": f"folder/source{index}", "weight": draw(POSITIVE)}
        bounds = sorted(draw(st.lists(st.floats(0, 1), min_size=2, max_size=2, unique=True)))
        sources.append(source | {"subset": bounds} if draw(st.booleans()) else source)
    total = sum(source["weight"] for source in sources)
    for source in sources:
        source["weight"] = max(source["weight"] / total, 1e-12)
    normalizer = draw(st.sampled_from(["all_positions", "bearing_tokens"]))
    length = (
        model["max_position_embeddings"]
        if normalizer == "bearing_tokens"
        else draw(st.integers(1, model["max_position_embeddings"]))
    )
    micro, replicas = draw(st.integers(1, 50)), draw(st.integers(1, 20))
    return Recipe.model_validate(
        {
            "name": "round_trip",
            "description": "",
            "seed": draw(st.integers(0, 2**31)),
            "start_from": draw(
                st.sampled_from([None, {"run": "before", "state": "weights"}, {"run": "before", "state": "all"}])
            ),
            "model": model,
            "objective": {"normalizer": normalizer},
            "optimizer": optimizer,
            "schedule": draw(schedules()),
            "precision": {"compute": draw(st.sampled_from(["float32", "bfloat16"]))},
            "data": {
                "root": "/data",
                "sequence_length": length,
                "shuffle_seed": draw(st.integers(0, 99)),
                "sources": sources,
            },
            "batch": {
                "global_batch_size": micro * replicas * draw(st.integers(1, 9)),
                "micro_batch_size": micro,
                "replicas": replicas,
            },
            "backend": {"name": "local"},
            "checkpoint": {"every_steps": draw(st.integers(0, 9999))},
            "log": {"every_steps": draw(st.integers(1, 99)), "evaluate_every_steps": draw(st.integers(0, 9999))},
        }
    )


def back(recipe: Recipe, folder: Path) -> Recipe:
    return import_params(
        written(folder, export_params(recipe)),
        name=recipe.name,
        description=recipe.description,
        micro_batch_size=recipe.batch.micro_batch_size,
        start_from=None if recipe.start_from is None else recipe.start_from.run,
        data_root=recipe.data.root,
    ).recipe


@pytest.mark.prove
@settings(max_examples=50, deadline=None)
@given(recipe=recipes())
def test_export_and_import_give_the_recipe_back(recipe: Recipe) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert back(recipe, Path(folder)) == recipe


def test_what_export_leaves_out(tmp_path: Path) -> None:
    """These fields come back as defaults or derived; the form has no keys for them."""
    recipe = load_recipe(
        "crystalcoder_7b_phase3",
        [
            "kernels.preferences=[reference]",
            "kernels.pins={adamw: reference}",
            "checkpoint.at_end=false",
            "log.evaluate_rows=7",
            "log.tensorboard=false",
            "data.sources.0.name=styles",
        ],
        backend="streaming",
    ).recipe
    assert differing(recipe.model_dump(), back(recipe, tmp_path).model_dump()) == {
        "kernels.preferences.*",
        "kernels.pins.adamw",
        "backend.name",
        "checkpoint.at_end",
        "log.evaluate_rows",
        "log.tensorboard",
        "data.sources.*.name",
        "data.sources.*.fim",
        "data.sources.*.fim.rate",
        "data.sources.*.fim.spm_share",
        "data.sources.*.fim.mode",
    }


@given(values=st.lists(st.floats(allow_nan=False, allow_infinity=False)))
def test_floats_survive_the_text(values: list[float]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = written(Path(folder), {"values": values})
        assert yaml.safe_load(path.read_text())["values"] == values
        assert load_values(path) == values


def test_the_text_is_plain() -> None:
    text = dump(base())
    assert "  eps: 1.0e-09\n" in text
    assert not any(mark in text for mark in ("!", "&", "*", "{"))


def load_values(path: Path) -> list[float]:
    tree = parse(path.read_text(), LineMap("text"))
    assert all(type(value) is float for value in tree["values"])
    return list(tree["values"])


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("model.norm=rms_norm", "model.norm: layer_norm"),
        ("model.rotary_interleaved=false", "model.rotary_interleaved: true"),
        ("model.rope_theta=500000", "model.rope_theta: 10000"),
        ("optimizer.eps_placement=after_bias_correction", "optimizer.eps_placement: before_bias_correction"),
        ("optimizer.decay=all", "optimizer.decay: matrices_and_embeddings"),
        ("optimizer.non_finite=skip", "optimizer.non_finite: halt"),
        ("data.document_attention=true", r"no data\.document_attention"),
        ("data.chunks=1", r"no data\.chunks"),
        ("model.num_kv_heads=8", r"model\.num_kv_heads: 1 or num_heads \(its groups take query heads in turn\)"),
        ("model.head_dim=64", r"the default of model\.head_dim"),
        ("model.qk_norm=full", r"the default of model\.qk_norm"),
        ("model.norm_placement=after", r"the default of model\.norm_placement"),
        ("model.norm_weight_offset=1", r"the default of model\.norm_weight_offset"),
        ("model.residual=parallel", r"the default of model\.residual"),
        ("model.rotary_scaling={kind: linear, factor: 2}", r"the default of model\.rotary_scaling"),
        ("model.layer_pattern=[{window: 64}]", r"the default of model\.layer_pattern"),
        ("model.logits_softcap=30", r"the default of model\.logits_softcap"),
    ],
)
def test_recipes_that_the_form_cannot_hold_are_refused(override: str, reason: str) -> None:
    with pytest.raises(RecipeError, match=f"recipe 'crystalcoder_7b_phase1': .*cannot say this: it needs {reason}$"):
        export_params(load_recipe("crystalcoder_7b_phase1", [override]).recipe)


def test_amber_and_synthetic_rows_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"model\.norm: layer_norm; .*optimizer\.eps_placement"):
        export_params(load_recipe("amber_7b").recipe)
    with pytest.raises(RecipeError, match=r"it needs data\.sources"):
        export_params(load_recipe("crystalcoder_7b_phase1", ["data.sources=[]", "data.synthetic_rows=4"]).recipe)
