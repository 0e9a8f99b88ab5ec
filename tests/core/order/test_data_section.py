"""Data sections that contradict themselves are refused by key."""

from __future__ import annotations

from typing import Any

import pytest
from data_configs import config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": [{"name": "a", "path": "a", "weight": 0.5}]}, "weights add up to 0.5, not to 1"),
        (
            {"sources": [{"name": "a", "path": "a", "weight": 0.5}, {"name": "b", "path": "b", "tokens": 5}]},
            "different kinds",
        ),
        (
            {"sources": [{"name": "a", "path": "a", "weight": 1.0, "epochs": 2.0}]},
            "exactly one of 'weight', 'tokens' and 'epochs'",
        ),
        ({"sources": [{"name": "a", "path": "a"}]}, "exactly one of 'weight', 'tokens' and 'epochs'"),
        ({"skip": [{"chunk": 0, "action": "drop", "reason": "x"}]}, "there is no chunk 0 of none"),
        ({"chunks": 2, "skip": [{"chunk": 2, "action": "drop", "reason": "x"}]}, "there is no chunk 2 of 2"),
        ({"chunks": 4, "skip": [{"chunk": 2, "action": "drop", "reason": "x"}] * 2}, "two entries name chunk 2"),
        ({"chunks": 1, "skip": [{"chunk": 0, "action": "drop", "reason": "x"}]}, "every chunk is dropped"),
        ({"skip": [{"chunk": 0, "reason": "x"}]}, "give 'chunk' and 'action', or 'source' and 'rows'"),
        ({"skip": [{"source": "a", "reason": "x"}]}, "give 'chunk' and 'action', or 'source' and 'rows'"),
        ({"skip": [{"source": "a", "rows": [4, 4], "reason": "x"}]}, "are none"),
        ({"skip": [{"source": "z", "rows": [0, 4], "reason": "x"}]}, "there is no source 'z'"),
        (
            {"skip": [{"source": "a", "rows": rows, "reason": "x"} for rows in ([0, 4], [3, 5])]},
            "two entries name row 3 of source 'a'",
        ),
        ({"sources": [], "synthetic_rows": 4, "chunks": 2}, "synthetic rows have no"),
    ],
)
def test_what_a_recipe_cannot_say(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**change)
