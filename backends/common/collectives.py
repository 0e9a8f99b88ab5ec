"""Collectives of torch under one name, where its versions have several."""

from __future__ import annotations

import torch.distributed as dist

# (whole [R * n], own [n], group): the name in newer versions of torch, and in older ones
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
