"""In which keys two models differ, of those that decide shapes or function."""

from __future__ import annotations

from weftrain.core.model_config import ModelConfig
from weftrain.core.mup import resolve_scales

# limits, noise and how weights were drawn
_NOT_THE_FUNCTION = ("max_position_embeddings", "dropout", "initialization", "mup")


def model_differences(recorded: ModelConfig, wanted: ModelConfig) -> dict[str, str]:
    """Key of the model -> "model.key: recorded -> wanted". What follows from another key is left out."""
    keys = [key for key in ModelConfig.model_fields if key not in _NOT_THE_FUNCTION and not key.endswith("_scale")]
    given = recorded.model_dump(), wanted.model_dump()
    pairs = {key: (given[0].get(key), given[1].get(key)) for key in [*keys, "attention_scale"]}
    before, after = (one and one.function.model_dump() for one in (recorded.experts, wanted.experts))
    if before and after:
        keys = [key for key in after if before[key] != after[key]]
        before, after = ({key: one[key] for key in keys} for one in (before, after))
    pairs["experts"] = before, after
    scales = resolve_scales(recorded), resolve_scales(wanted)
    pairs["embedding_scale"] = (scales[0].embedding_scale, scales[1].embedding_scale)
    pairs["logits_scale"] = (scales[0].logits_scale, scales[1].logits_scale)
    return {key: f"model.{key}: {old} -> {new}" for key, (old, new) in pairs.items() if old != new}
