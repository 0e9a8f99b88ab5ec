"""What is known of each op besides its formula: example inputs, attributes, and how many bytes and flops a call must
cost.

What a reader would get wrong: counts are of the *op*, not of an implementation: every input read once, every output
written once, a multiply-add as two flops, forward only. A kernel that moves more is slower than it need be, and the
share of the roofline shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from weftrain.kernels import reference

Arguments = dict[str, Any]  # the op's arguments by name


@dataclass(frozen=True)
class Op:
    """One op of the contract: `function` is the specification, `examples[name](device, dtype)` builds the arguments of
    one call.
    """

    function: Callable[..., Any]
    differentiable: tuple[str, ...]  # arguments that receive gradients
    examples: Mapping[str, Callable[[str, torch.dtype], Arguments]]
    bytes_moved: Callable[[Arguments], int]
    flops: Callable[[Arguments], int]
    in_place: tuple[str, ...] = ()  # arguments that the op overwrites
    attributes: Mapping[str, int | float | bool | str] = field(default_factory=dict)  # of a typical use, for the table
    # of one call, as a Spec has them
    attributes_of: Callable[[Arguments], dict[str, int | float | bool | str]] = lambda arguments: {}

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def small(self) -> tuple[str, ...]:
        """The examples that `kernels check` runs: ugly sizes, and sizes at the edge of a block. The others are for
        measuring.
        """
        return tuple(name for name in self.examples if name.startswith(("odd", "edge")))

    @property
    def smallest(self) -> str:
        """The example for what is asked of an op many times over."""
        return "odd_small" if "odd_small" in self.examples else "odd"


class _Draw:
    """Seeded random tensors of one device and dtype, so that an example is the same at every call."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int, std: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return (torch.randn(*shape, generator=self.generator) * std).to(self.device, dtype or self.dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator).to(self.device)


def _norm(
    rows: tuple[int, ...], hidden: int, *, bias: bool, eps: float, weight_dtype: torch.dtype | None = None
) -> Callable[[str, torch.dtype], Arguments]:
    def build(device: str, dtype: torch.dtype) -> Arguments:
        draw = _Draw(device, dtype)
        arguments: Arguments = {
            "x": draw.normal(*rows, hidden),
            "weight": 1 + draw.normal(hidden, std=0.1, dtype=weight_dtype),
        }
        if bias:
            arguments["bias"] = draw.normal(hidden, std=0.1, dtype=weight_dtype)
        return {**arguments, "eps": eps}

    return build


def _norm_examples(*, bias: bool) -> dict[str, Callable[[str, torch.dtype], Arguments]]:
    """eps = 0.1 is large enough that leaving it out shows."""
    return {
        "odd": _norm((3, 5), 77, bias=bias, eps=0.1),
        "odd_rows": _norm((301,), 33, bias=bias, eps=1e-5),
        "odd_fp32_weight": _norm((3, 5), 77, bias=bias, eps=1e-5, weight_dtype=torch.float32),
        "odd_bf16_weight": _norm((3, 5), 77, bias=bias, eps=1e-5, weight_dtype=torch.bfloat16),
        "edge": _norm((2, 8), 128, bias=bias, eps=1e-5),
        "edge_above": _norm((9,), 1025, bias=bias, eps=1e-5),
    }


def _rope(
    batch: int, tokens: int, heads: int, head_dim: int, rotary_dim: int, *, interleaved: bool
) -> Callable[[str, torch.dtype], Arguments]:
    def build(device: str, dtype: torch.dtype) -> Arguments:
        frequency = 10000.0 ** (-torch.arange(0, rotary_dim, 2) / rotary_dim)
        angle = torch.outer(torch.arange(tokens).float(), frequency)
        return {
            "x": _Draw(device, dtype).normal(batch, tokens, heads, head_dim),
            "cos": angle.cos().to(device),
            "sin": angle.sin().to(device),
            "rotary_dim": rotary_dim,
            "interleaved": interleaved,
        }

    return build


def _swiglu(rows: int, hidden: int) -> Callable[[str, torch.dtype], Arguments]:
    def build(device: str, dtype: torch.dtype) -> Arguments:
        draw = _Draw(device, dtype)
        return {"gate": draw.normal(rows, hidden), "up": draw.normal(rows, hidden)}

    return build


def _attention(
    batch: int, tokens: int, heads: int, head_dim: int, *, documents: bool = False
) -> Callable[[str, torch.dtype], Arguments]:
    def build(device: str, dtype: torch.dtype) -> Arguments:
        draw = _Draw(device, dtype)
        q, k, v = (draw.normal(batch, tokens, heads, head_dim) for _ in range(3))
        start = None
        if documents:  # a new document at about one token in nine
            begins = torch.rand(batch, tokens, generator=draw.generator) < 1 / 9
            start = torch.where(begins, torch.arange(tokens), 0).cummax(1).values.to(device, torch.int32)
        return {"q": q, "k": k, "v": v, "scale": head_dim**-0.5, "document_start": start}

    return build


def _labels(draw: _Draw, rows: int, vocab: int) -> Tensor:
    labels = draw.integers(vocab, rows)
    labels[::7] = -100
    return labels


def _cross_entropy(
    rows: int, vocab: int, *, std: float = 3.0, **statics: float
) -> Callable[[str, torch.dtype], Arguments]:
    def build(device: str, dtype: torch.dtype) -> Arguments:
        draw = _Draw(device, dtype)
        return {"logits": draw.normal(rows, vocab, std=std), "labels": _labels(draw, rows, vocab), **statics}

    return build


def _linear_cross_entropy(
    rows: int, hidden: int, vocab: int, **statics: float
) -> Callable[[str, torch.dtype], Arguments]:
    def build(device: str, dtype: torch.dtype) -> Arguments:
        draw = _Draw(device, dtype)
        return {
            "hidden": draw.normal(rows, hidden),
            "weight": draw.normal(vocab, hidden, std=3 * hidden**-0.5),
            "labels": _labels(draw, rows, vocab),
            **statics,
        }

    return build


def _adamw(
    sizes: tuple[tuple[int, ...], ...],
    eps_placement: str,
    *,
    copies: torch.dtype | None = torch.bfloat16,
    **changed: float,
) -> Callable[[str, torch.dtype], Arguments]:
    def build(device: str, dtype: torch.dtype) -> Arguments:
        draw = _Draw(device, dtype)
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


def _grad_norm(sizes: tuple[tuple[int, ...], ...]) -> Callable[[str, torch.dtype], Arguments]:
    def build(device: str, dtype: torch.dtype) -> Arguments:
        draw = _Draw(device, dtype)
        return {"gradients": [draw.normal(*size, std=1e-3) for size in sizes]}

    return build


def _size_bytes(value: Any) -> int:
    """Bytes of a tensor, or of all tensors of a list."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(_size_bytes(item) for item in value) if isinstance(value, (list, tuple)) else 0


def _read_all(arguments: Arguments) -> int:
    return sum(_size_bytes(value) for value in arguments.values())


def _read_all_write_like(name: str) -> Callable[[Arguments], int]:
    """Every argument read, one output of the size of argument `name` written."""
    return lambda arguments: _read_all(arguments) + _size_bytes(arguments[name])


def _elements(name: str, per_element: int) -> Callable[[Arguments], int]:
    return lambda arguments: per_element * arguments[name].numel()


def _attention_flops(arguments: Arguments) -> int:
    batch, tokens, heads, head_dim = arguments["q"].shape
    visible_pairs = tokens * (tokens + 1) // 2  # documents would only lower it
    return 4 * batch * heads * visible_pairs * head_dim  # q k^T and p v


def _adamw_bytes(arguments: Arguments) -> int:
    state = sum(_size_bytes(arguments[name]) for name in ("parameters", "exp_avgs", "exp_avg_sqs"))
    return 2 * state + _size_bytes(arguments["gradients"]) + _size_bytes(arguments["copies"])


def _norm_attributes(arguments: Arguments) -> dict[str, int | float | bool | str]:
    return {"hidden_size": arguments["x"].shape[-1], "eps": arguments["eps"]}


def _loss_attributes(arguments: Arguments) -> dict[str, int | float | bool | str]:
    return {name: arguments.get(name, default) for name, default in (("logits_scale", 1.0), ("z_loss", 0.0))}


def _total_elements(name: str, per_element: int) -> Callable[[Arguments], int]:
    return lambda arguments: per_element * sum(tensor.numel() for tensor in arguments[name])


_ODD_SIZES = ((33, 17), (17,), (129,), (1,), (5, 7))
_EDGE_SIZES = ((1024,), (1025,), (2, 4096), (8193,))
_LAYER_7B = (*((4096, 4096),) * 4, *((11008, 4096),) * 3, (4096,), (4096,))

OPS: Mapping[str, Op] = {
    op.name: op
    for op in (
        Op(
            reference.rms_norm,
            ("x", "weight"),
            {**_norm_examples(bias=False), "amber_7b": _norm((2048,), 4096, bias=False, eps=1e-6)},
            _read_all_write_like("x"),
            _elements("x", 4),
            attributes={"hidden_size": 4096, "eps": 1e-6},
            attributes_of=_norm_attributes,
        ),
        Op(
            reference.layer_norm,
            ("x", "weight", "bias"),
            {**_norm_examples(bias=True), "crystalcoder_7b": _norm((2048,), 4096, bias=True, eps=1e-5)},
            _read_all_write_like("x"),
            _elements("x", 7),
            attributes={"hidden_size": 4096, "eps": 1e-5},
            attributes_of=_norm_attributes,
        ),
        Op(
            reference.rope,
            ("x",),
            {
                "odd": _rope(2, 13, 3, 20, 12, interleaved=False),
                "odd_interleaved": _rope(2, 13, 3, 20, 12, interleaved=True),
                "odd_whole_head": _rope(1, 7, 3, 10, 10, interleaved=False),
                "edge": _rope(1, 33, 2, 64, 64, interleaved=False),
                "edge_interleaved": _rope(1, 9, 2, 64, 16, interleaved=True),
                "amber_7b": _rope(1, 2048, 32, 128, 128, interleaved=False),
                "crystalcoder_7b": _rope(1, 2048, 32, 128, 32, interleaved=True),
            },
            _read_all_write_like("x"),
            lambda arguments: 3 * arguments["x"][..., : arguments["rotary_dim"]].numel(),
            attributes={"head_dim": 128, "rotary_dim": 128, "interleaved": False},
            attributes_of=lambda arguments: {
                "head_dim": arguments["x"].shape[-1],
                "rotary_dim": arguments["rotary_dim"],
                "interleaved": arguments["interleaved"],
            },
        ),
        Op(
            reference.swiglu,
            ("gate", "up"),
            {
                "odd": _swiglu(15, 77),
                "edge": _swiglu(8, 128),
                "edge_above": _swiglu(1, 4097),
                "crystalcoder_7b": _swiglu(2048, 10922),
                "amber_7b": _swiglu(2048, 11008),
            },
            _read_all_write_like("gate"),
            _elements("gate", 5),
            attributes={"intermediate_size": 11008},
            attributes_of=lambda arguments: {"intermediate_size": arguments["gate"].shape[-1]},
        ),
        Op(
            reference.attention,
            ("q", "k", "v"),
            {
                "odd": _attention(2, 63, 3, 20),
                "odd_blocks": _attention(1, 269, 1, 24),
                "odd_documents": _attention(2, 63, 3, 20, documents=True),
                "odd_one_token": _attention(2, 1, 2, 8),
                "odd_small": _attention(1, 19, 2, 8, documents=True),
                "edge_documents": _attention(1, 33, 2, 32, documents=True),
                "edge": _attention(1, 64, 1, 64),
                "edge_above": _attention(1, 129, 1, 32, documents=True),
                "bench_70m": _attention(2, 512, 8, 64),
                "amber_7b": _attention(1, 2048, 32, 128),
            },
            _read_all_write_like("q"),
            _attention_flops,
            attributes={"head_dim": 128, "scale": 128**-0.5, "document_start": False},
            attributes_of=lambda arguments: {
                "head_dim": arguments["q"].shape[-1],
                "scale": arguments["scale"],
                "document_start": arguments["document_start"] is not None,
            },
        ),
        Op(
            reference.cross_entropy,
            ("logits",),
            {
                "odd": _cross_entropy(29, 101),
                "odd_scaled": _cross_entropy(29, 101, logits_scale=0.13875, z_loss=1e-2),
                "edge": _cross_entropy(9, 1024, std=1.0),
                "edge_above": _cross_entropy(16, 8193, std=1.0, logits_scale=0.7, z_loss=1e-3),
                "amber_7b": _cross_entropy(2048, 32000),
            },
            lambda arguments: _read_all(arguments) + 4 * arguments["labels"].numel(),
            _elements("logits", 4),
            attributes={"vocab_size": 32000, "logits_scale": 1.0, "z_loss": 0.0},
            attributes_of=lambda arguments: {"vocab_size": arguments["logits"].shape[1], **_loss_attributes(arguments)},
        ),
        Op(
            reference.linear_cross_entropy,
            ("hidden", "weight"),
            {
                "odd": _linear_cross_entropy(29, 24, 101),
                "odd_scaled": _linear_cross_entropy(29, 24, 101, logits_scale=0.13875, z_loss=1e-2),
                "odd_chunks": _linear_cross_entropy(201, 24, 101),
                "edge": _linear_cross_entropy(64, 32, 128, logits_scale=0.7, z_loss=1e-3),
                "bench_70m": _linear_cross_entropy(1024, 512, 32000),
                "crystalcoder_7b": _linear_cross_entropy(2048, 4096, 32032, logits_scale=0.13875),
            },
            lambda arguments: _read_all(arguments) + 4,
            lambda arguments: (
                arguments["hidden"].shape[0] * arguments["weight"].shape[0] * (2 * arguments["hidden"].shape[1] + 4)
            ),
            attributes={"hidden_size": 4096, "vocab_size": 32000, "logits_scale": 1.0, "z_loss": 0.0},
            attributes_of=lambda arguments: {
                "hidden_size": arguments["weight"].shape[1],
                "vocab_size": arguments["weight"].shape[0],
                **_loss_attributes(arguments),
            },
        ),
        Op(
            reference.adamw,
            (),
            {
                "odd": _adamw(_ODD_SIZES, "after_bias_correction"),
                "odd_before": _adamw(_ODD_SIZES, "before_bias_correction"),
                "odd_no_copies": _adamw(_ODD_SIZES, "after_bias_correction", copies=None),
                # A large eps makes its placement visible; at that rate a wrong update is not lost when the parameter is
                # rounded.
                "odd_large_eps": _adamw(
                    _ODD_SIZES, "after_bias_correction", eps=1e-3, learning_rate=0.1, update_index=1
                ),
                "odd_before_large_eps": _adamw(
                    _ODD_SIZES, "before_bias_correction", copies=torch.float16, eps=1e-3, learning_rate=0.1
                ),
                "edge": _adamw(_EDGE_SIZES, "after_bias_correction", learning_rate=0.1),
                "amber_7b_layer": _adamw(_LAYER_7B, "after_bias_correction"),
            },
            _adamw_bytes,
            _total_elements("parameters", 16),
            in_place=("parameters", "exp_avgs", "exp_avg_sqs", "copies"),
            attributes={"eps_placement": "after_bias_correction", "copies": True},
            attributes_of=lambda arguments: {
                "eps_placement": arguments["eps_placement"],
                "copies": arguments["copies"] is not None,
            },
        ),
        Op(
            reference.grad_norm,
            (),
            {
                "odd": _grad_norm(_ODD_SIZES),
                "edge": _grad_norm((*_EDGE_SIZES, (3, 4099))),
                "amber_7b_layer": _grad_norm(_LAYER_7B),
            },
            lambda arguments: _read_all(arguments) + 4,
            _total_elements("gradients", 2),
        ),
    )
}
