"""docs/coming-from.md: every key of ours exists, and each name of theirs is answered with the key that the page gives."""

from __future__ import annotations

import re

import pytest
from places import ROOT

from weftrain.backends.common.registry import find_backends
from weftrain.core.config import Recipe
from weftrain.core.formats.strict_yaml import keys
from weftrain.core.recipe_file import OTHER_NAMES

PAGE = (ROOT / "docs" / "coming-from.md").read_text()
ROW = re.compile(r"^\| (`.*?) \| (.*?) \|.*\|$", re.MULTILINE)
# Words that mean different things in different sections of the same trainer.
AMBIGUOUS = {"interval", "freq", "mode", "data", "steps"}


def our_keys() -> set[str]:
    options = {
        f"backend.options.{name}" for backend in find_backends().values() for name in backend.options.model_fields
    }
    return {key for key, _ in keys(Recipe)} | options


def test_every_key_of_ours_exists() -> None:
    named = [key for _, ours in ROW.findall(PAGE) for key in re.findall(r"`([a-z_]+\.[a-z0-9_.]+)", ours)]
    assert len(named) > 80
    assert set(named) <= our_keys()


def test_each_name_is_answered_with_the_key_beside_it() -> None:
    answered = 0
    for theirs, ours in ROW.findall(PAGE):
        key = re.fullmatch(r"`([a-z_.0-9]+)`", ours)
        if key is None or key[1] not in our_keys():
            continue
        for name in re.findall(r"`([^`]+)`", theirs):
            last = name.rpartition(".")[2].removeprefix("--").replace("-", "_")
            if last in AMBIGUOUS or last == key[1].rpartition(".")[2]:
                continue
            if last == "decoder_kernel":  # part of a mapping
                continue
            assert OTHER_NAMES.get(last) == key[1], name
            answered += 1
    assert answered > 60


def test_every_answer_is_a_key() -> None:
    assert set(OTHER_NAMES.values()) <= our_keys()


@pytest.mark.parametrize(
    "trainer", ["torchtitan", "litgpt", "Megatron-LM", "Cerebras Model Zoo", "Hugging Face Trainer"]
)
def test_each_trainer_has_its_table(trainer: str) -> None:
    assert f"\n## {trainer}\n" in PAGE
