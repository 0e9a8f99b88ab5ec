"""The softmax of one row that does not fit a program: what cross_entropy and linear_cross_entropy share.

The maximum is one number a row and not one a lane, so an element costs one exponential; the sum is kept in lanes and
added once at the end, so that an fp32 sum of 32,000 terms is a tree over lanes of a few terms each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from weftrain.kernels.triton_ops._launch import TRITON_DTYPES, next_power_of_2

_MAX_BLOCK = 4096  # columns in one step: 16 elements a thread

# ---- for the compile gate: arguments that every kernel of a loss takes, and (dtype, name, type of the size)
LOSS_TYPES = {"labels": "*i64:16", "scale": "fp32", "z_loss": "fp32", "ignore_index": "i32"}
# 32000 and 32032 (Amber's, CrystalCoder's) are multiples of 16; an odd vocabulary is not.
VOCABULARIES = (*((dtype, "v32000", "i32:16") for dtype in TRITON_DTYPES.values()), ("fp32", "v50257", "i32"))


@triton.jit
def row_statistics(x, columns, scale, BLOCK: tl.constexpr):
    """Row pointer x -> (maximum, sum of exp(scale x - maximum)), fp32. A row of -inf alone gives (0, 0); +inf and NaN
    give a NaN sum.
    """
    maximum = float("-inf")
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        values = tl.where(inside, tl.load(x + column, mask=inside, other=0.0).to(tl.float32) * scale, float("-inf"))
        before = maximum
        maximum = tl.maximum(before, tl.max(values, 0))
        shift = tl.where(maximum == float("-inf"), 0.0, maximum)  # while all is -inf, -inf - -inf would make a NaN
        total = total * tl.exp(before - shift) + tl.exp(values - shift)
    return tl.where(maximum == float("-inf"), 0.0, maximum), tl.sum(total, 0)


@triton.jit
def row_loss(x, label, columns, scale, z_loss, ignore_index, maximum, total):
    """Token loss: logsumexp - scale x[label] + z_loss logsumexp^2; 0 where ignored, NaN for a label outside the row,
    which is not read.
    """
    ignored = label == ignore_index
    valid = (label >= 0) & (label < columns)
    at_label = tl.load(x + label, mask=valid, other=0.0).to(tl.float32) * scale
    log_total = tl.log(total)
    logsumexp = maximum + log_total
    loss = log_total + (maximum - at_label) + z_loss * logsumexp * logsumexp
    return tl.where(ignored, 0.0, tl.where(valid, loss, float("nan")))


@triton.jit
def row_factors(label, columns, scale, z_loss, ignore_index, maximum, total, incoming):
    """(softmax_factor, label_factor, z_factor) for block_gradient; all 0 for a row whose loss is 0 or NaN."""
    counted = (label >= 0) & (label < columns) & (label != ignore_index)
    factor = tl.where(counted, incoming * scale, 0.0)
    softmax_factor = tl.div_rn(factor, total)
    return softmax_factor, factor, softmax_factor * (2.0 * z_loss * (maximum + tl.log(total)))


@triton.jit
def block_gradient(values, column, label, maximum, softmax_factor, label_factor, z_factor):
    """Scaled logits of one block, fp32 -> the gradient of the logits, fp32: factor ((softmax - onehot) + softmax 2
    z_loss logsumexp).

    In this order: of a token that is as good as certain only the z-loss is left, and it must not have been rounded
    beside the 1.
    """
    exponential = tl.exp(values - maximum)
    return (exponential * softmax_factor - tl.where(column == label, label_factor, 0.0)) + exponential * z_factor


def row_block(columns: int) -> tuple[int, int]:
    """(BLOCK, num_warps) for rows of that many columns."""
    block = min(next_power_of_2(columns), _MAX_BLOCK)
    return block, min(max(block // 512, 1), 8)
