"""Text from a file, made safe to show in a terminal or on a page: characters that control the display become visible
escapes.

A reason in a ledger, a file's name or a tensor's can hold escape sequences that erase lines, rename the window or
reverse the direction of writing. Whatever a command prints passes through here (cli/display.py).
"""

from __future__ import annotations

import re

# Control characters, line and paragraph separators, marks that change the direction of writing, invisible ones, lone
# surrogates.
_ACTING = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


def printable(text: str, keep: str = "") -> str:
    """The text with every such character written as its escape, `\\x1b` for one. keep: those that may stay, as
    "\\n\\t".
    """
    return _ACTING.sub(lambda found: found[0] if found[0] in keep else found[0].encode("unicode_escape").decode(), text)
