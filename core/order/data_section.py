"""The recipe's `data` section (see core/config.py): the sources, their shares, their order, what is skipped, and where
a run that changed its data continues.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from weftrain.core.formats.dataset_manifest import FimSettings, SourceCursor, Subset
from weftrain.core.formats.safe_names import RelativePath
from weftrain.core.formats.strict_model import Count, Positive, PositiveInt, Seed, StrictModel

# bounds tables by position: at least ten times the largest published model's
Positions = Annotated[int, Field(gt=0, le=1 << 26)]


class SourceConfig(StrictModel):
    """One component of the mixture: a prepared dataset folder, its share of the samples, and which part of it.

    The share is given in one of three ways, the same for all sources: `weight`, a fraction of all samples; `tokens`,
    the number to read if the steps suffice; or `epochs` of the prepared rows.
    """

    name: Annotated[str, Field(min_length=1)]
    path: RelativePath  # below data.root
    weight: Positive | None = None
    tokens: PositiveInt | None = None
    epochs: Positive | None = None
    subset: Subset = (0.0, 1.0)
    fim: FimSettings | None = None

    @property
    def share_kind(self) -> str:
        return next(kind for kind in _SHARES if getattr(self, kind) is not None)

    @model_validator(mode="after")
    def _check(self) -> SourceConfig:
        if sum(getattr(self, kind) is not None for kind in _SHARES) != 1:
            raise ValueError("give exactly one of 'weight', 'tokens' and 'epochs'")
        if self.subset[0] >= self.subset[1]:
            raise ValueError(f"subset {list(self.subset)} is empty: its start must lie below its end")
        return self


_SHARES = ("weight", "tokens", "epochs")
_WEIGHTS_TOLERANCE = 1e-9  # released decimals add up to 1 but for the last digits


class SkipRule(StrictModel):
    """What is skipped or deferred: a chunk of the run (chunk, action), or rows [first, stop) of a source."""

    reason: Annotated[str, Field(min_length=1)]
    chunk: Count | None = None
    action: Literal["defer", "drop"] | None = None  # deferred chunks come last; later chunks take a dropped one's place
    source: str | None = None
    rows: tuple[Count, Count] | None = Field(default=None, strict=False)

    @model_validator(mode="after")
    def _check(self) -> SkipRule:
        of_chunk, of_rows = (self.chunk, self.action), (self.source, self.rows)
        if None not in of_chunk and of_rows == (None, None):
            return self
        if None in of_rows or of_chunk != (None, None):
            raise ValueError("give 'chunk' and 'action', or 'source' and 'rows'")
        if self.rows is not None and self.rows[0] >= self.rows[1]:
            raise ValueError(f"rows {list(self.rows)} are none: the first must lie below the one after the last")
        return self


class Continuation(StrictModel):
    """The position of a run's data where this data section took over. `train` writes it (docs/data-order.md).

    The section's stream of samples, which the mixture counts in, begins at the run's sample `base_sample`: with chunks,
    sample `base_within` of chunk `base_chunk`.
    """

    step: Count  # the first step that reads by this section
    sample: Count  # the number of its first sample
    # begun before `step`, in reading order
    chunks: Annotated[tuple[Count, ...], Field(strict=False)] = ()
    base_sample: Count = 0
    base_chunk: Count = 0
    base_within: Count = 0
    # at base_sample; sources that are not listed begin at their first row
    sources: dict[str, SourceCursor] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Continuation:
        if self.base_sample > self.sample or len(set(self.chunks)) < len(self.chunks):
            wanted = "take the recipe from the run's folder again, or set data.continues to null"
            raise ValueError(f"this is not what `train` writes: {wanted}")
        return self


class DataConfig(StrictModel):
    """What is read: prepared `sources`, or `synthetic_rows` repeating random rows, to measure speed without a dataset.

    The order is a pure function of (datasets, this section, step, row). order: `feistel`, or `cerebras`, the Model
    Zoo's for an unshuffled mixture. document_attention: no query sees keys of another document. chunks: of the run,
    with equal numbers of steps.
    """

    root: Annotated[str, Field(min_length=1)] = "datasets"
    sequence_length: Positions
    shuffle_seed: Seed
    order: Literal["feistel", "cerebras"] = "feistel"
    document_attention: bool = False
    # bounded because opening a run lists their order
    chunks: Annotated[int, Field(gt=0, le=1_000_000)] | None = None
    continues: Continuation | None = None  # written by `train` when a run goes on with other data or another batch size
    skip: Annotated[tuple[SkipRule, ...], Field(strict=False)] = ()
    sources: Annotated[tuple[SourceConfig, ...], Field(strict=False)] = ()
    synthetic_rows: PositiveInt | None = None
    # of the datasets, where it is a multiple of sequence_length: each row is then read as so many samples, one after
    # the other, so that a run's sequence length can change while its rows stay the same
    row_length: Positions | None = None

    @property
    def pieces(self) -> int:
        """Samples that a row of the datasets is cut into."""
        return 1 if self.row_length is None else self.row_length // self.sequence_length

    @model_serializer(mode="wrap")
    def _dump(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without `row_length` where it is null: a recipe that does not use it has the hash it had before."""
        return {key: value for key, value in handler(self).items() if key != "row_length" or value is not None}

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.row_length is not None and self.row_length % self.sequence_length:
            raise ValueError(
                f"row_length {self.row_length} is not a multiple of sequence_length {self.sequence_length}: a row is "
                "cut in samples of equal length"
            )
        if self.row_length is not None and self.synthetic_rows is not None:
            raise ValueError("synthetic rows are made as long as they are read: leave row_length out")
        if bool(self.sources) == (self.synthetic_rows is not None):
            raise ValueError("give exactly one of 'sources' and 'synthetic_rows'")
        if self.synthetic_rows is not None and (self.chunks, self.skip, self.document_attention) != (None, (), False):
            raise ValueError(
                "synthetic rows have no documents, chunks or rows to skip: leave document_attention, chunks and skip "
                "out"
            )
        names = [source.name for source in self.sources]
        for name, count in Counter(names).items():
            if count > 1:
                raise ValueError(f"two sources are named '{name}'")
        kinds = {source.share_kind: source.name for source in self.sources}
        if len(kinds) > 1:
            shown = ", ".join(f"'{name}' gives {kind}" for kind, name in kinds.items())
            raise ValueError(
                f"the sources' shares are of different kinds: {shown}; give weight, tokens or epochs for all of them"
            )
        total = sum(source.weight or 0 for source in self.sources)
        if "weight" in kinds and abs(total - 1) > _WEIGHTS_TOLERANCE:
            raise ValueError(
                f"the sources' weights add up to {total:.12g}, not to 1; correct them, or give tokens instead of weight"
            )
        self._check_skip(names)
        return self

    def _check_skip(self, names: list[str]) -> None:
        chunks = [entry.chunk for entry in self.skip if entry.chunk is not None]
        for chunk, count in Counter(chunks).items():
            if self.chunks is None or chunk >= self.chunks:
                raise ValueError(
                    f"skip: there is no chunk {chunk} of {self.chunks or 'none'}: set chunks, or correct the entry"
                )
            if count > 1:
                raise ValueError(f"skip: two entries name chunk {chunk}")
        dropped = [entry.chunk for entry in self.skip if entry.action == "drop"]
        if self.chunks is not None and len(dropped) == self.chunks:
            raise ValueError("skip: every chunk is dropped")
        ranges = sorted((entry.source or "", *entry.rows) for entry in self.skip if entry.rows is not None)
        for source, _, _ in ranges:
            if source not in names:
                raise ValueError(f"skip: there is no source '{source}'; the sources are {', '.join(names)}")
        for (source, _, stop), (other, first, _) in pairwise(ranges):
            if source == other and first < stop:
                raise ValueError(f"skip: two entries name row {first} of source '{source}'")
