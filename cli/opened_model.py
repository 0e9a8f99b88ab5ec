"""The model that a verb was given: a run (its newest whole checkpoint), a checkpoint's folder, or a Hugging Face
model's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from weftrain.core.formats.plain_file import real_path

if TYPE_CHECKING:
    from weftrain.analysis.serving.model import ServedModel
    from weftrain.core.config import Recipe
    from weftrain.core.formats.dataset_manifest import DatasetManifest
    from weftrain.core.model import Decoder
    from weftrain.core.model_config import ModelConfig


class OpenedModel(NamedTuple):
    """tokenizer: its file, the dataset that must agree with it, and whether texts begin as the tokenizer has them."""

    config: ModelConfig
    load: Callable[[], Decoder]
    tokenizer: Callable[[], tuple[Path, tuple[Path, DatasetManifest] | None, bool]]


def opened_model(run: Path, overrides: Sequence[str], device: str) -> OpenedModel:
    """overrides: of the recorded recipe. Raises WeftrainError."""
    from weftrain.analysis.compare.huggingface import is_model

    return _huggingface(run, overrides, device) if is_model(run) else _checkpoint(run, overrides, device)


def served(
    run: Path, overrides: Sequence[str], device: str, tokenizer: Path | None, template: str | None, name: str | None
) -> ServedModel:
    """The model for conversations. tokenizer, template: instead of its own. Raises WeftrainError."""
    from weftrain.analysis.evaluation.tokenizer import end_of_text_id, open_tokenizer
    from weftrain.analysis.serving.model import ServedModel
    from weftrain.data_prep.conversations.prompts import open_prompts

    opened = opened_model(run, overrides, device)
    file, dataset, begins = (tokenizer, None, False) if tokenizer is not None else opened.tokenizer()
    tokens, _ = open_tokenizer(file, opened.config.vocab_size, dataset)
    end_id = end_of_text_id(tokens, file, None if dataset is None else dataset[1])
    chat = open_prompts(file, dataset, template)
    return ServedModel(name or real_path(run).name, opened.config, opened.load, tokens, begins, end_id, chat)


def _checkpoint(run: Path, overrides: Sequence[str], device: str) -> OpenedModel:
    from weftrain.analysis.evaluation.generation import load_model
    from weftrain.cli.assembly import newest_or_named, recipe_of_checkpoint
    from weftrain.core import checkpoint
    from weftrain.core.formats.dataset import read_dataset_manifest

    path = newest_or_named(run, lambda line: click.echo(line, err=True))
    state, manifest = checkpoint.load(path, verified=path != run)
    recipe = recipe_of_checkpoint(path, manifest, overrides).recipe

    def of_dataset() -> tuple[Path, tuple[Path, DatasetManifest], bool]:
        file = default_tokenizer(recipe)
        dataset = read_dataset_manifest(file.parent)
        return file, (file.parent, dataset), dataset.bos_id is not None

    return OpenedModel(
        recipe.model,
        lambda: load_model(checkpoint.Weights(state.tensors, recipe.tuning.lora), recipe.model, device),
        of_dataset,
    )


def _huggingface(folder: Path, overrides: Sequence[str], device: str) -> OpenedModel:
    from weftrain.analysis.compare.huggingface import TOKENIZER, check_no_overrides, load_own
    from weftrain.exchange.huggingface.folder import read_config

    check_no_overrides(folder, overrides)
    return OpenedModel(read_config(folder), lambda: load_own(folder, device), lambda: (folder / TOKENIZER, None, True))


def default_tokenizer(recipe: Recipe) -> Path:
    """tokenizer.json of the dataset of the recipe's first source. Raises DataError."""
    from weftrain.core.errors import DataError
    from weftrain.core.formats.dataset import TOKENIZER

    if not recipe.data.sources:
        raise DataError(
            "data.synthetic_rows: random rows have no tokenizer; name one with --tokenizer, or give --ids instead of "
            "--prompt"
        )
    return Path(recipe.data.root) / recipe.data.sources[0].path / TOKENIZER
