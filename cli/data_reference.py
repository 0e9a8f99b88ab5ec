"""`weftrain data reference`: log-probabilities of a dataset's preference pairs under the model that DPO starts from."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import click

from weftrain.cli.arguments import FETCH, NamedPath
from weftrain.cli.display import Bar, Console
from weftrain.core.errors import DataError

if TYPE_CHECKING:
    import numpy as np

    from weftrain.core.formats.dataset_manifest import DatasetManifest
    from weftrain.core.formats.reference_parts import ReferenceParts
    from weftrain.core.formats.shard_set import ShardSet
    from weftrain.core.model import Decoder
    from weftrain.core.model_config import ModelConfig

Compute = Literal["float32", "bfloat16"]


class _Opened(NamedTuple):
    """load: the model in a dtype. tokenizer_sha256: None if it is not known. compute: the dtype it was trained with."""

    words: str
    config: ModelConfig
    load: Callable[[Compute], Decoder]
    weights_sha256: Callable[[], str]
    tokenizer_sha256: str | None
    compute: Compute


@click.command("reference")
@click.argument("folder", type=NamedPath(path_type=Path, remedy=FETCH))
@click.option(
    "--of",
    "of",
    required=True,
    type=NamedPath(path_type=Path, exists=True),
    help="The model: a run (its newest whole checkpoint), a checkpoint's folder, or a Hugging Face model's.",
)
@click.option("--name", default="reference", show_default=True, help="What objective.reference calls it.")
@click.option(
    "--compute",
    type=click.Choice(["float32", "bfloat16"]),
    help="Dtype of the forward pass.  [default: the run's precision.compute; float32 for Hugging Face]",
)
@click.option("--batch-size", type=click.IntRange(min=2), default=16, show_default=True, help="Rows at once.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
def reference(folder: Path, of: Path, name: str, compute: Compute | None, batch_size: int, device: str) -> None:
    """Compute the log-probabilities of the preference pairs in FOLDER under a frozen model, once, and store them beside
    it. objective dpo trains against them; they are tied to the dataset, the tokenizer and the model's weights. The same
    command after an interruption goes on with the first shard that is not there.
    """
    from pydantic import TypeAdapter, ValidationError

    from weftrain.core.formats.dataset import read_dataset_manifest
    from weftrain.core.formats.reference_file import ReferenceName, write_reference
    from weftrain.core.formats.reference_parts import ReferenceParts
    from weftrain.core.formats.shard_set import ShardSet

    console = Console()
    try:
        TypeAdapter(ReferenceName).validate_python(name)
    except ValidationError:
        raise click.BadParameter("use letters, digits, '_' and '-'", param_hint="--name") from None
    manifest = read_dataset_manifest(folder)
    opened = _opened(of, device)
    _check_tokenizer(folder, manifest, opened, console)
    dtype, weights_sha256 = compute or opened.compute, opened.weights_sha256()
    settings = {"compute": dtype, "batch_size": batch_size, "device": device}
    sets = {set_name: entry.id for set_name, entry in manifest.sets.items()}
    model = opened.config.model_dump(mode="json")
    whose = {"weights_sha256": weights_sha256, "model": model}
    parts = ReferenceParts(folder, name, {**settings, **whose, "sets": sets})
    load = functools.cache(functools.partial(opened.load, dtype))
    values = {
        set_name: _of_set(load, ShardSet(folder, manifest, set_name), set_name, parts, batch_size, console)
        for set_name in manifest.sets
    }
    written = write_reference(
        folder,
        name,
        manifest,
        values,
        of=opened.words,
        weights_sha256=weights_sha256,
        model=model,
        compute=dtype,
    )
    parts.remove()
    for set_name, found in values.items():
        likelier = int((found[:, 0] > found[:, 1]).sum())
        console.print(f"{set_name:<8} {len(found):,} pairs; {likelier:,} chosen answers are likelier than the rejected")
    console.print(f"{written.path}: root {written.root[:16]}, of {opened.words} in {dtype}")
    console.print(f"  next     objective.name=dpo objective.reference={name}")


def _of_set(
    load: Callable[[], Decoder],
    shards: ShardSet,
    set_name: str,
    parts: ReferenceParts,
    batch_size: int,
    console: Console,
) -> np.ndarray:
    """float64 [pairs, 2] of one set, shard by shard; of those that an earlier start made, read. No batch has pairs of
    two shards, so that the bits are those of a start that was not interrupted.
    """
    import numpy as np

    from weftrain.analysis.evaluation.pair_scores import pair_log_probabilities

    found, first = [], 0
    with Bar(console, f"reference {set_name}", shards.num_rows) as bar:
        for number, shard in enumerate(shards.entry.shards):
            stop = first + shard.n_examples
            values = parts.read(set_name, number, shard.n_examples)
            if values is None:
                values = pair_log_probabilities(
                    load(), shards, batch_size, lambda done, _: bar.update(done, "pairs"), range(first, stop)
                )
                parts.write(set_name, number, values)
            bar.update(stop, "pairs")
            found.append(values)
            first = stop
    return np.concatenate(found)


def _check_tokenizer(folder: Path, manifest: DatasetManifest, opened: _Opened, console: Console) -> None:
    """Raises DataError where the model reads other ids than the dataset holds."""
    if opened.config.vocab_size < manifest.vocab_size:
        raise DataError(
            f"{folder}: has {manifest.vocab_size:,} ids in its vocabulary, {opened.words} has "
            f"{opened.config.vocab_size:,}: prepare the dataset with that model's tokenizer"
        )
    if opened.tokenizer_sha256 is None:
        console.print(f"note: {opened.words} does not say here which tokenizer is its own: it is not compared")
    elif opened.tokenizer_sha256 != manifest.tokenizer_sha256:
        raise DataError(
            f"{folder}: was prepared with tokenizer {manifest.tokenizer_sha256[:12]}, {opened.words} reads "
            f"{opened.tokenizer_sha256[:12]}: prepare the dataset with that model's tokenizer.json"
        )


def _opened(of: Path, device: str) -> _Opened:
    from weftrain.analysis.compare.huggingface import is_model

    return _huggingface(of, device) if is_model(of) else _checkpoint(of, device)


def _checkpoint(of: Path, device: str) -> _Opened:
    import torch

    from weftrain.analysis.evaluation.generation import load_model
    from weftrain.cli.assembly import newest_or_named, recipe_of_checkpoint
    from weftrain.cli.opened_model import default_tokenizer
    from weftrain.core import checkpoint
    from weftrain.core.formats.checkpoint_manifest import weights_sha256_of
    from weftrain.core.formats.dataset import read_dataset_manifest

    path = newest_or_named(of, lambda line: click.echo(line, err=True))
    state, manifest = checkpoint.load(path, verified=path != of)
    recipe = recipe_of_checkpoint(path, manifest).recipe
    tokenizer = None
    if recipe.data.sources and (place := default_tokenizer(recipe).parent).is_dir():
        tokenizer = read_dataset_manifest(place).tokenizer_sha256

    def load(dtype: Compute) -> Decoder:
        return load_model(
            checkpoint.Weights(state.tensors, recipe.tuning.lora), recipe.model, device, getattr(torch, dtype)
        )

    words = f"{recipe.name}, step {manifest['step']}, checkpoint {manifest['root'][:16]}"
    return _Opened(words, recipe.model, load, lambda: weights_sha256_of(manifest), tokenizer, recipe.precision.compute)


def _huggingface(of: Path, device: str) -> _Opened:
    import torch

    from weftrain.analysis.compare.huggingface import TOKENIZER, load_own
    from weftrain.analysis.evaluation.scores import weights_sha256
    from weftrain.core.formats.fsops import sha256_file
    from weftrain.exchange.huggingface.folder import read_config

    file = of / TOKENIZER
    return _Opened(
        of.absolute().name,
        read_config(of),
        lambda dtype: load_own(of, device, getattr(torch, dtype)),
        lambda: weights_sha256(load_own(of)),
        sha256_file(file) if file.is_file() else None,
        "float32",
    )
