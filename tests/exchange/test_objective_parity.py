"""Objectives against the libraries that people know them from: trl's DPO trainer and transformers' losses, on the same
rows and the same weights in fp32.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from weftrain.backends.common.registry import get_backend
from weftrain.core.backend import Job, Plan, Run
from weftrain.core.config import Recipe
from weftrain.core.initialization import draw
from weftrain.core.order.batch import Batch
from weftrain.core.parameters import parameter_specs
from weftrain.exchange.huggingface.config import config_to_huggingface
from weftrain.exchange.layouts import export_weights

transformers = pytest.importorskip("transformers")
Tiny = Callable[..., Recipe]
TOLERANCE = 1e-5


def both(recipe: Recipe) -> tuple[Run, Any, dict[str, Tensor]]:
    """A local run and transformers' model, of the same weights: larger ones than at initialisation."""
    weights = {
        spec.name: draw(spec, recipe.model, 3) * (2.0 if len(spec.shape) > 1 else 1.0)
        for spec in parameter_specs(recipe.model)
    }
    local = get_backend("local")
    run = local.prepare(Job(recipe, Plan(0, 1), local.options.model_validate({"device": "cpu"}), weights))
    settings = transformers.LlamaConfig(**config_to_huggingface(recipe.model), attn_implementation="eager")
    model = transformers.LlamaForCausalLM(settings)
    model.load_state_dict(dict(export_weights(weights, recipe.model, "llama")))
    return run, model, weights


def compare(run: Run, batch: Batch, recipe: Recipe, model: Any, loss: Tensor) -> None:
    model.zero_grad()
    loss.backward()
    found, gradients = run.gradients(batch)
    assert found == pytest.approx(loss.item(), rel=TOLERANCE)
    wanted = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, gradient in export_weights(gradients, recipe.model, "llama"):
        assert (gradient - wanted[name]).norm() <= TOLERANCE * wanted[name].norm(), name


def rows(count: int, seed: int = 0) -> Batch:
    """Prompts and answers of unequal lengths."""
    numbers = np.random.default_rng(seed)
    starts, ends = numbers.integers(1, 5, (count, 1)), numbers.integers(6, 13, (count, 1))
    place = np.arange(13)
    mask = (place >= starts) & (place < ends)
    reference = -4.5 * mask.sum(1) + numbers.normal(size=count)
    return Batch(numbers.integers(0, 97, (count, 14)), mask, reference=reference)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_masked_rows_as_transformers_trains_them(smoothing: float, tiny_recipe: Tiny) -> None:
    recipe = tiny_recipe("amber", f"objective={{label_smoothing: {smoothing}}}", "batch.micro_batch_size=2")
    run, model, _ = both(recipe)
    batch = rows(4)
    ids = torch.from_numpy(batch.ids)
    labels = ids.clone()
    labels[:, 1:].masked_fill_(~torch.from_numpy(batch.loss_mask), -100)
    labels[:, 0] = -100
    if smoothing:
        smoother = transformers.trainer_pt_utils.LabelSmoother(epsilon=smoothing)
        loss = smoother(model(input_ids=ids), labels, shift_labels=True)
    else:
        loss = model(input_ids=ids, labels=labels).loss
    compare(run, batch, recipe, model, loss)


# trl's name for each of ours. Its smoothed sigmoid is `aot`, which for one pair at a time sorts nothing.
FORMS = {
    "sigmoid": ("sigmoid", {}),
    "sigmoid_norm": ("sigmoid", {"length_normalized": True}),
    "ipo": ("ipo", {"length_normalized": True}),
    "aot": ("sigmoid", {"label_smoothing": 0.2}),
}


@pytest.mark.parametrize("theirs", FORMS)
def test_pairs_as_trl_trains_them(theirs: str, tiny_recipe: Tiny) -> None:
    pytest.importorskip("trl")
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.utils import add_fused_lm_head

    form, options = FORMS[theirs]
    keys = {"name": "dpo", "beta": 0.3, "form": form, "reference": "base", **options}
    given = ", ".join(f"{key}: {str(value).lower() if value is True else value}" for key, value in keys.items())
    recipe = tiny_recipe("amber", f"objective={{{given}}}", "batch.micro_batch_size=2")
    run, model, _ = both(recipe)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    model.train()
    batch = rows(4)
    trainer: Any = object.__new__(DPOTrainer)  # its loss alone: no data, no optimizer
    trainer.__dict__ |= {
        "model": model,
        "accelerator": SimpleNamespace(
            device=torch.device("cpu"), gather_for_metrics=lambda found: found, gather=lambda found: found
        ),
        "beta": 0.3,
        "label_smoothing": options.get("label_smoothing", 0.0),
        "loss_types": [theirs],
        "loss_weights": [1.0],
        "f_divergence_type": "reverse_kl",
        "precompute_ref_logps": True,
        "ld_alpha": None,
        "aux_loss_enabled": False,
        "use_weighting": False,
        "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    total = torch.zeros(())
    for first in (0, 2):
        chosen_and_rejected = batch.take(slice(first, first + 2))
        mask = np.pad(chosen_and_rejected.loss_mask, ((0, 0), (1, 0)))
        reference = torch.from_numpy(chosen_and_rejected.reference).float()
        inputs = {
            "input_ids": torch.from_numpy(chosen_and_rejected.ids),
            "attention_mask": torch.ones(2, 14, dtype=torch.int64),
            "completion_mask": torch.from_numpy(mask.astype(np.int64)),
            "ref_chosen_logps": reference[:1],
            "ref_rejected_logps": reference[1:],
        }
        total = total + trainer._compute_loss(model, inputs, False) / 2
    compare(run, batch, recipe, model, total)
    if not options.get("length_normalized"):  # trl's rewards are of sums in every form
        means = {name: np.mean(values) for name, values in trainer._metrics["train"].items()}
        (result,) = run.train(_Fixed(batch))
        ours = [float(result.measures[f"reward_{name}"]) for name in ("chosen", "rejected", "margin", "accuracy")]
        theirs_found = [means[f"rewards/{name}"] for name in ("chosen", "rejected", "margins", "accuracies")]
        assert ours == pytest.approx(theirs_found, rel=TOLERANCE)


class _Fixed:
    """One batch at every step."""

    sequence_length, global_batch_size, dataset_id = 13, 4, "fixed"

    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def rows(self, step: int, first: int, count: int) -> Batch:
        return self._batch.take(slice(first, first + count))

    def sample_names(self, step: int, first: int, count: int) -> list[str]:
        return [f"row {number}" for number in range(first, first + count)]

    def cursors(self, step: int) -> dict[str, Any]:
        return {}


def test_packed_rows_are_their_documents_one_by_one(tiny_recipe: Tiny) -> None:
    """Masked documents packed into rows, each attending to itself alone, have the loss and the gradient that they have
    in rows of their own, padded without loss.

    Rotary positions are counted from the row's first token, and attention sees their differences alone.
    """
    numbers = np.random.default_rng(5)
    lengths = [(4, 9), (7, 6), (13,), (5, 3, 5)]  # labels of the documents of each row, its 13
    packed_ids, starts, mask = numbers.integers(0, 97, (4, 14)), np.zeros((4, 13), np.int32), np.zeros((4, 13), bool)
    alone_ids, alone_mask = [], []
    for row, documents in enumerate(lengths):
        first = 0
        for length in documents:
            own = np.arange(first, first + length)
            starts[row, own] = first
            mask[row, own] = numbers.random(length) < 0.6
            mask[row, own[-1]] = False  # its label is the next document's first token
            alone_ids.append(np.pad(packed_ids[row, first : first + length + 1], (0, 13 - length)))
            alone_mask.append(np.pad(mask[row, own], (0, 13 - length)))
            first += length
    overrides = ("batch.micro_batch_size=2",)
    packed, _, weights = both(tiny_recipe("amber", "batch.global_batch_size=4", *overrides))
    single, _, _ = both(tiny_recipe("amber", f"batch.global_batch_size={len(alone_ids)}", *overrides))
    loss, gradients = packed.gradients(Batch(packed_ids, mask, starts))
    wanted_loss, wanted = single.gradients(Batch(np.stack(alone_ids), np.stack(alone_mask)))
    assert loss == pytest.approx(wanted_loss, rel=1e-6)
    for name in weights:
        assert (gradients[name] - wanted[name]).norm() <= 1e-6 * wanted[name].norm(), name
