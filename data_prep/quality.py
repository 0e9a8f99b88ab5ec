"""What a preparation recipe may ask for before tokenisation: filters, near-duplicate removal, decontamination, all of
it datatrove's.

Exact duplicates are not here; the pipeline drops them by content hash whatever is asked for.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from weftrain.core.formats.strict_model import Count, Positive, PositiveInt, StrictModel


class LengthFilter(StrictModel):
    """Documents of fewer or more words are dropped."""

    min_words: PositiveInt | None = None
    max_words: PositiveInt | None = None


class LanguageFilter(StrictModel):
    """Documents in none of these languages (ISO 639-1) are dropped. datatrove downloads its fastText model when it is
    first used.
    """

    languages: Annotated[tuple[str, ...], Field(min_length=1, strict=False)]
    threshold: Positive = 0.65


class MinHash(StrictModel):
    """Near-duplicates, by MinHash over word n-grams in `buckets` of `hashes` (Broder, 1997): one of each cluster
    stays.
    """

    ngrams: PositiveInt = 5
    buckets: PositiveInt = 14
    hashes: PositiveInt = 8
    seed: Count = 1


class Decontaminate(StrictModel):
    """Documents that share an n-gram of words with an evaluation set are dropped. against: JSON lines with a field
    `text`.
    """

    against: Annotated[tuple[str, ...], Field(min_length=1, strict=False)]
    ngrams: PositiveInt = 12


class Quality(StrictModel):
    """The steps, in this order. language: of the text, for splitting it into words."""

    language: str = "eng"
    length: LengthFilter | None = None
    languages: LanguageFilter | None = None
    gopher_quality: bool = False  # the rules of Rae et al., 2021 (arXiv 2112.11446), table A1
    gopher_repetition: bool = False
    minhash: MinHash | None = None
    decontaminate: Decontaminate | None = None
