"""Runs the blocks of a model: compiled or not, and with the part of them that backward computes again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Recomputes = Literal["none", "selective", "full"]
Forward = Callable[..., torch.Tensor]

# Matrix multiplies and attention: what selective recomputation keeps. Attention kernels of the registry are custom ops
# of their own namespaces, and scaled_dot_product_attention is one of aten's.
_KEPT_ATEN = ("mm", "addmm", "bmm", "_scaled_dot_product", "scaled_dot_product")


def block_runner(forward: Forward, recomputes: Recomputes, compiles: bool, mode: str | None = None) -> Forward:
    """`forward(block, *arguments)`, run as asked. mode: torch.compile's.

    All blocks share one compiled graph, since their parameters are its inputs. A selective one has the recomputation
    within its graph, a full one around it.
    """
    run = partial(_selective, forward) if recomputes == "selective" else forward
    if compiles:
        run = torch.compile(_function(run), dynamic=False, mode=mode)  # shapes are static
    if recomputes == "full":
        return partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
    return run


def _function(run: Forward) -> Forward:
    """torch.compile takes functions."""
    return run if not isinstance(run, partial) else lambda *arguments: run(*arguments)


def _selective(forward: Forward, *arguments: Any) -> torch.Tensor:
    contexts = partial(create_selective_checkpoint_contexts, _keep_products)
    found: torch.Tensor = checkpoint(
        forward, *arguments, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
    )
    return found


def _keep_products(context: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    namespace, _, name = str(operator.name()).partition("::")  # every operator has one, a higher-order one too
    kept = name.startswith(_KEPT_ATEN) if namespace == "aten" else "attention" in name
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
