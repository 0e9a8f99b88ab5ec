"""What a run computes with: the recipe's kernels, fp32 master weights and moments, and the model whose parameters are
the masters or their compute copies.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch

from weftrain.backends.common.step import norm_of_each
from weftrain.core.backend import Job
from weftrain.core.config import Recipe
from weftrain.core.initialization import draw
from weftrain.core.lora import attach_adapters
from weftrain.core.model import Decoder, kernel_specs
from weftrain.core.parameters import FP32_ROLES, PLANES, ParameterSpec, Role, is_adapter
from weftrain.kernels import Selection, Spec, select

HEAD_USE = "embedding.weight as the head"  # a tied weight's second use; no parameter has such a name


def compute_dtype(recipe: Recipe) -> torch.dtype:
    found: torch.dtype = getattr(torch, recipe.precision.compute)
    return found


# The norm of each tensor of a list, fp32 [n]: as many calls of the op grad_norm, or one of an implementation that takes
# many with the same bits.
Norms = Callable[[Sequence[torch.Tensor]], torch.Tensor]


class OptimizerKernels(NamedTuple):
    """The optimizer's ops for tensors on one type of device."""

    adamw: Callable[..., Any]
    norms: Norms


@dataclass(frozen=True)
class Kernels:
    """The chosen implementations: those of the model within `selection`, and the optimizer's."""

    selection: Selection
    adamw: Callable[..., Any]
    norms: Norms
    newton_schulz: Callable[..., torch.Tensor] | None  # of a recipe whose optimizer is muon, on the model's device
    # device type -> the optimizer's, where its tensors lie on several: matrices on the host, norms on the device
    on: Mapping[str, OptimizerKernels]

    @property
    def manifest(self) -> dict[str, Any]:
        return self.selection.manifest


def select_kernels(
    recipe: Recipe,
    device_type: str,
    adamw_on: str | None = None,
    grad_norm_on: str | None = None,
    also_on: Collection[str] = (),
) -> Kernels:
    """adamw_on, grad_norm_on: device types of the optimizer's ops where they are others than the model's. also_on:
    further device types, for `Kernels.on`.
    """
    compute, attributes = compute_dtype(recipe), {"eps_placement": recipe.optimizer.eps_placement}
    # The residual stream stays fp32 in bf16 compute, as it does under autocast: its sums are where bf16 loses most.
    documents, parts = recipe.data.document_attention, recipe.precision.tensor_parts
    uses = kernel_specs(recipe.model, device_type, compute, torch.float32, documents, recipe.objective, parts)
    first = (adamw_on or device_type, grad_norm_on or device_type)
    places = {first: "optimizer"} | {(more, more): f"optimizer on {more}" for more in also_on if (more, more) != first}
    for types, place in places.items():
        uses += [
            Spec(op, place, where, compute, attributes) for op, where in zip(("adamw", "grad_norm"), types, strict=True)
        ]
    if recipe.optimizer.muon is not None:
        uses.append(Spec("newton_schulz", "optimizer", device_type, getattr(torch, recipe.optimizer.muon.compute)))
    compiled = recipe.backend.options.get("compile") is True
    selection = select(uses, recipe.kernels.preferences, recipe.kernels.pins, compiled=compiled)
    found = {
        types: OptimizerKernels(selection.function("adamw", place), _norms(selection, place))
        for types, place in places.items()
    }
    on = {adamw: chosen for (adamw, norms), chosen in found.items() if adamw == norms}
    orthogonal = None if recipe.optimizer.muon is None else selection.function("newton_schulz", "optimizer")
    return Kernels(selection, *found[first], orthogonal, on)


def _norms(selection: Selection, place: str) -> Norms:
    return selection.of_each.get(("grad_norm", place)) or partial(norm_of_each, selection.function("grad_norm", place))


def decoder_on_meta(recipe: Recipe, kernels: Kernels) -> Decoder:
    """The model without memory of its own; its parameters are bound to others afterwards. Frozen ones take no
    gradient.
    """
    with torch.device("meta"):
        of_run = recipe.objective, recipe.tokens_per_step, recipe.precision.tensor_parts
        model = Decoder(recipe.model, kernels.selection, torch.float32, *of_run)
    attach_adapters(model, recipe.parameters, recipe.tuning.lora)
    for spec in recipe.parameters:
        model.get_parameter(spec.name).requires_grad_(spec.trained)
    return model


def initial_weight(job: Job, spec: ParameterSpec) -> torch.Tensor:
    """The job's, else drawn from the seed, as adapters are that the job's weights do not have."""
    if job.weights is not None and (spec.name in job.weights or not is_adapter(spec)):
        return job.weights[spec.name]
    return draw(spec, job.recipe.model, job.recipe.seed)


def first_weight(job: Job, spec: ParameterSpec) -> torch.Tensor:
    """Of the model that the run began with, for an objective that keeps it."""
    return initial_weight(job if job.first_weights is None else replace(job, weights=job.first_weights), spec)


def initial_planes(job: Job, device: torch.device) -> dict[str, dict[str, torch.Tensor]]:
    """plane -> parameter -> fp32 tensor, in execution order: initial weights, and moments of zero of what is trained.
    A frozen weight that computes in bf16 is as `at_rest` has it.
    """
    planes: dict[str, dict[str, torch.Tensor]] = {plane: {} for plane in PLANES}
    for spec in job.recipe.parameters:
        weight = initial_weight(job, spec).detach()
        if is_frozen_copy(spec, compute_dtype(job.recipe)):
            planes["weights"][spec.name] = at_rest(weight)
            continue
        weight = weight.to(device, torch.float32, copy=True)
        for plane in spec.planes:
            planes[plane][spec.name] = weight if plane == "weights" else torch.zeros_like(weight)
    return planes


def is_frozen_copy(spec: ParameterSpec, compute: torch.dtype) -> bool:
    """Whether a parameter is frozen and computes in another dtype than fp32: the device then has that copy alone."""
    return not spec.trained and compute != torch.float32 and spec.role not in FP32_ROLES


def memory_of_weights(
    specs: Iterable[ParameterSpec], compute: torch.dtype, device: torch.device
) -> dict[str, torch.Tensor]:
    """Parameter -> fp32 zeros for its weight: on the device, but for a frozen one of which the device has a copy in the
    compute dtype alone, whose weight lies in host memory until `Bound.place_frozen` is given it.
    """
    return {
        spec.name: torch.zeros(spec.shape, device="cpu" if is_frozen_copy(spec, compute) else device) for spec in specs
    }


def at_rest(weight: torch.Tensor) -> torch.Tensor:
    """A frozen weight in host memory, as it is exported: in bf16 if that holds every bit of it, else in fp32."""
    narrow = weight.to("cpu", torch.bfloat16)
    return narrow if torch.equal(narrow.float(), weight.cpu()) else weight.to("cpu", torch.float32, copy=True)


def state_tensors(planes: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """'<plane>/<parameter>' -> tensor, as `State.tensors` names them."""
    return {f"{plane}/{name}": tensor for plane, group in planes.items() for name, tensor in group.items()}


# Device type -> multiple to which a feed-forward's inner features are padded in the compute copies. Rows of 10,922 bf16
# numbers are not aligned to 16 bytes, and the fast products of a GPU take no others.
_INNER_MULTIPLE = {"cuda": 64}


@dataclass(frozen=True)
class Bound:
    """A model's parameters in execution order, the trained and the `frozen` ones, and which of the trained ones are
    compute copies of the masters.

    Some copies are larger than their masters (`pads`): their other rows or columns are zeros, compute zeros, and get
    gradients of zero, of which `own` takes the rest. `copies` are what the optimizer writes; `columns` are the padded
    ones that it cannot, since their parts lie apart: `refresh_columns` follows its update.
    """

    parameters: dict[str, torch.nn.Parameter]
    copies: dict[str, torch.Tensor]
    columns: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]  # the masters; of `frozen` bf16 ones see `place_frozen`
    frozen: dict[str, torch.nn.Parameter]

    @property
    def padded(self) -> dict[str, torch.nn.Parameter]:
        return {name: one for name, one in self.parameters.items() if one.shape != self.weights[name].shape}

    def own(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        """A parameter's gradient without its padding, as a view."""
        return _corner(gradient, self.weights[name].shape) if name in self.weights else gradient

    def refresh(self) -> None:
        """All copies, after the masters were changed."""
        for name, copy in self.copies.items():
            copy.copy_(self.weights[name])
        self.refresh_columns()

    def refresh_columns(self) -> None:
        for name, copy in self.columns.items():
            copy.copy_(self.weights[name])

    def place_frozen(self, name: str, weight: torch.Tensor) -> None:
        """Give a frozen parameter its weight. Where it computes in bf16 and that holds the weight exactly, it is kept
        on the device alone; else the device has the rounded copy, and host memory the weight. No tensor that was
        handed out is overwritten.
        """
        parameter = self.frozen[name]
        if parameter.dtype == torch.float32:
            parameter.data = self.weights[name] = weight.to(parameter.device, torch.float32, copy=True)
            return
        weight = at_rest(weight)
        copy = weight.to(parameter.device, parameter.dtype)
        if copy.shape != parameter.shape:
            padded = torch.zeros(parameter.shape, dtype=parameter.dtype, device=parameter.device)
            _corner(padded, weight.shape).copy_(copy)
            copy = padded
        parameter.data = copy
        self.weights[name] = weight if weight.dtype == torch.float32 else _corner(copy, weight.shape)


class Bindable(Protocol):
    """A Decoder, or a part of one with parameters of the same names."""

    def get_submodule(self, target: str) -> torch.nn.Module: ...

    def place_rotary_tables(self, device: torch.device | str) -> None: ...


def bind_parameters(
    model: Bindable,
    specs: Sequence[ParameterSpec],
    weights: dict[str, torch.Tensor],
    compute: torch.dtype,
    device: torch.device,
    pads: bool = False,
) -> Bound:
    """Give a model built on `meta` its parameters and rotary tables: the master tensors themselves in fp32 (and for
    norms), compute copies of them otherwise. pads: the caller takes gradients by `Bound.own`.
    """
    bound = Bound({}, {}, {}, weights, {})
    multiple = _INNER_MULTIPLE.get(device.type, 1) if pads else 1
    for spec in specs:
        master = weights[spec.name]
        owner, _, attribute = spec.name.rpartition(".")
        held = bound.parameters if spec.trained else bound.frozen
        if compute == torch.float32 or spec.role in FP32_ROLES:
            parameter = torch.nn.Parameter(master, requires_grad=spec.trained)
        else:
            dimension = _inner_dimension(spec)
            shape = list(spec.shape)
            if dimension is not None:
                shape[dimension] += -shape[dimension] % multiple
            parameter = torch.nn.Parameter(torch.zeros(shape, dtype=compute, device=device), requires_grad=spec.trained)
            if spec.trained:
                copy = _corner(parameter.detach(), spec.shape)
                (bound.copies if copy.is_contiguous() else bound.columns)[spec.name] = copy.copy_(master)
        held[spec.name] = parameter
        if is_frozen_copy(spec, compute):
            bound.place_frozen(spec.name, master)
        setattr(model.get_submodule(owner), attribute, parameter)
    model.place_rotary_tables(device)
    return bound


def _inner_dimension(spec: ParameterSpec) -> int | None:
    """Which dimension of a parameter counts the inner features of a feed-forward."""
    if ".ffn.gate_proj." in spec.name or ".ffn.up_proj." in spec.name:
        return None if spec.role is Role.LORA_A else 0
    return 1 if spec.name.endswith((".ffn.down_proj.weight", ".ffn.down_proj.lora_a")) else None


def _corner(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    for dimension, size in enumerate(shape):
        tensor = tensor.narrow(dimension, 0, size)
    return tensor


def call(segment: torch.nn.Module, *arguments: Any) -> torch.Tensor:
    """What torch.compile is given: a module's parameters are then inputs of the graph, and all blocks share one."""
    return segment(*arguments)
