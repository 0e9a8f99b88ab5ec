"""Which parameters Muon updates, and how it scales them, as data. `kernels/reference.py:newton_schulz` is its product.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) moves a matrix by its momentum with every singular
value made about 1. It is for the hidden matrices; embeddings, head, norms and biases keep AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field

from weftrain.core.formats.strict_model import Positive, StrictModel
from weftrain.core.parameters import ParameterSpec, Role
from weftrain.core.tuning import Patterns, matched

HIDDEN_MATRICES = (Role.MATRIX, Role.OUTPUT_MATRIX)


class MuonConfig(StrictModel):
    """The recipe's `optimizer.muon`, beside AdamW's keys, which are those of all other parameters.

    Each of its matrices moves by rate x scale x newton_schulz(momentum) and decays by rate x weight_decay, where rate
    is the schedule's times learning_rate_multiplier.
    """

    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95  # of the moving average of gradients
    nesterov: bool = True  # the newest gradient counts once more
    iterations: Annotated[int, Field(ge=1, le=20)] = 5
    # a x + b x^3 + c x^5 on the singular values, chosen by the authors for a steep slope at 0, not for a limit at 1
    coefficients: Annotated[tuple[float, float, float], Field(strict=False)] = (3.4445, -4.775, 2.0315)
    eps: Positive = 1e-7  # the least norm that a momentum is divided by
    compute: Literal["bfloat16", "float32"] = "bfloat16"  # of the iterations
    # match_adamw: 0.2 sqrt(max(out, in)), the root mean square of AdamW's updates, so that its rates and decay carry
    # over (arXiv 2502.16982, section 2.2). original: sqrt(max(1, out / in)), the authors'. spectral: sqrt(out / in),
    # the condition under which rates carry over to other widths (arXiv 2310.17813, condition 1), which is muP's too.
    scale: Literal["match_adamw", "original", "spectral"] = "match_adamw"
    learning_rate_multiplier: Positive = 1.0
    parameters: Annotated[Patterns, Field(min_length=1)] | None = None  # globs; null: every hidden matrix

    def scale_of(self, shape: tuple[int, ...]) -> float:
        """Of the update of a matrix [out, in]."""
        rows, columns = shape[-2:]
        match self.scale:
            case "match_adamw":
                return 0.2 * math.sqrt(max(rows, columns))
            case "original":
                return math.sqrt(max(1.0, rows / columns))
            case "spectral":
                return math.sqrt(rows / columns)

    def flops_of(self, shape: tuple[int, ...]) -> int:
        """Of newton_schulz of one matrix [.., out, in], or a stack: two products with the smaller side's square, which
        the first makes, and that square's.
        """
        *stack, rows, columns = shape
        short, long = sorted((rows, columns))
        return math.prod(stack) * self.iterations * (4 * short * short * long + 2 * short**3)


def muon_flops(specs: Sequence[ParameterSpec], muon: MuonConfig | None) -> int:
    """Of newton_schulz in one step."""
    return sum(muon.flops_of(spec.shape) for spec in specs if muon and spec.trained and spec.optimizer == "muon")


def with_muon(specs: Sequence[ParameterSpec], muon: MuonConfig | None) -> tuple[ParameterSpec, ...]:
    """Names the optimizer of each parameter. Raises ValueError for a pattern that matches nothing or no matrix, and
    where nothing that is trained would be Muon's.
    """
    if muon is None:
        return tuple(specs)
    if muon.parameters is None:
        mine = {spec.name for spec in specs if spec.role in HIDDEN_MATRICES}
    else:
        names, mine = [spec.name for spec in specs], set()
        for number, pattern in enumerate(muon.parameters):
            mine |= matched(pattern, names, f"optimizer.muon.parameters.{number}")
    for spec in specs:
        if spec.name in mine and len(spec.shape) < 2:
            raise ValueError(
                f"optimizer.muon.parameters: {spec.name} is a vector of {spec.shape[0]}, and Muon is of matrices: "
                "leave it to AdamW"
            )
    if not any(spec.trained and spec.name in mine for spec in specs):
        raise ValueError("optimizer.name is muon and every matrix of its is frozen: set optimizer.name=adamw")
    return tuple(replace(spec, optimizer="muon") if spec.name in mine else spec for spec in specs)
