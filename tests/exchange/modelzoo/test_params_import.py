"""Params files as recipes: CrystalCoder's released ones give the shipped recipes, and nothing is dropped or guessed
without a word.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from params_cases import PHASES, base, differing, imported, leaves, put, released, shipped, written

from weftrain.core.config import Recipe, StartFrom
from weftrain.core.errors import RecipeError
from weftrain.exchange.modelzoo.params_export import dump
from weftrain.exchange.modelzoo.params_import import Imported, import_params

MEANINGLESS = "it concerns the vendor's cluster or its programs"


def import_phase(phase: int, *overrides: str) -> Imported:
    ours = shipped(phase)
    return import_params(
        released(phase),
        name=ours.name,
        description=ours.description,
        micro_batch_size=66,
        start_from=None if phase == 1 else f"crystalcoder_7b_phase{phase - 1}",
        overrides=overrides,
    )


@PHASES
def test_a_released_file_is_the_shipped_recipe_but_for_what_it_cannot_know(phase: int) -> None:
    """Exactly these fields differ; names and folders are weftrain's, FIM rates stand nowhere in the file, phase 3 has
    no num_csx.
    """
    imported = import_phase(phase)
    fim = {"data.sources.*.fim.rate", "data.sources.*.fim.spm_share", "data.sources.*.fim.mode", "data.sources.*.fim"}
    unknown = {"data.sources.*.name", "data.sources.*.path"} | (fim if phase > 1 else set())
    unknown |= {"batch.replicas"} if phase == 3 else set()
    assert differing(imported.recipe.model_dump(), shipped(phase).model_dump()) == unknown


@PHASES
def test_with_what_it_cannot_know_it_is_the_shipped_recipe(phase: int) -> None:
    ours = shipped(phase)
    overrides = ["batch.replicas=16"] if phase == 3 else []
    for index, source in enumerate(ours.data.sources):
        overrides += [f"data.sources.{index}.name={source.name}", f"data.sources.{index}.path={source.path}"]
        if source.fim is not None:
            overrides.append(f"data.sources.{index}.fim={{rate: {source.fim.rate}, spm_share: {source.fim.spm_share}}}")
    imported = import_phase(phase, *overrides)
    assert imported.recipe == ours
    assert Recipe.model_validate(imported.tree) == ours


@PHASES
def test_what_a_released_file_says_beyond_a_recipe_is_named(phase: int) -> None:
    """Every key of the file is in the recipe, has the one value that can be, or is in a note."""
    notes = import_phase(phase).notes
    run = yaml.safe_load(released(phase).read_text())["runconfig"]
    used = {"max_steps", "checkpoint_steps", "eval_steps", "log_steps", "seed", "num_csx", "is_pretrained_checkpoint"}
    used |= {"mode", "num_epochs", "num_steps"}  # checked
    for key in run:
        assert any(note.startswith(f"runconfig.{key} (") for note in notes) != (key in used), key
    expected = [f"runconfig.mgmt_namespace ('rel-191-g42'): not in a recipe: {MEANINGLESS}"]
    expected += ["optimizer.log_summaries (True): not in a recipe: what is logged is weftrain's own choice"]
    assert set(expected) <= set(notes)
    guesses = [note for note in notes if "not in a recipe" not in note]
    folders = {1: 0, 2: 1, 3: 5}[phase]  # whose path says fim
    assert len(guesses) == folders + (phase == 3)
    assert ("runconfig.num_csx is not there: batch.replicas is 1" in guesses) == (phase == 3)


# Files that this decoder cannot follow, or that are wrong: what is wrong, its line, what to do.


def test_a_file_of_ours_is_imported_and_its_numbers_are_muP(tmp_path: Path) -> None:  # noqa: N802
    imported = import_params(written(tmp_path, base()), name="again", micro_batch_size=66)
    assert imported.recipe.model == shipped(1).model
    assert imported.recipe.description == "from params.yaml, a params file of Model Zoo 1.9"
    assert imported.recipe.batch == shipped(1).batch


def test_biases_of_q_k_and_v_gelu_and_shared_heads(tmp_path: Path) -> None:
    changes = [("model.use_projection_bias_in_attention", False), ("model.nonlinearity", "GELU")]
    changes += [("model.scale_glu_initialization", False), ("model.attention_module", "multiquery_attention")]
    model = imported(tmp_path, *changes).recipe.model
    assert (model.linear_bias, model.qkv_bias, model.feed_forward, model.num_kv_heads) == (True, False, "gelu", 1)
    every = imported(tmp_path, *changes, ("model.extra_attention_params", {"num_kv_groups": 32})).recipe.model
    assert every.num_kv_heads == every.num_heads == 32
    with pytest.raises(RecipeError, match=r"params\.yaml:\d+: .*num_kv_groups is 8: there query head h reads group h"):
        imported(tmp_path, *changes, ("model.extra_attention_params", {"num_kv_groups": 8}))


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("model.position_embedding_type", "learned", "position_embedding_type is 'learned'; this decoder rotates"),
        ("model.use_position_embedding", False, "use_position_embedding is False"),
        ("model.nonlinearity", "geglu", "nonlinearity is 'geglu'; this decoder has swiglu and gelu feed-forward"),
        ("model.attention_module", "flash", "attention_module is 'flash'"),
        ("model.extra_attention_params", {"num_kv_groups": 1}, "extra_attention_params are of multiquery_attention"),
        ("model.extra_attention_params", {"window": 1}, "unknown key 'model.extra_attention_params.window'"),
        ("model.attention_type", "dot_product", "attention_type is 'dot_product'"),
        ("model.attention_softmax_fp32", False, "attention_softmax_fp32 is False"),
        (
            "model.attention_dropout_rate",
            0.1,
            "attention_dropout_rate is 0.1; this decoder has no dropout: only 0.0 can be imported",
        ),
        ("model.dropout_rate", 0.1, "dropout_rate is 0.1"),
        ("model.use_bias_in_output", True, "use_bias_in_output is True"),
        ("model.boundary_casting", True, "boundary_casting is True"),
        ("model.scale_glu_initialization", False, "scale_glu_initialization is False"),
        ("model.loss_scaling", "num_tokens", "loss_weight is 0.000488.*, and loss_scaling num_tokens takes none"),
        ("model.loss_scaling", "sum", "loss_scaling is 'sum'; it is batch_size or num_tokens"),
        ("model.loss_weight", 0.3, "loss_weight is 0.3; it is 1 / sequence length"),
        ("model.loss_weight", 1 / 4096, "loss_weight is 0.000244"),
        ("model.loss_weight", 1 / 2049, "loss_weight is 0.000488"),
        ("model.use_ffn_bias", False, "model.use_ffn_bias and use_ffn_bias_in_attention differ"),
        ("model.use_bfloat16", False, "use_bfloat16 False; weftrain computes in bfloat16"),
        ("model.weight_initialization_seed", 2, "weight_initialization_seed is 2 and runconfig.seed 1"),
        ("model.initializer.name", "uniform", "embedding_initializer.name is 'truncated_normal'; a recipe has one of"),
        ("model.initializer.mean", 0.5, "initializer.mean is 0.5"),
        (
            "model.initializer.b",
            0.05,
            r"initializer is 'truncated_normal' from a = -0.0365 to b = 0.05; truncated_normal is cut at two",
        ),
        ("model.initializer.std", 0.02, "initializer is 'truncated_normal' from"),
        ("model.rotary_dim", 256, "rotary_dim 256 must be even and at most the head dimension 128"),
        ("optimizer.optimizer_type", "SGD", "optimizer_type is 'SGD'"),
        ("optimizer.correct_bias", False, "correct_bias is False"),
        ("optimizer.amsgrad", True, "amsgrad is True"),
        ("optimizer.loss_scaling_factor", "dynamic", "loss_scaling_factor is 'dynamic'"),
        ("optimizer.beta1", 1.5, "beta1"),
        (
            "optimizer.adjust_learning_rate.decoder_kernel",
            0.125,
            "muP does not explain it: model.output_logits_scale|muP does not explain it",
        ),
        ("optimizer.adjust_learning_rate.decoder_kernel", 0.0601, "4096 x 0.0601, is no whole number"),
        (
            "optimizer.adjust_learning_rate.encoder_kernel",
            0.5,
            "unknown key 'optimizer.adjust_learning_rate.encoder_kernel'; did you mean",
        ),
        ("optimizer.learning_rate", [], "learning_rate is empty"),
        ("optimizer.learning_rate.0.scheduler", "Step", "scheduler is 'Step'; Linear, CosineDecay and Constant"),
        ("optimizer.learning_rate.0.steps", 5, "steps 5 and decay_steps 86 differ"),
        ("optimizer.learning_rate.0.base_lr", 0.5, "base_lr is 0.5, the schedule starts at 0.0"),
        (
            "optimizer.learning_rate.0.end_learning_rate",
            ...,
            "missing key 'optimizer.learning_rate.0.end_learning_rate'",
        ),
        (
            "optimizer.learning_rate.0.initial_learning_rate",
            ...,
            "missing key 'optimizer.learning_rate.0.initial_learning_rate'",
        ),
        ("train_input.repeat", False, "repeat is False"),
        ("train_input.vocab_size", 5, "train_input.vocab_size is 5, model.vocab_size 32032"),
        ("train_input.mixture.0.data_subset", "first tenth", "data_subset 'first tenth' is not START-END"),
        ("train_input.mixture.0.data_subset", "0.5-0.5", "is empty"),
        ("train_input.mixture.0.data_dir", "/", "names no folder"),
        ("train_input.mixture.0.data_dir", "a/../b", "names no folder"),
        ("train_input.mixture", ..., "missing key 'train_input.mixture'"),
        ("train_input.data_dir", "both", "both mixture and data_dir"),
        (
            "train_input.micro_batch",
            3,
            "unknown key 'train_input.micro_batch'; did you mean 'train_input.micro_batch_size'",
        ),
        ("runconfig.mode", "eval", "mode is 'eval'"),
        ("runconfig.num_epochs", 2, "num_epochs is 2"),
        ("runconfig.is_pretrained_checkpoint", True, "is_pretrained_checkpoint starts from another run: say which"),
        ("runconfig.checkpoint_path", "/some/where", "checkpoint_path starts from another run: say which"),
        ("runconfig.max_step", 5, "unknown key 'runconfig.max_step'; did you mean 'runconfig.max_steps'"),
        ("sparsity.type", "static", "unknown key 'sparsity'"),
        ("runconfig.max_steps", "many", "runconfig.max_steps: should be integer > 0, not a string"),
        ("runconfig.max_steps", ..., r"missing key 'runconfig.max_steps' \(integer > 0\); add it"),
        ("model.layer_norm_epsilon", ..., "missing key 'model.layer_norm_epsilon'"),
        ("optimizer.correct_bias", ..., "missing key 'optimizer.correct_bias'"),
        ("model", ..., "missing key 'model'"),
    ],
)
def test_what_a_recipe_cannot_say_is_refused(tmp_path: Path, key: str, value: Any, reason: str) -> None:
    params = base()
    put(params, key, value)
    with pytest.raises(RecipeError, match=reason) as caught:
        import_params(written(tmp_path, params), name="x", micro_batch_size=66)
    assert "params.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    1e-320,
    1e308,
    10**30,
    "",
    "x",
    "1-2",
    [],
    [1],
    {},
    {"x": 1},
    float("nan"),
    float("inf"),
)


@pytest.mark.prove
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_whatever_a_value_is_the_answer_is_a_recipe_or_one_line(data: st.DataObject) -> None:
    params = base()
    keys = [key for key, _ in leaves(params)]
    keys += [
        "model.initializer",
        "optimizer.learning_rate",
        "train_input.mixture",
        "optimizer.adjust_learning_rate",
        "model",
        "runconfig",
    ]
    for key in data.draw(st.lists(st.sampled_from(keys), min_size=1, max_size=2, unique=True)):
        try:
            # `put` reaches into what it was given before
            put(params, key, copy.deepcopy(data.draw(st.sampled_from(ODD))))
        except (KeyError, IndexError, TypeError, AttributeError):
            continue  # the first change took the second's place away
    with tempfile.TemporaryDirectory() as folder:
        message = ""
        try:
            import_params(written(Path(folder), params), name="x")
        except RecipeError as error:
            message = str(error)
        assert "\n" not in message


def test_errors_name_the_line(tmp_path: Path) -> None:
    text = dump(base())
    line = 1 + text.splitlines().index("  dropout_rate: 0.0")
    path = written(tmp_path, text.replace("  dropout_rate: 0.0", "  dropout_rate: 0.2"))
    with pytest.raises(RecipeError, match=rf"params\.yaml:{line}: model\.dropout_rate is 0\.2"):
        import_params(path, name="x")
    path = written(tmp_path, text.replace("  dropout_rate: 0.0", "  dropout_rat: 0.0"))
    with pytest.raises(
        RecipeError, match=rf"params\.yaml:{line}: unknown key 'model\.dropout_rat'; did you mean 'model\.dropout_rate'"
    ):
        import_params(path, name="x")


def test_the_strict_loader_reads_it(tmp_path: Path) -> None:
    """Duplicate keys, tags, aliases, files that are none."""
    text = dump(base())
    for change, reason in (
        (lambda: text.replace("  beta1: 0.9\n", "  beta1: 0.9\n  beta1: 0.8\n"), r"duplicate key 'optimizer\.beta1'"),
        (lambda: text.replace("beta1: 0.9", "beta1: !!python/name:os.system 0.9"), "tag"),
        (lambda: text.replace("beta1: 0.9", "beta1: &a 0.9").replace("beta2: 0.95", "beta2: *a"), "alias"),
        (lambda: "- 1\n", "a params file is a mapping"),
        (lambda: "", "a params file is a mapping"),
        (lambda: "optimizer: 3\n", r"missing key 'model' \(Model section\); add it"),
    ):
        with pytest.raises(RecipeError, match=reason):
            import_params(written(tmp_path, change()), name="x")
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        import_params(Path("absent"), name="x")


def test_other_ways_to_say_a_schedule(tmp_path: Path) -> None:
    def segments(*changes: tuple[str, Any]) -> tuple[Any, list[str]]:
        result = imported(tmp_path, *changes)
        notes = [note for note in result.notes if "learning_rate" in note]
        return [segment.model_dump(exclude_none=True) for segment in result.recipe.schedule.learning_rate], notes

    constant = [{"shape": "constant", "steps": 79721, "start": 0.25}]
    assert segments(("optimizer.learning_rate", 0.25)) == (constant, [])
    assert segments(("optimizer.learning_rate", {"scheduler": "constant", "learning_rate": 0.25})) == (constant, [])
    short = {"scheduler": "CosineDecay", "initial_learning_rate": 1.0, "end_learning_rate": 0.5, "decay_steps": 79720}
    assert segments(("optimizer.learning_rate", short)) == (
        [
            {"shape": "cosine", "steps": 79720, "start": 1.0, "end": 0.5},
            {"shape": "constant", "steps": 1, "start": 0.5},
        ],
        ["optimizer.learning_rate ends 1 steps before runconfig.max_steps: the last rate, 0.5, holds for them"],
    )
    step = ("optimizer.learning_rate", {"learning_rate": 0.25, "scheduler": "Step"})
    params = base()
    put(params, *step)
    line = 1 + dump(params).splitlines().index("    scheduler: Step")
    with pytest.raises(RecipeError, match=rf"params\.yaml:{line}: optimizer\.learning_rate\.0\.scheduler is 'Step'"):
        segments(step)


def test_sources(tmp_path: Path) -> None:
    folders = ["/here/a/train", "/here/b/train", "/here/c_fim_0.3/other"]
    result = imported(tmp_path, ("train_input.mixture", ...), ("train_input.data_dir", folders))
    names = [(source.name, source.path, source.weight) for source in result.recipe.data.sources]
    assert names == [("train", "train", 1 / 3), ("train#1", "train", 1 / 3), ("other", "other", 1 / 3)]
    assert any(
        "data.sources.2 (/here/c_fim_0.3/other) seems to hold fill-in-the-middle" in note for note in result.notes
    )
    assert any("equal weights" in note for note in result.notes)
    result = imported(tmp_path, ("train_input.mixture", ...), ("train_input.data_dir", folders), data_root="/here")
    assert [(source.name, source.path) for source in result.recipe.data.sources] == [
        ("train", "a/train"),
        ("b/train", "b/train"),
        ("other", "c_fim_0.3/other"),
    ]
    assert result.recipe.data.root == "/here"
    with pytest.raises(
        RecipeError, match=r"params\.yaml:\d+: data_dir '/here/a/train' does not lie below data_root '/there'"
    ):
        imported(tmp_path, ("train_input.mixture", ...), ("train_input.data_dir", folders), data_root="/there")


def test_the_micro_batch(tmp_path: Path) -> None:
    assert imported(tmp_path).recipe.batch.micro_batch_size == 66
    derived = imported(tmp_path, micro_batch_size=None)
    assert derived.recipe.batch.micro_batch_size == 132
    assert "the file has no micro-batch: batch.micro_batch_size is 2112 / 16 = 132, no accumulation" in derived.notes
    assert (
        imported(tmp_path, ("train_input.micro_batch_size", 33), micro_batch_size=None).recipe.batch.micro_batch_size
        == 33
    )
    with pytest.raises(
        RecipeError,
        match=r"train_input\.batch_size 2112 is not a multiple of runconfig\.num_csx 5: give micro_batch_size",
    ):
        imported(tmp_path, ("runconfig.num_csx", 5), micro_batch_size=None)
    with pytest.raises(RecipeError, match="global_batch_size 2112 is not a multiple"):
        imported(tmp_path, micro_batch_size=67)


@pytest.mark.parametrize(("pretrained", "state"), [(True, "weights"), (False, "all")])
def test_the_run_before(tmp_path: Path, pretrained: bool, state: str) -> None:
    result = imported(tmp_path, ("runconfig.is_pretrained_checkpoint", pretrained), start_from="before")
    assert result.recipe.start_from == StartFrom(run="before", state=state)  # type: ignore[arg-type]
    assert imported(tmp_path).recipe.start_from is None


def test_overrides_are_checked_as_a_recipe_is(tmp_path: Path) -> None:
    assert imported(tmp_path, overrides=["schedule.steps=7"]).recipe.schedule.steps == 7
    with pytest.raises(RecipeError, match=r"unknown key 'schedule\.step'; did you mean 'schedule\.steps'"):
        imported(tmp_path, overrides=["schedule.step=7"])
