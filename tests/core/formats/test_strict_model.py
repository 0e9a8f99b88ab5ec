"""Schemas: a file that breaks one is refused in one line that names the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from weftrain.core.formats.strict_model import Count, StrictModel, read_json_model


class Outer(StrictModel):
    class Inner(StrictModel):
        count: Count

    inner: Inner


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"inner":{"count":"3"}}', "key 'inner.count': Input should be a valid integer"),
        ('{"inner":{"count":-1}}', "key 'inner.count': Input should be greater than or equal to 0"),
        ('{"inner":{"count":1},"more":1}', "key 'more': Extra inputs are not permitted"),
        ("[]", "Input should be a valid dictionary"),
        ("{", "Expecting"),
    ],
)
def test_the_first_wrong_key_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"inner":{"count":3}}')
    assert read_json_model(path, Outer, "record").inner.count == 3
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_json_model(path, Outer, "record")
    assert "\n" not in str(caught.value)
