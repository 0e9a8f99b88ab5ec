"""Every objective on every backend: gradients, losses and measures against float64, for micro-batches and ranks whose
rows bear unequal numbers of tokens; what a backend does not have is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conformance_cases import FOUND, of, prepare
from float64_reference import initial, objective_reference, relative, state_with
from ranks import source_of
from written_datasets import store_rows

from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError
from weftrain.core.formats.shard_reader import read_rows
from weftrain.core.order.batch import Batch

Tiny = Callable[..., Recipe]

OBJECTIVES = {
    "stored": "{z_loss: 0.01, label_smoothing: 0.1, token_weights: true}",  # rows of a dataset
    "terms_by_positions": "{normalizer: all_positions, z_loss: 0.01, token_weights: true}",
    "dpo": "{name: dpo, beta: 0.3, label_smoothing: 0.2, reference: base}",
    "ipo": "{name: dpo, beta: 0.5, form: ipo, length_normalized: true, reference: base}",
}


@pytest.fixture(params=OBJECTIVES)
def recipe(request: pytest.FixtureRequest, name: str, tiny_recipe: Tiny, tmp_path: Path) -> Recipe:
    """Rows with 13, 3, 4, 5, 1, 12, 13 and 13 bearing tokens, two a micro-batch; of the dataset in another order."""
    batch = ("batch.global_batch_size=8", "batch.micro_batch_size=2")
    made_up = tiny_recipe("crystal", "name=pairs", f"objective={OBJECTIVES[request.param]}", *batch)
    if request.param != "stored":
        return made_up
    return stored(made_up, tmp_path)


def stored(made_up: Recipe, folder: Path) -> Recipe:
    """A recipe that reads the same rows from a dataset."""
    store_rows(folder / "a", source_of(made_up).rows(0, 0, 8), made_up.model.vocab_size)
    data = {"synthetic_rows": None, "root": str(folder), "sources": [{"name": "a", "path": "a", "weight": 1.0}]}
    return Recipe.model_validate({**made_up.model_dump(), "data": {**made_up.data.model_dump(), **data}})


def test_gradients_losses_and_measures(name: str, recipe: Recipe) -> None:
    if missing := FOUND[of(name)].unsupported & set(recipe.objective.features):
        with pytest.raises(BackendError, match=rf"objective\.(name is dpo|{sorted(missing)[0]} is .*) and the "):
            prepare(name, recipe)
        return
    run, weights, source = prepare(name, recipe, steps=1), initial(recipe, 2.0), source_of(recipe)
    run.import_state(state_with(weights))
    batch = source.rows(0, 0, 8)
    wanted_loss, wanted, measures = objective_reference(recipe, weights, batch)
    loss, gradients = run.gradients(batch)
    assert loss == pytest.approx(wanted_loss, rel=2e-5)
    assert gradients.keys() == wanted.keys()
    errors = {key: relative(gradients[key], wanted[key]) for key in wanted if not key.endswith("k_proj.bias")}
    assert max(errors.values()) < 2e-5, max(errors.items(), key=lambda item: item[1])
    (result,) = run.train(source)
    assert float(result.loss) == pytest.approx(wanted_loss, rel=2e-5)
    norm = torch.stack([gradient.norm() for gradient in wanted.values()]).norm().item()
    assert float(result.grad_norm) == pytest.approx(norm, rel=2e-5)
    assert (result.tokens, result.bearing_tokens) == (104, 64)
    assert {key: float(value) for key, value in result.measures.items()} == pytest.approx(measures, rel=2e-5)


def test_held_out_loss(name: str, recipe: Recipe) -> None:
    """Of pairs, the objective's over a last round that is padded; of next_token, the plain cross entropy whatever the
    objective adds to it.
    """
    if FOUND[of(name)].unsupported & set(recipe.objective.features):
        return
    run, weights, rows = prepare(name, recipe, steps=1), initial(recipe, 2.0), source_of(recipe)
    run.import_state(state_with(weights))
    six = rows.rows(0, 0, 8).take(np.array([0, 1, 2, 3, 1, 2]))

    class HeldOut:
        name, sequence_length, num_rows, dataset_id = "held", 13, 6, "x"

        def rows(self, first: int, count: int) -> Batch:
            return six.take(slice(first, first + count))

    found = run.evaluate(HeldOut())
    wanted, _, measures = objective_reference(recipe, weights, six, held_out=True)
    assert found.loss == pytest.approx(wanted, rel=2e-5)
    assert six.loss_mask is not None
    assert found.tokens == six.loss_mask.sum()
    assert found.measures == pytest.approx(measures, rel=2e-5)


WRONG = {
    "divided by the weights": ("weftrain.core.objectives_section.NextTokenObjective.divisor", lambda *_: 77),
    "divided by positions": ("weftrain.core.objectives_section.NextTokenObjective.divisor", lambda *at: at[2]),
    "weights of the token before": ("weftrain.core.data.read_rows", lambda *at: shifted(read_rows(*at))),
    "no weights": ("weftrain.core.data.read_rows", lambda *at: read_rows(*at[:3])),
}


def shifted(planes: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return planes | {"token_weights": np.roll(planes["token_weights"], 1, axis=1)}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_comparison_sees_wrong_weights_and_divisors(
    wrong: str, tiny_recipe: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up = tiny_recipe("amber", "name=pairs", f"objective={OBJECTIVES['stored']}", "batch.global_batch_size=8")
    recipe = stored(made_up, tmp_path)
    weights, rows = initial(recipe, 2.0), source_of(recipe).rows(0, 0, 8)
    _, wanted, _ = objective_reference(recipe, weights, rows)
    monkeypatch.setattr(*WRONG[wrong])
    run = prepare("local", recipe, steps=1)
    run.import_state(state_with(weights))
    _, gradients = run.gradients(source_of(recipe).rows(0, 0, 8))
    assert max(relative(gradients[key], wanted[key]) for key in wanted) > 1e-2
