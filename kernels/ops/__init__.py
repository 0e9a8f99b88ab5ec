"""What is known of each op besides its formula: one file an op, named after its function in kernels/reference.py.

Each file defines `OP`: the formula once more in float64, example calls, attributes, and the bytes and flops of a call.
Other packages add ops of their own by entry points of the group `weftrain.ops`, each an Op or a list of them.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from weftrain.kernels import reference
from weftrain.kernels.contract import Op
from weftrain.kernels.plugins import load_plugins

ENTRY_POINT_GROUP = "weftrain.ops"
BUILT_IN: Mapping[str, Op] = {
    function.__name__: importlib.import_module(f"{__name__}.{function.__name__}").OP for function in reference.FUNCTIONS
}


class Ops(Mapping[str, Op]):
    """Every op by its name. Those of other packages, which import this one, are looked for at the first use."""

    def __init__(self) -> None:
        self._found: dict[str, Op] | None = None
        self.broken_plugins: dict[str, str] = {}  # entry point -> why its ops are not here

    def look_again(self) -> None:
        """Read the entry points: all ops of one that is right, none of one that is not."""
        self._found, self.broken_plugins = dict(BUILT_IN), {}
        origins = dict.fromkeys(BUILT_IN, "weftrain itself")
        for plugin in load_plugins(ENTRY_POINT_GROUP):
            offered = plugin.loaded if isinstance(plugin.loaded, (list, tuple)) else [plugin.loaded]
            reason = plugin.broken or next(filter(None, (_refusal(op, origins) for op in offered)), None)
            names = [] if reason else [op.name for op in offered]
            if reason is None and len(set(names)) < len(names):
                reason = "gives two ops of one name"
            if reason is not None:
                self.broken_plugins[plugin.origin] = reason
                continue
            self._found |= dict(zip(names, offered, strict=True))
            origins |= dict.fromkeys(names, plugin.origin)

    def _all(self) -> dict[str, Op]:
        if self._found is None:
            self.look_again()
        assert self._found is not None
        return self._found

    def __getitem__(self, name: str) -> Op:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())


def _refusal(op: Any, origins: Mapping[str, str]) -> str | None:
    """Why what an entry point gives is not taken, or None."""
    if not isinstance(op, Op):
        return f"gives a {type(op).__name__}; it must give an Op or a list of them"
    name = getattr(op.function, "__name__", "")
    if not name.isidentifier():
        return f"gives an op whose function has no name of its own ('{name}'): define it with def"
    if name in origins:
        return f"gives the op '{name}', which {origins[name]} has already: give the function a name of its own"
    if not {"odd", "odd_small"} & set(op.examples):
        return f"op '{name}' has no example named 'odd' (sizes that no block divides), which every check begins with"
    takes = inspect.signature(op.function).parameters
    unknown = [argument for argument in (*op.differentiable, *op.in_place) if argument not in takes]
    if unknown:
        return f"op '{name}': its function takes {', '.join(takes)}, and not '{unknown[0]}'"
    return None


OPS = Ops()
