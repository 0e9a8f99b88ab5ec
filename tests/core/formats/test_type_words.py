"""Types in words."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
from pydantic import Field

from weftrain.core.config import Recipe, Segment
from weftrain.core.formats.strict_model import Positive
from weftrain.core.formats.type_words import keys, type_words


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (bool, "true or false"),
        (Literal["a", "b"], "one of a, b"),
        (Positive | None, "number > 0 or null"),
        (dict[str, int], "mapping of text to integer"),
        (tuple[int, int], "list of 2: integer, integer"),
        (Segment, "Segment section"),
        (tuple[Segment, ...], "list of Segment sections"),
        (Annotated[int, Field(gt=0, le=8)], "integer > 0, <= 8"),
    ],
)
def test_types_in_words(annotation: object, words: str) -> None:
    assert type_words(annotation) == words


def test_keys_of_lists_and_sections() -> None:
    found = dict(keys(Recipe))
    assert found["schedule.learning_rate"] == "list of Segment sections"
    assert (
        found["schedule.learning_rate.*.shape"] == "one of linear, cosine, constant, one_minus_sqrt, sqrt, inverse_sqrt"
    )
    assert found["model.hidden_size"].startswith("integer > 0")
