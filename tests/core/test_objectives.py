"""The objective's section of a recipe, and what it computes beyond what the conformance suite asks of every backend."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from weftrain.core.config import Recipe
from weftrain.core.errors import RecipeError
from weftrain.core.objectives import DpoLoss, Extras, NextTokenLoss, measures_of
from weftrain.core.objectives_section import DpoObjective, NextTokenObjective
from weftrain.kernels.reference import linear_cross_entropy

Tiny = Callable[..., Recipe]
SOURCES = ["data.synthetic_rows=null", "data.sources=[{name: a, path: a, weight: 1.0}]", "data.row_length=26"]


def test_a_recipe_of_before_has_the_section_and_the_hash_that_it_had(tiny_recipe: Tiny) -> None:
    tree = tiny_recipe("amber").model_dump(mode="json")
    assert tree["objective"] == {"name": "next_token", "normalizer": "bearing_tokens"}
    recorded = Recipe.from_record({**tree, "objective": {"normalizer": "all_positions"}})
    assert recorded.objective == NextTokenObjective(normalizer="all_positions")
    dpo = tiny_recipe("crystal", "objective={name: dpo, beta: 0.1, reference: base}")
    assert Recipe.model_validate(dpo.model_dump(mode="json")) == dpo


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["objective.name=sft"], r"objective"),
        (["objective={name: dpo, reference: base}"], r"beta"),
        (["objective={name: dpo, beta: 0.0, reference: base}"], r"beta"),
        (["objective={name: dpo, beta: 0.1}"], r"reference"),
        (["objective={name: dpo, beta: 0.1, reference: ../base}"], r"reference"),
        (["objective={name: dpo, beta: 0.1, reference: base, label_smoothing: 0.5}"], r"label_smoothing"),
        (["objective={name: dpo, beta: 0.1, reference: base, normalizer: all_positions}"], r"normalizer"),
        (
            ["objective={name: dpo, beta: 0.1, reference: base, form: ipo, label_smoothing: 0.1}"],
            r"'label_smoothing' is of form sigmoid",
        ),
        (["objective.label_smoothing=1.0"], r"label_smoothing"),
        (["objective.z_loss=-1.0"], r"z_loss"),
        (
            [
                "objective={name: dpo, beta: 0.1, reference: base}",
                "batch.global_batch_size=3",
                "batch.micro_batch_size=3",
            ],
            r"batch\.global_batch_size 3 is odd, and objective dpo reads pairs",
        ),
        (
            ["objective={name: dpo, beta: 0.1, reference: base}", "batch.micro_batch_size=1"],
            r"batch\.micro_batch_size 1 is odd",
        ),
        (
            ["objective={name: dpo, beta: 0.1, reference: base}", *SOURCES, "data.document_attention=true"],
            r"data\.document_attention is of rows that several documents share",
        ),
        (
            ["objective={name: dpo, beta: 0.1, reference: base}", *SOURCES, "data.row_length=null"],
            r"set data\.row_length to 2 x data\.sequence_length",
        ),
    ],
)
def test_what_an_objective_cannot_be_is_refused(overrides: list[str], words: str, tiny_recipe: Tiny) -> None:
    with pytest.raises(RecipeError, match=words) as refused:
        tiny_recipe("crystal", *overrides)
    assert "\n" not in str(refused.value)


def at_head(weight: Tensor) -> Callable[..., Tensor]:
    return lambda hidden, labels, **terms: linear_cross_entropy(hidden, weight, labels, **terms)


def drawn(rows: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [rows, 6, 8], weight [11, 8], labels, reference."""
    numbers = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(shape, generator=numbers) for shape in ((rows, 6, 8), (11, 8)))
    labels = torch.randint(0, 11, (rows, 6), generator=numbers)
    labels[torch.rand(rows, 6, generator=numbers) < 0.3] = -100
    return hidden, weight, labels, -10 * torch.rand(rows, generator=numbers, dtype=torch.float64)


def test_a_policy_that_is_its_reference_has_a_margin_of_zero_to_the_last_bit() -> None:
    hidden, weight, labels, _ = drawn()
    loss = DpoLoss(DpoObjective(name="dpo", beta=0.1, reference="base"))
    losses = at_head(weight)
    own = -torch.stack([losses(row, of) for row, of in zip(hidden, labels, strict=True)]).double()
    sums = loss(losses, hidden.requires_grad_(), labels, Extras(reference=own))
    measures = measures_of(loss._objective, sums.detach())
    assert {name: float(value) for name, value in measures.items()} == dict.fromkeys(DpoObjective.measures, 0.0)
    assert sums[0].tolist() == pytest.approx([2 * math.log(2), 2])
    # there the loss falls by beta / 2 for each nat of the margin: chosen answers become likelier, rejected ones less
    (gradient,) = torch.autograd.grad(sums[0, 0], hidden)
    each = [losses(row, of) for row, of in zip(hidden, labels, strict=True)]
    (expected,) = torch.autograd.grad(sum(0.05 * (each[at] - each[at + 1]) for at in (0, 2)), hidden)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("form", ["sigmoid", "ipo"])
@pytest.mark.parametrize("normalized", [False, True])
def test_a_pair_of_padding_neither_counts_nor_has_a_gradient(form: str, normalized: bool) -> None:
    hidden, weight, labels, reference = drawn()
    objective = DpoObjective.model_validate(
        {"name": "dpo", "beta": 0.3, "form": form, "length_normalized": normalized, "reference": "base"}
    )
    padded = labels.clone()
    padded[2:] = -100
    found, gradients = [], []
    for rows, of, known in ((hidden, padded, reference), (hidden[:2], labels[:2], reference[:2])):
        rows = rows.clone().requires_grad_()
        sums = DpoLoss(objective)(at_head(weight), rows, of, Extras(reference=known))
        sums[0, 0].backward()
        found.append(sums.detach())
        gradients.append(rows.grad)
    assert torch.equal(found[0], found[1])
    assert torch.equal(gradients[0][:2], gradients[1])
    assert not gradients[0][2:].any()
    held_out = DpoLoss(objective)
    with torch.no_grad():
        assert torch.equal(held_out(at_head(weight), hidden, padded, Extras(reference=reference)), found[0])


def test_a_batch_without_what_the_objective_needs_is_an_error() -> None:
    hidden, weight, labels, _ = drawn()
    with pytest.raises(ValueError, match="objective dpo: the batch has no log-probabilities"):
        DpoLoss(DpoObjective(name="dpo", beta=0.1, reference="base"))(at_head(weight), hidden, labels, None)
    with pytest.raises(ValueError, match=r"objective\.token_weights: the batch has no token weights"):
        NextTokenLoss(NextTokenObjective(token_weights=True))(at_head(weight), hidden, labels, None)
