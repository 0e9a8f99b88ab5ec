"""Small runs of the streaming backend, and of the local one to compare with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from weftrain.backends.common.registry import get_backend
from weftrain.core.backend import Job, Plan, Run, State
from weftrain.core.config import Recipe
from weftrain.core.model import Decoder, kernel_specs
from weftrain.core.order.synthetic import SyntheticSource, synthetic_source
from weftrain.kernels import select

TIERS = ("ram", "mapped", "direct")
SIX_LAYERS = "model.num_layers=6"  # more than the ring holds


def source_of(recipe: Recipe) -> SyntheticSource:
    rows = recipe.data.synthetic_rows
    assert rows is not None
    return synthetic_source(
        recipe.model.vocab_size, recipe.data.sequence_length, rows, recipe.batch.global_batch_size, seed=5
    )


def prepare(
    recipe: Recipe, name: str = "local", folder: Path | None = None, steps: int = 6, start: int = 0, **options: object
) -> Run:
    backend = get_backend(name)
    chosen = backend.options.model_validate({**recipe.backend.options, **options})
    return backend.prepare(Job(recipe, Plan(start, steps), chosen, folder=folder))


def streaming(recipe: Recipe, folder: Path, tier: str, steps: int = 6, start: int = 0, **options: object) -> Any:
    """Small tiles, two slots, and NaN in every slot that nobody may read: a stale weight shows at once."""
    small = {"tile_elements": 4096, "poison_freed_slots": tier == "direct", "layer_slots": 2} | options
    return prepare(recipe, "streaming", folder, steps, start, tier=tier, **small)


def trained(run: Run, recipe: Recipe) -> tuple[list[float], list[float], State]:
    results = list(run.train(source_of(recipe)))
    return (
        [float(result.loss) for result in results],
        [float(result.grad_norm) for result in results],
        run.export_state(),
    )


def assert_same(found: State, wanted: State) -> None:
    assert (found.step, found.optimizer_updates) == (wanted.step, wanted.optimizer_updates)
    assert set(found.tensors) == set(wanted.tensors)
    different = [name for name in wanted.tensors if not torch.equal(found.tensors[name], wanted.tensors[name])]
    assert not different, different


def abandon(run: Any) -> None:
    """What remains of a process that died: its locks and files are closed, nothing is flushed."""
    store = run.store
    run.executor._updates.close()
    if hasattr(store, "_fail"):
        store._fail(RuntimeError("abandoned"))
    for name in ("_reader", "_writer"):
        if hasattr(store, name):
            with contextlib.suppress(BaseException):
                getattr(store, name).shutdown(cancel_futures=True)
    store._stack.close()


def small(tiny_recipe: Callable[..., Recipe]) -> Recipe:
    return tiny_recipe("crystal", "model.num_layers=3", "schedule.steps=3")


def resumed(recipe: Recipe, folder: Path, tier: str, steps: int = 3, **options: object) -> tuple[int, State]:
    """Where a restart finds the store, and the state at the end of what it then trains."""
    run = streaming(recipe, folder, tier, steps, poison_freed_slots=False, **options)
    stood = run.store.committed.step
    list(run.train(source_of(recipe)))
    state = run.export_state()
    held = State(state.step, state.optimizer_updates, {name: state.tensors[name] for name in state.tensors})
    run.close()
    return stood, held


def abandon_after_drain(run: Any) -> None:
    run.store.drain()
    abandon(run)


def saved_by_a_block(recipe: Recipe) -> int:
    """Bytes that autograd keeps of one block for 8 rows, weights aside: each memory once, whatever views of it are
    saved.
    """
    config, length = recipe.model, recipe.data.sequence_length
    uses = kernel_specs(config, "cpu", torch.float32, residual_dtype=torch.float32)
    model = Decoder(config, select(uses, recipe.kernels.preferences), torch.float32)
    apart = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in apart:
            found[storage.data_ptr()] = storage
        return tensor

    x = torch.randn(8, length, config.hidden_size, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.layers[0](x, model.rotary(length)[0])
    return sum(storage.nbytes() for storage in found.values())
