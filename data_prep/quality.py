"""What a preparation recipe may ask for before tokenisation, done by datatrove: filters, near-duplicates,
decontamination.

Exact duplicates are always dropped by the pipeline.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from weftrain.core.formats.strict_model import Count, Positive, PositiveInt, StrictModel


class LengthFilter(StrictModel):
    """Drops documents of fewer or more words."""

    min_words: PositiveInt | None = None
    max_words: PositiveInt | None = None


class LanguageFilter(StrictModel):
    """Drops documents in other languages (ISO 639-1), by datatrove's fastText model, downloaded on first use."""

    languages: Annotated[tuple[str, ...], Field(min_length=1, strict=False)]
    threshold: Positive = 0.65


class MinHash(StrictModel):
    """Keeps one of each cluster of near-duplicates, by MinHash over word n-grams (Broder, 1997)."""

    ngrams: PositiveInt = 5
    buckets: PositiveInt = 14
    hashes: PositiveInt = 8
    seed: Count = 1


class Decontaminate(StrictModel):
    """Drops documents that share a word n-gram with an evaluation set. against: JSON lines with a field `text`."""

    against: Annotated[tuple[str, ...], Field(min_length=1, strict=False)]
    ngrams: PositiveInt = 12


class Quality(StrictModel):
    """The steps, in this order. language: how text is split into words."""

    language: str = "eng"
    length: LengthFilter | None = None
    languages: LanguageFilter | None = None
    gopher_quality: bool = False  # the rules of Rae et al., 2021 (arXiv 2112.11446), table A1
    gopher_repetition: bool = False
    minhash: MinHash | None = None
    decontaminate: Decontaminate | None = None
