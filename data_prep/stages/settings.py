"""What is prepared and how: the inputs and settings that determine every byte of a dataset, and whether they fit."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace
from typing import Any

from weftrain.core.errors import DataError
from weftrain.core.formats.canonical import sha256_json
from weftrain.core.formats.dataset_manifest import FimSettings
from weftrain.core.formats.line_table import Lines
from weftrain.data_prep import heldout
from weftrain.data_prep.choices import NOT_STATED, KeepPrompt, Loss, Order, Packing, PreferenceRows, TooLong
from weftrain.data_prep.conversations.encode import ConversationEncoder
from weftrain.data_prep.conversations.pairs import PreferenceEncoder
from weftrain.data_prep.conversations.template import ChatTemplate
from weftrain.data_prep.readers.documents import InputFile, SkippedFile
from weftrain.data_prep.readers.read_options import ReadOptions
from weftrain.data_prep.readers.registry import READERS
from weftrain.data_prep.tokens.markers import NO_EOS, Markers
from weftrain.data_prep.tokens.tokenization import TextEncoder

_HOLD_RECORDS = {"jsonl", "json", "parquet", "arrow"}


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
    if inputs.options.weight_key is not None:
        _check_weights(inputs, settings, formats)
    if settings.global_batch_size is not None and settings.chunks is None:
        raise DataError("--global-batch-size makes chunks of whole steps: give --chunks too, or leave it out")


def _check_weights(inputs: Inputs, settings: Settings, formats: set[str]) -> None:
    """Raises DataError for what has no weight of a whole text, or would lose it."""
    if settings.conversations is not None or settings.preferences is not None:
        raise DataError(
            "--weight-key: is of texts: an answer of a conversation has its weight in its message's key 'weight', and "
            "preferences have none"
        )
    if unread := sorted(formats - _HOLD_RECORDS):
        raise DataError(
            f"{inputs.description}: --weight-key: weights are read from {', '.join(sorted(_HOLD_RECORDS))}, not from "
            f"{', '.join(unread)}: convert them"
        )
    if settings.fim is not None:
        raise DataError("--weight-key: fill-in-the-middle does not keep weights: leave --fim-rate or the weights out")


def _check_conversations(inputs: Inputs, settings: Settings, formats: set[str]) -> None:
    """Raises DataError for what does not go with conversations or preferences."""
    option, holds = "--chat-template", "conversations"
    if settings.preferences is not None:
        option, holds = "--preferences", "preferences"
        if settings.packing != "concatenate":
            raise DataError("--preferences: each is a row of its own: leave --packing out")
    if unread := sorted(formats - _HOLD_RECORDS):
        raise DataError(
            f"{inputs.description}: {holds} are read from {', '.join(sorted(_HOLD_RECORDS))}, not from "
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
