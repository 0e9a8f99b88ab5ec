"""Torch operators (`torch.ops.weftrain.*`) around code that torch.compile cannot trace: Triton launches and C++."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch


def define_operator(
    library: torch.library.Library, schema: str, launches: Mapping[str, Callable[..., Any]], fake: Callable[..., Any]
) -> Any:
    """Define and return the operator of `schema` ("name(Tensor x) -> Tensor").

    launches: dispatch key ("CPU", "CUDA") -> what computes there; fake: allocates what they return. An operator has no
    derivative of its own: an autograd.Function around it has.
    """
    name = schema.split("(")[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key, launch in launches.items():
        library.impl(name, launch, key)
    library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"{library.ns}::{name}", fake, lib=library)
    return getattr(getattr(torch.ops, library.ns), name).default
