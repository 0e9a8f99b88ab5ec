"""Reading inputs in one or several shares, as the pipeline does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from weftrain.core.errors import DataError
from weftrain.data_prep.readers.documents import Document, Failure, FileRead
from weftrain.data_prep.readers.listing import list_inputs
from weftrain.data_prep.readers.read_options import ReadOptions
from weftrain.data_prep.readers.shares import read_part, split_parts

ReadAll = Callable[..., list[Document | Failure]]


def _items(path: Path, part_bytes: int, format: str | None, options: dict[str, Any]) -> Iterator[Document | Failure]:
    files = list_inputs([str(path)], source=None, format=format)
    before: dict[int, int] = {}
    for part in split_parts(files, part_bytes):
        for item in read_part(files, part, ReadOptions(**options)):
            if isinstance(item, FileRead):
                before[item.share.file] = before.get(item.share.file, 0) + item.records
            else:
                yield type(item)(**{**item.__dict__, "record": item.record + before.get(item.file, 0)})


@pytest.fixture
def read_all() -> ReadAll:
    """read_all(path, part_bytes=..., format=..., **options): documents and failures, with records of the whole file."""

    def read(
        path: Path, part_bytes: int = 1 << 40, format: str | None = None, **options: Any
    ) -> list[Document | Failure]:
        return list(_items(path, part_bytes, format, options))

    return read


@pytest.fixture
def check_damaged(read_all: ReadAll) -> Callable[..., None]:
    """check_damaged(path, ...): what was damaged gives documents and failures, or one DataError of one line that names
    the path.
    """

    def check(path: Path, *arguments: Any, **options: Any) -> None:
        items: list[Document | Failure] = []
        message = str(path)
        try:
            items = read_all(path, *arguments, **options)
        except DataError as error:
            message = str(error)
        assert path.name in message or str(path.parent) in message
        assert "\n" not in message
        assert all(isinstance(item, Document | Failure) for item in items)

    return check
