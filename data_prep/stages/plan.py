"""The plan: what is to be made, cut into tasks, as a function of inputs and settings alone.

A plan is a JSON file in the work folder, `.NAME.partial` beside the dataset. Any process that sees the folder can take
a task by its number, and an interrupted run resumes. A task is done when its output file exists; nothing else records
it, and two processes doing the same task write the same bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from weftrain.core.formats import fsops
from weftrain.core.formats.canonical import canonical_json, parse_json
from weftrain.core.formats.dataset_manifest import FimSettings
from weftrain.core.formats.line_table import Lines, LineTable, lines_sha256, write_lines
from weftrain.data_prep.conversations.encode import ConversationEncoder
from weftrain.data_prep.conversations.pairs import PreferenceEncoder
from weftrain.data_prep.readers.documents import InputFile, Part, Share, SkippedFile
from weftrain.data_prep.readers.read_options import ReadOptions
from weftrain.data_prep.readers.registry import READERS
from weftrain.data_prep.readers.shares import split_parts
from weftrain.data_prep.stages.settings import Conversations, Inputs, Preferences, Settings
from weftrain.data_prep.stages.table_file import damaged
from weftrain.data_prep.tokens.tokenization import TextEncoder

PLAN, PLANNED_TOKENIZER = "plan.json", "tokenizer.json"
VERSION = 5
_REFERENCE, _FELL_BACK = "reference", "reference.json"
_TASK_FOLDERS = ("parts", "runs", "buckets", "shards")
SHARD_TOKENS = 1 << 25  # 64 MiB of uint16
_MEBI = 1 << 20
_PIECE_DOCUMENTS = 1 << 18
_FILE_OPENS = 1 << 20
Progress = Callable[[str, int, int | None, str], None]  # stage, done, total if known, unit


def no_progress(stage: str, done: int, total: int | None, unit: str) -> None:
    """Reports nothing."""


@dataclass(frozen=True)
class Limits:
    """Bounds on a task's memory and on open files; in the plan, so that every process has the same.

    piece_bytes, piece_documents: size at which a part's piece is written. bucket_bytes: range of a bucket's size in ids
    and columns. file_opens: pieces x buckets from which pieces are merged.
    """

    piece_bytes: int
    piece_documents: int
    bucket_bytes: tuple[int, int]
    file_opens: int


@dataclass(frozen=True)
class Parent:
    """The dataset that grows: its folder, its manifest's root, and how many inputs, sources and shards come first."""

    folder: str
    root: str
    files: int
    num_sources: int
    train_shards: int
    heldout_shards: int


@dataclass(frozen=True)
class PrepPlan:
    """folder: the work folder. by_reference: the engines differed (fall_back). parent: what the inputs are added to."""

    folder: Path
    inputs: Inputs
    settings: Settings
    engine: str
    parts: Lines[Part]
    limits: Limits
    by_reference: bool = False
    parent: Parent | None = None

    @property
    def work(self) -> Path:
        """Where task outputs lie; another folder once the reference engine encodes everything, so that all tasks are
        redone.
        """
        return self.folder / _REFERENCE if self.by_reference else self.folder

    @functools.cached_property
    def header(self) -> bytes:
        """Contents of plan.json: the plan, with the hashes of its tables."""
        return canonical_json(_header(self)) + b"\n"

    @property
    def fixed_rows(self) -> bool:
        """Whether each document is a whole row: packed elsewhere, or a preference."""
        return self.settings.preferences is not None or READERS[self.inputs.files[0].format].holds == "rows"

    @property
    def row_stride(self) -> int:
        """Rows that stand alone share no token; rows cut from one stream share one."""
        fim = self.settings.fim
        alone = self.fixed_rows or self.settings.packing != "concatenate" or (fim is not None and fim.mode != "exact")
        return self.settings.sequence_length + 1 if alone else self.settings.sequence_length

    def conversation_encoder(self, encoder: TextEncoder) -> ConversationEncoder | None:
        """What encodes conversations; None where the inputs hold other things."""
        if self.settings.conversations is None:
            return None
        width = self.settings.row_tokens if self.settings.packing != "concatenate" else None
        return self.settings.conversations.encoder(encoder, width)

    def preference_encoder(self, encoder: TextEncoder) -> PreferenceEncoder | None:
        """What encodes preferences; None where the inputs hold other things."""
        told = self.settings.preferences
        return None if told is None else told.encoder(encoder, self.settings.sequence_length)

    def sample_file(self, index: int) -> Path:
        return self.folder / "samples" / f"{index:05d}.table"

    def part_file(self, index: int) -> Path:
        """Marks a part done; its documents are in its pieces."""
        return self.work / "parts" / f"{index:05d}.json"

    def piece_file(self, part: int, piece: int) -> Path:
        return self.work / "parts" / f"{part:05d}-{piece:05d}.table"

    def failures_file(self, stage: str, part: int) -> Path:
        """Documents of a part that could not be read, one per line, if any. stage: 'samples' or 'parts'."""
        return (self.folder if stage == "samples" else self.work) / stage / f"{part:05d}.failures.jsonl"

    def run_file(self, index: int) -> Path:
        """Marks a merge done; its documents are in its slices, one per range of keys."""
        return self.work / "runs" / f"{index:05d}.json"

    def run_slice_file(self, run: int, key_range: int) -> Path:
        return self.work / "runs" / f"{run:05d}-{key_range:05d}.table"

    def bucket_file(self, index: int) -> Path:
        """Marks a bucket done; its documents are in its streams."""
        return self.work / "buckets" / f"{index:05d}.table"

    def stream_file(self, stream: str, bucket: int) -> Path:
        return self.work / "buckets" / f"{bucket:05d}-{stream}.table"

    def shard_record(self, index: int) -> Path:
        return self.work / "shards" / f"{index:05d}.json"

    @property
    def survey_file(self) -> Path:
        return self.work / "survey.json"

    @property
    def names_file(self) -> Path:
        """The sources' names in order, one JSON string per line."""
        return self.work / "names.jsonl"

    @property
    def pieces_file(self) -> Path:
        """All pieces in reading order, written with the survey."""
        return self.work / "pieces.table"

    @property
    def layout_file(self) -> Path:
        return self.work / "layout.json"

    @property
    def tokenizer_file(self) -> Path:
        return self.dataset / PLANNED_TOKENIZER

    @property
    def dataset(self) -> Path:
        """The dataset under construction, renamed when it is complete."""
        return self.folder / "dataset"


def make_plan(folder: Path, inputs: Inputs, settings: Settings, engine: str) -> PrepPlan:
    """A plan with some 64 parts of 4 to 64 MiB of input, or more of 64 MiB."""
    total = sum(file.num_bytes for file in inputs.files)
    parts = tuple(split_parts(inputs.files, clamped(total // 64, 4 * _MEBI, 64 * _MEBI)))
    limits = Limits(64 * _MEBI, _PIECE_DOCUMENTS, (4 * _MEBI, 64 * _MEBI), _FILE_OPENS)
    return PrepPlan(folder, inputs, settings, engine, parts, limits)


def clamped(value: int, low: int, high: int) -> int:
    """The next power of two, within the limits."""
    return min(max(power_of_two(value), low), high)


def power_of_two(value: int) -> int:
    """The smallest power of two that is at least `value`."""
    return 1 << max(0, value - 1).bit_length()


def save_plan(plan: PrepPlan) -> bool:
    """Write the plan. Returns True if it was there already, with valid outputs; another plan's are removed. Raises
    OSError.
    """
    if is_saved(plan):
        return True
    fsops.remove_tree(plan.folder)
    for folder in ("samples", *_TASK_FOLDERS, "dataset/train", "dataset/heldout"):
        fsops.make_dirs(plan.folder / folder)
    for name, values in _tables(plan).items():
        write_lines(plan.folder / f"{name}.jsonl", values)
    fsops.write_bytes(plan.folder / PLAN, plan.header)
    return False


def fall_back(plan: PrepPlan, reason: str) -> None:
    """Record that the reference engine encodes every part from now on; earlier outputs do not count. Raises OSError.
    Any process may find that the engines differ, on any sampled document; the ids must not depend on which.
    """
    for folder in _TASK_FOLDERS:
        fsops.make_dirs(plan.folder / _REFERENCE / folder)
    fsops.write_bytes(plan.folder / _FELL_BACK, canonical_json(reason) + b"\n")


def fell_back(plan: PrepPlan) -> bool:
    """Whether a process has called fall_back since this plan was read."""
    return not plan.by_reference and (plan.folder / _FELL_BACK).exists()


def settled(plan: PrepPlan) -> PrepPlan:
    """The plan after fall_back, if a process has called it."""
    return replace(plan, engine="tokenizers", by_reference=True) if fell_back(plan) else plan


def fallback_reason(plan: PrepPlan) -> str | None:
    """Why the last process fell back, if one did."""
    return str(parse_json((plan.folder / _FELL_BACK).read_bytes())) if plan.by_reference else None


def is_saved(plan: PrepPlan) -> bool:
    """Whether the work folder holds this very plan."""
    path = plan.folder / PLAN
    return path.is_file() and path.read_bytes() == plan.header


def load_plan(folder: Path) -> PrepPlan:
    """The plan in a work folder, cached because every task asks for it. Raises DataError."""
    try:
        return settled(_loaded(folder, (folder / PLAN).stat().st_mtime_ns))
    except OSError as error:
        raise damaged(folder / PLAN, error, folder) from error


@functools.lru_cache(maxsize=4)
def _loaded(folder: Path, modified_ns: int) -> PrepPlan:
    try:
        tree = parse_json((folder / PLAN).read_bytes())
        inputs, settings = tree["inputs"], dict(tree["settings"])
        if settings["fim"] is not None:
            settings["fim"] = FimSettings(**settings["fim"])
        if settings["conversations"] is not None:
            told = settings["conversations"]
            settings["conversations"] = Conversations(**told | {"turn_end": tuple(told["turn_end"])})
        if settings["preferences"] is not None:
            told = settings["preferences"]
            settings["preferences"] = Preferences(**told | {"turn_end": tuple(told["turn_end"])})
        settings["fim_tokens"] = tuple(settings["fim_tokens"])
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in inputs["options"].items()
        }
        options = ReadOptions(**fields)
        hashes, remedy = tree["tables"], f"remove {folder} and prepare again"
        files = LineTable(
            folder / "files.jsonl", lambda entry: InputFile(*entry), sha256=hashes["files"], remedy=remedy
        )
        skipped = LineTable(
            folder / "skipped.jsonl", lambda entry: SkippedFile(*entry), sha256=hashes["skipped"], remedy=remedy
        )
        parts = LineTable(folder / "parts.jsonl", _part, sha256=hashes["parts"], remedy=remedy)
        read = Inputs(files, inputs["description"], inputs["licence"], options, inputs["quality"], skipped)
        limits = Limits(**tree["limits"] | {"bucket_bytes": tuple(tree["limits"]["bucket_bytes"])})
        parent = None if tree["parent"] is None else Parent(**tree["parent"])
        return PrepPlan(folder, read, Settings(**settings), tree["engine"], parts, limits, parent=parent)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(folder / PLAN, error, folder) from error


def _part(entry: Any) -> Part:
    num_bytes, shares = entry
    return Part(tuple(Share(*share) for share in shares), num_bytes)


def _tables(plan: PrepPlan) -> dict[str, Iterator[list[Any]]]:
    """Tables that may have millions of lines, in files of their own, from which a task reads only what it needs."""
    return {
        "files": ([getattr(file, name) for name in InputFile.__dataclass_fields__] for file in plan.inputs.files),
        "skipped": ([file.name, file.num_bytes, file.reason] for file in plan.inputs.skipped),
        "parts": ([part.num_bytes, part.shares] for part in plan.parts),
    }


def _header(plan: PrepPlan) -> dict[str, Any]:
    return {
        "version": VERSION,
        "inputs": {
            "description": plan.inputs.description,
            "licence": plan.inputs.licence,
            "options": asdict(plan.inputs.options),
            "quality": plan.inputs.quality,
        },
        "tables": {name: lines_sha256(values) for name, values in _tables(plan).items()},
        "settings": plan.settings.tree(),
        "engine": plan.engine,
        "limits": asdict(plan.limits),
        "parent": None if plan.parent is None else asdict(plan.parent),
    }
