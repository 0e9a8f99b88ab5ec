"""prepare(): documents in, a complete dataset folder out, or nothing.

read and hash -> tokenizer -> encode -> order by keyed hash -> pack -> shards -> manifest, in a folder aside that is renamed last. Same
corpus and settings give the same bytes. What a reader would get wrong: held-out documents are chosen by their content's hash alone, so a
text is held out of every dataset prepared with that share or none, whatever the seed, the order or the other documents.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from weftrain.core import fsops
from weftrain.core.canonical import canonical_json
from weftrain.core.dataset import (
    MANIFEST,
    TOKENIZER,
    Corpus,
    DocumentCounts,
    Manifest,
    SetEntry,
    SetName,
    ShardEntry,
    ShardSet,
    merkle_root,
    read_manifest,
    shard_file,
    write_manifest,
)
from weftrain.core.errors import DataError
from weftrain.core.shards import ID_BYTES, write_shard
from weftrain.data_prep.packing import Packer
from weftrain.data_prep.readers import Document, Inputs
from weftrain.data_prep.tokenization import TextEncoder, load_encoder, train_encoder

Progress = Callable[[str, int, int | None, str], None]  # stage, done, total if known, unit

DEFAULT_VOCAB_SIZE = 8192
SHARD_TOKENS = 1 << 25  # 64 MiB of uint16
TRAINING_BYTES = 32 << 20  # text that a tokenizer is trained on: the documents of the lowest hashes
_ENCODE_BYTES = 4 << 20  # text encoded at once
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9][A-Za-z0-9_.-]*)*")


@dataclass(frozen=True)
class Prepared:
    """A dataset folder that is complete. up_to_date: it was before, and nothing was done."""

    folder: Path
    manifest: Manifest
    up_to_date: bool


@dataclass(frozen=True)
class Settings:
    """What, with the corpus, determines every byte; the manifest's `preparation`. tokenizer: 'trained', or the given file's SHA-256."""

    tokenizer: str
    tokenizer_vocab_size: int | None
    eos: str | None
    sequence_length: int
    heldout_fraction: float
    rows_per_shard: int
    seed: int


@dataclass(frozen=True)
class _Entry:
    """A kept document, without its text. content: SHA-256 of the text. order: where it stands in the shuffle."""

    content: bytes
    order: bytes
    source: int
    heldout: bool
    num_bytes: int


@dataclass(frozen=True)
class _Survey:
    """What the first reading found: every kept document in reading order, and the corpus hash over all that was read."""

    entries: list[_Entry]
    sources: tuple[str, ...]
    read: int
    corpus_sha256: str

    def side(self, heldout: bool) -> list[_Entry]:
        """The training or the held-out documents, shuffled: by keyed hash."""
        return sorted((entry for entry in self.entries if entry.heldout == heldout), key=lambda entry: entry.order)


def _no_progress(stage: str, done: int, total: int | None, unit: str) -> None:
    pass


def prepare(
    inputs: Inputs,
    output: Path,
    *,
    name: str,
    tokenizer: Path | None = None,
    eos: str | None = None,
    vocab_size: int | None = None,
    sequence_length: int,
    heldout_fraction: float = 0.01,
    rows_per_shard: int | None = None,
    seed: int = 0,
    progress: Progress = _no_progress,
) -> Prepared:
    """Make output/name. Without `tokenizer` one of `vocab_size` ids (8192) and 32 special ids more is trained on the text.

    eos: the tokenizer's end-of-document token, else `</s>` or `<|endoftext|>`. rows_per_shard: else 64 MiB of tokens. Needs memory for the
    token ids, and for the text once if a tokenizer is trained. Raises DataError; nothing is then left under the dataset's name.
    """
    folder = output / name
    if not _NAME.fullmatch(name):
        raise DataError(f"--name {name!r}: use letters, digits, '_', '.', '-', and '/' for folders within the datasets' folder")
    if tokenizer is not None and vocab_size is not None:
        raise DataError("--vocab-size is for training a tokenizer, and --tokenizer names one: give only one of them")
    if sequence_length < 1 or not 0 <= heldout_fraction < 1 or (rows_per_shard is not None and rows_per_shard < 1):
        raise DataError("--sequence-length and --rows-per-shard must be at least 1, --heldout-fraction at least 0 and below 1")
    given = None if tokenizer is None else load_encoder(tokenizer, eos)
    settings = Settings(
        tokenizer="trained" if given is None else given.sha256,
        tokenizer_vocab_size=vocab_size or DEFAULT_VOCAB_SIZE if given is None else None,
        eos=eos,
        sequence_length=sequence_length,
        heldout_fraction=heldout_fraction,
        rows_per_shard=rows_per_shard or max(1, SHARD_TOKENS // sequence_length),
        seed=seed,
    )
    survey = _survey(inputs, settings, progress)
    partial = folder.parent / f".{folder.name}.partial"
    try:
        fsops.make_dirs(folder.parent)
        with fsops.held_lock(folder.parent / f".{folder.name}.lock", b""):
            if folder.exists():
                return Prepared(folder, _existing(folder, survey, settings), up_to_date=True)
            fsops.remove_tree(partial)  # what a killed run left
            try:
                manifest = _write_dataset(inputs, survey, settings, given, partial, name, progress)
            except (DataError, OSError):
                with contextlib.suppress(OSError):  # the error that led here is the one to report
                    fsops.remove_tree(partial)
                raise
            fsops.rename(partial, folder)
            return Prepared(folder, manifest, up_to_date=False)
    except BlockingIOError:
        raise DataError(f"{folder}: is being prepared by another process; wait for it, or give another --name") from None
    except OSError as error:
        raise DataError(f"{error.filename or folder}: {error.strerror}; free space or choose another folder for the datasets") from error


def _survey(inputs: Inputs, settings: Settings, progress: Progress) -> _Survey:
    """Read everything once: hashes, duplicates, sides."""
    corpus, read = hashlib.sha256(), 0
    seen: set[bytes] = set()
    sources: dict[str, int] = {}
    entries: list[_Entry] = []
    for document in inputs.read():
        data = document.text.encode()
        content = hashlib.sha256(data).digest()
        corpus.update(canonical_json([document.name, document.source, content.hex()]) + b"\n")
        read += 1
        if content not in seen:
            seen.add(content)
            owner = content if document.belongs_to is None else hashlib.sha256(document.belongs_to.encode()).digest()
            order = hashlib.sha256(b"order %d " % settings.seed + content).digest()
            source = sources.setdefault(document.source, len(sources))
            entries.append(_Entry(content, order, source, _is_held_out(owner, settings.heldout_fraction), len(data)))
        if read % 256 == 0:
            progress("read", read, None, "documents")
    progress("read", read, read, "documents")
    if not entries:
        raise DataError(f"{inputs.description}: holds no document; name other files")
    return _Survey(entries, tuple(sources), read, corpus.hexdigest())


def _is_held_out(content: bytes, fraction: float) -> bool:
    return int.from_bytes(hashlib.sha256(b"heldout " + content).digest()[:8]) < fraction * 2.0**64


def _existing(folder: Path, survey: _Survey, settings: Settings) -> Manifest:
    """The manifest of a folder that already is what was asked for. Raises DataError where it is another, or damaged."""
    if not (folder / MANIFEST).exists():
        raise DataError(f"{folder}: exists and is no dataset; give another --name, or remove it")
    manifest = read_manifest(folder)
    if manifest.corpus.sha256 != survey.corpus_sha256:
        raise DataError(f"{folder}: was prepared from other text ({manifest.corpus.description}); give another --name, or remove it")
    for key, value in asdict(settings).items():
        if manifest.preparation.get(key) != value:
            raise DataError(
                f"{folder}: was prepared with {key} {manifest.preparation.get(key)!r}, not {value!r}; give another --name, or remove it"
            )
    for set_name in manifest.sets:
        ShardSet(folder, manifest, set_name)
    return manifest


def _kept(inputs: Inputs, survey: _Survey) -> Iterator[tuple[_Entry, Document]]:
    """The kept documents again, with their text. Raises DataError where the files changed meanwhile."""
    entries = {entry.content: entry for entry in survey.entries}
    for document in inputs.read():
        entry = entries.pop(hashlib.sha256(document.text.encode()).digest(), None)
        if entry is not None:
            yield entry, document
    if entries:
        raise DataError(f"{inputs.description}: files changed while they were read; run again")


def _train_tokenizer(inputs: Inputs, survey: _Survey, vocab_size: int, progress: Progress) -> TextEncoder:
    """Trained on training documents only, those of the lowest hashes up to TRAINING_BYTES."""
    sample, sample_bytes = set(), 0
    for entry in survey.side(heldout=False):
        if sample_bytes >= TRAINING_BYTES:
            break
        sample.add(entry.content)
        sample_bytes += entry.num_bytes

    def texts() -> Iterator[str]:
        done = 0
        for entry, document in _kept(inputs, survey):
            if entry.content in sample:
                done += entry.num_bytes
                progress("train tokenizer", done, sample_bytes, "bytes")
                yield document.text

    return train_encoder(texts(), vocab_size)


def _encoded(inputs: Inputs, survey: _Survey, encoder: TextEncoder, progress: Progress) -> dict[bytes, np.ndarray]:
    """Token ids of every kept document by content hash."""
    total, done = sum(entry.num_bytes for entry in survey.entries), 0
    result: dict[bytes, np.ndarray] = {}
    waiting: list[tuple[_Entry, Document]] = []
    waiting_bytes = 0

    def flush() -> None:
        documents = [document for _, document in waiting]
        ids = encoder.encode([document.text for document in documents], [document.name for document in documents])
        result.update(zip((entry.content for entry, _ in waiting), ids, strict=True))
        waiting.clear()

    for entry, document in _kept(inputs, survey):
        waiting.append((entry, document))
        waiting_bytes += entry.num_bytes
        if waiting_bytes >= _ENCODE_BYTES:
            flush()
            done, waiting_bytes = done + waiting_bytes, 0
            progress("encode", done, total, "bytes")
    flush()
    progress("encode", total, total, "bytes")
    return result


def _write_dataset(
    inputs: Inputs, survey: _Survey, settings: Settings, given: TextEncoder | None, folder: Path, name: str, progress: Progress
) -> Manifest:
    """All of the dataset into `folder`, which does not exist yet."""
    fsops.make_dirs(folder)
    encoder = given or _train_tokenizer(inputs, survey, settings.tokenizer_vocab_size or DEFAULT_VOCAB_SIZE, progress)
    fsops.write_bytes(folder / TOKENIZER, encoder.data)
    ids = _encoded(inputs, survey, encoder, progress)
    names: tuple[SetName, ...] = ("train", "heldout") if settings.heldout_fraction else ("train",)
    sets = {set_name: _write_set(set_name, inputs, survey, settings, encoder, ids, folder, progress) for set_name in names}
    manifest = Manifest(
        format="weftrain-dataset",
        version=1,
        name=name,
        tokenizer_sha256=encoder.sha256,
        vocab_size=encoder.vocab_size,
        eos_id=encoder.eos_id,
        sequence_length=settings.sequence_length,
        row_stride=settings.sequence_length,
        fim=None,
        corpus=Corpus(sha256=survey.corpus_sha256, description=inputs.description, licence=inputs.licence),
        preparation=asdict(settings),
        documents=DocumentCounts(
            read=survey.read,
            duplicates=survey.read - len(survey.entries),
            train=sets["train"].documents,
            heldout=sets["heldout"].documents if "heldout" in sets else 0,
        ),
        train=sets["train"],
        heldout=sets.get("heldout"),
    )
    write_manifest(folder, manifest)
    return manifest


def _write_set(
    set_name: SetName,
    inputs: Inputs,
    survey: _Survey,
    settings: Settings,
    encoder: TextEncoder,
    ids: dict[bytes, np.ndarray],
    folder: Path,
    progress: Progress,
) -> SetEntry:
    """Pack and write one side's documents, in the order of their keyed hashes."""
    entries, length = survey.side(heldout=set_name == "heldout"), settings.sequence_length
    total, written = sum(len(ids[entry.content]) + 1 for entry in entries), 0
    packer = Packer(length, settings.rows_per_shard, encoder.eos_id, survey.sources)
    shards: list[ShardEntry] = []
    fsops.make_dirs(folder / set_name)
    for packed in packer.pack((ids[entry.content], entry.content[:ID_BYTES], entry.source) for entry in entries):
        file = shard_file(set_name, len(shards))
        info = write_shard(
            folder / file,
            packed.tokens,
            packed.documents,
            sequence_length=length,
            row_stride=length,
            vocab_size=encoder.vocab_size,
            tokenizer_sha256=encoder.sha256,
        )
        shards.append(ShardEntry(file=file, num_bytes=info.num_bytes, sha256=info.sha256, digest=info.digest, n_examples=info.num_rows))
        written += info.num_rows * length
        progress(f"write {set_name}", written, total, "tokens")
    if not shards:
        raise DataError(
            f"{inputs.description}: the {len(entries)} {set_name} documents hold {total} tokens, fewer than one row of {length} + 1; "
            "give more text, a shorter --sequence-length, or another --heldout-fraction (0: none)"
        )
    rows = sum(shard.n_examples for shard in shards)
    return SetEntry(
        id=merkle_root([shard.digest for shard in shards]),
        n_examples=rows,
        tokens=rows * length,
        documents=len(entries),
        dropped_tokens=packer.dropped_tokens,
        shards=tuple(shards),
    )
