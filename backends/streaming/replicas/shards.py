"""Stores that are sharded across ranks: all parts are filled, completed and continued together.

If the communicator is not sharded, each function acts on rank 0's store alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor

from weftrain.backends.streaming.communicator import Communicator
from weftrain.backends.streaming.state import Progress, TensorSource, fill
from weftrain.backends.streaming.store.base import Completed, Store
from weftrain.core.errors import BackendError
from weftrain.core.parameters import ParameterSpec


def complete_step(communicator: Communicator, store: Store, completed: Completed) -> None:
    """For rank 0: count a step as complete, in every rank's store."""
    wait_until_spooled(communicator, store)
    store.complete_step(completed)
    if communicator.sharded:
        store.drain()  # first on rank 0: another rank may be one step behind it, never ahead
        communicator.command(do="complete", completed=asdict(completed))


def wait_until_spooled(communicator: Communicator, store: Store) -> None:
    """Before any rank counts a step as complete, every rank must have stored the gradients of that step."""
    if communicator.sharded:
        store.drain()
        communicator.barrier()


def fill_from_rank_0(
    communicator: Communicator,
    store: Store,
    source: TensorSource | None,
    step: int,
    updates: int,
    progress: Progress,
    set_aside: bool,
) -> None:
    """Fill every rank's store from rank 0's `source`, which is None on the other ranks."""
    communicator.command_owners(do="fill", step=step, updates=updates, set_aside=set_aside)

    def broadcast(plane: str, spec: ParameterSpec) -> Tensor:
        found = None if source is None else source(plane, spec)
        whole = torch.zeros(spec.shape) if found is None else found.detach().to("cpu", torch.float32).contiguous()
        return communicator.broadcast(whole)

    tensors = broadcast if source is None or communicator.sharded else source
    fill(store, tensors, step, updates, progress, set_aside=set_aside)


def hold_one_state(communicator: Communicator, store: Store) -> bool:
    """For rank 0: whether its store holds a state. Raises BackendError if another rank's store holds another state."""
    if store.commit is not None and communicator.sharded:
        commit = asdict(store.commit)
        communicator.command(do="compare", commit=commit)
        compare(communicator, store, commit)
    return store.commit is not None


def compare(communicator: Communicator, store: Store, leading: Mapping[str, Any]) -> None:
    """Compare every rank's store with rank 0's commit. A rank that missed the last command `complete` has stored that
    step's gradients, and completes the step now.
    """
    own = store.commit
    if own is not None and own.step == leading["step"] - 1 and own.pending is None and communicator.rank > 0:
        if own.stretch in (leading["stretch"], leading["before"]) or own.step == own.filled_step:
            store.complete_step(Completed.from_json({field.name: leading[field.name] for field in fields(Completed)}))
        own = store.commit
    mine = -1.0 if own is None else float(own.step) if own.stretch == leading["stretch"] else -2.0
    steps = [float(step) for step in communicator.gather_losses([torch.tensor(mine)])]
    wrong = [rank for rank, step in enumerate(steps) if step != leading["step"]]
    if wrong:
        step = int(steps[wrong[0]])
        found = {-1: "holds no state", -2: "is of another branch or run"}.get(step, f"stands at {step}")
        raise BackendError(
            f"the store of rank {wrong[0]} {found}, that of rank 0 stands at step {leading['step']}: give each rank "
            "its own store of this run, or remove all of them and continue from a checkpoint"
        )
