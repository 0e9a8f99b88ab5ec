"""Texts that a run writes: what `weftrain generate` makes of the same state, in its place and without a trace."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from made_texts import sentences
from record_runs import done, weftrain

from weftrain.analysis.evaluation.samples import PromptSampler
from weftrain.core import checkpoint
from weftrain.core.backend import State
from weftrain.core.config import Recipe
from weftrain.core.errors import DataError
from weftrain.core.formats.dataset import TOKENIZER
from weftrain.core.initialization import draw
from weftrain.core.parameters import parameter_specs
from weftrain.core.run.metrics import digest, read_metrics
from weftrain.core.run.speed import Peak

PROMPTS = ["the weft", "1: a"]
ASK = ("log.evaluate_every_steps=4", f"log.sample_prompts={PROMPTS}", "log.sample_tokens=6")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that name a small dataset of text with a start token."""
    home = tmp_path_factory.mktemp("samples")
    (home / "texts").mkdir()
    for number, text in enumerate(sentences(40)):
        (home / "texts" / f"{number}.txt").write_text(text)
    options = ["--name", "text", "--vocab-size", "300", "--sequence-length", "13", "--bos", "<s>"]
    done(weftrain("prep", home / "texts", "--output", home, *options))
    sources = ["data.synthetic_rows=null", "data.sources=[{name: text, path: text, weight: 1}]"]
    return [f"data.root={home}", *sources, "model.vocab_size=512"]


@pytest.fixture
def recipe(tiny_recipe: Callable[..., Recipe], data: list[str]) -> Callable[..., Recipe]:
    return lambda *more: tiny_recipe("crystal", *data, "model.max_position_embeddings=32", *more)


def drawn(recipe: Recipe) -> State:
    return State(0, 0, {f"weights/{one.name}": draw(one, recipe.model, 1) for one in parameter_specs(recipe.model)})


def exporting(state: State) -> Any:
    return SimpleNamespace(export_state=lambda: state)


def test_a_run_with_samples_is_the_run_without_them(
    data: list[str], tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weftrain.cli.assembly.measured_peak", lambda device, dtype: Peak(1e11, "known in tests"))
    command = ["train", "crystal_demo", *tiny_overrides, *data]
    command += ["model.max_position_embeddings=32", "schedule.steps=4", "--runs", tmp_path]
    printed = done(weftrain(*command, *ASK, "--run", "with"))
    done(weftrain(*command, "log.evaluate_every_steps=4", "--run", "without"))
    records = read_metrics(tmp_path / "with")
    samples = [record for record in records if record["kind"] == "sample"]
    assert [(one["step"], one["prompt"]) for one in samples] == [(4, prompt) for prompt in PROMPTS]
    assert f"step      4  sample 'the weft' -> {samples[0]['text']!r}" in printed
    assert digest(records) == digest(read_metrics(tmp_path / "without"))
    states = [checkpoint.load(tmp_path / name / "checkpoints" / "step_00000004")[0] for name in ("with", "without")]
    assert all(torch.equal(tensor, states[1].tensors[name]) for name, tensor in states[0].tensors.items())
    for one in samples:
        asks = ("--prompt", one["prompt"], "--max-new-tokens", 6, "--stop-id", 0)
        assert done(weftrain("generate", tmp_path / "with", *asks)).rstrip("\n").endswith(one["text"].rstrip("\n"))
    refused = weftrain(*command, *ASK, "--run", "null", "--backend", "null")
    assert refused.exit_code == 2
    assert "log.sample_prompts: the null backend has no trained weights" in refused.output
    assert not (tmp_path / "null").exists()


def test_what_cannot_be_sampled_is_refused_before_the_first_step(
    recipe: Callable[..., Recipe], tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"log\.sample_prompts: data\.synthetic_rows are random rows"):
        PromptSampler(tiny_recipe("crystal", *ASK))
    with pytest.raises(DataError, match=r"'the weft' has \d tokens, .*sample_tokens=31 .* the model has 32"):
        PromptSampler(recipe(*ASK, "log.sample_tokens=31"))


def test_data_without_a_tokenizer(recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weftrain.analysis.evaluation.samples.TOKENIZER", f"no_{TOKENIZER}")
    with pytest.raises(DataError, match=r"has no no_tokenizer\.json"):
        PromptSampler(recipe(*ASK))


def test_weights_that_are_not_finite_do_not_end_the_run(recipe: Callable[..., Recipe]) -> None:
    asked = recipe(*ASK)
    state = drawn(asked)
    sampler = PromptSampler(asked)
    assert not any("problem" in one for one in sampler.measure(exporting(state), 4))
    state.tensors["weights/final_norm.weight"].fill_(math.nan)
    found = list(sampler.measure(exporting(state), 4))
    assert [(one["prompt"], one["text"]) for one in found] == [(prompt, "") for prompt in PROMPTS]
    assert all("finite" in one["problem"] for one in found)


def test_a_state_is_given_back_at_once(recipe: Callable[..., Recipe]) -> None:
    """What is still held when training goes on would be copied first."""
    import weakref

    asked = recipe(*ASK)
    state = drawn(asked)
    sampler = PromptSampler(asked)
    gc.disable()
    try:
        tensor = weakref.ref(state.tensors["weights/embedding.weight"])
        list(sampler.measure(exporting(state), 4))
        del state
        assert tensor() is None
    finally:
        gc.enable()
