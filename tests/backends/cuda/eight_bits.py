"""Sizes of a model whose linear maps can all be computed in eight bits."""

SIZES = [
    "model.hidden_size=64",
    "model.num_heads=4",
    "model.intermediate_size=96",
    "data.sequence_length=16",
    "model.vocab_size=112",
    "precision.compute=bfloat16",
]
