"""What every HTML page of weftrain shares: escaped text, and the frame of a self-contained document without script."""

from __future__ import annotations

import html
import re

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
_HIDDEN = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\ud800-\\udfff\\u200b-\\u200f\\u2028-\\u202e\\u2060-\\u206f\\ufeff\\ufffe\\uffff]"
)


def escape(value: object) -> str:
    """Text for a page: escaped, with control characters, lone surrogates and direction overrides made visible."""
    return html.escape(_HIDDEN.sub(lambda found: f"\\u{ord(found[0]):04x}", str(value)))


def document(title: str, style: str, body: str) -> str:
    """A whole page. title: text. style: CSS. body: markup, in which every untrusted text has gone through `escape`."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="referrer" content="no-referrer"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body>{body}</body></html>\n"
    )
