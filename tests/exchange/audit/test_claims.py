"""What a config claims against the tensors: tensor by tensor for families that convert, at large for others."""

from __future__ import annotations

from typing import Any

import pytest
from planted_series import CONFIG, trained

from weftrain.exchange.audit.claims import changes, claims_of, contradictions, where_changed

SHAPES = {name: ("F32", value.shape) for name, value in trained([0])[0].items()}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, ""),
        ({"tie_word_embeddings": True}, ""),  # the head may be in the file as a copy
        ({"torch_dtype": "bfloat16"}, "the tensors are F32, the config says bfloat16"),
        ({"vocab_size": 50}, "model.embed_tokens.weight is [48, 16], the config makes it [50, 16]"),
        ({"num_hidden_layers": 3}, "tensors that the config asks for are missing (model.layers.2."),
        ({"num_hidden_layers": 1}, "tensors are not the config's (model.layers.1."),
        ({"model_type": "unheard_of"}, ""),
        ({"model_type": "unheard_of", "vocab_size": 50}, "model.embed_tokens.weight is [48, 16]"),
        ({"model_type": "unheard_of", "num_hidden_layers": 7}, "the tensors have 2 layers, the config says 7"),
        ({"model_type": "unheard_of", "hidden_size": 99, "word_embed_proj_dim": 16}, ""),
        ({"num_hidden_layers": 10**9}, "the config says 1,000,000,000"),
        ({"vocab_size": "many", "hidden_size": -1}, "the config makes it [48, -1]"),
    ],
)
def test_contradictions(changed: dict[str, Any], said: str) -> None:
    found = "; ".join(contradictions({**CONFIG, **changed}, SHAPES))
    assert said in found if said else found == ""


def test_claims_leave_out_what_says_nothing_of_the_model() -> None:
    old = {**CONFIG, "transformers_version": "4.1", "_name_or_path": "/home/somebody"}
    new = {key: value for key, value in CONFIG.items() if key != "torch_dtype"} | {"dtype": "float32"}
    assert claims_of(old) == claims_of(new)


def test_changes_that_last_and_changes_that_go_back() -> None:
    values = [(f"s{index}", value) for index, value in enumerate("aabbbcaa")]
    assert [where_changed(*one) for one in changes(values)] == [
        (("s1", "s2"), "from s2 on"),
        (("s4", "s5"), "from s5 on"),
        (("s5", "s6"), "from s6 on"),
    ]
    values = [(f"s{index}", value) for index, value in enumerate("aabaab")]
    assert [where_changed(*one) for one in changes(values)] == [(("s2",), "in s2 only"), (("s4", "s5"), "from s5 on")]
