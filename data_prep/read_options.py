"""How inputs are read: what, with the files, determines the documents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class ReadOptions:
    """text_key, source_key: of JSON lines and Parquet. normalise: as normalisation.py has it. sequence_length: of rows packed already."""

    text_key: str = "text"
    source_key: str | None = None
    normalise: tuple[str, ...] = ()
    sequence_length: int | None = None
    max_line_bytes: ClassVar[int] = 256 << 20
