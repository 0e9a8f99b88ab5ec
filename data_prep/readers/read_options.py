"""How inputs are read: what, with the files, determines the documents."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar


@dataclass(frozen=True)
class ReadOptions:
    """text_key, source_key: of JSON lines and Parquet. normalise: as normalisation.py has it. sequence_length: of rows
    packed already.

    tokens_key: the field of tokenised records that holds the ids. tokens_dtype: NumPy's name of the type of ids that do
    not say theirs. stream_dtype, end_id: of streams of ids without a header: what a tokenizer's vocabulary asks for,
    and the id that ends a document.
    """

    text_key: str = "text"
    source_key: str | None = None
    normalise: tuple[str, ...] = ()
    sequence_length: int | None = None
    tokens_key: str | None = None
    tokens_dtype: str | None = None
    stream_dtype: str | None = None
    end_id: int | None = None
    max_line_bytes: ClassVar[int] = 256 << 20

    def of_tokenizer(self, vocab_size: int, end_id: int) -> ReadOptions:
        """For streams of ids that a tokenizer made: its end token, and ids of 2 or 4 bytes where nothing else is
        said.
        """
        return replace(
            self, stream_dtype=self.tokens_dtype or ("uint16" if vocab_size <= 1 << 16 else "uint32"), end_id=end_id
        )

    def record(self) -> dict[str, Any]:
        """What a preparation records: keys that came after the first datasets only where they are given, so that those
        stay the same.
        """
        tree = asdict(self)
        return {key: value for key, value in tree.items() if key not in _LATER or value is not None}


_LATER = ("tokens_key", "tokens_dtype", "stream_dtype", "end_id")
