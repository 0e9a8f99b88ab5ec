"""Wrong implementations, each a right one with one fault around it, for tests/kernels/checks/test_planted_faults.py.

They stand in a module of their own because a check that needs a process of its own finds a function by module and name.
"""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from weftrain.kernels import KernelError, reference

Function = Callable[..., Any]


# ---- numerics that an example shows


def gelu_for_silu(gate: Tensor, up: Tensor) -> Tensor:
    reference.swiglu(gate, up)
    return F.gelu(gate) * up


def sees_the_next_token(q: Tensor, k: Tensor, v: Tensor, *, scale: float, **rest: Any) -> Tensor:
    reference.attention(q, k, v, scale=scale, **rest)
    scores = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(q.shape[2] // k.shape[2], 2)).float() * scale
    hidden = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(2)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1).to(q.dtype)
    return torch.einsum("bhts,bshd->bthd", weights, v.repeat_interleave(q.shape[2] // v.shape[2], 2))


def eps_left_out(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    return reference.rms_norm(x, weight, eps=0.0)


def k_not_turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
    return reference.rope(q, k, cos, sin, **rest)[0], k.clone()


def eps_on_the_other_side(*arguments: Any, eps_placement: str, **rest: Any) -> None:
    other = {
        "after_bias_correction": "before_bias_correction",
        "before_bias_correction": "after_bias_correction",
    }[eps_placement]
    reference.adamw(*arguments, eps_placement=other, **rest)


def ignored_rows_counted(logits: Tensor, labels: Tensor, **rest: Any) -> Tensor:
    return reference.cross_entropy(logits, labels.clamp(min=0), **rest)


class _GradientTimes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return y.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def one_percent_more_gradient(gate: Tensor, up: Tensor) -> Tensor:
    return _GradientTimes.apply(reference.swiglu(gate, up), 1.01)  # type: ignore[no-any-return]


# ---- sizes


def first_keys_forgotten(q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, **rest: Any) -> Tensor:
    """Beyond 1,024 tokens a query sees the last 1,024 keys."""
    reach = 1024 if q.shape[1] > 1024 and window is None else window
    return reference.attention(q, k, v, window=reach, **rest)


def last_chunk_lost(hidden: Tensor, weight: Tensor, labels: Tensor, **rest: Any) -> Tensor:
    """Of more than 2^20 logits, the last row."""
    whole = hidden.shape[0] * weight.shape[0] <= 2**20
    rows = slice(None) if whole else slice(hidden.shape[0] - 1)
    return reference.linear_cross_entropy(hidden[rows], weight, labels[rows], **rest)


def grid_ends(gate: Tensor, up: Tensor) -> Tensor:
    """Only the first 65,536 elements are computed."""
    inside = torch.arange(gate.numel(), device=gate.device).view(gate.shape) < 65_536
    return torch.where(inside, reference.swiglu(gate, up), 0.0)


def tensor_cut(gradients: Sequence[Tensor]) -> Tensor:
    return reference.grad_norm([gradient.reshape(-1)[:65_536] for gradient in gradients])


_LISTS = ("parameters", "gradients", "exp_avgs", "exp_avg_sqs", "copies")


def list_cut(**named: Any) -> None:
    """A launch takes 64 tensors."""
    cut = {name: None if named[name] is None else named[name][:64] for name in _LISTS}
    reference.adamw(**{**named, **cut})


class _FirstRowsOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: int) -> Tensor:
        ctx.rows = rows
        return weight.expand(rows, -1).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[:1024].sum(0), None


def weight_gradient_of_the_first_rows(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """One partial sum a program, and 1,024 programs."""
    reference.rms_norm(x, weight, eps=eps)
    normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    weights = _FirstRowsOnly.apply(weight, x.numel() // x.shape[-1]).view(x.shape)
    return (normed * weights.float()).to(x.dtype)


def vocabulary_cut(logits: Tensor, labels: Tensor, **rest: Any) -> Tensor:
    """The sum of exponentials ends at column 65,536."""
    if logits.shape[1] <= 65_536:
        return reference.cross_entropy(logits, labels, **rest)
    seen = logits.masked_fill(torch.arange(logits.shape[1]) >= 65_536, float("-inf"))
    return reference.cross_entropy(seen, labels.clamp(max=65_535), **rest)


def offsets_of_32_bits(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """The address of a row wraps at 2^31 elements."""
    if x.dim() and x.stride(0) * (x.shape[0] - 1) >= 2**31:
        rows = [x.stride(0) * row % 2**31 for row in range(x.shape[0])]
        flat = x.detach()
        read = torch.stack([flat.as_strided(x.shape[1:], x.stride()[1:], x.storage_offset() + row) for row in rows])
        x = x + (read - flat)
    return reference.rms_norm(x, weight, eps=eps)


class _NarrowSum(torch.autograd.Function):
    """The bias, whose gradient is added row by row in bf16."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor, rows: int) -> Tensor:
        return bias.expand(rows, -1).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = torch.zeros(grad.shape[-1], dtype=torch.bfloat16)
        for row in grad:
            total += row.bfloat16()
        return total.to(grad.dtype), None


def bias_gradient_in_bf16(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    y = reference.layer_norm(x, weight, torch.zeros_like(bias), eps=eps)
    return (y.float() + _NarrowSum.apply(bias, x.numel() // x.shape[-1]).view(x.shape).float()).to(x.dtype)


def squares_in_bf16(gradients: Sequence[Tensor]) -> Tensor:
    """128 lanes, each of which adds in bf16."""
    lanes = torch.zeros(128, dtype=torch.bfloat16)
    for gradient in gradients:
        flat = gradient.reshape(-1).bfloat16()
        for part in F.pad(flat, (0, -flat.numel() % 128)).view(-1, 128):
            lanes += part.square()
    return lanes.float().sum().sqrt()


# ---- ranges


def _loss(scaled: Tensor, labels: Tensor, ignore_index: int, logsumexp: Tensor) -> Tensor:
    kept = labels != ignore_index
    at_label = scaled.gather(1, torch.where(kept, labels, 0)[:, None]).squeeze(1)
    return torch.where(kept, logsumexp - at_label, 0.0)


def no_maximum(logits: Tensor, labels: Tensor, *, ignore_index: int = -100, **rest: Any) -> Tensor:
    scaled = logits.float()
    return _loss(scaled, labels, ignore_index, scaled.exp().sum(-1).log())


def offset_kept(logits: Tensor, labels: Tensor, *, ignore_index: int = -100, **rest: Any) -> Tensor:
    scaled = logits.float()
    return _loss(scaled, labels, ignore_index, torch.logsumexp(scaled, -1))


def variance_in_one_pass(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    wide = x.float()
    mean = wide.mean(-1, keepdim=True)
    variance = (wide.square().mean(-1, keepdim=True) - mean.square()).clamp(min=0)
    return ((wide - mean) * torch.rsqrt(variance + eps) * weight.float() + bias.float()).to(x.dtype)


def squares_in_fp16(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    statistic = torch.rsqrt((x / x.shape[-1] ** 0.5).square().float().sum(-1, keepdim=True) + eps)
    return (x.float() * statistic * weight.float()).to(x.dtype)


def exponential_overflows(gate: Tensor, up: Tensor) -> Tensor:
    exponential = gate.float().exp()
    return (gate.float() * exponential / (1 + exponential) * up.float()).to(gate.dtype)


def softmax_without_maximum(q: Tensor, k: Tensor, v: Tensor, *, scale: float, **rest: Any) -> Tensor:
    first = rest["document_start"] if rest.get("document_start") is not None else torch.zeros(q.shape[:2])
    position = torch.arange(q.shape[1])
    visible = (position <= position[:, None]) & (position >= first[:, :, None])
    if rest.get("window") is not None:
        visible = visible & (position > position[:, None] - rest["window"])
    group = q.shape[2] // k.shape[2]
    scores = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(group, 2)).float() * scale
    weights = scores.exp() * visible[:, None]
    weights = (weights / weights.sum(-1, keepdim=True)).to(q.dtype)
    return torch.einsum("bhts,bshd->bthd", weights, v.repeat_interleave(group, 2))


def update_index_of_16_bits(*lists: Any, update_index: int, **rest: Any) -> None:
    reference.adamw(*lists, update_index=max(ctypes.c_int16(update_index).value, 1), **rest)


def norm_in_fp16(gradients: Sequence[Tensor]) -> Tensor:
    return torch.stack([gradient.square().sum().float() for gradient in gradients]).sum().sqrt()


# ---- steps, and one call after another


class Remembers:
    """adamw that keeps one of its arguments from the first call."""

    def __init__(self, name: str) -> None:
        self.name, self.kept = name, None
        self.__name__ = self.__qualname__ = f"Remembers({name})"
        self.__module__ = __name__

    def __call__(self, *lists: Any, **statics: Any) -> None:
        if self.kept is None:
            self.kept = statics[self.name]
        reference.adamw(*lists, **{**statics, self.name: self.kept})


def zero_gradients_skipped(
    parameters: Any, gradients: Any, exp_avgs: Any, exp_avg_sqs: Any, copies: Any, **rest: Any
) -> None:
    """A tensor whose gradient is zero keeps its moments."""
    moved = [index for index, gradient in enumerate(gradients) if bool(gradient.any())]
    lists = ([part[index] for index in moved] for part in (parameters, gradients, exp_avgs, exp_avg_sqs))
    reference.adamw(*lists, None if copies is None else [copies[index] for index in moved], **rest)


def decay_ends(*lists: Any, update_index: int, weight_decay: float, **rest: Any) -> None:
    """No weight decay after 10,000 updates."""
    decay = weight_decay if update_index < 10_000 else 0.0
    reference.adamw(*lists, update_index=update_index, weight_decay=decay, **rest)


_ANSWERS: dict[tuple[Any, ...], Tensor] = {}


def answers_from_memory(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Asked again with a tensor at the same address, the answer is the same."""
    if x.requires_grad:
        return reference.rms_norm(x, weight, eps=eps)
    return _ANSWERS.setdefault((x.data_ptr(), x.shape, x.dtype), reference.rms_norm(x, weight, eps=eps))


_NORMS: dict[Any, Tensor] = {}


def norm_from_memory(gradients: Sequence[Tensor]) -> Tensor:
    key = tuple(gradient.data_ptr() for gradient in gradients)
    return _NORMS.setdefault(key, reference.grad_norm(gradients))


_BUFFERS: dict[Any, Tensor] = {}


class _OneBuffer(torch.autograd.Function):
    """The output always lies in the same memory."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        buffer = _BUFFERS.setdefault((gate.shape, gate.dtype), torch.empty_like(gate))
        return buffer.copy_(F.silu(gate) * up).data

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = (saved.detach().requires_grad_() for saved in ctx.saved_tensors)
        with torch.enable_grad():
            return torch.autograd.grad(F.silu(gate) * up, (gate, up), grad)  # type: ignore[return-value]


def output_in_one_buffer(gate: Tensor, up: Tensor) -> Tensor:
    return _OneBuffer.apply(gate, up)  # type: ignore[no-any-return]


_SAVED: dict[str, Tensor] = {}


class _SavedOutside(torch.autograd.Function):
    """What the backward needs is kept in one place for all calls."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        _SAVED["gate"], _SAVED["up"] = gate.detach().clone(), up.detach().clone()
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = (_SAVED[name].clone().requires_grad_() for name in ("gate", "up"))
        with torch.enable_grad():
            return torch.autograd.grad(F.silu(gate) * up, (gate, up), grad)  # type: ignore[return-value]


def one_workspace(gate: Tensor, up: Tensor) -> Tensor:
    return _SavedOutside.apply(gate, up)  # type: ignore[no-any-return]


# ---- side effects


def changes_its_input(gate: Tensor, up: Tensor) -> Tensor:
    result = reference.swiglu(gate, up)
    up.data.mul_(1.0001)
    return result


def borrows_its_input(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
    """Written to, and put back."""
    result = reference.rope(q, k, cos, sin, **rest)
    q.detach().neg_().neg_()
    return result


def passes_its_input_on(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
    return reference.rope(q, k, cos, sin, **rest)[0], k.view_as(k)


class _ScalesIncoming(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        result = grad.clone()
        grad.mul_(0.5)
        return result


def overwrites_the_incoming_gradient(gate: Tensor, up: Tensor) -> Tensor:
    return _ScalesIncoming.apply(reference.swiglu(gate, up))  # type: ignore[no-any-return]


class _InPlaceBackward(torch.autograd.Function):
    """The memory of what was saved becomes that of the gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        ctx.softmax, ctx.labels = logits.float().softmax(-1), labels
        return reference.cross_entropy(logits, labels)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        kept = ctx.labels != -100
        rows = kept.nonzero().squeeze(-1)
        ctx.softmax[rows, ctx.labels[rows]] -= 1
        return ctx.softmax.mul_((grad * kept)[:, None]), None


def gradient_in_what_was_saved(logits: Tensor, labels: Tensor, **rest: Any) -> Tensor:
    return _InPlaceBackward.apply(logits, labels)  # type: ignore[no-any-return]


class _NotSavedForBackward(torch.autograd.Function):
    """The inputs are attributes, which autograd does not watch."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.gate, ctx.up = gate.detach(), up.detach()
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.gate.clone().requires_grad_(), ctx.up.clone().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(F.silu(gate) * up, (gate, up), grad)  # type: ignore[return-value]


def saved_as_attributes(gate: Tensor, up: Tensor) -> Tensor:
    return _NotSavedForBackward.apply(gate, up)  # type: ignore[no-any-return]


def writes_through_addresses(**named: Any) -> None:
    """As C++ does; autograd hears nothing of it."""
    lists = {name: named[name] for name in _LISTS if named[name] is not None}
    hidden = {name: [tensor.clone() for tensor in tensors] for name, tensors in lists.items()}
    reference.adamw(**{**named, **hidden})
    for name, tensors in lists.items():
        for tensor, result in zip(tensors, hidden[name], strict=True):
            ctypes.memmove(tensor.data_ptr(), result.data_ptr(), tensor.numel() * tensor.element_size())


def takes_a_random_number(gate: Tensor, up: Tensor) -> Tensor:
    torch.rand(())
    return reference.swiglu(gate, up)


def leaves_one_thread(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    torch.set_num_threads(1)
    return reference.rms_norm(x, weight, eps=eps)


def overwrites_gradients(parameters: Any, gradients: Any, *rest: Any, **statics: Any) -> None:
    reference.adamw(parameters, gradients, *rest, **statics)
    gradients[0].mul_(0.5)


def sum_in_the_residual(residual: Tensor, branch: Tensor, weight: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
    """The sum takes the residual's place."""
    total, normed = reference.add_rms_norm(residual, branch, weight, **rest)
    return _TakesItsPlace.apply(residual, total), normed  # type: ignore[return-value]


class _TakesItsPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual: Tensor, total: Tensor) -> Tensor:
        return residual.detach().copy_(total)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


# ---- cost


class _FourCopies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(*(x.float() + index for index in range(4)))
        return y.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def keeps_four_copies(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    return _FourCopies.apply(reference.rms_norm(x, weight, eps=eps), x.detach())  # type: ignore[no-any-return]


_LEAKED: list[Tensor] = []


def leaks(gate: Tensor, up: Tensor) -> Tensor:
    _LEAKED.append(gate.detach() + 1)
    return reference.swiglu(gate, up)


def all_gradients_joined(gradients: Sequence[Tensor]) -> Tensor:
    return torch.cat([gradient.reshape(-1).float() for gradient in gradients]).norm()


class _AllLogits(torch.autograd.Function):
    """Gradients in the forward, of all logits at once: little is kept, and the peak is as high as can be."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        with torch.enable_grad():
            leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
            loss = reference.linear_cross_entropy(*leaves, labels)
            ctx.save_for_backward(*torch.autograd.grad(loss, leaves))
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight = ctx.saved_tensors
        return hidden * grad, weight * grad, None


def all_logits_at_once(hidden: Tensor, weight: Tensor, labels: Tensor, **rest: Any) -> Tensor:
    return _AllLogits.apply(hidden, weight, labels)  # type: ignore[no-any-return]


def waits(gate: Tensor, up: Tensor) -> Tensor:
    time.sleep(1 if gate.numel() > 100_000 else 0)
    return reference.swiglu(gate, up)


def hangs(gradients: Sequence[Tensor]) -> Tensor:
    """For a tensor of more than 65,536 elements."""
    while any(gradient.numel() > 65_536 for gradient in gradients):
        time.sleep(0.01)
    return reference.grad_norm(gradients)


# ---- derivatives


class _SavedGradients(torch.autograd.Function):
    """The gradients are computed in the forward: constants to whoever differentiates them."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            losses = reference.cross_entropy(leaf, labels)
            (gradient,) = torch.autograd.grad(losses.sum(), leaf)
        ctx.save_for_backward(gradient)
        return losses.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad[:, None], None


def gradients_are_constants(logits: Tensor, labels: Tensor, **rest: Any) -> Tensor:
    return _SavedGradients.apply(logits, labels)  # type: ignore[no-any-return]


class _NamelessRefusal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise KernelError("no second derivative")
        return grad


def refuses_without_its_name(gate: Tensor, up: Tensor) -> Tensor:
    return _NamelessRefusal.apply(reference.swiglu(gate, up))  # type: ignore[no-any-return]


class _DetachedIncoming(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.detach()


def incoming_gradient_is_a_constant(gate: Tensor, up: Tensor) -> Tensor:
    return _DetachedIncoming.apply(reference.swiglu(gate, up))  # type: ignore[no-any-return]


class _WeightIsAConstant(torch.autograd.Function):
    """First derivatives right; in the second, the weight is one."""

    @staticmethod
    def forward(ctx: Any, normed: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(normed, weight)
        return normed * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        normed, weight = ctx.saved_tensors
        return grad * weight.detach(), (grad * normed).flatten(0, -2).sum(0)


def weight_is_a_constant(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return _WeightIsAConstant.apply(normed, weight.float()).to(x.dtype)  # type: ignore[no-any-return]


class _OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = (saved.detach().requires_grad_() for saved in ctx.saved_tensors)
        with torch.enable_grad():
            return torch.autograd.grad(F.silu(gate) * up, (gate, up), grad)  # type: ignore[return-value]


def once_differentiable(gate: Tensor, up: Tensor) -> Tensor:
    return _OnceDifferentiable.apply(gate, up)  # type: ignore[no-any-return]


# ---- threads


def rest_of_three_lost(gate: Tensor, up: Tensor) -> Tensor:
    """Each thread takes as many rows; those that remain, nobody."""
    taken = gate.shape[0] // torch.get_num_threads() * torch.get_num_threads()
    done = torch.arange(gate.shape[0])[:, None] < taken
    return torch.where(done, reference.swiglu(gate, up), 0.0)


def partial_sum_lost(gradients: Sequence[Tensor]) -> Tensor:
    """The last thread's, where there are more than two."""
    keep = 1.0 if torch.get_num_threads() < 3 else 2 / 3
    return reference.grad_norm(gradients) * keep**0.5


def races(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    noise = 1e-3 * torch.rand(()) if torch.get_num_threads() > 1 else 0.0
    return (reference.rms_norm(x, weight, eps=eps) * (1 + noise)).to(x.dtype)


remembers = functools.cache(Remembers)
