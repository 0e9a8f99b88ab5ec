"""The recipes' numbers: the released configurations of Amber and CrystalCoder, key by key."""

from __future__ import annotations

import math
from typing import Any

import pytest
import yaml
from places import SHARED

from weftrain.core.model_config import in_words
from weftrain.core.mup import resolve_scales
from weftrain.core.optim import group_learning_rates, learning_rate, parameter_groups
from weftrain.core.parameters import (
    ParameterSpec,
    Role,
    active_parameter_count,
    flops_per_token,
    parameter_count,
    parameter_specs,
)
from weftrain.core.recipe_file import builtin_recipes, load_recipe

RELEASED = SHARED / "data" / "crystalcoder"
PHASES = [f"crystalcoder_7b_phase{phase}" for phase in (1, 2, 3)]


@pytest.mark.parametrize(
    ("name", "parameters", "tokens_per_step", "steps", "total_tokens_billion"),
    [
        ("amber_7b", 6_738_415_616, 4_587_520, 274_320, 1258.4),
        ("crystalcoder_7b_phase1", 6_575_278_720, 4_325_376, 79_721, 344.82),
        ("crystalcoder_7b_phase2", 6_575_278_720, 4_325_376, 214_387, 927.30),  # 927.304...
        ("crystalcoder_7b_phase3", 6_575_278_720, 4_325_376, 27_728, 119.93),
        ("llama31_8b", 8_030_261_248, 262_144, 1_200_000, 314.57),  # 32 x 8192 x 1,200,000
        ("llama32_1b", 1_235_814_400, 4_194_304, 2_145_767, 9000.0),
        ("qwen3_8b", 8_190_735_360, 4_194_304, 7_152_557, 30_000.0),
        ("qwen3_0_6b", 596_049_920, 4_194_304, 7_152_557, 30_000.0),
        ("olmo2_7b", 7_298_617_344, 4_194_304, 928_646, 3895.0),
        ("olmo3_7b", 7_298_617_344, 4_194_304, 1_192_092, 5000.0),
        ("smollm3_3b", 3_075_098_624, 2_359_296, 4_720_000, 11_135.88),
        ("pythia_6_9b", 6_857_302_016, 2_097_152, 143_000, 299.89),
        ("k2_65b", 65_286_184_960, 4_177_920, 338_760, 1415.31),
        ("k2_v2_70b", 72_550_195_200, 9_830_400, 1_250_000, 12_288.0),
        ("amberchat", 6_738_415_616, 524_288, 2730, 1.43),
        ("ambersafe_sft", 6_738_415_616, 32_768, 15_468, 0.507),
        ("ambersafe_dpo", 6_738_415_616, 32_768, 30_936, 1.01),
        ("crystalchat", 6_575_278_720, 4_194_304, 214_301, 898.84),
        ("chat_demo_sft", 7_375_104, 2048, 120, 0.0002),
        ("chat_demo_dpo", 7_375_104, 2048, 20, 0.0001),
        ("unlearn_demo", 7_375_104, 2048, 40, 0.0001),
        ("bench_1b", 1_235_814_400, 16_384, 1000, 0.02),
        ("llama_demo", 7_620_864, 4096, 240, 0.00098),
        ("qwen_demo", 6_040_832, 4096, 240, 0.00098),
        ("olmoe_1b_7b", 6_919_161_856, 4_194_304, 1_220_703, 5120.0),
        ("qwen3_30b_a3b", 30_532_122_624, 4_194_304, 7_152_557, 30_000.0),
        ("mixtral_8x7b", 46_702_792_704, 4_194_304, 238_419, 1000.0),
        ("moe_demo", 11_118_848, 4096, 240, 0.00098),
    ],
)
def test_sizes(name: str, parameters: int, tokens_per_step: int, steps: int, total_tokens_billion: float) -> None:
    recipe = load_recipe(name).recipe
    assert parameter_count(recipe.model) == parameters
    assert recipe.tokens_per_step == tokens_per_step
    assert recipe.schedule.steps == steps
    assert recipe.tokens_per_step * steps / 1e9 == pytest.approx(total_tokens_billion, abs=0.05)


@pytest.mark.parametrize(
    ("name", "active"),
    [("olmoe_1b_7b", 1_282_017_280), ("qwen3_30b_a3b", 3_353_032_704), ("mixtral_8x7b", 12_879_925_248)],
)
def test_a_token_is_computed_with_so_many_parameters(name: str, active: int) -> None:
    model = load_recipe(name).recipe.model
    assert active_parameter_count(model) == active
    # products with all of them but embedding and norms
    assert flops_per_token(model, 0) == 6 * (
        active - sum(spec.size for spec in parameter_specs(model) if _no_product(spec))
    )


def _no_product(spec: ParameterSpec) -> bool:
    return spec.role in (Role.EMBEDDING, Role.NORM_WEIGHT)


@pytest.mark.parametrize("name", builtin_recipes())
def test_output_projections_start_as_deep_as_the_model(name: str) -> None:
    """Either all matrices start alike, or o and down are divided by the square root of 2 x layers, written out."""
    model = load_recipe(name).recipe.model
    if model.initialization is not None:
        whole, out = model.initialization.matrix_std, model.initialization.output_matrix_std
        assert out in (whole, pytest.approx(whole / (2 * model.num_layers) ** 0.5, rel=1e-12))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("amber_7b", "32 layers, width 4096, 32 heads, rms_norm, SwiGLU 11008, rotary 128 of 128, vocabulary 32000"),
        ("llama31_8b", "32 heads over 8 of keys and values, rms_norm, SwiGLU 14336, rotary 128 of 128, llama3 x 8, "),
        ("qwen3_0_6b", "16 heads over 8 of keys and values, norms of q and k (per head), rms_norm, "),
        (
            "olmo3_7b",
            "norms of q and k (full), rms_norm after each branch, SwiGLU 11008, rotary 128 of 128, window 4096",
        ),
        ("smollm3_3b", "rotary 128 of 128, no rotary positions on 1 of 4 layers, "),
        ("pythia_6_9b", "layer_norm, parallel residual, GELU 16384, rotary 32 of 128, "),
        ("k2_v2_70b", "64 heads over 8 of keys and values, rms_norm of 1 + weight, "),
    ],
)
def test_a_model_is_told_in_words(name: str, words: str) -> None:
    assert words in in_words(load_recipe(name).recipe.model)


def test_bench_70m_counts_what_the_bare_loop_counts() -> None:
    recipe = load_recipe("bench_70m").recipe
    products = 12 * (4 * 512 * 512 + 3 * 512 * 1376) + 32000 * 512
    assert flops_per_token(recipe.model, 512) == 6 * products + 12 * 12 * 512 * 512


def test_llama31_8b_is_the_benchmark() -> None:
    """The numbers that mlcommons/logging's checker for llama31_8b asks for, at the batch size of one node of 8 H200."""
    recipe = load_recipe("llama31_8b").recipe
    optimizer, warm_up = recipe.optimizer, recipe.schedule.learning_rate[0].steps
    assert (optimizer.beta1, optimizer.beta2, optimizer.eps) == (0.9, 0.95, 1e-5)
    assert (optimizer.weight_decay, optimizer.clip_norm) == (0.1, 1.0)
    assert warm_up == 16384 // recipe.batch.global_batch_size
    assert learning_rate(recipe.schedule, warm_up) == 5e-4
    assert learning_rate(recipe.schedule, 1_199_999) == pytest.approx(5e-5)
    assert recipe.log.evaluate_every_steps * recipe.batch.global_batch_size == 12_288
    assert recipe.log.evaluate_rows * recipe.data.sequence_length == 8_388_608


def test_crystalcoder_mup_numbers() -> None:
    scales = resolve_scales(load_recipe("crystalcoder_7b_phase1").recipe.model)
    assert scales.embedding_std == 0.073
    assert scales.matrix_std == pytest.approx(0.01825, rel=1e-12)
    assert scales.output_matrix_std == pytest.approx(0.00228125, rel=1e-12)
    assert scales.logits_scale == pytest.approx(0.13875, rel=1e-12)
    assert scales.embedding_scale == 14.6
    assert scales.matrix_learning_rate_multiplier == 0.0625


def test_amber_learning_rate() -> None:
    schedule = load_recipe("amber_7b").recipe.schedule
    assert learning_rate(schedule, 0) == 0.0
    assert learning_rate(schedule, 1000) == pytest.approx(1.5e-4)
    assert learning_rate(schedule, 2000) == 3e-4
    assert learning_rate(schedule, 2000 + 272_320 // 2) == pytest.approx((3e-4 + 3e-5) / 2)
    assert learning_rate(schedule, 274_319) == pytest.approx(3e-5, rel=1e-6)


def test_crystalcoder_learning_rates_by_group() -> None:
    for name, warm_up, peak in zip(PHASES, (86, 86, 276), (0.012, 0.0087825, 0.002), strict=True):
        recipe = load_recipe(name).recipe
        groups = parameter_groups(recipe.model, recipe.optimizer)
        rates = group_learning_rates(groups, recipe.schedule, warm_up)
        assert rates == {"embeddings": peak, "decoder_matrices": peak * 0.0625, "norms_and_biases": peak}
        assert {group.name: group.weight_decay for group in groups} == {
            "embeddings": 0.1,
            "decoder_matrices": 0.1,
            "norms_and_biases": 0,
        }
    amber = load_recipe("amber_7b").recipe
    assert {group.weight_decay for group in parameter_groups(amber.model, amber.optimizer)} == {0.1}


def released(phase: int) -> dict[str, Any]:
    path = RELEASED / f"phase{phase}.yaml"
    if not path.exists():
        pytest.skip("the released params files are not beside this checkout")
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("phase", [1, 2, 3])
def test_crystalcoder_equals_the_released_params(phase: int) -> None:
    params, recipe = released(phase), load_recipe(PHASES[phase - 1]).recipe
    model, theirs, scales = recipe.model, params["model"], resolve_scales(recipe.model)
    ours = (
        "hidden_size",
        "num_layers",
        "num_heads",
        "intermediate_size",
        "vocab_size",
        "rotary_dim",
        "max_position_embeddings",
    )
    keys = (
        "hidden_size",
        "num_hidden_layers",
        "num_heads",
        "filter_size",
        "vocab_size",
        "rotary_dim",
        "max_position_embeddings",
    )
    assert [getattr(model, name) for name in ours] == [theirs[key] for key in keys]
    assert model.norm_eps == float(theirs["layer_norm_epsilon"])
    assert model.tie_embeddings == theirs["share_embedding_weights"]
    assert model.linear_bias == theirs["use_ffn_bias"] == theirs["use_projection_bias_in_attention"]
    assert scales.embedding_scale == theirs["embeddings_scale"]
    assert scales.logits_scale == pytest.approx(theirs["output_logits_scale"])
    assert scales.embedding_std == theirs["embedding_initializer"]["std"]
    assert scales.matrix_std == pytest.approx(theirs["initializer"]["std"])
    assert scales.output_matrix_std == pytest.approx(theirs["output_layer_initializer"]["std"])
    # truncated at two standard deviations
    assert theirs["initializer"]["b"] == pytest.approx(2 * theirs["initializer"]["std"])

    assert (theirs["loss_scaling"], theirs["loss_weight"]) == ("batch_size", pytest.approx(1 / 2048, rel=1e-3))
    assert recipe.objective.normalizer == "all_positions"

    optimizer, theirs = recipe.optimizer, params["optimizer"]
    assert (optimizer.beta1, optimizer.beta2, optimizer.eps) == (theirs["beta1"], theirs["beta2"], float(theirs["eps"]))
    assert (optimizer.weight_decay, optimizer.clip_norm) == (theirs["weight_decay_rate"], theirs["max_gradient_norm"])
    assert scales.matrix_learning_rate_multiplier == theirs["adjust_learning_rate"]["decoder_kernel"]
    for segment, piece in zip(recipe.schedule.learning_rate, theirs["learning_rate"], strict=True):
        assert segment.start == pytest.approx(piece["initial_learning_rate"])
        assert segment.end == pytest.approx(piece["end_learning_rate"])
        assert segment.steps == piece.get("decay_steps", piece.get("steps"))

    mixture = params["train_input"]["mixture"]
    assert [source.weight for source in recipe.data.sources] == [component["weight"] for component in mixture]
    subsets = [component.get("data_subset", "0.0-1.0") for component in mixture]
    assert [f"{source.subset[0]}-{source.subset[1]}" for source in recipe.data.sources] == subsets
    assert recipe.batch.global_batch_size == params["train_input"]["batch_size"]
    assert recipe.batch.accumulation_steps == 2
    run = params["runconfig"]
    assert (recipe.schedule.steps, recipe.checkpoint.every_steps) == (run["max_steps"], run["checkpoint_steps"])
    assert recipe.log.evaluate_every_steps == run["eval_steps"]
    assert (recipe.start_from is not None and recipe.start_from.state == "weights") == run["is_pretrained_checkpoint"]


def test_amberchat_is_the_released_script() -> None:
    """Batch 2 x 16 x 8, 3 epochs of 233,000 conversations, warm-up 0.04, cosine to 0, and the trainer's own AdamW."""
    recipe = load_recipe("amberchat").recipe
    assert recipe.model == load_recipe("amber_7b").recipe.model
    assert (recipe.batch.global_batch_size, recipe.batch.accumulation_steps) == (2 * 16 * 8, 16)
    assert recipe.schedule.steps == 3 * (233_000 // 256)
    assert recipe.schedule.learning_rate[0].steps == math.ceil(0.04 * recipe.schedule.steps)
    assert learning_rate(recipe.schedule, 0) == 0
    assert learning_rate(recipe.schedule, 110) == 2e-5
    assert learning_rate(recipe.schedule, 2729) < 1e-10
    optimizer = recipe.optimizer
    assert (optimizer.beta1, optimizer.beta2, optimizer.eps, optimizer.clip_norm) == (0.9, 0.999, 1e-8, 1.0)
    assert (optimizer.weight_decay, recipe.data.sequence_length) == (0.0, 2048)
    assert recipe.start_from is not None
    assert (recipe.start_from.run, recipe.start_from.state) == ("amber_7b", "weights")
    assert (recipe.checkpoint.every_steps, recipe.checkpoint.keep and recipe.checkpoint.keep.last) == (200, 5)


@pytest.mark.parametrize(("name", "rows", "pairs", "peak"), [("sft", 64, 64, 2e-7), ("dpo", 64, 32, 5e-7)])
def test_ambersafe_is_the_released_scripts(name: str, rows: int, pairs: int, peak: float) -> None:
    """Their optimizer is RMSprop, which AdamW with beta1 = 0 is but for the bias correction."""
    recipe = load_recipe(f"ambersafe_{name}").recipe
    assert recipe.model == load_recipe("amber_7b").recipe.model
    assert recipe.batch.global_batch_size == rows
    for step in (0, 1, 75, 149, 150, 30_000):
        assert learning_rate(recipe.schedule, step) == pytest.approx(peak * min(1, (step + 1) / 151), rel=1e-12)
    assert (recipe.optimizer.beta1, recipe.optimizer.beta2, recipe.optimizer.weight_decay) == (0, 0.99, 0)
    assert recipe.data.sequence_length == 512
    assert recipe.precision.compute == "float32"
    objective = recipe.objective
    scale = 1 if objective.name == "dpo" else 512  # of the gradient that is clipped
    assert recipe.optimizer.clip_norm == 10 / scale
    assert recipe.optimizer.eps == pytest.approx(1e-8 / scale)
    if objective.name == "dpo":
        assert (objective.beta, objective.form, objective.length_normalized) == (0.1, "sigmoid", False)
        assert objective.divisor(0, 0, rows) == pairs
        assert (recipe.data.row_length, recipe.start_from and recipe.start_from.run) == (1024, "ambersafe_sft")
    else:
        assert objective.normalizer == "all_positions"
        assert objective.divisor(7, rows * 512, rows) == pairs * 512
    assert recipe.schedule.steps == 3 * (330_000 // pairs)  # at most: docs say which number is not published


def test_crystalchat_is_the_released_script() -> None:
    recipe = load_recipe("crystalchat").recipe
    assert recipe.model == load_recipe("crystalcoder_7b_phase3").recipe.model
    assert recipe.batch.global_batch_size == 2048
    assert learning_rate(recipe.schedule, 0) == 0
    assert learning_rate(recipe.schedule, 86) == 0.0087825
    assert learning_rate(recipe.schedule, 214_300) == pytest.approx(0.00013679, rel=1e-3)
    optimizer = recipe.optimizer
    assert (optimizer.beta1, optimizer.beta2, optimizer.eps) == (0.9, 0.95, 1e-8)
    assert (optimizer.eps_placement, optimizer.weight_decay, optimizer.clip_norm) == ("after_bias_correction", 0.1, 1.0)
    scales = resolve_scales(recipe.model)
    assert (scales.embedding_scale, scales.matrix_learning_rate_multiplier) == (14.6, 0.0625)
    assert scales.logits_scale == pytest.approx(2.22 * 0.0625)
    assert recipe.model.vocab_size == 32_032
