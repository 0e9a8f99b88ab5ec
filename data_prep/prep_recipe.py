"""Preparation recipes: which datasets are made from which files, and how; YAML with the same strict rules as recipes.

The files are found below the folder or address given with `--inputs`. Recipes hold no data: the LLM360 corpora are not
redistributed, and each recipe says where their parts come from.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from weftrain.core.formats.dataset_manifest import FimSettings
from weftrain.core.formats.strict_model import Count, PositiveInt, StrictModel
from weftrain.core.formats.strict_yaml import builtin_names, read_as, read_builtin, read_text
from weftrain.data_prep.choices import (
    NOT_STATED,
    Engine,
    KeepPrompt,
    Loss,
    Order,
    Packing,
    PreferenceRows,
    TokensDtype,
    TooLong,
)
from weftrain.data_prep.quality import Quality
from weftrain.data_prep.readers.registry import READERS

Fraction = Annotated[float, Field(ge=0, lt=1)]


def _known_format(name: str) -> str:
    if name not in READERS:
        raise ValueError(f"there is {', '.join(READERS)}")
    return name


class FilesSection(StrictModel):
    """Files of one kind. addresses: below `--inputs`, absolute, or of another file system (`s3://…`); may be patterns.

    source: the name their documents are counted under; default: the folder's or file's name. suffixes: endings of names
    to read in folders.
    """

    addresses: Annotated[tuple[str, ...], Field(min_length=1, strict=False)]
    source: str | None = None
    format: Annotated[str, AfterValidator(_known_format)] | None = None
    suffixes: Annotated[tuple[str, ...], Field(strict=False)] = ()


class ChunksSection(StrictModel):
    """N equal chunks of rows. global_batch_size: makes each chunk a whole number of steps."""

    count: PositiveInt
    global_batch_size: PositiveInt | None = None


class DatasetSection(StrictModel):
    """One dataset: its folder's name, its inputs, and its own settings."""

    name: Annotated[str, Field(min_length=1)]
    inputs: Annotated[tuple[FilesSection, ...], Field(min_length=1, strict=False)]
    fim: FimSettings | None = None
    epochs: PositiveInt = 1
    chunks: ChunksSection | None = None
    licence: str | None = None


class PrepRecipe(StrictModel):
    """A preparation. tokenizer: a tokenizer.json below `--inputs`; null: train one of vocab_size ids. eos, bos,
    fim_tokens: names of the tokenizer's tokens, as for `weftrain prep`.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    description: str
    licence: str = NOT_STATED
    tokenizer: str | None = None
    vocab_size: PositiveInt | None = None
    eos: str | None = None
    bos: str | None = None
    fim_tokens: Annotated[tuple[str, ...], Field(strict=False)] = ()  # prefix, middle, suffix and perhaps pad
    engine: Engine = "auto"
    text_key: str = "text"
    source_key: str | None = None
    weight_key: str | None = None
    tokens_key: str | None = None
    tokens_dtype: TokensDtype | None = None
    normalise: Annotated[tuple[str, ...], Field(strict=False)] = ()
    chat_template: str | None = None  # the inputs hold conversations; see `weftrain prep --chat-template`
    loss: Loss = "answers"
    turn_end: Annotated[tuple[str, ...], Field(strict=False)] = ()
    too_long: TooLong = "cut"
    preferences: PreferenceRows | None = None  # the inputs hold preferences; see `weftrain prep --preferences`
    max_prompt: PositiveInt | None = None
    keep_prompt: KeepPrompt = "end"
    sequence_length: PositiveInt
    packing: Packing = "concatenate"
    order: Order = "shuffled"
    heldout_fraction: Fraction = 0.0
    rows_per_shard: PositiveInt | None = None
    seed: Count = 0
    max_failures: Count = 0
    quality: Quality | None = None  # filters and near-duplicate removal before tokenisation
    datasets: Annotated[tuple[DatasetSection, ...], Field(min_length=1, strict=False)]

    @model_validator(mode="after")
    def _check(self) -> PrepRecipe:
        names = [dataset.name for dataset in self.datasets]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two datasets are named '{name}'")
        for key in ("chat_template", "preferences"):
            if getattr(self, key) is not None and self.quality is not None:
                raise ValueError(f"'quality' filters texts, and '{key}' says that these are none")
        if self.weight_key is not None and self.quality is not None:
            raise ValueError("'quality' does not keep weights of texts: leave it or 'weight_key' out")
        if self.tokenizer is not None and self.vocab_size is not None:
            raise ValueError(
                "'vocab_size' is for training a tokenizer, and 'tokenizer' names one: give only one of them"
            )
        return self


def builtin_prep_recipes() -> list[str]:
    return builtin_names("weftrain.data_prep")


def is_prep_recipe(name: str) -> bool:
    """Whether an argument of `weftrain prep` names a recipe: a built-in one, or a .yaml file."""
    return name.endswith((".yaml", ".yml")) or (name in builtin_prep_recipes() and not Path(name).exists())


def load_prep_recipe(name: str, overrides: Iterable[str] = ()) -> PrepRecipe:
    """A recipe by built-in name or path. Raises RecipeError naming file, line, key and remedy."""
    if name.endswith((".yaml", ".yml")):
        return read_as(PrepRecipe, name, read_text(Path(name)), overrides)
    text = read_builtin("weftrain.data_prep", name, "preparation recipe")
    return read_as(PrepRecipe, f"data_prep/recipes/{name}.yaml", text, overrides)
