"""What `weftrain prep` prints at its end: what was read and skipped, the sets, steps of an epoch, and a train command.

Lines are wrapped by the terminal alone, so that a command or a path can be copied from any width.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

import yaml
from rich.filesize import decimal

from weftrain.cli.display import Console, program
from weftrain.core.config import Recipe
from weftrain.core.formats.dataset_manifest import DatasetManifest
from weftrain.core.recipe_file import builtin_recipes, load_recipe

if TYPE_CHECKING:
    from weftrain.data_prep.pipeline import Prepared
    from weftrain.data_prep.readers.documents import SkippedFile

DEMO = "amber_demo"  # the recipe that is cut to any dataset: it trains in minutes on a CPU


def report(console: Console, prepared: Prepared, skipped: Sequence[SkippedFile]) -> None:
    """Print the dataset in about a dozen lines."""
    manifest = prepared.manifest
    state = "is up to date" if prepared.up_to_date else "is ready"
    console.print(
        f"dataset {prepared.folder} {state}: {manifest.corpus.description}, licence {manifest.corpus.licence}",
        style="bold",
    )
    documents, corpus = manifest.documents, manifest.corpus
    _line(
        console,
        "read",
        f"{_count(corpus.files, 'file')}, {decimal(corpus.num_bytes)}: {_count(documents.read, 'document')}, "
        f"{_count(documents.duplicates, 'duplicate')} dropped, {documents.failed:,} failed",
    )
    if manifest.parents:
        parent, entry = manifest.parents[-1], manifest.train
        added = (
            f"{_count(entry.n_examples - parent.train.n_examples, 'row')} added after its {parent.train.n_examples:,}"
        )
        _line(console, "grew", f"from {parent.name}, dataset id {parent.train.id[:16]}: {added}")
    for set_name, entry in manifest.sets.items():
        rows = f"{_count(entry.n_examples, 'row')} x {manifest.sequence_length} = {entry.tokens:,} tokens"
        _line(console, set_name, f"{_count(entry.documents, 'document')}, {rows}, dataset id {entry.id[:16]}")
    if manifest.tokenization.unknown_tokens:
        _line(
            console,
            "unknown",
            f"{manifest.tokenization.unknown_tokens:,} tokens, for text that the vocabulary cannot spell",
        )
    for count, words in (
        (manifest.tokenization.cut_conversations, "longer than a row, cut at its end"),
        (manifest.tokenization.divided_conversations, "longer than a row, divided over several"),
    ):
        if count:
            _line(console, "long", f"{_count(count, 'conversation')} {words}")
    kept = "end" if manifest.preparation.get("keep_prompt") == "end" else "beginning"
    for count, words in (
        (manifest.tokenization.cut_prompts, f"whose prompt was cut to its {kept}"),
        (manifest.tokenization.cut_answers, "whose answers were cut at their ends"),
    ):
        if count:
            _line(console, "long", f"{_count(count, 'preference')} {words}")
    if left_out := manifest.tokenization.no_preference:
        _line(console, "left out", f"{_count(left_out, 'record')} whose answers are equally good")
    if weighted := manifest.tokenization.weighted_documents:
        words = "with a weight of loss; a recipe says with objective.token_weights whether they count"
        _line(console, "weights", f"{_count(weighted, 'document')} {words}")
    if documents.failed:
        _line(
            console, "failed", f"{_count(documents.failed, 'document')}, listed in {prepared.folder / 'failures.jsonl'}"
        )
    _skipped(console, skipped)
    for note in _notes(prepared):
        _line(console, "note", note)
    for steps in epoch_lines(manifest):
        _line(console, "epoch", steps)
    _line(console, "next", train_command(prepared))


def _notes(prepared: Prepared) -> list[str]:
    manifest, notes = prepared.manifest, list(prepared.notes)
    if manifest.heldout is not None and manifest.heldout_rule == 1:  # an old dataset, or one that grew from one
        notes.append(
            "held out by rule 1, each text's exact bytes: a copy with other white space, or a tokenised one, may be "
            "in another dataset's training set; to hold out by rule 2, give another --name"
        )
    if (reason := prepared.fallback or manifest.tokenization.reason) is not None:
        notes.append(f"encoded by the reference, tokenizers {manifest.tokenization.engine_version}, since {reason}")
    return notes


def _skipped(console: Console, skipped: Sequence[SkippedFile]) -> None:
    from weftrain.data_prep.readers.listing import by_reason

    if skipped:
        _line(
            console,
            "skipped",
            f"{_count(len(skipped), 'entry', 'entries')} beside the inputs, each listed in inputs.jsonl",
        )
    for one in by_reason(skipped):
        _line(console, "", one)


def _line(console: Console, label: str, words: str) -> None:
    console.print(f"  {label:<8} {words}")


def _count(number: int, one: str, several: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else several or f'{one}s'}"


def epoch_lines(manifest: DatasetManifest) -> list[str]:
    """Steps of an epoch at the batch size of the chunks, the printed recipe, and each built-in recipe that fits."""
    rows = manifest.train.epochs[0]
    chunks = manifest.chunks
    lines = []
    if chunks is not None and chunks.global_batch_size is not None:
        steps = chunks.rows // chunks.global_batch_size
        lines.append(
            f"{steps * chunks.count:,} steps of {chunks.global_batch_size:,} rows, in {chunks.count:,} chunks of "
            f"{_count(steps, 'step')}"
        )
    for name in builtin_recipes():
        recipe = load_recipe(name).recipe
        if (name == DEMO and not manifest.pairs) or (recipe.data.sources and _fits(recipe, manifest)):
            size = recipe.batch.global_batch_size // recipe.data.pieces
            what = "pairs" if manifest.pairs else "rows"
            lines.append(f"{_steps(rows, size)} of {size:,} {what} ({name})")
    return lines


def _fits(recipe: Recipe, manifest: DatasetManifest) -> bool:
    length = recipe.data.row_length or recipe.data.sequence_length
    return (recipe.model.vocab_size, length, recipe.data.row_length is not None) == (
        manifest.vocab_size,
        manifest.sequence_length,
        manifest.pairs,
    )


def _steps(rows: int, batch_size: int) -> str:
    whole = rows // batch_size
    return _count(whole, "step") if whole >= 10 or not rows % batch_size else f"{rows / batch_size:,.1f} steps"


def train_command(prepared: Prepared) -> str:
    """A command that trains the demonstration's small model on the dataset, with its vocabulary and rows; of pairs, the
    one that computes the reference, which comes before.
    """
    if prepared.manifest.pairs:
        return f"{program()} data reference {shlex.quote(str(prepared.folder))} --of RUN"
    manifest, recipe = prepared.manifest, load_recipe(DEMO).recipe
    leaf, tokens = manifest.name.rpartition("/")[2], manifest.sequence_length
    root = prepared.folder
    for _ in manifest.name.split("/"):
        root = root.parent
    source = recipe.data.sources[0]
    # As many tokens in a micro-batch as the recipe has, so that long rows fit into memory; the global batch size is a
    # power of two.
    micro_tokens = recipe.batch.micro_batch_size * recipe.data.sequence_length
    micro = 1 << max(0, (min(recipe.batch.micro_batch_size, micro_tokens // tokens)).bit_length() - 1)
    values: dict[str, tuple[str | int, str | int]] = {
        "data.root": (recipe.data.root, str(root)),
        "data.sources.0.path": (source.path, manifest.name),
        "data.sources.0.name": (source.name, leaf),
        "model.vocab_size": (recipe.model.vocab_size, manifest.vocab_size),
        "data.sequence_length": (recipe.data.sequence_length, tokens),
        "model.max_position_embeddings": (
            recipe.model.max_position_embeddings,
            max(recipe.model.max_position_embeddings, tokens),
        ),
        "batch.micro_batch_size": (recipe.batch.micro_batch_size, micro),
    }
    overrides = [f"{key}={_yaml(value)}" for key, (default, value) in values.items() if value != default]
    if manifest.fim is not None:
        fim = ", ".join(f"{key}: {value}" for key, value in manifest.fim.settings.model_dump().items())
        overrides.append(f"data.sources.0.fim={{{fim}}}")
    name = [] if leaf == source.name else ["--run", leaf]
    return f"{program()} {shlex.join(['train', DEMO, *overrides, *name])}"


def _yaml(value: str | int) -> str:
    """A value as an override spells it. A name such as 2024 or `yes` is quoted, because YAML reads another type."""
    return str(value) if yaml.safe_load(str(value)) == value else json.dumps(value, ensure_ascii=False)
