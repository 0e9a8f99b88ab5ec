"""How inputs are read: what, with the files, determines the documents."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar


@dataclass(frozen=True)
class ReadOptions:
    """text_key, source_key: fields of records. normalise: see normalisation.py. sequence_length: of packed rows.

    tokens_key: the field of ids. tokens_dtype: NumPy's name for the type of ids that do not state theirs. stream_dtype,
    end_id: for streams of ids without a header, the type that the vocabulary needs and the id that ends a document.
    conversations: records hold conversations (conversations/messages.py), not texts; None for not. preferences: they
    hold preferences (conversations/preferences.py). weight_key: the field of the weight of a text's loss.
    """

    text_key: str = "text"
    source_key: str | None = None
    normalise: tuple[str, ...] = ()
    sequence_length: int | None = None
    tokens_key: str | None = None
    tokens_dtype: str | None = None
    stream_dtype: str | None = None
    end_id: int | None = None
    conversations: bool | None = None
    preferences: bool | None = None
    weight_key: str | None = None
    max_line_bytes: ClassVar[int] = 256 << 20

    def of_tokenizer(self, vocab_size: int, end_id: int) -> ReadOptions:
        """For streams of ids of a tokenizer: its end token, and ids of 2 or 4 bytes unless stated."""
        return replace(
            self, stream_dtype=self.tokens_dtype or ("uint16" if vocab_size <= 1 << 16 else "uint32"), end_id=end_id
        )

    def record(self) -> dict[str, Any]:
        """What a preparation records; later keys only where they are given, so that old datasets stay the same."""
        tree = asdict(self)
        return {key: value for key, value in tree.items() if key not in _LATER or value is not None}


_LATER = ("tokens_key", "tokens_dtype", "stream_dtype", "end_id", "conversations", "preferences", "weight_key")
