"""What a line of the ledger may hold: a schema for each kind. A line that is written and a line that is read meet the
same one.

Types are strict and unknown keys are refused: a key of a newer version may change what a line means, and must not be
ignored. A new key of an existing kind has a default, so that older ledgers stay readable.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError
from pydantic_core import from_json

from weftrain.core.formats.canonical import parse_canonical
from weftrain.core.formats.strict_model import Count, PositiveInt, Sha256, StrictModel

LEDGER = "ledger.jsonl"

Reason = Annotated[str, Field(min_length=1, max_length=10_000)]  # words of a person, who may paste a log
DatasetId = Annotated[str, Field(min_length=1, max_length=200)]
# since 1970, to the end of the year 9999
Seconds = Annotated[float, Field(ge=0, le=253_402_300_799, allow_inf_nan=False)]
Samples = Annotated[tuple[Count, Count], Field(strict=False)]  # [first, stop) sample numbers of the run
Change = Annotated[tuple[str, Any, Any], Field(strict=False)]  # key, old value, new value; null where it is absent
# step and root of a checkpoint on a branch
Left = Annotated[tuple[Count, Sha256 | Literal["damaged"]], Field(strict=False)]
PassedOver = Annotated[tuple[Count, Literal["damaged", "missing"]], Field(strict=False)]
# step and root of a checkpoint that was removed, and root of the archive of its weights
Removed = Annotated[tuple[Count, Sha256, Sha256 | None], Field(strict=False)]
SegmentName = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class ParentRelease(StrictModel):
    """The release that a run began from. release: its root. link: the one that ends in the revision; null: the state
    that the first link begins with. step: completed steps of the revision's checkpoint, whose root is the line's
    `parent`.
    """

    release: Sha256
    name: Annotated[str, Field(min_length=1, max_length=200)]
    revision: Annotated[str, Field(pattern=r"^ckpt_[0-9]{3,9}$")]
    link: PositiveInt | None
    step: Count


class LedgerLine(StrictModel):
    """What every line has. step: completed steps."""

    n: Count
    previous: Sha256 | None
    hash: Sha256
    time: Seconds
    kind: str
    step: Count
    torn_bytes: PositiveInt | None = None  # how much of a torn line before this one was moved to ledger.torn


class BeginLine(LedgerLine):
    """What both lines have that say where training begins, and what was decided there beyond the ordinary."""

    recipe_sha256: Sha256
    dataset_id: DatasetId
    environment: dict[str, Any]
    parent: Sha256 | None
    parent_release: ParentRelease | None = None  # what that checkpoint is of, where the run begins from a release
    # newer checkpoints that it does not go on from
    passed_over: Annotated[tuple[PassedOver, ...], Field(strict=False)] = ()
    from_scratch: bool = False  # no whole checkpoint was left, and to begin at step 0 again was asked for
    # parameter -> rows [first, stop) drawn, the others are start_from's
    drawn: dict[str, Samples] = Field(default_factory=dict)
    stretch: SegmentName | None = None  # names what is trained from here on; a backend that keeps state notes it there
    continues: SegmentName | None = None  # whose state, kept by the backend, it goes on from
    repaired: bool = False  # the ledger had lost lines, and to go on all the same was asked for


class StartLine(BeginLine):
    kind: Literal["start"]
    recipe: dict[str, Any]


class ResumeLine(BeginLine):
    kind: Literal["resume"]


class RecipeLine(LedgerLine):
    kind: Literal["recipe"]
    changes: Annotated[tuple[Change, ...], Field(strict=False)]
    recipe: dict[str, Any]
    recipe_sha256: Sha256
    reason: Reason | None = None  # that the recipe gave for a change it planned


class ChunkBeginLine(LedgerLine):
    kind: Literal["chunk_begin"]
    chunk: Count
    place: Count
    samples: Samples
    dataset_id: DatasetId
    parent: Sha256 | None


class ChunkEndLine(LedgerLine):
    kind: Literal["chunk_end"]
    chunk: Count
    place: Count
    samples: Samples
    dataset_id: DatasetId
    root: Sha256


class CheckpointLine(LedgerLine):
    kind: Literal["checkpoint"]
    root: Sha256
    parent: Sha256 | None
    metrics_after: Count
    metrics_sha256: Sha256
    entered: Literal["resume", "repair"] | None = None  # by a later start, because a crash or lost lines left it out


class SkipLine(LedgerLine):
    kind: Literal["skip"]
    samples: Samples


class RollbackLine(LedgerLine):
    kind: Literal["rollback"]
    root: Sha256
    branch: Annotated[int, Field(ge=1, le=1_000_000_000)]  # it names a folder
    abandoned: Annotated[tuple[Left, ...], Field(strict=False)]
    reason: Reason


class DeferLine(LedgerLine):
    kind: Literal["defer"]
    chunk: Count
    action: Literal["defer", "drop"]
    reason: Reason


class RemoveLine(LedgerLine):
    """Checkpoints were removed by a rule of retention; what the ledger says of them stays."""

    kind: Literal["remove"]
    removed: Annotated[tuple[Removed, ...], Field(strict=False, min_length=1)]
    rule: dict[str, Any]


class AlertLine(LedgerLine):
    """A rule of the recipe's `alerts` changed the run. to_step: the checkpoint that a rollback goes back to; chunk: the
    one that it defers.
    """

    kind: Literal["alert"]
    rule: Annotated[str, Field(min_length=1, max_length=200)]
    action: Literal["checkpoint", "halt", "rollback"]
    words: Reason
    to_step: Count | None = None
    chunk: Count | None = None


class EvaluationLine(LedgerLine):
    """A score of one of the recipe's `evaluations`, which metrics.jsonl holds (core/run/scores.py)."""

    kind: Literal["evaluation"]
    set: Annotated[str, Field(min_length=1, max_length=10_000)]
    sha256: Sha256  # of what the score says
    record: Sha256 | None = None  # root of the record in analyses/evaluations, of tasks
    checkpoint: Sha256 | None = (
        None  # root of the checkpoint that was evaluated; null: the state of that step in memory
    )
    weights_sha256: Sha256 | None = None  # of that state


class EndLine(LedgerLine):
    kind: Literal["end"]


_LINES = (
    StartLine,
    ResumeLine,
    RecipeLine,
    ChunkBeginLine,
    ChunkEndLine,
    CheckpointLine,
    SkipLine,
    RollbackLine,
    DeferLine,
    RemoveLine,
    AlertLine,
    EvaluationLine,
    EndLine,
)
_SCHEMAS: dict[str, TypeAdapter[Any]] = {
    line.model_fields["kind"].annotation.__args__[0]: TypeAdapter(line)  # type: ignore[union-attr]
    for line in _LINES
}


def check_line(entry: Any) -> None:
    """Raises ValueError, naming the key, for what is no ledger line of this version."""
    if not isinstance(entry, dict):
        raise ValueError("is not a ledger line")
    kind = entry.get("kind")
    schema = _SCHEMAS.get(kind) if isinstance(kind, str) else None
    if schema is None:
        raise ValueError(f"kind {str(kind)[:40]!r} is not one that this program writes: use a newer weftrain")
    try:
        schema.validate_python(entry)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))[:80]
        if first["type"] == "extra_forbidden":
            raise ValueError(
                f"key '{key}' is not one that this program writes in a line of kind {kind}: use a newer weftrain"
            ) from None
        raise ValueError(f"key '{key}' of a line of kind {kind}: {first['msg'].lower()}") from None


# Most lines of a long ledger, as this program writes them: what matches is canonical JSON and of its schema, if the
# texts of `rule` and `time` are also those that this program writes for their values.
_COUNT, _SHA256 = r"(?:0|[1-9][0-9]{0,14})", '"[0-9a-f]{64}"'
_HASH_OR_NULL, _SAMPLES = f"(?:{_SHA256}|null)", rf"\[{_COUNT},{_COUNT}\]"
_REMOVED = rf"\[{_COUNT},{_SHA256},{_HASH_OR_NULL}\]"
_PLACE = f'"n":{_COUNT},"parent":{_HASH_OR_NULL},"place":{_COUNT},"previous":{_SHA256}'
_FREQUENT = re.compile(
    rf'\{{(?:"hash":{_SHA256},"kind":"(?:'
    rf'skip","n":{_COUNT},"previous":{_SHA256},"samples":{_SAMPLES}'
    rf'|checkpoint","metrics_after":{_COUNT},"metrics_sha256":{_SHA256},"n":{_COUNT},"parent":{_HASH_OR_NULL},'
    rf'"previous":{_SHA256},"root":{_SHA256}'
    rf'|remove","n":{_COUNT},"previous":{_SHA256},"removed":\[{_REMOVED}(?:,{_REMOVED})*\],'
    rf'"rule":(?P<rule>\{{[ -z|~]*\}}))'
    rf'|"chunk":{_COUNT},"dataset_id":{_SHA256},"hash":{_SHA256},"kind":"chunk_(?:begin",{_PLACE}'
    rf'|end","n":{_COUNT},"place":{_COUNT},"previous":{_SHA256},"root":{_SHA256}),"samples":{_SAMPLES})'
    rf',"step":{_COUNT},"time":(?P<time>[0-9]{{1,11}}\.[0-9]{{1,17}})\}}'.encode()
)


def read_line(line: bytes) -> dict[str, Any]:
    """The checked entry whose canonical JSON is `line`. Raises ValueError."""
    if found := _FREQUENT.fullmatch(line):  # in a quarter of the time
        rule, time = found.groups()
        if b"%r" % float(time) == time and (rule is None or _is_canonical(rule)):
            known: dict[str, Any] = from_json(line)
            return known
    entry: dict[str, Any] = parse_canonical(line)
    check_line(entry)
    return entry


@lru_cache(maxsize=64)
def _is_canonical(text: bytes) -> bool:
    try:
        parse_canonical(text)
    except ValueError:
        return False
    return True
