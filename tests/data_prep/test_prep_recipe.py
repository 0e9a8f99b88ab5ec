"""Preparation recipes: every one that ships loads and makes the folders that the training recipes read; wrong ones name
the line.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from weftrain.core.errors import RecipeError
from weftrain.core.recipe_file import load_recipe
from weftrain.data_prep.prep_recipe import builtin_prep_recipes, is_prep_recipe, load_prep_recipe

MINIMAL = "name: mine\ndescription: d\nsequence_length: 8\ndatasets:\n  - {name: a, inputs: [{addresses: [x.jsonl]}]}\n"


def write(tmp_path: Path, text: str) -> str:
    (tmp_path / "r.yaml").write_text(text)
    return str(tmp_path / "r.yaml")


@pytest.mark.parametrize("name", builtin_prep_recipes())
def test_every_recipe_loads(name: str) -> None:
    recipe = load_prep_recipe(name)
    assert recipe.name == name
    assert recipe.datasets


@pytest.mark.parametrize(
    ("prepared", "trained"),
    [
        ("amber", ["amber_7b"]),
        ("crystalcoder", ["crystalcoder_7b_phase1", "crystalcoder_7b_phase2", "crystalcoder_7b_phase3"]),
    ],
)
def test_what_the_training_recipes_read_is_what_is_made(prepared: str, trained: list[str]) -> None:
    """The folder, the row length and the FIM of each source, and nothing that no phase reads."""
    made = {dataset.name: dataset for dataset in load_prep_recipe(prepared).datasets}
    read = set()
    for name in trained:
        data = load_recipe(name).recipe.data
        assert data.sequence_length == load_prep_recipe(prepared).sequence_length
        for source in data.sources:
            assert made[source.path].fim == source.fim
            read.add(source.path)
    assert read == made.keys()


def test_ambers_chunks_are_the_checkpoints_steps() -> None:
    """FACTS: 1,706,976 rows a chunk are 762 steps of 2240 and 96 rows left over."""
    chunks = load_prep_recipe("amber_chunks").datasets[0].chunks
    assert chunks is not None
    recipe = load_recipe("amber_7b").recipe
    assert (chunks.count, chunks.global_batch_size) == (360, recipe.batch.global_batch_size)
    assert 1_706_976 // 2240 == recipe.checkpoint.every_steps == recipe.schedule.steps // chunks.count


def test_defaults_and_overrides(tmp_path: Path) -> None:
    recipe = load_prep_recipe(
        write(tmp_path, MINIMAL), ["packing=best_fit", "datasets.0.fim={rate: 0.9, spm_share: 0.5}"]
    )
    assert recipe.packing == "best_fit"
    assert recipe.datasets[0].fim is not None
    assert recipe.max_failures == 0
    assert recipe.engine == "auto"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("sequence_length: 8", "sequence_lenth: 8"),
            r"r\.yaml:3: unknown key 'sequence_lenth'; did you mean 'sequence_length'",
        ),
        (("sequence_length: 8\n", ""), "missing key 'sequence_length'"),
        (("sequence_length: 8", "sequence_length: 0"), r"r\.yaml:3: sequence_length"),
        (("name: a,", "name: a, fim: {rate: 2, spm_share: 0.5},"), r"r\.yaml:5: datasets\.0\.fim\.rate"),
        (("name: a,", "name: a, fim: {rte: 1, spm_share: 0.5},"), r"unknown key 'datasets\.0\.fim\.rte'; did you mean"),
        (("addresses: [x.jsonl]", "addresses: []"), r"datasets\.0\.inputs\.0\.addresses"),
        (("description: d", "description: d\ntokenizer: t.json\nvocab_size: 500"), "only one of them"),
        (("  - {", "  - {name: a, inputs: [{addresses: [y]}]}\n  - {"), "two datasets are named 'a'"),
        (("name: mine", "name: mine\nname: other"), "duplicate key 'name'"),
        (("name: mine\n", "- a\n"), "not valid YAML|a mapping of sections"),
    ],
)
def test_a_wrong_recipe_names_the_place(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    assert change[0] in MINIMAL
    with pytest.raises(RecipeError, match=message):
        load_prep_recipe(write(tmp_path, MINIMAL.replace(*change)))


def test_names(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'amber'"):
        load_prep_recipe("ambr")
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        load_prep_recipe(str(tmp_path / "absent.yaml"))
    assert is_prep_recipe("amber")
    assert is_prep_recipe("x/y.yaml")
    assert not is_prep_recipe("texts.jsonl")
