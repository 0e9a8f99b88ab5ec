"""What a checkpoint file of the Cerebras Model Zoo holds besides its tensors, as JSON. Nothing of the vendor's is used.

`checkpoint_writer.py` writes files that `cerebras.pytorch.load` opens and `checkpoint_reader.py` reads them without
trust. This is what `cerebras.pytorch.save` of release 2.10 writes (its format version 0.5; found by writing and reading
with that release): one HDF5 file whose root holds a dataset for each tensor, named by its path in the state dict joined
with dots, as in `optimizer.state.0.exp_avg`.

- root attribute `__version__`: 0.5. Releases before 2.1 wrote 0.1 to 0.4, whose `__spec__` is a pickle that is never
  opened here.
- root attribute `__spec__`: JSON, the state dict's shape, once as nested objects and once as torch's pytree spec.
- root attribute `__SUCCESS__`: true, set last. A file without it is half-written.
- root attribute `KEY.__metadata__`: JSON that describes the leaf KEY. Numbers and strings stand here and have no
  dataset. A tensor that has a second name (a tied head) has one dataset; under the other name stands a link to it.
- attributes of a dataset: the same description for a tensor: shape, dtype, the appliance's number of the dtype. HDF5
  has no bfloat16, so such a tensor is an int16 dataset whose attribute `dtypes` tells it from integers.

The state dict of release 1.9 holds the bare decoder, with names that begin with `model.`; that of later Model Zoos
holds it in a wrapper, hence `model.model.`. Both are read, and the writer's `prefix` says which is written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

FORMAT_VERSION = 0.5
MOMENTS = ("exp_avg", "exp_avg_sq")
LINK = "LinkedObject"
APPLIANCE_DTYPES = {torch.float32: 11, torch.bfloat16: 15}  # as `rtfx_dtypes` numbers element types


@dataclass(frozen=True)
class StoredTensor:
    """A leaf that has a dataset of its own."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


@dataclass(frozen=True)
class Link:
    """A leaf that is another name of the leaf `key`."""

    key: str


def flatten(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(key, leaf) of a state dict in order; the names on the way to a leaf are joined with dots."""
    if not isinstance(tree, dict | list | tuple):
        yield key, tree
        return
    for name, item in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield from flatten(item, f"{key}.{name}" if key else str(name))


def spec_json(tree: Any) -> str:
    """The JSON of `__spec__`: nested objects with '*' for leaves, and torch's pytree spec, itself JSON in a string."""
    return json.dumps([_stars(tree), json.dumps([1, _pytree(tree)])], indent=4)


def _stars(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {str(name): _stars(item) for name, item in tree.items()}
    return [_stars(item) for item in tree] if isinstance(tree, list | tuple) else "*"


def _pytree(tree: Any) -> dict[str, Any]:
    if isinstance(tree, dict):
        return {
            "type": "builtins.dict",
            "context": json.dumps(list(tree)),
            "children_spec": [_pytree(item) for item in tree.values()],
        }
    if isinstance(tree, list | tuple):
        return {
            "type": f"builtins.{type(tree).__name__}",
            "context": "null",
            "children_spec": [_pytree(item) for item in tree],
        }
    return {"type": None, "context": None, "children_spec": []}


def tensor_metadata(leaf: StoredTensor) -> dict[str, Any]:
    return {
        "__TORCH__": True,
        "shapes": [list(leaf.shape)],
        "dtypes": [str(leaf.dtype)],
        "rtfx_dtypes": [APPLIANCE_DTYPES[leaf.dtype]],
        "__TYPE__": "TorchTensorSerializer",
        "__NUMPY__": True,
        "compressed": False,
    }


def metadata_json(key: str, leaf: Any) -> str:
    """The JSON of a leaf's `KEY.__metadata__`."""
    own: dict[str, Any]
    if isinstance(leaf, StoredTensor):
        own = tensor_metadata(leaf)
    elif isinstance(leaf, Link):
        own = {"key": leaf.key, "__LINKED__": True, "__TYPE__": LINK, "__NONE__": True}
    elif isinstance(leaf, str):
        own = {"string_value": leaf, "__TYPE__": "StringSerializer", "__NONE__": True}
    else:
        own = {"scalar_value": leaf, "__TYPE__": "ScalarSerializer", "__NONE__": True}
    return json.dumps(
        {"__spec__": json.loads(spec_json({key: leaf})), "__objects__": [key], f"{key}.__metadata__": own}, indent=4
    )
