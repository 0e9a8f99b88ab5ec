"""Perplexity against fp64 for every batch size, and its record."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_stubs import SUBJECT, say_nothing
from float64_reference import initial, objective_reference
from ranks import source_of

from weftrain.analysis.evaluation.generation import load_model
from weftrain.analysis.evaluation.heldout import (
    RaggedRows,
    attend_within_documents,
    held_out_loss,
    run_heldout,
)
from weftrain.analysis.evaluation.records import (
    EvaluationSettings,
)
from weftrain.core.backend import EvalResult
from weftrain.core.config import Recipe
from weftrain.core.errors import DataError
from weftrain.core.initialization import draw
from weftrain.core.model import Decoder
from weftrain.core.order.batch import Batch
from weftrain.core.parameters import parameter_specs


@pytest.fixture(scope="module")
def ragged() -> list[list[int]]:
    numbers = np.random.default_rng(3)
    return [numbers.integers(0, 97, length).tolist() for length in (14, 2, 9, 5, 14, 3, 11, 7, 2)]


def decoder(recipe: Recipe) -> Decoder:
    return load_model({spec.name: draw(spec, recipe.model, 5) for spec in parameter_specs(recipe.model)}, recipe.model)


def loss_in_float64(
    model: Decoder, rows: Sequence[Sequence[int]], masks: Sequence[Sequence[bool]] | None = None
) -> float:
    """Row by row, without any padding, from the logits on in fp64."""
    total, tokens = 0.0, 0
    with torch.no_grad():
        for index, row in enumerate(rows):
            logits = model.logits(torch.tensor([row[:-1]]))[0].double()
            kept = torch.tensor(masks[index] if masks is not None else [True] * (len(row) - 1))
            losses = -logits.log_softmax(-1).gather(-1, torch.tensor(row[1:])[:, None])[:, 0]
            total += float(losses[kept].sum())
            tokens += int(kept.sum())
    return total / tokens


@pytest.mark.parametrize("family", ["amber", "crystal"])
def test_perplexity_is_over_tokens(tiny_recipe: Callable[..., Recipe], ragged: list[list[int]], family: str) -> None:
    model = decoder(tiny_recipe(family))
    wanted = loss_in_float64(model, ragged)
    for batch_size in (1, 2, 3, 7, 100):
        found = held_out_loss(model, RaggedRows("ragged", ragged), batch_size)
        assert found.tokens == sum(len(row) - 1 for row in ragged)
        assert found.loss == pytest.approx(wanted, rel=1e-6)  # fp32 sums of some tens of terms near 5
        assert found.beside_loss["perplexity"] == pytest.approx(math.exp(wanted), rel=1e-5)


class Masked:
    """Held-out rows of one length of which some labels bear no loss, one row none at all."""

    name, dataset_id, num_rows, sequence_length = "masked", "d", 9, 13

    def __init__(self) -> None:
        numbers = np.random.default_rng(4)
        self.ids = numbers.integers(0, 97, (9, 14), dtype=np.int64)
        self.mask = numbers.random((9, 13)) < 0.4
        self.mask[4] = False

    def rows(self, first: int, count: int) -> Batch:
        return Batch(self.ids[first : first + count], self.mask[first : first + count])


def test_perplexity_with_masked_labels(tiny_recipe: Callable[..., Recipe]) -> None:
    model, held = decoder(tiny_recipe("amber")), Masked()
    wanted = loss_in_float64(model, held.ids.tolist(), held.mask.tolist())
    for batch_size in (1, 2, 3, 7):
        found = held_out_loss(model, held, batch_size)
        assert found.tokens == held.mask.sum()
        assert found.loss == pytest.approx(wanted, rel=1e-6)


def test_perplexity_within_documents(tiny_recipe: Callable[..., Recipe]) -> None:
    """No query sees another document's keys: the loss is that of each document's part by itself, at the positions that
    it has.
    """
    model, held = decoder(tiny_recipe("amber")), Masked()
    starts = np.where(np.arange(13) < 6, 0, 6).astype(np.int32)[None].repeat(9, 0)
    attend_within_documents(model)
    held.rows = lambda first, count: Batch(
        held.ids[first : first + count], held.mask[first : first + count], starts[first : first + count]
    )  # type: ignore[method-assign]
    found = held_out_loss(model, held, 4)
    both = held.mask.copy()
    both[:, 6:] = False
    first = loss_in_float64(model, held.ids.tolist(), both.tolist())  # nothing precedes the first document
    for name in ("cos", "sin"):
        model.register_buffer(name, model.get_buffer(name)[6:], persistent=False)
    second = loss_in_float64(model, held.ids[:, 6:].tolist(), held.mask[:, 6:].tolist())
    share = both.sum() / held.mask.sum()
    assert found.loss == pytest.approx(share * first + (1 - share) * second, rel=1e-6)


def test_perplexity_of_nothing_and_of_too_much(tiny_recipe: Callable[..., Recipe]) -> None:
    held = Masked()
    held.mask[:] = False
    with pytest.raises(DataError, match="no token that bears a loss"):
        held_out_loss(decoder(tiny_recipe("amber")), held, 2)
    with pytest.raises(DataError, match="batch size"):
        held_out_loss(decoder(tiny_recipe("amber")), held, 0)
    assert EvalResult(1e4, 1).beside_loss == {"perplexity": math.inf}


def test_held_out_record(tiny_recipe: Callable[..., Recipe], ragged: list[list[int]], tmp_path: Path) -> None:
    model, opened = decoder(tiny_recipe("amber")), []

    def open_model() -> Decoder:
        opened.append(1)
        return model

    def run(settings: EvaluationSettings) -> dict[str, Any]:
        (record,) = run_heldout(
            [RaggedRows("my set/1", ragged, "id")], SUBJECT, settings, open_model, tmp_path, say_nothing
        )
        return record

    record = run(EvaluationSettings(batch_size=2))
    assert (
        record["value"] == record["metrics"]["loss"]["value"] == pytest.approx(loss_in_float64(model, ragged), rel=1e-6)
    )
    assert record["value_percent"] is None
    assert (record["task"], record["step"], record["checkpoint"], record["tokens"]) == (
        "heldout/my set/1",
        40,
        "a" * 64,
        58,
    )
    assert run(EvaluationSettings(batch_size=2)) == record
    assert len(opened) == 1
    assert run(EvaluationSettings(batch_size=3))["batch_size"] == 3
    assert len(opened) == 2
    assert sorted(path.name.rpartition("-")[0] for path in tmp_path.iterdir()) == ["00000040-heldout_my_set_1-0"] * 2


def test_pairs_have_the_objectives_loss_and_measures(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """Against float64, for every even batch size; a record says the objective, and an odd batch size is refused."""
    words = ["name=pairs", "batch.global_batch_size=8", "batch.micro_batch_size=4"]
    recipe = tiny_recipe("amber", *words, "objective={name: dpo, beta: 0.3, label_smoothing: 0.1, reference: base}")
    weights, batch = initial(recipe, 2.0), source_of(recipe).rows(0, 0, 8)
    model = load_model(weights, recipe.model, objective=recipe.objective)
    wanted, _, measures = objective_reference(recipe, weights, batch, held_out=True)

    class Pairs:
        name, dataset_id, num_rows, rows_available, sequence_length = "pairs", "d", 8, 8, 13

        def rows(self, first: int, count: int) -> Batch:
            return batch.take(slice(first, first + count))

    for batch_size in (2, 6, 16):
        found = held_out_loss(model, Pairs(), batch_size, recipe.objective)
        assert found.loss == pytest.approx(wanted, rel=2e-5)
        assert found.measures == found.beside_loss == pytest.approx(measures, rel=2e-5)
    settings = EvaluationSettings(batch_size=4)
    (record,) = run_heldout([Pairs()], SUBJECT, settings, lambda: model, tmp_path, say_nothing, recipe.objective)
    assert record["objective"] == recipe.objective.model_dump()
    assert record["metrics"].keys() == {"loss", *measures}
    with pytest.raises(DataError, match="reads pairs of rows"):
        held_out_loss(model, Pairs(), 3, recipe.objective)
