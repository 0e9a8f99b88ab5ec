"""K2-65B's released layout, 8 tensor ranks x 4 stages on 480 GPUs, planned: memory, bubble and time by hand."""

from __future__ import annotations

import pytest

from weftrain.analysis.machine.devices import DEVICES, speeds
from weftrain.backends.cuda import BACKEND
from weftrain.backends.cuda.degrees import Degrees
from weftrain.backends.cuda.needs import needs_of_ranks
from weftrain.backends.cuda.options import CudaOptions
from weftrain.backends.cuda.planner import degrees_of, predict, traffic
from weftrain.core.config import Recipe
from weftrain.core.errors import RecipeError
from weftrain.core.recipe_file import load_recipe

BLOCK, OUTER, HIDDEN = 4 * 8192**2 + 3 * 8192 * 22016, 32032 * 8192, 8192
GPUS = speeds(480, DEVICES["A100-80GB"])


@pytest.fixture(scope="module")
def k2() -> Recipe:
    return load_recipe("k2_65b", [], "cuda").recipe


def options(recipe: Recipe, **changes: object) -> CudaOptions:
    return CudaOptions.model_validate({**recipe.backend.options, **changes})


def test_stages_and_memory(k2: Recipe) -> None:
    """20 layers a stage; a rank has an eighth of a row, of 34 micro-batches of 4 rows; the first stage keeps the streams
    before its layers of 4 of them, the last of one, and each has buffers for what it receives and what comes back.
    """
    shape = degrees_of(k2, options(k2), GPUS)
    assert shape == Degrees(1, 15, 1, 8, pipeline=4)
    assert shape.size == 480
    found = [one.memory_bytes for one in needs_of_ranks(k2, options(k2), shape, "cuda")]
    norms = [2 * 20 * HIDDEN] * 3 + [41 * HIDDEN]
    for rank, (parts, outer) in enumerate(zip(found, (OUTER, 0, 0, OUTER), strict=True)):
        owned = 20 * BLOCK // 120 + outer // 120 + norms[rank]
        assert (parts["weights, fp32"], parts["optimizer"]) == (4 * owned, 8 * owned)
        stream = 4 * HIDDEN * 4 * 2048 // 8
        assert parts["pipeline buffers"] == (34, 68, 68, 34)[rank] * stream
    stream = 4 * HIDDEN * 4 * 2048 // 8
    # one micro-batch more, and the streams that four of them have been given on with
    assert found[0]["activations"] - found[1]["activations"] == pytest.approx((20 + 4) * stream, rel=0.05)


def test_bubble_and_time(k2: Recipe) -> None:
    """3 / (34 + 3) of the passes; halved and more by two stages a rank, which send twice as often."""
    shape = degrees_of(k2, options(k2), GPUS)
    found = predict(k2, options(k2), shape, GPUS)
    passes = found.step_s - found.parts["pipeline bubble"] - found.parts["optimizer"]
    assert found.parts["pipeline bubble"] / (passes + found.parts["pipeline bubble"]) == pytest.approx(3 / 37)
    assert found.notes["pipeline"] == "1f1b, 34 micro-batches, stages of 20 + 20 + 20 + 20 layers"
    assert found.notes["pipeline bubble"].startswith("8.1% of the passes")
    stream = 4 * HIDDEN * 4 * 2048 // 8
    # of a rank in the middle, which the others wait for: it sends both ways
    assert found.sent_bytes["streams between stages"] == 68 * stream
    two = options(k2, pipeline_schedule="interleaved_1f1b", pipeline_virtual_stages=2)
    other = predict(k2, two, shape, GPUS)
    assert other.notes["pipeline bubble"].startswith("4.2% of the passes")
    assert traffic(k2, two, shape)["streams between stages"] == 3 * 34 * stream  # its second stage sends both ways
    without = predict(k2, options(k2, pipeline_parallel=1), Degrees(1, 60, 1, 8), GPUS)
    assert "pipeline bubble" not in without.parts
    assert without.notes == {}


def test_a_tied_embedding_is_on_two_stages() -> None:
    """Each rank of the first and of the last holds as much as with a head of its own, and sends its piece's gradient."""
    found = []
    for tied in ("true", "false"):
        recipe = load_recipe("k2_65b", [f"model.tie_embeddings={tied}"], "cuda").recipe
        asked, shape = options(recipe, pipeline_parallel=2), Degrees(1, 15, 1, 8, pipeline=2)
        ranks = [one.memory_bytes for one in needs_of_ranks(recipe, asked, shape, "cuda")]
        found.append((ranks, traffic(recipe, asked, shape)))
    (ranks, sent), (untied_ranks, untied_sent) = found
    assert ranks == untied_ranks
    exchanged = {"gradient of the tied embedding between stages": 4 * OUTER // 120}
    assert sent == untied_sent | exchanged


def test_what_plan_and_show_say(k2: Recipe) -> None:
    found = BACKEND.predict(k2, options(k2), GPUS)
    assert found.fits
    assert found.largest_micro_batch == 34  # of 2040 / (15 replicas x 4 stages) rows
    lines = BACKEND.outline(k2, options(k2))
    assert lines[0] == "ranks        4 pipeline x 1 replicate x 15 shard x 1 context x 8 tensor = 480"
    assert any("stages of 20 + 20 + 20 + 20 layers" in line for line in lines)


def test_layers_of_stages_come_from_a_recipe() -> None:
    """A backend's option may be a list, as every page says of this one."""
    change = "backend.options={pipeline_parallel: 4, tensor_parallel: 8, pipeline_layers: [21, 21, 21, 17]}"
    recipe = load_recipe("k2_65b", [change], "cuda").recipe
    lines = BACKEND.outline(recipe, CudaOptions.model_validate(recipe.backend.options))
    assert any("stages of 21 + 21 + 21 + 17 layers" in line for line in lines)
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    with pytest.raises(RecipeError, match=r"backend.options.pipeline_layers"):
        load_recipe("k2_65b", ["backend.options.pipeline_layers=[[21, 59]]"], "cuda")
