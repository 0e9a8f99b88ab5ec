"""The schemas of a dataset's manifest.json, inputs.jsonl and sources.jsonl, and the Merkle tree of the dataset id."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from weftrain.core.formats.strict_model import Count, PositiveInt, Scalar, Sha256, StrictModel

SetName = Literal["train", "heldout"]


# a source's share of the dataset's rows: fractions [start, end)
Subset = Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(gt=0, le=1)]], Field(strict=False)]


class InputEntry(StrictModel):
    """A line of inputs.jsonl: first the files that were read, then those that were not.

    sha256: of each share that was read, in order; most files are one share. skipped: why the file was not read, if so.
    """

    name: Annotated[str, Field(min_length=1)]
    num_bytes: Count
    sha256: Annotated[tuple[Sha256, ...], Field(strict=False)] = ()
    skipped: str | None = None


class ShardEntry(StrictModel):
    file: Annotated[str, Field(pattern=r"^(train|heldout)/[0-9]{5,9}\.h5$")]
    num_bytes: PositiveInt
    sha256: Sha256  # of the file, as `sha256sum` prints it
    digest: Sha256  # the shard's own, which the dataset id is made of
    n_examples: PositiveInt


class SetEntry(StrictModel):
    id: Sha256
    n_examples: PositiveInt
    tokens: PositiveInt  # n_examples x sequence_length: labels, each once
    documents: PositiveInt
    dropped_tokens: Count  # the tail that fills no row, or no chunk
    padding_tokens: Count  # tokens that only fill a row
    # rows of each prepared epoch
    epochs: Annotated[tuple[PositiveInt, ...], Field(min_length=1, strict=False)]
    shards: Annotated[tuple[ShardEntry, ...], Field(min_length=1, strict=False)]

    @model_validator(mode="after")
    def _check(self) -> SetEntry:
        if self.n_examples != sum(shard.n_examples for shard in self.shards):
            raise ValueError(f"n_examples {self.n_examples} is not the sum over the shards")
        if self.n_examples != sum(self.epochs):
            raise ValueError(f"n_examples {self.n_examples} is not the sum over the epochs")
        if self.id != merkle_root([shard.digest for shard in self.shards]):
            raise ValueError("the id is not the Merkle root of the shards' digests")
        return self


class Corpus(StrictModel):
    sha256: Sha256  # Merkle root over the hashes of all shares of all files that were read
    description: str
    licence: str
    files: PositiveInt
    num_bytes: Count


class DocumentCounts(StrictModel):
    read: PositiveInt
    failed: Count  # could not be read; failures.jsonl lists them
    duplicates: Count  # equal in every byte to an earlier one, dropped
    train: PositiveInt
    heldout: Count


class SourceEntry(StrictModel):
    """A line of sources.jsonl: a source's part of one epoch of the training set. tokens: with start and end tokens."""

    name: str
    documents: Count
    num_bytes: Count
    tokens: Count


class FimSettings(StrictModel):
    """Fill-in-the-middle settings: of a dataset, or required of a recipe's source.

    mode (docs/fill-in-the-middle.md): `exact` transforms documents before they are packed, `context` their pieces in
    each row; both cut between tokens and lose none. `released` does what CrystalCoder's scripts did.
    """

    rate: Annotated[float, Field(gt=0, le=1)]
    spm_share: Annotated[float, Field(ge=0, le=1)]
    mode: Literal["exact", "context", "released"] = "exact"


class AppliedFim(FimSettings):
    """Fill-in-the-middle as applied. tokens: prefix, middle, suffix and perhaps pad; () in old datasets."""

    seed: Count
    tokens: Annotated[tuple[str, ...], Field(strict=False)] = ()

    @property
    def settings(self) -> FimSettings:
        """The settings as a training recipe states them."""
        return FimSettings(rate=self.rate, spm_share=self.spm_share, mode=self.mode)


class Tokenization(StrictModel):
    """Tokenizer implementation, which never changes the ids. checked_documents: encoded by both and compared.

    unknown_tokens: how many stand for text that the vocabulary cannot spell. reason: why the reference implementation
    encoded everything although the fast one was allowed. cut_conversations, divided_conversations: those that were
    longer than a row. cut_prompts, cut_answers: preferences of which such a part was cut; no_preference: records whose
    answers are equally good, which were left out. weighted_documents: texts, and conversations or parts of them, whose
    loss has a weight other than 1.
    """

    engine: Literal["tokenizers", "gigatoken"]
    engine_version: str
    reference_documents: Count
    checked_documents: Count
    unknown_tokens: Count = 0
    reason: str | None = None
    cut_conversations: Count = 0
    divided_conversations: Count = 0
    cut_prompts: Count = 0
    cut_answers: Count = 0
    no_preference: Count = 0
    weighted_documents: Count = 0

    @model_serializer(mode="wrap")
    def _without_later(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without later keys where they count nothing: the manifest of other data stays what it was."""
        counts = ("cut_conversations", "divided_conversations", "cut_prompts", "cut_answers", "no_preference")
        later = {*counts, "weighted_documents"}
        return {key: value for key, value in serialize(self).items() if key not in later or value}


class Chunks(StrictModel):
    """Chunk c is rows [c * rows, (c + 1) * rows) of the training set; with a known batch size, whole steps."""

    count: PositiveInt
    rows: PositiveInt
    global_batch_size: PositiveInt | None

    def steps(self, chunk: int) -> tuple[int, int] | None:
        """The steps [first, stop) of a chunk, in a run that reads this set alone."""
        if self.global_batch_size is None:
            return None
        each = self.rows // self.global_batch_size
        return chunk * each, (chunk + 1) * each


class AncestorSet(StrictModel):
    """A set of an ancestor. shards: their number; they are the first of the grown set."""

    id: Sha256
    n_examples: PositiveInt
    shards: PositiveInt


class Ancestor(StrictModel):
    """A dataset that this one grew from; its files and sources are the first of this one. root: of its manifest."""

    name: Annotated[str, Field(min_length=1)]
    root: Sha256
    files: PositiveInt
    num_sources: PositiveInt
    train: AncestorSet
    heldout: AncestorSet | None


class DatasetManifest(StrictModel):
    """manifest.json, consistent in itself. preparation: the settings that, with the corpus, determine every byte.

    eos_id, bos_id: the tokens after and before each document; at least one is set. inputs_skipped: number of skipped
    files by reason; inputs.jsonl lists them after the corpus.files that were read. parents: the datasets that this one
    grew from, oldest first. Version 4 is of datasets whose shards may hold weights of tokens, and like version 3 of all
    others. Version 2 listed the sources here and recorded no skipped files.
    """

    format: Literal["weftrain-dataset"]
    version: Literal[2, 3, 4]
    name: Annotated[str, Field(min_length=1)]
    parents: Annotated[tuple[Ancestor, ...], Field(strict=False)] = ()
    tokenizer_sha256: Sha256  # of tokenizer.json
    vocab_size: PositiveInt
    eos_id: Count | None
    bos_id: Count | None = None
    sequence_length: PositiveInt
    row_stride: PositiveInt
    packing: Literal["concatenate", "best_fit", "separate", "rows"]
    fim: AppliedFim | None
    corpus: Corpus
    inputs_sha256: Sha256  # of inputs.jsonl
    inputs_skipped: Annotated[dict[str, PositiveInt], Field(default_factory=dict)]
    tokenization: Tokenization
    preparation: dict[str, Scalar | None]
    documents: DocumentCounts
    num_sources: PositiveInt
    sources_sha256: Sha256  # of sources.jsonl
    chunks: Chunks | None
    train: SetEntry
    heldout: SetEntry | None

    @model_validator(mode="after")
    def _check(self) -> DatasetManifest:
        for set_name, entry in self.sets.items():
            files = [shard_file(set_name, index) for index in range(len(entry.shards))]
            if [shard.file for shard in entry.shards] != files:
                raise ValueError(f"{set_name}: the shards' files do not count up from {shard_file(set_name, 0)}")
        if self.weighted != (self.version == 4):
            counted = self.tokenization.weighted_documents
            raise ValueError(f"version {self.version}: {counted} documents have weights, which version 4 is for")
        if self.eos_id is None and self.bos_id is None:
            raise ValueError("eos_id and bos_id: documents have neither, so nothing tells them apart")
        if self.chunks is not None:
            chunks = self.chunks
            if chunks.count * chunks.rows != self.train.n_examples or len(self.train.epochs) > 1:
                raise ValueError(
                    f"chunks: {chunks.count} x {chunks.rows} rows are not the {self.train.n_examples} of one epoch"
                )
            if chunks.global_batch_size is not None and chunks.rows % chunks.global_batch_size:
                raise ValueError(f"chunks: {chunks.rows} rows are no whole steps of {chunks.global_batch_size}")
        for parent in self.parents:
            for before, now in ((parent.train, self.train), (parent.heldout, self.heldout)):
                if before is not None and not (now is not None and _begins_with(now, before)):
                    raise ValueError(f"parents: the shards do not begin with those of '{parent.name}'")
        return self

    def rows_of_ancestor(self, train_id: str) -> int | None:
        """The number of training rows of the ancestor with that dataset id, which are the first here; else None."""
        return next((parent.train.n_examples for parent in self.parents if parent.train.id == train_id), None)

    @property
    def separator_id(self) -> int:
        """The token between documents, which also ends generated texts: the end token, else the start token."""
        found = self.bos_id if self.eos_id is None else self.eos_id
        assert found is not None
        return found

    @property
    def chat_template_sha256(self) -> str | None:
        """Of chat_template.jinja, by which conversations were rendered; None for a dataset of texts."""
        found = self.preparation.get("chat_template")
        return found if isinstance(found, str) else None

    @property
    def weighted(self) -> bool:
        """Whether shards may hold weights of tokens, for objective.token_weights."""
        return self.tokenization.weighted_documents > 0

    @property
    def pairs(self) -> bool:
        """Whether each row is a preference pair, read in two pieces: the chosen side, then the rejected one."""
        return self.preparation.get("preferences") == "pairs"

    @property
    def heldout_rule(self) -> int:
        """The rule that split off held-out documents, see data_prep/heldout.py. The oldest datasets record none."""
        return int(self.preparation.get("heldout_rule") or 1)

    @property
    def sets(self) -> dict[SetName, SetEntry]:
        """'train', and 'heldout' if documents were held out."""
        return {"train": self.train} if self.heldout is None else {"train": self.train, "heldout": self.heldout}


def _begins_with(entry: SetEntry, before: AncestorSet) -> bool:
    shards = entry.shards[: before.shards]
    rows = sum(shard.n_examples for shard in shards)
    first = AncestorSet(id=merkle_root(shard.digest for shard in shards), n_examples=rows, shards=len(shards))
    return first == before


def shard_file(set_name: str, index: int) -> str:
    """A shard's path in the dataset's folder."""
    return f"{set_name}/{index:05d}.h5"


def merkle_root(leaves: Iterable[str]) -> str:
    """The Merkle root of RFC 6962, section 2.1, over hexadecimal leaves: leaf H(0 || x), node H(1 || left || right).

    Leaves may be a stream: only the roots of complete subtrees are kept, at most one of each size.
    """
    roots: list[tuple[int, bytes]] = []  # (leaves, root) of complete subtrees, each larger than the next
    for leaf in leaves:
        size, root = 1, hashlib.sha256(b"\x00" + bytes.fromhex(leaf)).digest()
        while roots and roots[-1][0] == size:
            root = hashlib.sha256(b"\x01" + roots.pop()[1] + root).digest()
            size *= 2
        roots.append((size, root))
    if not roots:
        return hashlib.sha256(b"").hexdigest()
    _, result = roots.pop()
    while roots:
        result = hashlib.sha256(b"\x01" + roots.pop()[1] + result).digest()
    return result.hex()


class SourceCursor(StrictModel):
    """How far a source had been read: `place` rows of its pass number `turn` were read or skipped.

    subsets: that of the pass's beginning, then each that the recipe changed to since. rows: only if the dataset has
    grown since: how many rows it had under each of the first subsets.
    """

    dataset_id: Annotated[str, Field(min_length=1)]
    read: Count  # its samples since the run began
    turn: Count
    place: Count
    subsets: Annotated[tuple[Subset, ...], Field(min_length=1, strict=False)]
    rows: Annotated[tuple[PositiveInt, ...], Field(strict=False)] = ()

    @model_serializer(mode="wrap")
    def _without_empty(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        value: dict[str, Any] = serialize(self)
        return value if self.rows else {key: item for key, item in value.items() if key != "rows"}
