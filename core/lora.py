"""Adapters in a model, and out of it: `attach_adapters` gives a Decoder the parameters that core/tuning.py lists,
`merged` adds them to the weights that they belong to, for everything that reads a model without them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from weftrain.core.blocks import Linear
from weftrain.core.formats.lazy_tensors import LazyTensors, meta_of
from weftrain.core.model import Decoder
from weftrain.core.parameters import ParameterSpec, is_adapter
from weftrain.core.tuning import LoraConfig

A, B = ".lora_a", ".lora_b"


def attach_adapters(model: Decoder, specs: Sequence[ParameterSpec], lora: LoraConfig | None) -> None:
    """Add the adapters among `specs` to the linear modules that they belong to, uninitialized, on their device."""
    if lora is None:
        return
    for spec in specs:
        if is_adapter(spec):
            owner, _, attribute = spec.name.rpartition(".")
            module = model.get_submodule(owner)
            assert isinstance(module, Linear)
            setattr(module, attribute, nn.Parameter(module.weight.detach().new_empty(spec.shape)))
            module.lora_scale, module.lora_dropout = lora.scale, lora.dropout


def merged(weights: Mapping[str, Tensor], lora: LoraConfig | None) -> Mapping[str, Tensor]:
    """Canonical name -> fp32 weight of the model alone: W + (alpha / rank) B A, summed in float64 and rounded once,
    each when it is read.
    """
    if lora is None:
        return weights
    scale = lora.scale

    def read(name: str) -> Tensor:
        module = name.removesuffix(".weight")
        if module == name or module + A not in weights:
            return weights[name]
        product = weights[module + B].double() @ weights[module + A].double()
        return (weights[name].double() + product * scale).float()

    return LazyTensors({name: meta_of(weights, name) for name in weights if not name.endswith((A, B))}, read)
