"""Kernels: one op = one reference and N implementations. This folder imports nothing else of weftrain's."""

from weftrain.kernels.contract import Attribute, Implementation, KernelError, Op, Spec, available_everywhere
from weftrain.kernels.ops import OPS
from weftrain.kernels.registry import (
    DEFAULT_PREFERENCES,
    ENTRY_POINT_GROUP,
    GPU_PREFERENCES,
    Selection,
    TableRow,
    default_preferences,
    load_catalog,
    select,
    table,
)

__all__ = [
    "DEFAULT_PREFERENCES",
    "ENTRY_POINT_GROUP",
    "GPU_PREFERENCES",
    "OPS",
    "Attribute",
    "Implementation",
    "KernelError",
    "Op",
    "Selection",
    "Spec",
    "TableRow",
    "available_everywhere",
    "default_preferences",
    "load_catalog",
    "select",
    "table",
]
