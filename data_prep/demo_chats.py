"""A small set of conversations and preferences, made of the embedded corpus: fine-tuning without a download.

A question asks what a function or class of Python's standard library is for; the answer is the first sentence of its
documentation string. The rule that preferred answers obey is one that a program checks: an answer is one line that
begins with the matter, not with PREAMBLE, and ends with a full stop. Three of four answers of the conversations break
the rule, so that a model which has learned them breaks it most of the time, and each pair has an answer of either kind.
The set depends on the Python version alone, as the corpus does.
"""

from __future__ import annotations

import ast
import hashlib
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from weftrain.data_prep.readers.corpus import embedded_inputs, source_text

PREAMBLE = "Certainly! I am happy to explain this. "
MOST = 1500  # of conversations, and of pairs
_SENTENCE = re.compile(r"[A-Z][^\n]{18,90}?\.(?=\s|$)")
_Record = dict[str, object]


class Entry(NamedTuple):
    """question: about a documented thing. sentence: the answer, one line with a full stop."""

    question: str
    sentence: str

    @property
    def number(self) -> int:
        """Evenly distributed, of the question alone."""
        return int.from_bytes(hashlib.sha256(self.question.encode()).digest()[:8])


def obeys(answer: str) -> bool:
    """Whether an answer obeys the rule."""
    words = answer.strip()
    return "\n" not in words and words.endswith(".") and not words.startswith(PREAMBLE.split()[0])


def demo_records(folder: Path | None = None) -> tuple[list[_Record], list[_Record]]:
    """Conversations and preferences, of different questions. folder: another library than the interpreter's."""
    entries = sorted({entry.question: entry for entry in _entries(folder)}.values(), key=lambda entry: entry.number)
    conversations = [_conversation(entry) for entry in entries[0::2]]
    return conversations[:MOST], [_preference(entry) for entry in entries[1::2]][:MOST]


def _conversation(entry: Entry) -> _Record:
    answer = entry.sentence if entry.number % 4 == 0 else PREAMBLE + entry.sentence
    return {
        "messages": [{"role": "user", "content": entry.question}, {"role": "assistant", "content": answer}],
    }


def _preference(entry: Entry) -> _Record:
    return {"prompt": entry.question, "chosen": entry.sentence, "rejected": PREAMBLE + entry.sentence}


def _entries(folder: Path | None) -> Iterator[Entry]:
    files, _, _ = embedded_inputs(folder)
    for file in files:
        module = file.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        with warnings.catch_warnings():  # an invalid escape in a library's string is not our user's business
            warnings.simplefilter("ignore")
            try:
                tree = ast.parse(source_text(Path(file.address).read_bytes(), file.name), file.name)
            except (SyntaxError, ValueError):  # a template, or code for another version
                continue
        for node in tree.body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from _of(node, module)
                members = node.body if isinstance(node, ast.ClassDef) else ()
                for member in members:
                    if isinstance(member, (ast.FunctionDef, ast.AsyncFunctionDef)):
                        yield from _of(member, f"{module}.{node.name}")


def _of(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, owner: str) -> Iterator[Entry]:
    found = _SENTENCE.match(ast.get_docstring(node) or "")
    if found is not None and not node.name.startswith("_"):
        yield Entry(f"What is {owner}.{node.name} for?", found[0])
