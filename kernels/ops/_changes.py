"""Changes of an op's example call, of which its `wrong` calls and `edges` are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from weftrain.kernels.contract import Arguments, Change


def replaced(name: str, change: Callable[[Any], Any]) -> Change:
    """One argument changed."""
    return lambda arguments: {**arguments, name: change(arguments[name])}


def first_replaced(name: str, change: Callable[[Tensor], Tensor]) -> Change:
    """The first tensor of a list changed."""
    return replaced(name, lambda tensors: [change(tensors[0]), *tensors[1:]])


def element_set(index: int | tuple[int, ...], value: int) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed[index] = value
        return changed

    return change


def shorter(tensor: Tensor) -> Tensor:
    """One element less along the last axis."""
    return tensor[..., :-1].contiguous()


def on_meta(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


def other_dtype(tensor: Tensor) -> Tensor:
    return tensor.to(torch.bfloat16 if tensor.dtype == torch.float32 else torch.float32)


def not_contiguous(tensor: Tensor) -> Tensor:
    return torch.stack((tensor, tensor), -1)[..., 0]


def no_rows(*names: str) -> Change:
    return lambda arguments: {
        **arguments,
        **{name: arguments[name][:0] for name in names if arguments.get(name) is not None},
    }


def so_many_tokens(count: int) -> Change:
    """Attention and rope of so many tokens."""

    def change(arguments: Arguments) -> Arguments:
        cut = {
            name: arguments[name][:, :count]
            for name in ("q", "k", "v", "document_start")
            if arguments.get(name) is not None
        }
        cut |= {name: arguments[name][..., :count, :] for name in ("cos", "sin") if name in arguments}
        return {**arguments, **cut}

    return change


def one_column(*names: str) -> Change:
    return lambda arguments: {**arguments, **{name: arguments[name][..., :1] for name in names}}


def empty_tensor(arguments: Arguments) -> Arguments:
    """A tensor without elements among the others."""
    return {
        name: [*value, value[0].flatten()[:0]] if isinstance(value, (list, tuple)) and value else value
        for name, value in arguments.items()
    }


def everything_ignored(arguments: Arguments) -> Arguments:
    return {**arguments, "labels": torch.full_like(arguments["labels"], -100)}


WRONG_NORM: dict[str, Change] = {
    "weight too short": replaced("weight", shorter),
    "weight of rank 2": replaced("weight", lambda weight: weight[None]),
    "x of integers": replaced("x", torch.Tensor.int),
    "x without columns": replaced("x", lambda x: x[..., :0]),
    "x 0-dimensional": replaced("x", lambda x: x.flatten()[0]),
    "weight on another device": replaced("weight", on_meta),
}
WRONG_ADD_NORM: dict[str, Change] = {
    "weight too short": replaced("weight", shorter),
    "weight of rank 2": replaced("weight", lambda weight: weight[None]),
    "residual of integers": replaced("residual", torch.Tensor.int),
    "residual without columns": replaced("residual", lambda residual: residual[..., :0]),
    "branch of fewer rows": replaced("branch", lambda branch: branch[:-1]),
    "branch wider than residual": replaced("branch", torch.Tensor.double),
    "branch on another device": replaced("branch", on_meta),
    "weight on another device": replaced("weight", on_meta),
    "dtype of integers": replaced("dtype", lambda dtype: torch.int32),
}
WRONG_LABELS: dict[str, Change] = {
    "labels too short": replaced("labels", shorter),
    "labels of int32": replaced("labels", torch.Tensor.int),
    "labels of rank 2": replaced("labels", lambda labels: labels[:, None]),
    "labels on another device": replaced("labels", on_meta),
}
WRONG_SOFTCAP: dict[str, Change] = {
    f"logits_softcap of {cap}": lambda arguments, cap=cap: {**arguments, "logits_softcap": cap}  # type: ignore[misc]
    for cap in (0.0, -30.0, float("inf"), float("nan"))
}
WRONG_SMOOTHING: dict[str, Change] = {
    f"label_smoothing of {value}": lambda arguments, value=value: {**arguments, "label_smoothing": value}  # type: ignore[misc]
    for value in (-0.1, 1.5, float("nan"))
}


def weights_like(change: Callable[[Tensor], Tensor]) -> Change:
    """A weight of 1 for each token, changed."""
    return lambda arguments: {
        **arguments, "token_weights": change(torch.ones_like(arguments["labels"], dtype=torch.float32))
    }  # fmt: skip


WRONG_TOKEN_WEIGHTS: dict[str, Change] = {
    "token_weights too short": weights_like(shorter),
    "token_weights of bfloat16": weights_like(torch.Tensor.bfloat16),
    "token_weights of rank 2": weights_like(lambda weights: weights[:, None]),
    "token_weights on another device": weights_like(on_meta),
}
WRONG_LABEL_VALUES: dict[str, Change] = {
    "label negative": replaced("labels", element_set(1, -1)),
    "label too large": replaced("labels", element_set(1, 101)),
    "label far outside": replaced("labels", element_set(1, 2**62)),
}
NORM_EDGES: dict[str, Change] = {"no rows": no_rows("x"), "one row": replaced("x", lambda x: x[:1, :1])}
ADD_NORM_EDGES: dict[str, Change] = {
    "no rows": no_rows("residual", "branch"),
    "one row": lambda a: {**a, **{name: a[name][:1, :1] for name in ("residual", "branch")}},
}
LOSS_EDGES: dict[str, Change] = {
    "everything ignored": everything_ignored,
    "ignore_index within the vocabulary": lambda arguments: {
        **arguments,
        "ignore_index": 7,
        "labels": arguments["labels"].masked_fill(arguments["labels"] == -100, 7),
    },
}
