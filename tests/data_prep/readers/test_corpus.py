"""The embedded corpus: sources and documentation of the standard library, without its tests, in sorted order."""

from __future__ import annotations

from pathlib import Path

import pytest

from weftrain.core.errors import DataError
from weftrain.data_prep.readers.corpus import DOCUMENTATION, LICENCE, SOURCES, documentation_text, embedded_inputs
from weftrain.data_prep.readers.documents import Document
from weftrain.data_prep.readers.read_options import ReadOptions
from weftrain.data_prep.readers.shares import read_part, split_parts


def documents_of(folder: Path | None = None) -> list[tuple[str, Document]]:
    """(file's name, document) of everything."""
    files, _, _ = embedded_inputs(folder)
    items = [item for part in split_parts(files, 1 << 22) for item in read_part(files, part, ReadOptions())]
    return [(files[item.file].name, item) for item in items if isinstance(item, Document)]


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
    documents = documents_of(tmp_path)
    assert [(name, document.source, document.record) for name, document in documents] == [
        ("a.py", SOURCES, 0),
        ("b.py", SOURCES, 0),
        ("b.py", DOCUMENTATION, 1),
        ("p/c.py", SOURCES, 0),
        ("z.py", SOURCES, 0),
    ]
    texts = [document.text for _, document in documents]
    assert texts[3] == "# -*- coding: latin-1 -*-\nname = 'é'\n"
    assert documents[2][1].belongs_to == texts[1]
    assert texts[2] == long


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
        documents_of(tmp_path)
    write(tmp_path, "bad.py", b"x = '\xff'\n")
    with pytest.raises(DataError, match=r"bad\.py: cannot be read as Python source"):
        documents_of(tmp_path)


@pytest.mark.prove
def test_the_whole_library() -> None:
    documents = documents_of()
    size = sum(len(str(document.text).encode()) for _, document in documents if document.source == SOURCES)
    assert 8e6 < size < 40e6
    assert sum(document.source == DOCUMENTATION for _, document in documents) > 200
    assert not any("/test/" in name or name.startswith("test/") for name, _ in documents)
    assert embedded_inputs()[2] == LICENCE
