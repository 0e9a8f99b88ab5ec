"""A mixture of experts in the place of a block's feed-forward: router, dispatch without dropping, losses of the router.

The assignments of tokens to experts are sorted by expert, so that each expert's tokens lie side by side and one call of
the op `grouped_gemm` multiplies all of them. An expert may get no token, or all.

The router's losses are not returned: their gradient joins the backward pass at the layer's output (`_WithLoss`), so
that a block returns its state alone, and is computed apart, compiled or recomputed as any other. They are of one row or
one token at a time, so no split of a batch changes them. Of a row whose tokens lie on several ranks each adds the part
of its own tokens: the balance is linear in their probabilities, so all that a rank must know of the others are the
row's loads. What the router did is counted in the backward pass too, which runs once however often a forward is
computed; counts are integers, which add up to the same in any order.

How many rows an expert gets is known only when they are counted, so a compiler of static shapes leaves this module out.

Letters for shapes: N = B T tokens, K experts of a token, E experts; the others as in core/model.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from weftrain.core.experts_section import ROUTER_MEASURES, ExpertsConfig
from weftrain.core.model_config import ModelConfig
from weftrain.core.objective_parts import SequenceShare
from weftrain.kernels import Selection

_UNIT = 1 << 20  # fractions are counted in units of 2^-20
_FIELDS = 4  # of a tally, after the loads: tokens, entropy, balance and squared log-sum-exp
_TINY = 1e-20  # of a sum of sigmoid scores, which may all be 0


class Routing(NamedTuple):
    """Where tokens go. experts: int64 [N, K], ascending for each token; weights: fp32 [N, K] of their outputs."""

    experts: Tensor
    weights: Tensor
    logits: Tensor  # fp32 [N, E]
    probabilities: Tensor  # fp32 [N, E], which add up to 1


class Router(nn.Module):
    """Scores each token against each expert, in fp32 whatever the compute dtype is. bias: fp32 [E], of the choice
    alone; no gradient reaches it, `balanced` moves it.
    """

    bias: nn.Parameter | None

    def __init__(self, config: ExpertsConfig, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.count, hidden))
        with_bias = config.bias_update > 0
        self.bias = nn.Parameter(torch.empty(config.count), requires_grad=False) if with_bias else None
        self.top_k, self.sigmoid = config.top_k, config.scores == "sigmoid"
        self.renormalize, self.scale = config.renormalize, config.scale

    def forward(self, x: Tensor) -> Routing:
        """x [N, C] -> Routing."""
        wide = torch.promote_types(x.dtype, torch.float32)
        logits = F.linear(x.to(wide), self.weight.to(wide))
        scores = torch.sigmoid(logits) if self.sigmoid else torch.softmax(logits, -1)
        choice = scores.detach() if self.bias is None else scores.detach() + self.bias
        experts = choice.topk(self.top_k, -1).indices
        weights = scores.gather(-1, experts)
        if self.renormalize:
            total = weights.sum(-1, keepdim=True)  # in the order of the scores, as others have it
            weights = weights / (total + _TINY if self.sigmoid else total)
        weights = weights if self.scale == 1.0 else weights * self.scale
        experts, order = experts.sort(-1)
        probabilities = scores / (scores.sum(-1, keepdim=True) + _TINY) if self.sigmoid else scores
        return Routing(experts, weights.gather(-1, order), logits, probabilities)


class Stacked(nn.Module):
    """One matrix of each expert: weight [E, out, in]."""

    def __init__(self, experts: int, out_features: int, in_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, out_features, in_features))


class ExpertFeedForwards(nn.Module):
    """The experts' SwiGLU feed-forwards: x [N, C] in the weights' dtype and Routing -> [N, C] in that dtype.

    `through` is where rows meet weights; one who keeps experts elsewhere puts a function of his own in its place.
    own_dtype: what it reads and gives, where its weights have that dtype only while it computes.
    """

    own_dtype: torch.dtype | None = None

    def __init__(self, config: ExpertsConfig, hidden: int, selection: Selection, name: str) -> None:
        super().__init__()
        inner = config.intermediate_size
        self.count = config.count
        self.gate_proj = Stacked(config.count, inner, hidden)
        self.up_proj = Stacked(config.count, inner, hidden)
        self.down_proj = Stacked(config.count, hidden, inner)
        self.grouped_gemm = selection.function("grouped_gemm", name)
        self.swiglu = selection.function("swiglu", name)

    @property
    def dtype(self) -> torch.dtype:
        return self.own_dtype or self.up_proj.weight.dtype

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        top_k = routing.experts.shape[1]
        by_expert, order = routing.experts.flatten().sort(stable=True)  # [N K]; order: an assignment's place before
        place = inverse(order)
        numbers = torch.arange(self.count, device=order.device)
        ends = torch.searchsorted(by_expert, numbers, right=True).int()  # [E]: where each expert's tokens end
        rows: Tensor = _Dispatch.apply(x, order, place, top_k)  # [N, C] -> [N K, C], expert by expert
        found = self.through(rows, ends)
        parts = Reorder.apply(found, place, order).unflatten(0, (-1, top_k)).unbind(1)  # K of [N, C]
        # in the order of the experts, one after another: the same bits on any device, and those of other programs
        total = None
        for part, weight in zip(parts, routing.weights.unbind(1), strict=True):
            weighted = part * weight[:, None]  # fp32
            total = weighted if total is None else total + weighted
        assert total is not None
        return total.to(x.dtype)

    def through(self, rows: Tensor, ends: Tensor) -> Tensor:
        """rows [n, C], expert by expert, ends int32 [E] -> [n, C]."""
        return self.products(rows, ends, *(one.weight for one in (self.gate_proj, self.up_proj, self.down_proj)))

    def products(self, rows: Tensor, ends: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """As `through`, by weights [e, I, C], [e, I, C] and [e, C, I] of any e experts, ends int32 [e]."""
        gated, wide = self.grouped_gemm(rows, gate, ends), self.grouped_gemm(rows, up, ends)
        found: Tensor = self.grouped_gemm(self.swiglu(gated, wide), down, ends)
        return found


class MixtureOfExperts(nn.Module):
    """[B, T, C] -> [B, T, C] in the weights' dtype: what the chosen experts give, and the shared ones.

    shared: a feed-forward of all tokens, or None. positions: of the global batch, over which the losses are means.
    share: of ranks that have a part of every row's tokens each; None: rows are whole.
    """

    share: SequenceShare | None = None

    def __init__(
        self, config: ModelConfig, selection: Selection, layer: int, shared: nn.Module | None, positions: int
    ) -> None:
        super().__init__()
        experts = config.experts
        assert experts is not None
        self.router = Router(experts, config.hidden_size)
        self.experts = ExpertFeedForwards(experts, config.hidden_size, selection, f"layers.{layer}.ffn.experts")
        self.shared = shared
        self.tally, self._not_compiled = Tally(), _not_compiled()
        over = positions * (config.num_layers - experts.dense_layers)
        self.aux_loss, self.z_loss = experts.aux_loss / over, experts.z_loss / over

    @property
    def dtype(self) -> torch.dtype:
        """Of what it reads and gives."""
        return self.experts.dtype

    def forward(self, x: Tensor, dropout_keys: Tensor | None = None) -> Tensor:
        found: Tensor = self._not_compiled(self, x, dropout_keys)
        return found

    def compute(self, x: Tensor, dropout_keys: Tensor | None) -> Tensor:
        """`forward`, of which no compiler may make a part of a block's graph."""
        x = x.to(self.dtype)
        routing = self.router(x.flatten(0, -2))
        found = self.experts(x.flatten(0, -2), routing).view(x.shape)
        if self.shared is not None:
            found = found + self.shared(x, dropout_keys)
        return self._with_losses(found, routing) if torch.is_grad_enabled() and found.requires_grad else found

    def _with_losses(self, found: Tensor, routing: Routing) -> Tensor:
        """found: [B, T, C]."""
        rows, tokens = found.shape[0], found.shape[1]
        probabilities = routing.probabilities.unflatten(0, (rows, tokens))
        loads = _loads(routing.experts.view(rows, -1), probabilities.shape[-1])  # int64 [B, E]
        of_rows = balance(probabilities, loads if self.share is None else self.share.sum(loads))  # [B]
        squares = routing.logits.logsumexp(-1).square()  # [N]
        loss = self.aux_loss * tokens * of_rows.sum() + self.z_loss * squares.sum()
        with torch.no_grad():
            entropy = -torch.xlogy(routing.probabilities, routing.probabilities).sum(-1)
            fractions = (entropy, of_rows * tokens, squares)
            counted = [(one.double() * _UNIT).round().long().sum() for one in fractions]
            table = torch.cat([loads.sum(0), torch.stack([loads.new_tensor(rows * tokens), *counted])])
        joined: Tensor = _WithLoss.apply(found, loss, table, self.tally)
        return joined


@functools.cache
def _not_compiled() -> Callable[..., Tensor]:
    """One function for all layers, which so share their graphs. Not made at import: that loads torch's compiler."""
    found: Callable[..., Tensor] = torch.compiler.disable(MixtureOfExperts.compute)
    return found


def balance(probabilities: Tensor, loads: Tensor) -> Tensor:
    """[B]: E x sum over experts of (share of the row's assignments) x (mean probability): 1 where both are equal.

    probabilities [B, T, E], loads int64 [B, E]. Of T tokens that are a part of a row, with the loads of the whole row,
    it is what they add to the row's: the mean over such parts of equal length is the row's.
    """
    shares = loads / loads.sum(-1, keepdim=True)
    return loads.shape[-1] * (shares * probabilities.mean(1)).sum(-1)


def _loads(experts: Tensor, count: int) -> Tensor:
    """int64 [B, T K] -> [B, E]: how many assignments each expert has."""
    return experts.new_zeros(len(experts), count).scatter_add_(1, experts, torch.ones_like(experts))


class Tally:
    """What a layer's router did since it was last asked: int64 [E + 4], the assignments of each expert, the tokens, and
    in units of 2^-20 sums over them of entropy, of balance and of the squared log-sum-exp.
    """

    def __init__(self) -> None:
        self._total: Tensor | None = None

    @staticmethod
    def nothing(experts: int, device: torch.device) -> Tensor:
        """The table of no tokens."""
        return torch.zeros(experts + _FIELDS, dtype=torch.int64, device=device)

    def add(self, table: Tensor) -> None:
        self._total = table if self._total is None else self._total + table

    @property
    def total(self) -> Tensor | None:
        """What `take` would give; it is kept."""
        return self._total

    def take(self) -> Tensor | None:
        """None: no backward pass came by."""
        found, self._total = self._total, None
        return found


def mixtures_of(model: nn.Module) -> dict[str, MixtureOfExperts]:
    """Router's name -> its layer, of each with experts."""
    named = model.named_modules()
    return {f"{name}.router": module for name, module in named if isinstance(module, MixtureOfExperts)}


def take_tallies(model: nn.Module) -> dict[str, Tensor]:
    """Router's name -> what its Tally holds, of each layer with experts; they begin again from nothing."""
    found = {name: module.tally.take() for name, module in mixtures_of(model).items()}
    return {name: table for name, table in found.items() if table is not None}


def measures_of(config: ExpertsConfig, tallies: dict[str, Tensor]) -> dict[str, Tensor]:
    """The measures of a step, fp64 0-dim each: ROUTER_MEASURES. tallies: of the whole global batch.

    router_load_max, _min: the assignments of the busiest and of the idlest expert of any layer, 1 where all have as
    many. router_entropy: of a token's probabilities, 1 where they are equal. router_dropped: the share of assignments
    that was not computed. The losses are without their factors.
    """
    if not tallies:
        return {}
    table = torch.stack(list(tallies.values())).double()  # [layers, E + 4]
    loads, (tokens, *sums) = table[:, : config.count], table[:, config.count :].unbind(1)
    even = loads / (tokens * config.top_k / config.count)[:, None]
    entropy, aux, z = ((one / tokens / _UNIT).mean() for one in sums)
    dropped = 1 - loads.sum() / (tokens.sum() * config.top_k)
    found = (even.max(), even.min(), entropy / math.log(config.count), dropped, aux, z)
    return dict(zip(ROUTER_MEASURES, found, strict=True))


@torch.no_grad()
def balance_biases(config: ExpertsConfig, tallies: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    """Add bias_update to the bias of each expert that got less than the mean, and subtract it from those that got more
    (arXiv 2408.15664, algorithm 1), in place. weights: canonical name -> fp32.
    """
    if not config.bias_update:
        return
    for name, table in tallies.items():
        weights[f"{name}.bias"].add_(bias_directions(config, table), alpha=config.bias_update)


def bias_directions(config: ExpertsConfig, table: Tensor) -> Tensor:
    """int64 [E]: 1 for each expert that got less than the mean, -1 for those that got more. table: of a Tally."""
    loads = table[: config.count]
    return (loads.sum() - loads * config.count).sign()


class _Dispatch(torch.autograd.Function):
    """x [N, C] -> [N K, C]: row j is the token of assignment order[j]. Backward adds a token's K gradients in order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, place: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(place)
        ctx.top_k = top_k
        return x.index_select(0, order // top_k)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        (place,) = ctx.saved_tensors
        of_token = dy.index_select(0, place).unflatten(0, (-1, ctx.top_k))
        return of_token.sum(1, dtype=torch.promote_types(dy.dtype, torch.float32)).to(dy.dtype), None, None, None


def inverse(order: Tensor) -> Tensor:
    """int64 [n], a permutation -> [n]: inverse[order[i]] = i."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


class Reorder(torch.autograd.Function):
    """x [n, C] -> x[order]. back: the inverse of order, so that backward gathers too and adds nothing atomically."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x.index_select(0, order)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return dy.index_select(0, back), None, None


class _WithLoss(torch.autograd.Function):
    """y as it is. Backward gives `loss`, 0-dim, a gradient of 1 whatever follows, and counts `table`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor, table: Tensor, tally: Tally) -> Tensor:
        ctx.save_for_backward(table)
        ctx.tally, ctx.dtype = tally, loss.dtype
        return y.view_as(y)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None, None]:
        ctx.tally.add(*ctx.saved_tensors)
        return dy, torch.ones((), dtype=ctx.dtype, device=dy.device), None, None
