"""The recipe loader: what it accepts, and that each kind of bad input gives one line with file, line, key and
remedy.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recipe_texts import TEXT, line_of, refused

from weftrain.core.config import Recipe
from weftrain.core.errors import RecipeError
from weftrain.core.formats.type_words import keys
from weftrain.core.recipe_file import OTHER_NAMES, builtin_recipes, load_recipe, recorded_recipe


def test_an_empty_value_is_not_null(tmp_path: Path) -> None:
    """A variable that was never set (`optimizer.clip_norm=$UNSET`, a filled-in template) must not turn clipping off."""
    (line,) = (line for line in TEXT.splitlines() if "clip_norm:" in line)
    message = refused(tmp_path, TEXT.replace(line, "  clip_norm:"))
    assert f"r.yaml:{line_of(TEXT, 'clip_norm:')}: 'optimizer.clip_norm' has an empty value: write null" in message
    for override in ("optimizer.clip_norm=", "optimizer.clip_norm=  ", "optimizer.clip_norm=# nothing"):
        assert "'optimizer.clip_norm' has an empty value: write null" in refused(tmp_path, TEXT, override)
    for text in ("null", "~", "Null"):
        assert load_recipe("bench_70m", [f"optimizer.clip_norm={text}"]).recipe.optimizer.clip_norm is None


@pytest.mark.parametrize("name", ["amber_7b", "bench_70m"])
def test_resolved_recipe_survives_json(name: str) -> None:
    recipe = load_recipe(name).recipe
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


def test_unknown_key_names_line_and_nearest(tmp_path: Path) -> None:
    text = TEXT.replace("num_layers: 12", "num_layer: 12")
    line = line_of(text, "num_layer:")
    assert f"r.yaml:{line}: unknown key 'model.num_layer'; did you mean 'model.num_layers'?" in refused(tmp_path, text)


def test_missing_key(tmp_path: Path) -> None:
    message = refused(tmp_path, TEXT.replace("  num_heads: 8\n", ""))
    assert f"r.yaml:{line_of(TEXT, 'model:')}: missing key 'model.num_heads'" in message


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "num_layers: 12",
            "num_layers: twelve",
            "model.num_layers: should be integer > 0, <= 10000, not a string ('twelve')",
        ),
        ("num_layers: 12", "num_layers: '12'", "not a string ('12')"),
        ("num_layers: 12", "num_layers: 12.0", "not a number (12.0)"),
        ("num_layers: 12", "num_layers: true", "not a boolean (True)"),
        ("num_layers: 12", "num_layers: 0", "greater than 0, not 0"),
        ("beta2: 0.95", "beta2: 1.5", "less than 1"),
        ("norm: rms_norm", "norm: batch_norm", "'rms_norm' or 'layer_norm'"),
        ("num_heads: 8", "num_heads: 7", "hidden_size 512 is not a multiple of num_heads 7"),
        ("rotary_dim: 64", "rotary_dim: 66", "rotary_dim 66 must be even and at most the head dimension 64"),
        ("steps: 1000\n  learning", "steps: 2000\n  learning", "learning_rate covers 1000 steps of 2000"),
        ("micro_batch_size: 2", "micro_batch_size: 3", "global_batch_size 2 is not a multiple"),
        ("sequence_length: 512", "sequence_length: 513", "exceeds"),
        ("tie_embeddings: false", "tie_embeddings: no", "should be true or false, not a string ('no')"),
        ("norm_eps: 1e-6", "norm_eps: .nan", "norm_eps"),
    ],
)
def test_wrong_values(tmp_path: Path, old: str, new: str, expected: str) -> None:
    assert old in TEXT
    text = TEXT.replace(old, new)
    message = refused(tmp_path, text)
    assert expected in message
    assert "r.yaml" in message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="No such file"):
        load_recipe(str(tmp_path / "absent.yaml"))
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9\n")
    with pytest.raises(RecipeError, match="not UTF-8 text at byte 6"):
        load_recipe(str(tmp_path / "latin.yaml"))
    (tmp_path / "big.yaml").write_bytes(b"#" * (1 << 21))
    with pytest.raises(RecipeError, match="more than the 262,144 bytes"):
        load_recipe(str(tmp_path / "big.yaml"))
    with pytest.raises(RecipeError, match="did you mean 'bench_70m'"):
        load_recipe("bench_70")


def test_overrides() -> None:
    given = ["schedule.steps=7", "optimizer.clip_norm=null", "data.sources.0.path=x/y", "kernels.pins.rope=reference"]
    recipe = load_recipe("crystal_demo", given)
    assert recipe.recipe.schedule.steps == 7
    assert recipe.recipe.optimizer.clip_norm is None
    assert recipe.recipe.data.sources[0].path == "x/y"
    assert recipe.recipe.kernels.pins == {"rope": "reference"}
    assert recipe.at(("schedule", "steps")) == "command line 'schedule.steps=7'"
    assert recipe.at(("schedule", "learning_rate")).startswith("recipes/crystal_demo.yaml:")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("schedule.steps", "an override reads key.sub=value"),
        (
            "schedule.stepz=3",
            "command line 'schedule.stepz=3': unknown key 'schedule.stepz'; did you mean 'schedule.steps'",
        ),
        ("modle.hidden_size=3", "command line 'modle.hidden_size=3': unknown key 'modle'; did you mean 'model'"),
        ("data.sources.5.path=x", "no such key 'data.sources.5'"),
        ("name.x=1", "it has no key 'x'"),
        ("schedule.steps=1e2", "not a number (100.0)"),
        ("schedule.steps=[", "not valid YAML"),
    ],
)
def test_wrong_overrides(override: str, expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("crystal_demo", [override])
    assert expected in str(caught.value)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=300))
def test_any_text_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "fuzz.yaml"
    path.write_text(text, encoding="utf-8", newline="")
    with pytest.raises(RecipeError):
        load_recipe(str(path))


@pytest.mark.parametrize("name", builtin_recipes())
def test_every_builtin_recipe_loads(name: str) -> None:
    assert load_recipe(name).recipe.name == name


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "model.num_layers=1000000000",
            "model.num_layers: input should be less than or equal to 10000, not 1000000000",
        ),
        ("model.hidden_size=1073741824", "model.hidden_size: input should be less than or equal to"),
        ("model.vocab_size=1000000000000", "model.vocab_size: input should be less than or equal to"),
        ("data.sequence_length=1000000000000", "data.sequence_length: input should be less than or equal to"),
        ("data.chunks=1000000000", "data.chunks: input should be less than or equal to 1000000"),
        ("batch.global_batch_size=16000000000000", "make 983,040,000,000,000,000 tokens: set one lower"),
        ("seed=9223372036854775808", "seed: input should be less than 9223372036854775808"),
        ("log.every_steps=100000000000000000", "log.every_steps: input should be less than or equal to"),
    ],
)
def test_sizes_have_bounds(override: str, words: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(words)):
        load_recipe("crystal_demo", [override])


@pytest.mark.parametrize("recorded", [None, [], "x", 3, {}, {"name": "x"}, {"name": 7}, {"data": []}])
def test_what_was_recorded_is_a_recipe_or_refused_in_words(recorded: object) -> None:
    with pytest.raises(RecipeError, match="somewhere: "):
        recorded_recipe(recorded, "somewhere")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("optimizer.lr", "schedule.learning_rate"),
        ("batch.batch_size", "batch.global_batch_size"),
        ("model.n_layers", "model.num_layers"),
        ("device", "backend.options.device"),
        ("training.seq_len", "data.sequence_length"),
        ("parallelism.tensor_parallel_degree", "backend.options.tensor_parallel"),
        ("optimizer.beta3", "optimizer.beta"),
    ],
)
def test_a_key_of_another_trainer_is_answered_with_ours(given: str, meant: str) -> None:
    with pytest.raises(RecipeError, match=f"unknown key '{given}'; did you mean '{meant}"):
        load_recipe("crystal_demo", [f"{given}=1"])


def test_other_names_lead_to_keys() -> None:
    known = {key for key, _ in keys(Recipe)}
    for name, key in OTHER_NAMES.items():
        assert key in known or key.startswith("backend.options."), name
        assert name not in known


def test_types_are_told_in_words() -> None:
    with pytest.raises(RecipeError, match="learning_rate: should be list of Segment sections, not an integer"):
        load_recipe("crystal_demo", ["schedule.learning_rate=5"])
