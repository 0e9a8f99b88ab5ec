"""The step of a rank, with `meta` in place of a GPU: which tensors go to which device's kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from weftrain.backends.common import decoder
from weftrain.backends.common.decoder import PLANES, OptimizerKernels, select_kernels
from weftrain.backends.common.muon import MuonUpdate
from weftrain.backends.common.phase_clock import PhaseClock
from weftrain.backends.common.registry import get_backend
from weftrain.backends.common.step import LossScale, held_by_device, update_sets
from weftrain.backends.cuda.degrees import Degrees
from weftrain.backends.cuda.engine import CudaRun
from weftrain.backends.cuda.totals import Totals
from weftrain.core.backend import Job, Plan
from weftrain.core.config import Recipe
from weftrain.core.optim import parameter_groups
from weftrain.core.order.synthetic import synthetic_source
from weftrain.core.parameters import parameter_specs

CPU, META = torch.device("cpu"), torch.device("meta")


def recording(seen: list[Tensor]) -> OptimizerKernels:
    """Kernels that compute nothing, and remember what tensors they were given."""

    def adamw(*lists: list[Tensor] | None, gradient_scale: Tensor, **options: object) -> None:
        seen.extend(tensor for tensors in lists if tensors is not None for tensor in tensors)
        seen.append(gradient_scale)

    def norms(gradients: Sequence[Tensor]) -> Tensor:
        seen.extend(gradients)
        return torch.ones(len(gradients), device=gradients[0].device)

    return OptimizerKernels(adamw, norms)


def test_with_offloading_each_device_has_kernels_and_tensors_of_its_own(tiny_recipe: Callable[..., Recipe]) -> None:
    """FSDP offloads the matrices, and leaves the norms, which it does not manage, where the model computes."""
    recipe = tiny_recipe("crystal")
    specs = parameter_specs(recipe.model)
    weights = {spec.name: torch.empty(spec.shape, device=META if "norm" in spec.name else CPU) for spec in specs}
    run: Any = object.__new__(CudaRun)
    run._recipe, run._world, run._clock = recipe, SimpleNamespace(device=META, size=1), PhaseClock(CPU, False)
    run._model, run._optimizer_updates = SimpleNamespace(owners=lambda name: 1, updated=lambda: None), 0
    run._planes, run._held = dict.fromkeys(PLANES, weights), held_by_device(weights)
    groups = parameter_groups(recipe.model, recipe.optimizer)
    run._muon = MuonUpdate(recipe, groups, {}, None)
    run._sets = {where: update_sets(groups, {}, held) for where, held in run._held.items()}
    seen: dict[str, list[Tensor]] = {"cpu": [], "meta": []}
    run._kernels = SimpleNamespace(on={kind: recording(tensors) for kind, tensors in seen.items()})
    run._totals = Totals(run._world, run._clock, run._kernels, run._model, run._held, Degrees(), None)
    run._totals.loss_and_norm([torch.zeros((), device=META)], LossScale(1, 1), weights)
    run._update(weights, torch.ones(()), {group.name: 0.1 for group in groups})
    for kind, tensors in seen.items():
        assert {tensor.device.type for tensor in tensors} == {kind}
    sets = {where.type: len(found) for where, found in run._sets.items()}
    for kind, tensors in seen.items():  # a gradient's norm; weight, gradient and two moments; a set's scale
        assert len(tensors) - sets[kind] == 5 * sum(weight.device.type == kind for weight in weights.values()) > 0


def test_the_optimizer_is_selected_for_every_device_that_holds_tensors(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe("crystal", "kernels.preferences=[reference]")
    both = select_kernels(recipe, "cpu", "meta", "meta", also_on={"cpu"})
    assert set(both.on) == {"cpu", "meta"}
    for op in ("adamw", "grad_norm"):
        modules = [module for entry in both.manifest["ops"][op] for module in entry["modules"]]
        assert sorted(modules) == ["optimizer", "optimizer on cpu"]
    assert select_kernels(recipe, "cpu", also_on={"cpu"}).manifest == select_kernels(recipe, "cpu").manifest


@pytest.mark.parametrize("micro", [4, 2])
def test_padded_copies_compute_the_same_under_ddp(
    micro: int, tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank: what DDP reduces is padded, what the optimizer gets is not."""
    sizes = ["model.intermediate_size=70", "precision.compute=bfloat16", "batch.global_batch_size=4"]
    recipe, cuda = tiny_recipe("crystal", *sizes, f"batch.micro_batch_size={micro}"), get_backend("cuda")
    options = cuda.options.model_validate({"parallel": "ddp", "device": "cpu", "threads": 1})
    source, found = synthetic_source(97, recipe.data.sequence_length, 12, 4, 5), []
    for multiple in (1, 64):
        monkeypatch.setitem(decoder._INNER_MULTIPLE, "cpu", multiple)
        run: Any = cuda.prepare(Job(recipe, Plan(0, 3), options))
        assert bool(run._model._bound.padded) == (multiple == 64)
        _, gradients = run.gradients(source.rows(0, 0, 4))
        losses = [float(result.loss) for result in run.train(source)]
        found.append((losses, gradients | dict(run.export_state().tensors)))
        run.close()
    assert found[0][0] == found[1][0]
    assert all(torch.equal(tensor, found[1][1][name]) for name, tensor in found[0][1].items())


def test_a_step_is_timed_around_its_result_and_its_update(
    tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result is marked behind all that it needs and before the host waits for it; the update is inside the step."""
    recipe, seen = tiny_recipe("crystal"), []

    def told(name: str, value: object = None) -> Callable[..., Any]:
        return lambda *_, **__: (seen.append(name), value)[1]

    run: Any = object.__new__(CudaRun)
    run._recipe, run.step_number, run._groups, run._pipeline, run._tied = recipe, 0, [], None, None
    run._world = SimpleNamespace(device=CPU, size=1, step=0, together=lambda what: contextlib.nullcontext())
    run._clock = SimpleNamespace(to=told("part"), stop=told("parts read", {}))
    run._step_clock = SimpleNamespace(begin=told("begin"), result=told("result"), end=told("end", 7.0))
    run._forward_backward = told("forward and backward", ([torch.zeros(())], LossScale(1, 1), 0.0))
    run._model = SimpleNamespace(take_gradients=told("gradients", {}))
    run._totals = SimpleNamespace(loss_and_norm=told("norm", (torch.ones(()), torch.ones(()), {})), losses=list)
    run._update = told("update")
    monkeypatch.setattr("weftrain.backends.cuda.engine.step_happens", told("wait", True))
    monkeypatch.setattr("weftrain.backends.cuda.engine.group_learning_rates", lambda *_: {})
    source: Any = SimpleNamespace(rows=told("rows"))
    assert run.step(source).step_ms == 7.0
    timed = [name for name in seen if name != "part"]
    wanted = ["begin", "forward and backward", "gradients", "norm", "result", "wait", "update", "parts read", "end"]
    assert timed == wanted
