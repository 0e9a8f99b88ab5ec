"""One AdamW update of a parameter group. The formula is `kernels/reference.py:adamw`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from weftrain.kernels import reference
from weftrain.kernels.contract import Arguments, Cost, Op, Size
from weftrain.kernels.ops._changes import empty_tensor, first_replaced, not_contiguous, on_meta, replaced, shorter
from weftrain.kernels.ops._parts import EDGE_SIZES, LAYER_7B, ODD_SIZES, Draw, all_moved, size_bytes, total_elements


def example(
    sizes: tuple[tuple[int, ...], ...],
    eps_placement: str,
    *,
    copies: torch.dtype | None = torch.bfloat16,
    **changed: float,
) -> Callable[[str, torch.dtype], Arguments]:
    def build(device: str, dtype: torch.dtype) -> Arguments:
        draw = Draw(device, dtype)
        parameters = [draw.normal(*size, std=0.02, dtype=torch.float32) for size in sizes]
        return {
            "parameters": parameters,
            "gradients": [draw.normal(*size, std=1e-3) for size in sizes],
            "exp_avgs": [draw.normal(*size, std=1e-4, dtype=torch.float32) for size in sizes],
            "exp_avg_sqs": [draw.normal(*size, std=1e-3, dtype=torch.float32).square() for size in sizes],
            "copies": [parameter.to(copies) for parameter in parameters] if copies else None,
            "learning_rate": 3e-4,
            "beta1": 0.9,
            "beta2": 0.95,
            "eps": 1e-8,
            "weight_decay": 0.1,
            "update_index": 3,
            "eps_placement": eps_placement,
            "gradient_scale": torch.tensor(0.7, device=device),
            **changed,
        }

    return build


def bytes_moved(arguments: Arguments) -> int:
    state = sum(size_bytes(arguments[name]) for name in ("parameters", "exp_avgs", "exp_avg_sqs"))
    return 2 * state + size_bytes(arguments["gradients"]) + size_bytes(arguments["copies"])


def exact(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor] | None,
    *,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    update_index: int,
    eps_placement: str,
    gradient_scale: Tensor,
) -> None:
    """In place, as the two papers' pseudo-code and cerebras_pytorch's source have it."""
    for index, (p, m, v) in enumerate(zip(parameters, exp_avgs, exp_avg_sqs, strict=True)):
        g = gradients[index] * gradient_scale
        new_m = beta1 * m + (1 - beta1) * g
        new_v = beta2 * v + (1 - beta2) * g**2
        if eps_placement == "after_bias_correction":
            update = (new_m / (1 - beta1**update_index)) / ((new_v / (1 - beta2**update_index)).sqrt() + eps)
        else:
            update = new_m / (new_v.sqrt() + eps) * (1 - beta2**update_index) ** 0.5 / (1 - beta1**update_index)
        p.copy_(p - learning_rate * (update + weight_decay * p))
        m.copy_(new_m)
        v.copy_(new_v)
        if copies is not None:
            copies[index].copy_(p)


OP = Op(
    reference.adamw,
    exact,
    differentiable=(),
    inputs=("gradients",),
    examples={
        "odd": example(ODD_SIZES, "after_bias_correction"),
        "odd_before": example(ODD_SIZES, "before_bias_correction"),
        "odd_no_copies": example(ODD_SIZES, "after_bias_correction", copies=None),
        # A large eps makes its placement visible; at that rate a wrong update is not lost when the parameter is
        # rounded.
        "odd_large_eps": example(ODD_SIZES, "after_bias_correction", eps=1e-3, learning_rate=0.1, update_index=1),
        "odd_before_large_eps": example(
            ODD_SIZES, "before_bias_correction", copies=torch.float16, eps=1e-3, learning_rate=0.1
        ),
        "edge": example(EDGE_SIZES, "after_bias_correction", learning_rate=0.1),
        "amber_7b_layer": example(LAYER_7B, "after_bias_correction"),
    },
    bytes_moved=bytes_moved,
    flops=total_elements("parameters", 16),
    in_place=("parameters", "exp_avgs", "exp_avg_sqs", "copies"),
    attributes={"eps_placement": "after_bias_correction", "copies": True},
    attributes_of=lambda arguments: {
        "eps_placement": arguments["eps_placement"],
        "copies": arguments["copies"] is not None,
    },
    wrong={
        "unknown eps_placement": replaced("eps_placement", lambda _: "nowhere"),
        "update_index 0": replaced("update_index", lambda _: 0),
        "gradient_scale of rank 1": replaced("gradient_scale", lambda scale: scale[None]),
        "gradient_scale of bf16": replaced("gradient_scale", torch.Tensor.bfloat16),
        "gradient_scale on another device": replaced("gradient_scale", on_meta),
        "a gradient too few": replaced("gradients", lambda tensors: tensors[:-1]),
        "a moment too many": replaced("exp_avgs", lambda tensors: [*tensors, tensors[0]]),
        "a copy too few": replaced("copies", lambda tensors: tensors[:-1]),
        "a gradient of another shape": first_replaced("gradients", shorter),
        "a moment of another shape": first_replaced("exp_avg_sqs", shorter),
        "a gradient of integers": first_replaced("gradients", torch.Tensor.int),
        "a gradient on another device": first_replaced("gradients", on_meta),
        "a parameter of bf16": first_replaced("parameters", torch.Tensor.bfloat16),
        "a moment of fp16": first_replaced("exp_avgs", torch.Tensor.half),
        "a copy of fp32": first_replaced("copies", torch.Tensor.float),
        "a parameter that is not contiguous": first_replaced("parameters", not_contiguous),
        "a copy that is not contiguous": first_replaced("copies", not_contiguous),
    },
    edges={
        "a tensor without elements": empty_tensor,
        "a scale of zero": replaced("gradient_scale", torch.zeros_like),
    },
    sizes={
        "elements": Size(lambda n: example(((n,),), "after_bias_correction"), (70_000,), (2_000_003,)),
        "tensors": Size(lambda n: example(((3,),) * n, "before_bias_correction"), (70,), (600,)),
        "update_index": Size(lambda n: example(ODD_SIZES, "after_bias_correction", update_index=n), (100_000,)),
    },
    ranges={
        "update 100000": replaced("update_index", lambda _: 100_000),
        "gradients of 10": all_moved("gradients", 1e4),
        "gradients of 1e-9": all_moved("gradients", 1e-6),
        "a weight decay and rate of zero": lambda a: {**a, "weight_decay": 0.0, "learning_rate": 0.0},
    },
    steps=[
        replaced("update_index", lambda _: 1),
        lambda a: {**a, "update_index": 2, "learning_rate": 1e-3, "gradient_scale": a["gradient_scale"] * 0.25},
        lambda a: {**a, "update_index": 3, "gradients": [gradient * 2 for gradient in a["gradients"]]},
        lambda a: {**a, "update_index": 4, "gradients": [gradient * 0 for gradient in a["gradients"]]},
        lambda a: {**a, "update_index": 70_000, "beta1": 0.8, "weight_decay": 0.01},
    ],
    cost=Cost(
        example(((300_000,), (200_000,)), "after_bias_correction"),
        kept_bytes=lambda arguments: 0,
        peak_bytes=lambda arguments: 4 * 300_000 + 65_536,
    ),
)
