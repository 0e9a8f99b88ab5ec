"""The softmax of one row that does not fit a program: what cross_entropy and linear_cross_entropy share.

The maximum is one number a row and not one a lane, so an element costs one exponential; the sum is kept in lanes and
added once at the end, so that an fp32 sum of 32,000 terms is a tree over lanes of a few terms each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from weftrain.kernels.triton_ops._launch import TRITON_DTYPES, next_power_of_2

_MAX_BLOCK = 4096  # columns in one step

# ---- for the compile gate: arguments that every kernel of a loss takes, and (dtype, name, type of the size)
LOSS_TYPES = {
    "labels": "*i64:16",
    "token_weights": "*fp32:16",
    "scale": "fp32",
    "cap": "fp32",
    "z_loss": "fp32",
    "smoothing": "fp32",
    "uniform": "fp32",
    "ignore_index": "i32",
}
# An argument that is None takes no register and no instruction: a launch without it compiles to what it was without it.
_SHARP: dict[str, None] = {"smoothing": None, "uniform": None}
_PLAIN = {"token_weights": None, **_SHARP}
# (dtype, name, type of the size, capped, constants). 32000 and 32032 (Amber's, CrystalCoder's) are multiples of 16; an
# odd vocabulary is not.
LOSSES: tuple[tuple[str, str, str, bool, dict[str, None]], ...] = (
    *((dtype, "v32000", "i32:16", False, _PLAIN) for dtype in TRITON_DTYPES.values()),
    ("fp32", "v50257", "i32", False, _PLAIN),
    ("bf16", "v32000 capped", "i32:16", True, _PLAIN),
    ("fp32", "v50257 capped", "i32", True, _PLAIN),
    ("bf16", "v32000 weighted", "i32:16", False, _SHARP),
    ("bf16", "v32000 weighted smoothed", "i32:16", False, {}),
    ("fp32", "v50257 weighted smoothed capped", "i32", True, {}),
)


@triton.jit
def tanh(y):
    """fp32, relative error below 2^-22: near 0 an odd polynomial (a least-squares fit of ours), whose digits a quotient
    of exponentials would lose.
    """
    magnitude = tl.abs(y)
    z = y * y
    series = 0.0021429572 * z - 0.0081773931
    series = series * z + 0.0217007007
    series = series * z - 0.0539467633
    series = series * z + 0.1333320588
    series = series * z - 0.3333333135
    e = tl.exp(-2.0 * magnitude)
    far = (1.0 - e) / (1.0 + e)
    return tl.where(magnitude <= 0.625, y + y * z * series, tl.where(y < 0.0, -far, far))


@triton.jit
def load_logits(x, column, mask, scale, cap, CAPPED: tl.constexpr):
    """scale x[column] in fp32, or cap tanh(scale x[column] / cap)."""
    values = tl.load(x + column, mask=mask, other=0.0).to(tl.float32) * scale
    if CAPPED:
        values = cap * tanh(values / cap)
    return values


@triton.jit
def row_statistics(x, columns, scale, cap, smoothing, CAPPED: tl.constexpr, BLOCK: tl.constexpr):
    """Row pointer x -> (maximum, sum of exp(logit - maximum), sum of (logit - maximum) or 0 where smoothing is None),
    fp32. A row of -inf alone gives (0, 0); +inf and NaN give a NaN sum.
    """
    maximum = float("-inf")
    total = tl.zeros([BLOCK], dtype=tl.float32)
    below = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        values = tl.where(inside, load_logits(x, column, inside, scale, cap, CAPPED), float("-inf"))
        before = maximum
        maximum = tl.maximum(before, tl.max(values, 0))
        shift = tl.where(maximum == float("-inf"), 0.0, maximum)  # while all is -inf, -inf - -inf would make a NaN
        total = total * tl.exp(before - shift) + tl.exp(values - shift)
        if smoothing is not None:
            # a lane has seen start / BLOCK logits so far, which lie further below a larger maximum
            further = tl.where(before == float("-inf"), 0.0, before - shift) * (start // BLOCK)
            below = below + further + tl.where(inside, values - shift, 0.0)
    return tl.where(maximum == float("-inf"), 0.0, maximum), tl.sum(total, 0), tl.sum(below, 0)


@triton.jit
def row_loss(
    x, label, weight, columns, scale, cap, z_loss, smoothing, uniform, ignore_index, maximum, total, below,
    CAPPED: tl.constexpr,
):  # fmt: skip
    """Token loss: logsumexp - logit at the label (with smoothing: 1 - smoothing of it, and uniform of each logit) +
    z_loss logsumexp^2, times the token's weight or None; 0 where ignored, NaN for a label outside the row, which is not
    read.
    """
    ignored = label == ignore_index
    valid = (label >= 0) & (label < columns)
    at_label = load_logits(x, label, valid, scale, cap, CAPPED)
    log_total = tl.log(total)
    logsumexp = maximum + log_total
    target = maximum - at_label
    if smoothing is not None:
        target = (1.0 - smoothing) * target - uniform * below
    loss = log_total + target + z_loss * logsumexp * logsumexp
    if weight is not None:
        loss = loss * weight
    return tl.where(ignored, 0.0, tl.where(valid, loss, float("nan")))


@triton.jit
def row_factors(label, columns, scale, z_loss, ignore_index, maximum, total, incoming):
    """(softmax_factor, label_factor, z_factor) for block_gradient; all 0 for a row whose loss is 0 or NaN."""
    counted = (label >= 0) & (label < columns) & (label != ignore_index)
    factor = tl.where(counted, incoming * scale, 0.0)
    softmax_factor = tl.div_rn(factor, total)
    return softmax_factor, factor, softmax_factor * (2.0 * z_loss * (maximum + tl.log(total)))


@triton.jit
def block_gradient(
    values, column, label, cap, maximum, softmax_factor, label_factor, z_factor, uniform_factor, CAPPED: tl.constexpr
):  # fmt: skip
    """Scaled (and capped) logits of one block, fp32 -> the gradient of the logits, fp32: factor ((softmax - onehot) +
    softmax 2 z_loss logsumexp), less uniform_factor where that is not None, and 1 - tanh^2 times that.

    In this order: of a token that is as good as certain only the z-loss is left, and it must not have been rounded
    beside the 1.
    """
    exponential = tl.exp(values - maximum)
    gradient = (exponential * softmax_factor - tl.where(column == label, label_factor, 0.0)) + exponential * z_factor
    if uniform_factor is not None:
        gradient -= uniform_factor
    if CAPPED:
        bent = values / cap
        gradient *= 1.0 - bent * bent
    return gradient


def row_block(columns: int, capped: bool = False) -> tuple[int, int]:
    """(BLOCK, num_warps) for rows of that many columns: 16 elements a thread, or 8 where a tanh takes registers too."""
    block = min(next_power_of_2(columns), _MAX_BLOCK // 2 if capped else _MAX_BLOCK)
    return block, min(max(block // (256 if capped else 512), 1), 8)


def smoothing_arguments(label_smoothing: float, columns: int) -> tuple[float | None, float | None]:
    """(smoothing, uniform) of a launch: uniform is what each of the columns gets. A division on the device spills."""
    return (label_smoothing, label_smoothing / columns) if label_smoothing else (None, None)
