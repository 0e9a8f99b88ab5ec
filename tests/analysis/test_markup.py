"""Hidden characters are made visible."""

from __future__ import annotations

from weftrain.analysis.markup import escape


def test_hidden_characters_are_made_visible() -> None:
    assert escape("a\u202eb\x1b\ud800<&'\"\n") == "a\\u202eb\\u001b\\ud800&lt;&amp;&#x27;&quot;\n"
