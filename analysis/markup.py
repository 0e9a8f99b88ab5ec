"""What every HTML page of weftrain shares: escaped text, and the frame of a self-contained document.

The frame's Content-Security-Policy allows the scripts that it is given, by their hashes, and no other, so that text
which escaped its escaping would still not run.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Sequence

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
_HIDDEN = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\ud800-\\udfff\\u200b-\\u200f\\u2028-\\u202e\\u2060-\\u206f\\ufeff\\ufffe\\uffff]"
)


def escape(value: object) -> str:
    """Text for a page: `visible`, with the characters of markup escaped."""
    return html.escape(visible(value))


def visible(value: object) -> str:
    """The text with control characters, lone surrogates and direction overrides made visible."""
    return _HIDDEN.sub(lambda found: f"\\u{ord(found[0]):04x}", str(value))


def document(title: str, style: str, body: str, scripts: Sequence[str] = ()) -> str:
    """A whole page. title: text. style: CSS. body: markup, in which every untrusted text has gone through `escape`.

    scripts: constant texts, run in order behind the body.
    """
    digests = (hashlib.sha256(script.encode()).digest() for script in scripts)
    allowed = "".join(f" 'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    policy = f"{POLICY}; script-src{allowed}" if scripts else POLICY
    run = "".join(f"<script>{script}</script>" for script in scripts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="referrer" content="no-referrer"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body>{body}{run}</body></html>\n"
    )
