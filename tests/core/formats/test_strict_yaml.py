"""YAML as recipes hold it: scalars of YAML 1.2, and hostile text refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_texts import TEXT, line_of, refused

from weftrain.core.errors import RecipeError
from weftrain.core.formats.strict_yaml import LineMap, dump_yaml, parse
from weftrain.core.recipe_file import load_recipe


def test_numbers_follow_yaml_1_2(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(TEXT.replace("norm_eps: 1e-6", "norm_eps: 1e-3").replace("description: ", "description: no # "))
    recipe = load_recipe(str(path)).recipe
    assert recipe.model.norm_eps == 1e-3  # YAML 1.1 makes it a string
    assert recipe.description == "no"  # YAML 1.1 makes it False


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("09", 9),
        ("-007", -7),
        ("+3", 3),
        ("0o17", 15),
        ("0x1F", 31),
        ("1_000", "1_000"),
        ("0b11", "0b11"),
        ("1:30", "1:30"),
    ],
)
def test_integers_follow_the_core_schema_in_files_and_overrides(tmp_path: Path, text: str, value: object) -> None:
    # YAML 1.1 reads 010 as 8, 1_000 as 1000 and 1:30 as 90
    assert parse(f"key: {text}", LineMap("x")) == {"key": value}
    if isinstance(value, int) and value > 0:
        assert load_recipe("bench_70m", [f"seed={text}"]).recipe.seed == value
        path = tmp_path / "r.yaml"
        path.write_text(TEXT.replace(f"seed: {load_recipe('bench_70m').recipe.seed}\n", f"seed: {text}\n", 1))
        assert load_recipe(str(path)).recipe.seed == value


def test_an_integer_without_end_is_refused(tmp_path: Path) -> None:
    assert "r.yaml:" in refused(tmp_path, TEXT.replace("num_layers: 12", f"num_layers: {'9' * 5000}"))


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False)
        | st.text(max_size=8)
        | st.from_regex(r"[-+0-9.eox_:~]{1,6}"),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=8,
    )
)
@settings(max_examples=200, deadline=None)
def test_what_is_dumped_reads_back_as_the_same_values(value: object) -> None:
    assert parse(dump_yaml({"key": value}), LineMap("x")) == {"key": value}


def test_duplicate_key_names_both_lines(tmp_path: Path) -> None:
    text = TEXT.replace("  num_heads: 8\n", "  num_heads: 8\n  num_heads: 16\n")
    first = line_of(text, "num_heads: 8")
    message = refused(tmp_path, text)
    assert f"r.yaml:{first + 1}: duplicate key 'model.num_heads'" in message
    assert f"r.yaml:{first}" in message


def test_alias_bomb_is_refused_before_it_expands(tmp_path: Path) -> None:
    bomb = "a: &a [x, x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
    )
    assert "r.yaml:2: alias '*a'" in refused(tmp_path, bomb)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: !!python/object/apply:os.system [ls]\n", "tag 'tag:yaml.org,2002:python/object/apply:os.system'"),
        ("a: [1, 2\n", "not valid YAML"),
        ("- 1\n", "a recipe is a mapping"),
        ("", "a recipe is a mapping"),
        ("a: 1\n---\nb: 2\n", "not valid YAML"),
        ("? [1, 2]\n: 3\n", "a key is a plain word"),
        ("a: " + "[" * 2000, "r.yaml"),
        ("a: " + "[" * 100 + "]" * 100, "nested deeper"),
        ("a: 2020-01-01\n", "unknown key 'a'"),
        ("\x00", "not valid YAML"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in refused(tmp_path, text)


def test_deep_yaml_is_given_up_at_once(tmp_path: Path) -> None:
    for text in ("a: " + "[" * 100_000, "a: " + "{b: " * 50_000, "- " * 100_000):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(RecipeError, match=r"x\.yaml:1: nested deeper than the 12 levels"):
            load_recipe(str(tmp_path / "x.yaml"))
    with pytest.raises(RecipeError, match="nested deeper than the 12 levels"):
        load_recipe("crystal_demo", ["name=" + "[" * 100_000])
