"""The recipe's `data` section: which sources, how much of each, in which order, what is skipped, and where a run that
changed its data in mid-run reads on. It is a part of the recipe (core/config.py) and obeys the same rules.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, model_validator

from weftrain.core.formats.dataset_manifest import FimSettings, SourceCursor, Subset
from weftrain.core.formats.safe_names import RelativePath
from weftrain.core.formats.strict_model import Count, Positive, PositiveInt, Seed, StrictModel

# A model has tables by position: ten times and more what the largest published model has.
Positions = Annotated[int, Field(gt=0, le=1 << 26)]


class SourceConfig(StrictModel):
    """One component of the mixture: a prepared dataset folder, its share of the samples, and which part of it.

    The share is one of three, the same for all sources: `weight`, a fraction of all samples; `tokens`, of which the run
    reads so many, or so much of it as its steps allow; `epochs` of the prepared rows.
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
_WEIGHTS_TOLERANCE = 1e-9  # of their sum from 1: sums of released decimals differ in the last digits


class SkipRule(StrictModel):
    """What is not read, or read later: a chunk of the run (`chunk`, `action`), or rows [first, stop) of a source
    (`source`, `rows`).
    """

    reason: Annotated[str, Field(min_length=1)]
    chunk: Count | None = None
    action: Literal["defer", "drop"] | None = None  # defer: after all others; drop: what follows takes its place
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
    """Where a run's data stood when this data section took over in mid-run. `train` writes it (docs/data-order.md).

    The section's stream of samples, in which the mixture counts, begins at the run's sample `base_sample`; in a run
    with chunks that is sample `base_within` of chunk `base_chunk`.
    """

    step: Count  # the first step that reads by this section
    sample: Count  # the number of its first sample
    # begun before `step`, in the order in which they were read
    chunks: Annotated[tuple[Count, ...], Field(strict=False)] = ()
    base_sample: Count = 0
    base_chunk: Count = 0
    base_within: Count = 0
    # at base_sample; a source that is not listed begins at its first row
    sources: dict[str, SourceCursor] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Continuation:
        if self.base_sample > self.sample or len(set(self.chunks)) < len(self.chunks):
            raise ValueError(
                "this is not what `train` writes: take the recipe from the run's folder again, or set data.continues "
                "to null"
            )
        return self


class DataConfig(StrictModel):
    """What is read: prepared `sources`, or `synthetic_rows` random rows that repeat (to measure speed without any
    dataset).

    The order is a pure function of (datasets, this section, step, row). `order`: `feistel`, or `cerebras`, the Model
    Zoo's for a mixture that is not shuffled. `document_attention`: no query sees keys of another document. `chunks`: of
    the run, equal numbers of steps.
    """

    root: Annotated[str, Field(min_length=1)] = "datasets"
    sequence_length: Positions
    shuffle_seed: Seed
    order: Literal["feistel", "cerebras"] = "feistel"
    document_attention: bool = False
    # their order is a list, made whenever a run is opened
    chunks: Annotated[int, Field(gt=0, le=1_000_000)] | None = None
    continues: Continuation | None = None  # written by `train` when a run goes on with other data or another batch size
    skip: Annotated[tuple[SkipRule, ...], Field(strict=False)] = ()
    sources: Annotated[tuple[SourceConfig, ...], Field(strict=False)] = ()
    synthetic_rows: PositiveInt | None = None

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
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
        if (
            "weight" in kinds
            and abs((total := sum(source.weight or 0 for source in self.sources)) - 1) > _WEIGHTS_TOLERANCE
        ):
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
        if (
            self.chunks is not None
            and len(chunks) == self.chunks
            and all(entry.action == "drop" for entry in self.skip if entry.action)
        ):
            raise ValueError("skip: every chunk is dropped")
        ranges = sorted((entry.source or "", *entry.rows) for entry in self.skip if entry.rows is not None)
        for source, _, _ in ranges:
            if source not in names:
                raise ValueError(f"skip: there is no source '{source}'; the sources are {', '.join(names)}")
        for (source, _, stop), (other, first, _) in pairwise(ranges):
            if source == other and first < stop:
                raise ValueError(f"skip: two entries name row {first} of source '{source}'")
