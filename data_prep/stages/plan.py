"""The plan: what is to be made, cut into tasks, as a function of inputs and settings alone.

A plan is a JSON file in the work folder, `.NAME.partial` beside the dataset. Any process that sees the folder can take
a task by its number, and an interrupted run resumes. A task is done when its output file exists; nothing else records
it, and two processes doing the same task write the same bytes.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from weftrain.core.errors import DataError
from weftrain.core.formats import fsops
from weftrain.core.formats.canonical import canonical_json, parse_json, sha256_json
from weftrain.core.formats.dataset_manifest import FimSettings
from weftrain.core.formats.line_table import Lines, LineTable, lines_sha256, write_lines
from weftrain.data_prep import heldout
from weftrain.data_prep.choices import NOT_STATED, KeepPrompt, Loss, Order, Packing, PreferenceRows, TooLong
from weftrain.data_prep.conversations.encode import ConversationEncoder
from weftrain.data_prep.conversations.pairs import PreferenceEncoder
from weftrain.data_prep.conversations.template import ChatTemplate
from weftrain.data_prep.readers.documents import InputFile, Part, Share, SkippedFile
from weftrain.data_prep.readers.read_options import ReadOptions
from weftrain.data_prep.readers.registry import READERS
from weftrain.data_prep.readers.shares import split_parts
from weftrain.data_prep.stages.table_file import damaged
from weftrain.data_prep.tokens.markers import NO_EOS, Markers
from weftrain.data_prep.tokens.tokenization import TextEncoder

PLAN, PLANNED_TOKENIZER = "plan.json", "tokenizer.json"
VERSION = 4
_REFERENCE, _FELL_BACK = "reference", "reference.json"
_TASK_FOLDERS = ("parts", "runs", "buckets", "shards")
SHARD_TOKENS = 1 << 25  # 64 MiB of uint16
_MEBI = 1 << 20
_PIECE_DOCUMENTS = 1 << 18
_FILE_OPENS = 1 << 20
_HOLD_CONVERSATIONS = {"jsonl", "json", "parquet", "arrow"}
Progress = Callable[[str, int, int | None, str], None]  # stage, done, total if known, unit


def no_progress(stage: str, done: int, total: int | None, unit: str) -> None:
    """Reports nothing."""


@dataclass(frozen=True)
class Inputs:
    """Files, how to read them, and what the manifest says about them. skipped: files found beside them but not read."""

    files: Lines[InputFile]
    description: str
    licence: str = NOT_STATED
    options: ReadOptions = ReadOptions()  # noqa: RUF009 - frozen itself
    quality: str | None = None  # what filtered them before, canonical JSON
    skipped: Lines[SkippedFile] = ()


@dataclass(frozen=True)
class Conversations:
    """How conversations become rows. template: its text, of `template_name`. Others: conversations/."""

    template: str
    template_name: str
    turn_end: tuple[str, ...]
    loss: Loss
    too_long: TooLong

    def encoder(self, encoder: TextEncoder, width: int | None) -> ConversationEncoder:
        """width: of a row that holds whole conversations; None for rows cut from one stream."""
        template = ChatTemplate(self.template, self.template_name, self.turn_end)
        return ConversationEncoder(encoder, template, self.loss, self.too_long, width)


@dataclass(frozen=True)
class Preferences:
    """How preferences become rows (conversations/pairs.py). template: None: prompt and answer are joined as texts."""

    rows: PreferenceRows
    max_prompt: int
    keep_prompt: KeepPrompt
    too_long: TooLong
    template: str | None = None
    template_name: str | None = None
    turn_end: tuple[str, ...] = ()

    @property
    def sides(self) -> int:
        return 2 if self.rows == "pairs" else 1

    def encoder(self, encoder: TextEncoder, row_length: int) -> PreferenceEncoder:
        """row_length: inputs of a row, of both sides together."""
        template = None
        if self.template is not None:
            template = ChatTemplate(self.template, self.template_name or "", self.turn_end)
        width = row_length // self.sides
        return PreferenceEncoder(encoder, template, self.rows, width, self.max_prompt, self.keep_prompt, self.too_long)


@dataclass(frozen=True)
class Settings:
    """What, with the inputs, determines every byte; the manifest's `preparation`.

    tokenizer: 'trained', or the given file's SHA-256. packing: 'concatenate' cuts one stream, 'best_fit' fills rows
    with whole documents, 'separate' has one in each row.
    order: 'shuffled' by content, or 'as_read', which keeps duplicates. epochs: how often each
    document appears, with FIM drawn anew. global_batch_size: makes each chunk whole steps. heldout_rule: heldout.py.
    eos, bos, fim_tokens: markers.py. conversations: how records that hold them become text; None: they hold texts.
    preferences: likewise how records that hold those become rows.
    """

    tokenizer: str
    tokenizer_vocab_size: int | None
    eos: str | None
    sequence_length: int
    heldout_fraction: float
    rows_per_shard: int
    seed: int
    packing: Packing = "concatenate"
    order: Order = "shuffled"
    epochs: int = 1
    chunks: int | None = None
    global_batch_size: int | None = None
    fim: FimSettings | None = None
    heldout_rule: int = heldout.RULE
    bos: str | None = None
    fim_tokens: tuple[str, ...] = ()
    conversations: Conversations | None = None
    preferences: Preferences | None = None

    def tree(self) -> dict[str, Any]:
        return asdict(replace(self, fim=None)) | {"fim": None if self.fim is None else self.fim.model_dump()}

    @property
    def markers(self) -> Markers:
        return Markers(self.eos, self.bos, self.fim_tokens)

    @property
    def row_tokens(self) -> int:
        return self.sequence_length + 1

    @property
    def chat_template(self) -> str | None:
        """The text of the chat template by which records were written, if there is one."""
        told = self.conversations or self.preferences
        return None if told is None else told.template


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


def check_inputs(inputs: Inputs, settings: Settings) -> None:
    """Raises DataError for inputs that cannot be in one dataset, or settings that do not apply to them."""
    if not inputs.files:
        raise DataError(f"{inputs.description}: holds no file to read; name other files")
    formats = {file.format for file in inputs.files}
    holds = {READERS[name].holds for name in formats}
    if "rows" in holds and len(formats) > 1:
        raise DataError(
            f"{inputs.description}: {', '.join(sorted(formats))}: rows that are packed already go with nothing else: "
            "prepare them apart"
        )
    if "rows" in holds and (settings.packing != "concatenate" or settings.fim is not None):
        raise DataError(
            f"{inputs.description}: rows that are packed already take no --packing best_fit and no --fim-rate: leave "
            "them out"
        )
    if holds != {"text"} and settings.tokenizer == "trained":
        raise DataError(f"{inputs.description}: is tokenised already: name its tokenizer.json with --tokenizer")
    if (
        settings.fim is not None
        and settings.fim.mode == "released"
        and (settings.bos is not None or settings.eos == NO_EOS)
    ):
        raise DataError(
            "--fim-mode released does what scripts did that know an end token alone: give no --bos and no --eos none"
        )
    if settings.chunks is not None and settings.epochs > 1:
        raise DataError(
            "--chunks and --epochs: a dataset has chunks, or its documents come several times; give one of them"
        )
    if settings.packing == "separate" and settings.fim is not None:
        raise DataError(
            "--packing separate: leaves each document in rows of its own, and FIM is not made there: leave one out"
        )
    if settings.conversations is not None or settings.preferences is not None:
        _check_conversations(inputs, settings, formats)
    if settings.global_batch_size is not None and settings.chunks is None:
        raise DataError("--global-batch-size makes chunks of whole steps: give --chunks too, or leave it out")


def _check_conversations(inputs: Inputs, settings: Settings, formats: set[str]) -> None:
    """Raises DataError for what does not go with conversations or preferences."""
    option, holds = "--chat-template", "conversations"
    if settings.preferences is not None:
        option, holds = "--preferences", "preferences"
        if settings.packing != "concatenate":
            raise DataError("--preferences: each is a row of its own: leave --packing out")
    if unread := sorted(formats - _HOLD_CONVERSATIONS):
        raise DataError(
            f"{inputs.description}: {holds} are read from {', '.join(sorted(_HOLD_CONVERSATIONS))}, not from "
            f"{', '.join(unread)}: convert them"
        )
    if settings.tokenizer == "trained":
        raise DataError(
            f"{option}: takes a tokenizer that has the rows' control tokens: name its tokenizer.json with --tokenizer"
        )
    if settings.fim is not None:
        raise DataError(f"{option}: fill-in-the-middle would cut {holds}: leave --fim-rate out")
    if inputs.options.normalise:
        raise DataError(f"{option}: {holds} are read as they are: leave --normalise out")


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


def order_key(settings: Settings, content: bytes) -> bytes:
    """A document's 32-byte key in the shuffle, by its content and the seed alone."""
    return hashlib.sha256(b"order %d " % settings.seed + content).digest()


def preparation(settings: Settings, inputs: Inputs) -> dict[str, Any]:
    """The settings as the manifest records them: flat."""
    tree = settings.tree()
    fim = tree.pop("fim") or {"rate": None, "spm_share": None, "mode": None}
    tree |= {f"fim_{key}": value for key, value in fim.items()}
    tree["fim_tokens"] = ",".join(settings.fim_tokens) or None
    tree["reading_sha256"] = sha256_json(inputs.options.record())
    tree["normalise"] = ",".join(inputs.options.normalise) or None
    tree["quality"] = inputs.quality
    if (told := tree.pop("conversations")) is not None:
        tree["chat_template"] = hashlib.sha256(told["template"].encode()).hexdigest()
        tree |= {"loss": told["loss"], "too_long": told["too_long"], "turn_end": ",".join(told["turn_end"]) or None}
    if (told := tree.pop("preferences")) is not None:
        if told["template"] is not None:
            tree["chat_template"] = hashlib.sha256(told["template"].encode()).hexdigest()
            tree["turn_end"] = ",".join(told["turn_end"]) or None
        tree |= {"preferences": told["rows"], "too_long": told["too_long"]}
        tree |= {key: told[key] for key in ("max_prompt", "keep_prompt")}
    return tree
