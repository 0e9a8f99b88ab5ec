"""Parts of an op's entry: seeded example tensors, and the sizes that costs are counted in."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from weftrain.kernels.contract import Arguments, Attribute, Change, Size

ODD_SIZES = ((33, 17), (17,), (129,), (1,), (5, 7))
EDGE_SIZES = ((1024,), (1025,), (2, 4096), (8193,))
LOSS_DEFAULTS = {
    "logits_scale": 1.0,
    "z_loss": 0.0,
    "logits_softcap": None,
    "label_smoothing": 0.0,
    "token_weights": False,  # whether there are any
}
_MOST_DRAWN = 2**24  # numbers of one tensor
LAYER_7B = (*((4096, 4096),) * 4, *((11008, 4096),) * 3, (4096,), (4096,))


class Draw:
    """Seeded random tensors of one device and dtype, so that an example is the same at every call."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int, std: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers; those of a tensor that only a benchmark makes repeat, since drawing them takes seconds."""
        count = math.prod(shape)
        drawn = torch.randn(*(shape if count <= _MOST_DRAWN else (_MOST_DRAWN,)), generator=self.generator) * std
        drawn = drawn.to(self.device, dtype or self.dtype)
        return drawn if count <= _MOST_DRAWN else drawn.repeat(-(-count // _MOST_DRAWN))[:count].view(shape)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator).to(self.device)

    def labels(self, rows: int, vocab: int) -> Tensor:
        """int64 [rows] in 0..vocab-1; every seventh is ignored (-100)."""
        labels = self.integers(vocab, rows)
        labels[::7] = -100
        return labels

    def token_weights(self, labels: Tensor) -> Tensor:
        """fp32 [rows] of either sign, some 0; NaN and infinite for ignored tokens, whose weights nobody looks at."""
        weights = 1 + self.normal(len(labels), dtype=torch.float32)
        weights[2::5] = 0.0
        ignored = labels.to(weights.device) == -100
        weights[ignored] = float("nan")
        weights[::14] = float("inf")  # every other one of the ignored
        return weights


def norm(
    rows: tuple[int, ...], hidden: int, *, bias: bool, eps: float, weight_dtype: torch.dtype | None = None
) -> Callable[[str, torch.dtype], Arguments]:
    def build(device: str, dtype: torch.dtype) -> Arguments:
        draw = Draw(device, dtype)
        arguments: Arguments = {
            "x": draw.normal(*rows, hidden),
            "weight": 1 + draw.normal(hidden, std=0.1, dtype=weight_dtype),
        }
        if bias:
            arguments["bias"] = draw.normal(hidden, std=0.1, dtype=weight_dtype)
        return {**arguments, "eps": eps}

    return build


def add_norm(
    rows: tuple[int, ...],
    hidden: int,
    *,
    bias: bool,
    eps: float,
    residual_dtype: torch.dtype | None = None,
    output_dtype: torch.dtype | None = None,
) -> Callable[[str, torch.dtype], Arguments]:
    """None: the dtype that is asked for, which the branch and the parameters have."""
    normed = norm(rows, hidden, bias=bias, eps=eps)

    def build(device: str, dtype: torch.dtype) -> Arguments:
        arguments = normed(device, dtype)
        branch = arguments.pop("x")
        draw = Draw(device, dtype)
        draw.generator.manual_seed(1)
        residual = draw.normal(*rows, hidden, dtype=residual_dtype)
        return {"residual": residual, "branch": branch, **arguments, "dtype": output_dtype or dtype}

    return build


def add_norm_examples(*, bias: bool) -> dict[str, Callable[[str, torch.dtype], Arguments]]:
    fp32 = torch.float32
    return {
        "odd": add_norm((3, 5), 77, bias=bias, eps=0.1),
        "odd_rows": add_norm((301,), 33, bias=bias, eps=1e-5, residual_dtype=fp32),
        "odd_fp32_residual": add_norm((3, 5), 77, bias=bias, eps=1e-5, residual_dtype=fp32),
        "odd_fp32_output": add_norm((3, 5), 77, bias=bias, eps=1e-5, output_dtype=fp32),
        "edge": add_norm((2, 8), 128, bias=bias, eps=1e-5),
        "edge_above": add_norm((9,), 1025, bias=bias, eps=1e-5, residual_dtype=fp32),
    }


def add_norm_bytes(arguments: Arguments) -> int:
    """Every argument read; the sum and its norm written."""
    residual = arguments["residual"]
    return read_all(arguments) + size_bytes(residual) + residual.numel() * arguments["dtype"].itemsize


def add_norm_backward_bytes(arguments: Arguments) -> int:
    """The sum, its gradient, that of the norm and the parameters read; a gradient of every argument written."""
    residual = arguments["residual"]
    affine = size_bytes([arguments[name] for name in ("weight", "bias") if name in arguments])
    read = 2 * size_bytes(residual) + residual.numel() * arguments["dtype"].itemsize + size_bytes(arguments["weight"])
    return read + size_bytes(residual) + size_bytes(arguments["branch"]) + affine


def norm_examples(*, bias: bool) -> dict[str, Callable[[str, torch.dtype], Arguments]]:
    """eps = 0.1 is large enough that leaving it out shows. edge_head_*: rows of qk-norm, and some more than fill a tile
    of 4096 elements; odd_waves: more tiles than interpreted programs.
    """
    return {
        "odd": norm((3, 5), 77, bias=bias, eps=0.1),
        "odd_rows": norm((301,), 33, bias=bias, eps=1e-5),
        "odd_waves": norm((67,), 1031, bias=bias, eps=1e-5),
        "odd_fp32_weight": norm((3, 5), 77, bias=bias, eps=1e-5, weight_dtype=torch.float32),
        "odd_bf16_weight": norm((3, 5), 77, bias=bias, eps=1e-5, weight_dtype=torch.bfloat16),
        "edge": norm((2, 8), 128, bias=bias, eps=1e-5),
        "edge_above": norm((9,), 1025, bias=bias, eps=1e-5),
        **{f"edge_head_{n}": norm((5, 13, 3), n, bias=bias, eps=1e-5) for n in (64, 80, 96, 128, 192, 256)},
    }


def norm_sizes(*, bias: bool) -> dict[str, Size]:
    return {
        "rows": Size(lambda n: norm((n,), 40, bias=bias, eps=1e-5), (2_000,), (70_001,), accumulates=True),
        "hidden_size": Size(lambda n: norm((3,), n, bias=bias, eps=1e-5), (5_000,), (70_001,)),
    }


def add_norm_sizes(*, bias: bool) -> dict[str, Size]:
    return {
        "rows": Size(lambda n: add_norm((n,), 40, bias=bias, eps=1e-5), (2_000,), (70_001,), accumulates=True),
        "hidden_size": Size(lambda n: add_norm((3,), n, bias=bias, eps=1e-5), (5_000,), (70_001,)),
    }


def moved(*names: str, by: float = 0.0, times: float = 1.0) -> Change:
    """The tensors times a number plus another, in their own dtypes."""
    return lambda arguments: {**arguments, **{name: arguments[name] * times + by for name in names}}


def all_moved(name: str, times: float) -> Change:
    """The same of a list of tensors."""
    return lambda arguments: {**arguments, name: [tensor * times for tensor in arguments[name]]}


def in_float32(arguments: Arguments, *names: str) -> int:
    """Bytes of the tensors if they were fp32."""
    return sum(4 * arguments[name].numel() for name in names)


def size_bytes(value: Any) -> int:
    """Bytes of a tensor, or of all tensors of a list."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(size_bytes(item) for item in value) if isinstance(value, (list, tuple)) else 0


def read_all(arguments: Arguments) -> int:
    return sum(size_bytes(value) for value in arguments.values())


def read_all_write_like(name: str) -> Callable[[Arguments], int]:
    """Every argument read, one output of the size of argument `name` written."""
    return lambda arguments: read_all(arguments) + size_bytes(arguments[name])


def elements(name: str, per_element: int) -> Callable[[Arguments], int]:
    return lambda arguments: per_element * arguments[name].numel()


def total_elements(name: str, per_element: int) -> Callable[[Arguments], int]:
    return lambda arguments: per_element * sum(tensor.numel() for tensor in arguments[name])


def norm_attributes(arguments: Arguments) -> dict[str, Attribute]:
    return {"hidden_size": arguments["weight"].shape[-1], "eps": arguments["eps"]}


def loss_attributes(arguments: Arguments) -> dict[str, Attribute]:
    given = {name: arguments.get(name, default) for name, default in LOSS_DEFAULTS.items()}
    return {**given, "token_weights": arguments.get("token_weights") is not None}
