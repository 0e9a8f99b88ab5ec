"""What is known of each op besides its formula: one file an op, named after its function in kernels/reference.py.

Each file defines `OP`: the formula once more in float64, example calls, attributes, and the bytes and flops of a call.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from weftrain.kernels import reference
from weftrain.kernels.contract import Op

OPS: Mapping[str, Op] = {
    function.__name__: importlib.import_module(f"{__name__}.{function.__name__}").OP for function in reference.FUNCTIONS
}
