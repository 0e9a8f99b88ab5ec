"""What only a GPU can show of the local and cuda backends: streams, page-locked copies, padding under cuBLAS, and memory
as computed. `make test-gpu` runs it; elsewhere it is skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from weftrain.backends.common import decoder
from weftrain.backends.common.copies import HostCopy, RowsAhead
from weftrain.backends.common.device_memory import alone_needs
from weftrain.backends.common.registry import get_backend
from weftrain.core.backend import Job, Plan
from weftrain.core.config import Recipe
from weftrain.core.errors import OutOfMemoryError
from weftrain.core.order.batch import Batch
from weftrain.core.order.synthetic import synthetic_source
from weftrain.core.recipe_file import load_recipe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: make test-gpu runs it")
CUDA = torch.device("cuda")


def prepared(recipe: Recipe, **options: object) -> Any:
    local = get_backend("local")
    return local.prepare(Job(recipe, Plan(0, 3), local.options.model_validate({"device": "cuda", **options})))


def source_of(recipe: Recipe) -> Any:
    rows = recipe.batch.global_batch_size
    return synthetic_source(recipe.model.vocab_size, recipe.data.sequence_length, rows, rows, 5)


def trained(recipe: Recipe, **options: object) -> tuple[list[float], dict[str, torch.Tensor], Any]:
    run = prepared(recipe, **options)
    losses = [float(result.loss) for result in run.train(source_of(recipe))]
    return losses, dict(run.export_state().tensors), run


def test_padded_copies_train_as_unpadded_ones(
    tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other products of cuBLAS, so not the same bits: bf16 has 8 of them."""
    recipe = tiny_recipe("crystal", "model.intermediate_size=70", "precision.compute=bfloat16")
    losses, _, run = trained(recipe)
    assert run.bound.padded
    monkeypatch.setitem(decoder._INNER_MULTIPLE, "cuda", 1)
    unpadded, _, run = trained(recipe)
    assert not run.bound.padded
    assert losses == pytest.approx(unpadded, rel=5e-3)


@pytest.mark.parametrize("kind", ["none", "selective", "full"])
def test_the_same_bits_twice_and_recomputed(kind: str, tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe("crystal", "precision.compute=bfloat16", "precision.numerics=replayable")
    wanted, state, _ = trained(recipe)
    losses, found, run = trained(recipe, activation_checkpointing=kind)
    assert losses == wanted
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert run.fingerprint().more["deterministic_algorithms"] is True
    assert run.fingerprint().more["driver"]


def test_offloaded_matrices_and_norms_on_the_device(tiny_recipe: Callable[..., Recipe]) -> None:
    """One rank: the first step of cpu_offload updates matrices on the host and norms on the device."""
    recipe = tiny_recipe("crystal", "schedule.steps=3")
    wanted, _, _ = trained(recipe)
    cuda = get_backend("cuda")
    options = cuda.options.model_validate({"device": "cuda", "cpu_offload": True})
    run = cuda.prepare(Job(recipe, Plan(0, 3), options))
    losses = [float(result.loss) for result in run.train(source_of(recipe))]
    assert losses == pytest.approx(wanted, rel=1e-4)
    run.close()


def test_rows_and_state_are_what_was_copied() -> None:
    batches = [Batch(np.full((64, 2049), number)) for number in range(8)]
    for number, (ids, labels, _) in enumerate(RowsAhead(CUDA)(batches)):
        assert int(ids.sum()) == int(labels.sum()) == 64 * 2048 * number
    copy = HostCopy(CUDA, piece_bytes=1 << 20)
    for size in (3, 1 << 18, (1 << 20) + 17):
        tensor = torch.randn(size, device=CUDA)
        assert torch.equal(copy(tensor), tensor.cpu())


def test_the_computed_memory_is_what_torch_allocates() -> None:
    overrides = ["batch.replicas=1", "data.chunks=null", "precision.compute=bfloat16", "model.num_layers=4"]
    for kind, micro, rows in (("none", 4, 4), ("full", 4, 4), ("selective", 2, 4)):
        more = [f"batch.micro_batch_size={micro}", f"batch.global_batch_size={rows}"]
        recipe = load_recipe("amber_7b", [*overrides, *more], "local").recipe
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run = prepared(recipe, activation_checkpointing=kind)
        next(iter(run.train(source_of(recipe))))
        found = torch.cuda.max_memory_allocated() - before
        parts = alone_needs(recipe, kind, False, "cuda")
        assert sum(parts.values()) - parts["program"] - parts["fragments"] == pytest.approx(found, rel=0.1), kind
        run.close()
        del run


def test_memory_that_ends_names_the_device(tiny_recipe: Callable[..., Recipe]) -> None:
    run = prepared(tiny_recipe("crystal"))
    run.update = lambda *_: torch.empty(1 << 50, dtype=torch.uint8, device=CUDA)
    with pytest.raises(OutOfMemoryError, match=r"out of memory in step 0, .*largest parts"):
        next(iter(run.train(source_of(run.recipe))))
