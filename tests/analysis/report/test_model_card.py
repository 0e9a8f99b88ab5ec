"""What a card makes of text that would be markup."""

from __future__ import annotations

import re

import pytest

from weftrain.analysis.report.model_card import hub_licence, plain
from weftrain.core.errors import ReleaseError, printable
from weftrain.exchange.release.build import checked_licence

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1)) ![x](http://x/y.png)",
    "a | b | c",
    "**bold** _it_ ~~gone~~ `code` # head",
    "one\n\n# two\n---\nlicense: mit",
    "\n---\nlicense: mit\n---\n",
    "- item",
    "=====",
    "+ item",
    "&lt;b&gt; &amp;",
    "$x$ \\",
    "\x1b[2J\x07\x00\u202egnp.exe",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_text_stays_text(text: str) -> None:
    shown = plain(text)
    assert "\n" not in shown
    assert shown == printable(shown)
    assert not re.search(r"[<>]|&(?!(lt|gt|amp);)", shown)
    assert not re.search(r"(?<!\\)(\\\\)*[`*_\[\]|~#!$]", shown)  # each is escaped
    assert not re.match(r"[-+=#>]", shown)


def test_what_a_reader_sees_is_the_text() -> None:
    assert (
        plain("width 256, 5,264,208 parameters (muP: a/b) 1.5 %") == "width 256, 5,264,208 parameters (muP: a/b) 1.5 %"
    )
    assert plain("python_stdlib < 3") == r"python\_stdlib &lt; 3"
    assert plain(3.5) == "3.5"


def test_licences() -> None:
    assert checked_licence("apache-2.0 or mit") == "Apache-2.0 OR MIT"
    assert hub_licence(checked_licence("mit")) == {"license": "mit"}
    assert hub_licence("Apache-2.0 OR MIT") == {"license": "other", "license_name": "Apache-2.0 OR MIT"}
    assert hub_licence(checked_licence("LicenseRef-Mine")) == {"license": "other", "license_name": "LicenseRef-Mine"}
    with pytest.raises(ReleaseError, match=r"'GPL' or so'|is not an SPDX licence expression .*LicenseRef-NAME"):
        checked_licence("GPL or so")
