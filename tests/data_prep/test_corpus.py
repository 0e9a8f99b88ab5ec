"""The embedded corpus: sources and documentation of the standard library, without its tests, in sorted order."""

from __future__ import annotations

from pathlib import Path

import pytest

from weftrain.core.errors import DataError
from weftrain.data_prep.corpus import DOCUMENTATION, LICENCE, SOURCES, documentation_text, embedded_corpus


def write(folder: Path, name: str, text: str | bytes) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


def test_a_small_library(tmp_path: Path) -> None:
    long = "Words. " * 80
    write(tmp_path, "b.py", f'"""{long}"""\n')
    write(tmp_path, "a.py", "x = 1\n")
    write(tmp_path, "p/c.py", "# -*- coding: latin-1 -*-\nname = 'é'\n".encode("latin-1"))
    for left_out in (
        "test/t.py",
        "p/tests/t.py",
        "idlelib/idle_test/t.py",
        "site-packages/s.py",
        "__pycache__/a.py",
        "_sysconfigdata_x.py",
        "a.txt",
    ):
        write(tmp_path, left_out, "left = out\n")
    write(tmp_path, "z.py", "this is a template, $not python\n")
    documents = list(embedded_corpus(tmp_path).read())
    assert [(document.name, document.source) for document in documents] == [
        ("a.py", SOURCES),
        ("b.py", SOURCES),
        ("b.py (documentation)", DOCUMENTATION),
        ("z.py", SOURCES),
        ("p/c.py", SOURCES),
    ]
    assert documents[4].text == "# -*- coding: latin-1 -*-\nname = 'é'\n"
    assert documents[2].belongs_to == documents[1].text
    assert documents[2].text == long


def test_documentation_in_order_of_the_source() -> None:
    source = '''"""Module."""
class A:
    """Class."""
    async def f(self):
        """Method
        more."""
def g():
    "Function."
    x = "no"
'''
    assert documentation_text(source, "m.py") == "Module.\n\nClass.\n\nMethod\nmore.\n\nFunction."


def test_a_library_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no standard library sources"):
        embedded_corpus(tmp_path).read()
    write(tmp_path, "bad.py", b"x = '\xff'\n")
    with pytest.raises(DataError, match=r"bad\.py: cannot be read as Python source"):
        embedded_corpus(tmp_path).read()


@pytest.mark.prove
def test_the_whole_library() -> None:
    inputs = embedded_corpus()
    documents = list(inputs.read())
    size = sum(len(document.text.encode()) for document in documents if document.source == SOURCES)
    assert 8e6 < size < 40e6
    assert sum(document.source == DOCUMENTATION for document in documents) > 200
    assert not any("/test/" in document.name or document.name.startswith("test/") for document in documents)
    assert inputs.licence == LICENCE
