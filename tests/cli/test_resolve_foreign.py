"""What a record that anybody may have written chooses on this machine: no path, no device, no address."""

from __future__ import annotations

import typing
from pathlib import Path

import pytest

from weftrain.backends.common.registry import find_backends
from weftrain.cli.assembly import recipe_of_checkpoint
from weftrain.cli.resolve import resolve_foreign
from weftrain.core.formats.checkpoint_manifest import folder_name
from weftrain.core.recipe_file import load_recipe
from weftrain.exchange.release.release import RELEASE

OURS = ("cerebras", "cuda", "local", "null", "streaming")


@pytest.mark.parametrize("name", OURS)
def test_a_portable_option_is_a_number_a_truth_value_or_one_of_listed_words(name: str) -> None:
    backend = find_backends()[name]
    fields = backend.options.model_fields
    assert set(backend.portable_options) <= fields.keys()
    assert not {"device", "store", "threads", "timeout_s"} & backend.portable_options
    for option in backend.portable_options:
        kind = fields[option].annotation
        if option == "activation_checkpointing" and name == "cerebras":
            continue  # a word by its validator
        if option == "float8_linears":
            continue  # patterns, which are compared with names of the model's own modules alone
        if option == "pipeline_layers":
            assert str(kind).startswith("list[typing.Annotated[int,"), kind  # numbers of layers
            continue
        assert kind in (bool, int) or typing.get_origin(kind) is typing.Literal, option


@pytest.mark.parametrize(
    ("name", "options", "taken"),
    [
        (
            "streaming",
            {"tier": "mapped", "store": "/home/you/live", "device": "cuda", "activations": "recompute"},
            {"tier", "activations"},
        ),
        (
            "cerebras",
            {"target": "cpu", "credentials_path": "/etc/shadow", "management_address": "evil.example"},
            {"target"},
        ),
        ("local", {"device": "cuda", "compile": False}, {"compile"}),
        ("not_installed", {"folder": "/"}, set()),
    ],
)
def test_what_is_taken(name: str, options: dict[str, object], taken: set[str]) -> None:
    tree = load_recipe("crystal_demo").recipe.model_dump(mode="json")
    tree["backend"] = {"name": name, "options": options}
    said: list[str] = []
    file = resolve_foreign(tree, "a record", say=said.append)
    assert file.recipe.backend.options.keys() == taken
    for left in options.keys() - taken:
        assert f"backend.options.{left}" in said[0]
    assert tree["backend"]["options"] == options


def test_a_release_is_not_asked_where_its_data_are(tmp_path: Path) -> None:
    recipe = load_recipe("crystal_demo", ["data.root=/somebody/elses"]).recipe.model_dump(mode="json")
    (tmp_path / RELEASE).write_text("{}")
    manifest = {"recipe": recipe, "tensors": {}}
    path = tmp_path / "checkpoints" / folder_name(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("weftrain.cli.assembly.check_fit", lambda *arguments, **options: None)
        assert recipe_of_checkpoint(path, manifest).recipe.data.root == str(tmp_path / "data")
        assert recipe_of_checkpoint(path, manifest, ["data.root=/mine"]).recipe.data.root == "/mine"
        (tmp_path / RELEASE).unlink()
        assert recipe_of_checkpoint(path, manifest).recipe.data.root == "/somebody/elses"
