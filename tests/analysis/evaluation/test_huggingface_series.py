"""Revisions of Pythia, OLMo and others straight from their Hugging Face folders: what weftrain's decoder continues,
scores and recites is what transformers does, to the last token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, their_model
from model_cases import large_weights

from weftrain.analysis.compare.huggingface import load_own, load_revision
from weftrain.analysis.evaluation.generation import Generator
from weftrain.analysis.memorization.scores import Parameters, count_matches, figures
from weftrain.core.model import Decoder

transformers = pytest.importorskip("transformers")
NAMES = ("pythia", "neox_sequential", "olmo2", "olmo3", "llama31")
LENGTHS = (1, 17, 32)  # of prompts; the models have 64 positions
NEW = 32


@pytest.fixture(params=NAMES, scope="module")
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder that transformers saved, and its model."""
    family = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp("series") / "step1000"
    transformers.utils.logging.disable_progress_bar()
    model = their_model(family, large_weights(family.ours)).requires_grad_(False)
    model.save_pretrained(folder)
    return folder, model


def prompts_of(length: int, count: int = 2) -> torch.Tensor:
    return torch.randint(0, 97, (count, length), generator=torch.Generator().manual_seed(length))


def greedy(model: Any, prompts: torch.Tensor, count: int) -> list[list[int]]:
    """transformers' own continuation, token by token from the whole row: no cache, no settings of generate."""
    ids = prompts
    for _ in range(count):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    found: list[list[int]] = ids[:, prompts.shape[1] :].tolist()
    return found


def test_greedy_continuations_are_those_of_transformers(both: tuple[Path, Any]) -> None:
    folder, model = both
    assert isinstance(load_revision(folder), Decoder), "computed by weftrain's decoder"
    prompts = [prompts_of(length) for length in LENGTHS]
    expected = [row for part in prompts for row in greedy(model, part, NEW)]
    found = Generator(load_own(folder)).generate([row for part in prompts for row in part.tolist()], NEW)
    assert found == expected
    assert len({tuple(row) for row in found}) > len(LENGTHS), "prompts move what is continued"


def test_log_likelihoods_are_those_of_transformers(both: tuple[Path, Any]) -> None:
    folder, model = both
    rows = [(row[:3], row[3:]) for length in LENGTHS[1:] for row in prompts_of(length).tolist()]
    rows += [(row, greedy(model, torch.tensor([row]), 4)[0]) for row in prompts_of(5).tolist()]
    found = Generator(load_own(folder)).log_likelihoods(rows)
    for (context, continuation), (total, is_greedy) in zip(rows, found, strict=True):
        logits = model(input_ids=torch.tensor([[*context, *continuation]])).logits[0, len(context) - 1 : -1]
        each = logits.log_softmax(-1).gather(-1, torch.tensor(continuation)[:, None])
        # both are fp32, and add in an order of their own that depends on the processor
        assert total == pytest.approx(float(each.double().sum()), rel=1e-5)
        assert is_greedy == (logits.argmax(-1).tolist() == continuation)
    assert [is_greedy for _, is_greedy in found[-2:]] == [True, True]


def test_memorization_scores_are_those_of_transformers(both: tuple[Path, Any]) -> None:
    """Half of the rows continue as the model does, for some tokens or to the end."""
    folder, model = both
    parameters = Parameters(prompt_tokens=8, continuation_tokens=16)
    prompts = prompts_of(8, 8)
    decoded = np.array(greedy(model, prompts, 16))
    ids = np.concatenate([prompts.numpy(), prompts_of(16, 8).numpy()], axis=1)
    for row, length in ((0, 16), (1, 16), (2, 9), (3, 1)):
        ids[row, 8 : 8 + length] = decoded[row, :length]
    expected = [int(count) for count in (decoded == ids[:, 8:]).sum(axis=1)]
    found = count_matches(Generator(load_own(folder)), ids, parameters)
    assert found == expected
    assert figures(found, 16)[1] == 25.0
