"""Unlearning in the recipe: sources, layers and rows; and a planted set of facts that is forgotten beside one that
stays.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from weftrain.analysis.evaluation.generation import Generator, load_model
from weftrain.backends.common.device_memory import alone_needs
from weftrain.backends.common.registry import get_backend
from weftrain.backends.cuda.degrees import Degrees
from weftrain.backends.cuda.needs import needs as cuda_needs
from weftrain.backends.cuda.options import CudaOptions
from weftrain.backends.streaming.needs import needs as streaming_needs
from weftrain.backends.streaming.options import StreamingOptions, layout_of
from weftrain.backends.streaming.placement import Placement
from weftrain.core.backend import Job, Plan
from weftrain.core.checkpoint import Weights
from weftrain.core.config import Recipe
from weftrain.core.data import training_source
from weftrain.core.errors import RecipeError
from weftrain.core.order.batch import Batch
from weftrain.core.recipe_file import load_recipe
from weftrain.core.unlearning import posterior_loss

Tiny = Callable[..., Recipe]
BIO = "data.sources=[{name: bio, path: b, weight: 0.5}, {name: wiki, path: w, weight: 0.5}]"


def test_sources_and_layers_of_the_recipe() -> None:
    chosen = load_recipe("amber_demo", [BIO, "objective={name: rmu, forget: [bio], layer: 1}"]).recipe
    assert chosen.objective.model_dump() == {
        "name": "rmu", "forget": ("bio",), "forget_weight": 1.0, "retain_weight": 10.0, "layer": 1, "steering": 1.0,
        "vector_seed": 42,
    }  # fmt: skip
    for section, said in (
        ("{name: max_entropy, forget: [boi]}", "'boi' is no source of the recipe: there are bio, wiki"),
        ("{name: max_entropy, forget: [bio, wiki]}", "names every source"),
        ("{name: max_entropy, forget: []}", "forget"),
        ("{name: rmu, forget: [bio], layer: 99}", "objective.layer 99: the model has layers 0.."),
        ("{name: min_posterior, forget: [bio], threshold: 1.0}", "threshold"),
        ("{name: max_entropy}", "forget"),
    ):
        with pytest.raises(RecipeError, match=said.replace("[", r"\[")):
            load_recipe("amber_demo", [BIO, f"objective={section}"])
    load_recipe("amber_demo", [BIO, "objective={name: max_entropy, forget: [bio, wiki], retain_weight: 0}"])


def test_rmu_freezes_what_lies_behind_its_layer() -> None:
    rmu = "objective={name: rmu, forget: [bio], layer: 1}"
    chosen = load_recipe("amber_demo", [BIO, rmu, "tuning.freeze=[embedding, layers.2]"]).recipe
    assert chosen.tuning.freeze == ("embedding", "layers.2", "layers.3", "final_norm", "head")
    assert Recipe.model_validate(chosen.model_dump(mode="json")) == chosen
    lora = "tuning.lora={rank: 4, alpha: 8, targets: ['layers.*.attention.q_proj']}"
    with pytest.raises(RecipeError, match=r"layers.2.attention.q_proj.lora_a lies behind that block"):
        load_recipe("amber_demo", [BIO, rmu, lora])
    change = "changes=[{step: 9, set: {objective: {name: rmu, forget: [bio], layer: 1}}}]"
    with pytest.raises(RecipeError, match="freezes what lies behind its layer: begin another run"):
        load_recipe("amber_demo", [BIO, "objective={name: max_entropy, forget: [bio]}", change])


def test_the_plan_counts_the_layers_that_rmu_keeps() -> None:
    def needs(objective: str) -> int:
        recipe = load_recipe("amber_7b", ["objective=" + objective, "batch.replicas=1"]).recipe
        return alone_needs(recipe, "none", False, "cpu").get("frozen layers", 0)

    assert needs("{name: next_token}") == 0
    forget = "forget: [arxiv]"
    matrices, norms = 4 * 4096**2 + 3 * 4096 * 11008, 2 * 4096
    rmu, kept = f"{{name: rmu, {forget}, layer: 6}}", 2 * (32000 * 4096 + 7 * matrices) + 4 * 7 * norms
    assert needs(rmu) == kept
    recipe = load_recipe("amber_7b", ["objective=" + rmu, "batch.replicas=1"]).recipe
    streaming = StreamingOptions()
    layout = layout_of(recipe, streaming)
    assert streaming_needs(recipe, streaming, layout, Placement()).memory_bytes["frozen layers"] == kept
    sharded = cuda_needs(recipe, CudaOptions(), Degrees(1, 8, 1, 1), "cuda")
    assert sharded.memory_bytes["frozen layers"] == kept // 8


def test_rows_are_marked_by_their_source(tiny_recipe: Tiny) -> None:
    recipe = tiny_recipe("amber", "objective={name: max_entropy, forget: [any]}", "data.synthetic_rows=8")
    marks = training_source(recipe).rows(0, 0, 4).forget
    assert marks is not None
    assert marks.tolist() == [False, True, False, True]


def test_posterior_loss_keeps_its_digits_near_one() -> None:
    logits = torch.tensor([[40.0, 0.0, 0.0], [0.0, 40.0, 0.0]])
    found = posterior_loss(logits, torch.tensor([0, 0]), -15.0)
    assert found[0].item() == pytest.approx(40 - math.log(2), rel=1e-6)  # 1 - p is 2 exp(-40), which fp32 rounds away
    assert found[1].item() == 0.0  # log p is -40: forgotten


FACTS = 16
FORGET, RETAIN = np.arange(FACTS), np.arange(FACTS) + FACTS  # subjects; their objects are ids from 40 on


class Facts:
    """Rows of four facts (subject, 39, object): those of even rows are kept, those of odd ones marked."""

    sequence_length, dataset_id, global_batch_size = 12, "0" * 64, 8
    sample_names = cursors = None

    def __init__(self, objects: np.ndarray) -> None:
        self._objects = objects

    def rows(self, step: int, first: int, count: int) -> Batch:
        rows, marks = [], []
        for row in range(first, first + count):
            rng = np.random.default_rng([step, row])
            subjects = rng.choice(FORGET if row % 2 else RETAIN, 4)
            triples = np.stack([subjects, np.full(4, 39), self._objects[subjects]], 1)
            rows.append(np.concatenate([[38], triples.reshape(-1)]))
            marks.append(bool(row % 2))
        return Batch(np.array(rows), forget=np.array(marks))


def train(recipe: Recipe, source: Facts, weights: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    backend = get_backend("local")
    job = Job(recipe, Plan(0, recipe.schedule.steps), backend.options.model_validate({}), weights)
    run = backend.prepare(job)
    list(run.train(source))  # type: ignore[arg-type]
    state = run.export_state()
    found = {name: tensor.clone() for name, tensor in Weights(state.tensors).items()}
    run.close()
    return found


def known(recipe: Recipe, weights: Mapping[str, Tensor], objects: np.ndarray, subjects: np.ndarray) -> float:
    """The share of facts whose object the model gives as the likeliest."""
    model = Generator(load_model(weights, recipe.model))
    rows = [([38, int(subject), 39], [int(objects[subject])]) for subject in subjects]
    return float(np.mean([greedy for _, greedy in model.log_likelihoods(rows)]))


OBJECTS = np.random.default_rng(3).integers(40, 90, 2 * FACTS)
TRAINING = ["batch.global_batch_size=8", "batch.micro_batch_size=8", "data.sequence_length=12", "data.synthetic_rows=8"]
TRAINING += ["schedule.learning_rate=[{shape: constant, steps: 1000, start: 0.003}]"]


@functools.cache
def learned(tiny_recipe: Tiny) -> dict[str, Tensor]:
    """Weights that know all facts."""
    recipe = tiny_recipe("amber", *TRAINING, "schedule.steps=150")
    weights = train(recipe, Facts(OBJECTS), None)
    assert [known(recipe, weights, OBJECTS, subjects) for subjects in (FORGET, RETAIN)] == [1.0, 1.0]
    return weights


@pytest.mark.prove
@pytest.mark.parametrize(
    "objective",
    [
        "{name: max_entropy, forget: [any]}",
        "{name: min_posterior, forget: [any]}",
        "{name: random_matching, forget: [any]}",
        "{name: rmu, forget: [any], layer: 0, steering: 20.0, retain_weight: 100.0}",
    ],
)
def test_a_planted_set_of_facts_is_forgotten_and_the_other_stays(objective: str, tiny_recipe: Tiny) -> None:
    torch.set_num_threads(1)
    recipe = tiny_recipe("amber", *TRAINING, "schedule.steps=40", f"objective={objective}")
    weights = train(recipe, Facts(OBJECTS), learned(tiny_recipe))
    forgotten, kept = (known(recipe, weights, OBJECTS, subjects) for subjects in (FORGET, RETAIN))
    assert forgotten <= 0.25, (forgotten, kept)
    assert kept >= 0.9, (forgotten, kept)
