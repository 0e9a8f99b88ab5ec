"""float8 linear maps through torchao, emulated where no device has them: the same training within what eight bits
allow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from ranks import source_of

from weftrain.backends.common.registry import get_backend
from weftrain.backends.cuda.rendezvous import leave
from weftrain.core.backend import Job, Plan
from weftrain.core.config import Recipe

pytest.importorskip("torchao", reason="torchao is not installed: pip install 'weftrain[float8]'")


@pytest.fixture(autouse=True)
def _no_world_stays() -> Iterator[None]:
    yield
    leave()


def trained(recipe: Recipe, **options: Any) -> tuple[dict[str, torch.Tensor], list[float]]:
    cuda = get_backend("cuda")
    recipe = Recipe.model_validate(
        {**recipe.model_dump(), "backend": {"name": "cuda", "options": {"device": "cpu", **options}}}
    )
    run = cuda.prepare(Job(recipe, Plan(0, recipe.schedule.steps), cuda.options.model_validate(recipe.backend.options)))
    _, gradients = run.gradients(source_of(recipe).rows(0, 0, 4))
    losses = [float(result.loss) for result in run.train(source_of(recipe))]
    run.close()
    return gradients, losses


GROUPED = ["model.num_kv_heads=2", "model.head_dim=32", "model.qk_norm=per_head", "model.norm_placement=after"]
GELU = ["model.feed_forward=gelu", "model.residual=parallel", "model.qkv_bias=true"]


@pytest.mark.parametrize(
    "fields", [[], *(pytest.param(fields, marks=pytest.mark.prove) for fields in (GROUPED, GELU))], ids=len
)
def test_float8_is_near_and_is_not_the_same(fields: list[str], tiny_recipe: Callable[..., Recipe]) -> None:
    """Three bits of mantissa in the blocks: gradients differ by a tenth, losses hardly; an eighth of that would be no
    float8 at all.
    """
    sizes = [
        "model.hidden_size=64",
        "model.num_heads=4",
        "model.intermediate_size=96",
        "data.sequence_length=16",
        "model.vocab_size=112",
    ]
    recipe = tiny_recipe("amber", *sizes, *fields, "precision.compute=bfloat16")
    (plain, plain_losses), (eight, eight_losses) = trained(recipe), trained(recipe, float8=True)
    apart = {
        name: ((eight[name] - plain[name]).norm() / plain[name].norm()).item()
        for name in plain
        if "proj.weight" in name
    }
    assert min(apart.values()) > 0.0125, apart
    assert max(apart.values()) < 0.5, apart
    assert eight_losses == pytest.approx(plain_losses, rel=0.03)
