"""Which keys of causal attention a query sees first: a document's start and a window are the same to a kernel."""

from __future__ import annotations

import torch
from torch import Tensor


def first_visible_keys(q: Tensor, document_start: Tensor | None, window: int | None) -> Tensor | None:
    """int32 [B, T], contiguous: the first key of each query of q [B, T, H, D]; None: key 0 for all of them."""
    B, T = q.shape[:2]
    if window is None or window >= T:
        return None if document_start is None else document_start.contiguous()
    first = torch.arange(1 - window, T + 1 - window, dtype=torch.int32, device=q.device).clamp(min=0).expand(B, T)
    return first.contiguous() if document_start is None else torch.maximum(first, document_start)
