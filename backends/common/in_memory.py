"""For backends whose whole model is on one device: state in and out, the update, held-out loss."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from weftrain.backends.common.copies import HostCopy
from weftrain.backends.common.decoder import (
    bind_parameters,
    compute_dtype,
    decoder_on_meta,
    initial_planes,
    select_kernels,
    state_tensors,
)
from weftrain.backends.common.device import memory_stats
from weftrain.backends.common.muon import MuonUpdate
from weftrain.backends.common.state_snapshot import SnapshotOwner, StateSnapshot, check_state
from weftrain.backends.common.step import clip_coefficient, evaluate_rows, update, update_sets
from weftrain.core.backend import EvalResult, Job, State
from weftrain.core.optim import parameter_groups
from weftrain.core.order.batch import EvaluationSource
from weftrain.core.parameters import Role


class InMemoryRun:
    """A run without its steps. A derived class calls `snapshots.detach` before each step."""

    def __init__(self, job: Job, device: torch.device, pads: bool = False) -> None:
        """pads: the derived class takes gradients by `bound.own`."""
        recipe = job.recipe
        self.recipe, self.plan, self.device = recipe, job.plan, device
        self.step_number, self.optimizer_updates = job.plan.start_step, 0
        self.kernels, self.planes = select_kernels(recipe, device.type), initial_planes(job, device)
        self.model, compute = decoder_on_meta(recipe, self.kernels), compute_dtype(recipe)
        self.bound = bind_parameters(self.model, recipe.parameters, self.planes["weights"], compute, device, pads)
        self.parameters = self.bound.parameters  # those that are trained
        self.groups = parameter_groups(recipe.model, recipe.optimizer, recipe.tuning)
        self.snapshots, self._host_copy = SnapshotOwner(), HostCopy(device)
        self._sets = update_sets(self.groups, self.bound.copies)
        self._muon = MuonUpdate(recipe, self.groups, self.bound.copies, self.kernels.newton_schulz)

    def update(self, gradients: Mapping[str, torch.Tensor], norm: torch.Tensor, rates: Mapping[str, float]) -> None:
        """Clip and update. norm: of the gradients, 0-dim fp32."""
        optimizer, self.optimizer_updates = self.recipe.optimizer, self.optimizer_updates + 1
        scale, count = clip_coefficient(norm, optimizer.clip_norm), self.optimizer_updates
        update(self.kernels.adamw, self._sets, self.planes, gradients, optimizer, rates, count, scale)
        self._muon.update(self.planes, gradients, rates, scale)
        self.bound.refresh_columns()

    def evaluate(self, source: EvaluationSource) -> EvalResult:
        """Held-out loss in the compute dtype; eager, so that no second graph is compiled for it."""
        micro = self.recipe.batch.micro_batch_size
        return evaluate_rows(self.model, source, micro, self.device, self.recipe.objective)

    def export_state(self) -> State:
        """See Run.export_state. A tensor is copied on access, or before the run trains on."""
        held = state_tensors(self.planes)
        shapes = {name: tuple(tensor.shape) for name, tensor in held.items()}
        # biases of routers have no gradient, and change all the same
        moved = {spec.name for spec in self.recipe.parameters if spec.role is Role.ROUTER_BIAS}
        frozen = {f"weights/{name}" for name in self.bound.frozen.keys() - moved}

        def read(name: str) -> torch.Tensor:
            return self._host_copy(held[name]).float()  # a frozen weight may be bf16

        tensors = self.snapshots.track(StateSnapshot(shapes, read, frozen))
        return State(self.step_number, self.optimizer_updates, tensors)

    def import_state(self, state: State) -> None:
        """See Run.import_state. Raises CheckpointError, with nothing changed, for a state that does not fit."""
        mine = state_tensors(self.planes)
        check_state(state.tensors, {name: tuple(tensor.shape) for name, tensor in mine.items()})
        self.snapshots.detach()
        for name in mine:  # one at a time: a lazy state never is in memory as a whole
            if (parameter := name.removeprefix("weights/")) in self.bound.frozen:
                self.bound.place_frozen(parameter, state.tensors[name])
                mine[name] = self.planes["weights"][parameter] = self.bound.weights[parameter]
            else:
                mine[name].copy_(state.tensors[name])
        self.step_number, self.optimizer_updates = state.step, state.optimizer_updates
        self.bound.refresh()

    def stats(self) -> dict[str, float]:
        return memory_stats(self.device)

    def close(self) -> None:
        """Release every tensor."""
        self.snapshots.detach()
        for plane in self.planes.values():
            plane.clear()
        for held in (self.bound.parameters, self.bound.copies, self.bound.columns, self.bound.frozen):
            held.clear()
        self._sets = []
