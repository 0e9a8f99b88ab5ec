"""The datasets that `weftrain prep` makes, from its arguments or a preparation recipe, with their inputs listed."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from weftrain.cli.display import Bar, Console
from weftrain.cli.prep_options import BESIDE_RECIPE, OF_INPUTS, OF_RECIPE, given
from weftrain.core.errors import DataError

if TYPE_CHECKING:
    from weftrain.core.formats.dataset_manifest import FimSettings
    from weftrain.data_prep.prep_recipe import DatasetSection, PrepRecipe
    from weftrain.data_prep.quality import Quality
    from weftrain.data_prep.readers.listing import Listed, Wanted
    from weftrain.data_prep.readers.read_options import ReadOptions
    from weftrain.data_prep.stages.settings import Conversations, Inputs, Preferences

# Options and keys of a recipe that prepare() takes under their own names.
_OF_PREPARE = (
    *("vocab_size", "eos", "bos", "engine", "sequence_length", "heldout_fraction", "rows_per_shard", "seed"),
    *("packing", "order", "max_failures"),
)


@dataclass(frozen=True)
class PrepJob:
    """One dataset to make: its inputs and the arguments of prepare(). json_texts: names of JSON files that are read as
    text.
    """

    inputs: Inputs
    arguments: dict[str, Any]
    json_texts: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return str(self.arguments["name"])


def job_of_options(inputs: tuple[str, ...], options: dict[str, Any], folder: Path, console: Console) -> PrepJob:
    """The dataset of INPUTS, or of the embedded corpus if there are none. folder: that of datasets. Raises
    DataError.
    """
    from weftrain.data_prep.prep_recipe import builtin_prep_recipes
    from weftrain.data_prep.readers.corpus import embedded_inputs
    from weftrain.data_prep.readers.listing import STANDARD_INPUT, Wanted
    from weftrain.data_prep.stages.settings import Inputs
    from weftrain.data_prep.tokens.markers import fim_names

    if (option := given(OF_RECIPE)) is not None:
        raise click.UsageError(f"{option} belongs to a recipe")
    if inputs and not options["name"]:
        like = difflib.get_close_matches(inputs[0], () if Path(inputs[0]).exists() else builtin_prep_recipes(), 1)
        meant = f"'{inputs[0]}' is not there; did you mean the recipe '{like[0]}'? For a path, " if like else ""
        raise click.UsageError(f"{meant}give the dataset a --name")
    if not inputs and (option := given(OF_INPUTS)) is not None:
        raise click.UsageError(f"{option} says what INPUTS are: name them, or leave it out for the embedded corpus")
    if options["grow"] is not None:
        options = _of_parent(options)
    conversations, preferences = _of_records(options, options["tokenizer"])
    if conversations is not None and given(("packing",)) is None and options["grow"] is None:
        options = options | {"packing": "best_fit"}
    read = _read_options(options)
    json_texts: tuple[str, ...] = ()
    if inputs:
        spooled = _standard_input(inputs, options, folder)
        wanted = Wanted(inputs, None, options["suffixes"], options["format_"], _record_keys(read))
        listed = _listed("list", [wanted], console, spooled)
        json_texts = listed.json_texts
        names = ", ".join(
            "stdin" if address in STANDARD_INPUT else address.rstrip("/").rpartition("/")[2] for address in inputs
        )
        chosen = Inputs(listed.files, names, options["licence"], read, skipped=listed.skipped)
    else:
        embedded, description, licence = embedded_inputs()
        chosen = Inputs(tuple(embedded), description, licence, read)
    arguments = {
        key: options[key] for key in (*_OF_PREPARE, "tokenizer", "epochs", "chunks", "global_batch_size", "grow")
    }
    arguments |= {
        "name": "python_stdlib" if options["name"] is None else options["name"],
        "fim": _fim(options),
        "fim_tokens": fim_names(options["fim_tokens"]),
        "conversations": conversations,
        "preferences": preferences,
    }
    return PrepJob(chosen, arguments, json_texts)


def jobs_of_recipe(recipe: PrepRecipe, options: dict[str, Any], console: Console) -> list[PrepJob]:
    """The recipe's datasets, or those named by --only. Options that the recipe decides are refused. Raises
    DataError.
    """
    if (option := given(BESIDE_RECIPE, but=True)) is not None:
        raise click.UsageError(f"the recipe decides {option}: lay a value over it with --set KEY.SUB=VALUE")
    known = [dataset.name for dataset in recipe.datasets]
    if unknown := set(options["only"]) - set(known):
        raise click.UsageError(f"--only {min(unknown)}: the recipe makes {', '.join(known)}")
    chosen = [dataset for dataset in recipe.datasets if not options["only"] or dataset.name in options["only"]]
    return [_job_of_section(recipe, dataset, options["root"], console) for dataset in chosen]


def filtered(job: PrepJob, quality: Quality, folder: Path, workers: int, console: Console) -> PrepJob:
    """The job on what the recipe's filters keep. The filtered text stays beside the dataset; its lines say where each
    document came from.
    """
    from weftrain.data_prep.datatrove_bridge import filter_inputs

    target = folder / f"{job.name}.filtered"
    kept = filter_inputs(job.inputs, quality, target, workers)
    counts = ", ".join(f"{step} {count:,}" for step, count in kept.dropped.items())
    console.print(f"filtered {job.name}: dropped by {counts}; what is left lies in {target}")
    return replace(job, inputs=kept.inputs)


def _listed(words: str, sections: Sequence[Wanted], console: Console, standard_input: Path | None = None) -> Listed:
    from weftrain.data_prep.readers.listing import find_inputs

    with Bar(console, words, 1) as bar:
        return find_inputs(sections, standard_input, lambda count: bar.note(f"{count:,} files"))


def _job_of_section(recipe: PrepRecipe, dataset: DatasetSection, root: str | None, console: Console) -> PrepJob:
    from weftrain.data_prep.readers.listing import Wanted
    from weftrain.data_prep.stages.settings import Inputs

    read, licence = _read_options(recipe.model_dump()), dataset.licence or recipe.licence
    tokenizer = None if recipe.tokenizer is None else Path(_below(root, recipe.tokenizer))
    sections = [
        Wanted(
            tuple(_below(root, address) for address in one.addresses),
            one.source,
            one.suffixes,
            one.format,
            _record_keys(read),
        )
        for one in dataset.inputs
    ]
    listed = _listed(f"list {dataset.name}", sections, console)
    arguments = {key: getattr(recipe, key) for key in (*_OF_PREPARE, "fim_tokens")}
    arguments |= {
        "name": dataset.name,
        "tokenizer": tokenizer,
        "epochs": dataset.epochs,
        "chunks": None if dataset.chunks is None else dataset.chunks.count,
        "global_batch_size": None if dataset.chunks is None else dataset.chunks.global_batch_size,
        "fim": dataset.fim,
    }
    arguments["conversations"], arguments["preferences"] = _of_records(_with_template(recipe, root), tokenizer)
    chosen = Inputs(listed.files, f"{recipe.name}: {dataset.name}", licence, read, skipped=listed.skipped)
    return PrepJob(chosen, arguments, listed.json_texts)


def _with_template(recipe: PrepRecipe, root: str | None) -> dict[str, Any]:
    """The recipe's values, with the chat template's file below the inputs, as the tokenizer's is."""
    from weftrain.data_prep.conversations.template import BUILT_IN, OF_TOKENIZER

    name = recipe.chat_template
    if name is None or name in (*BUILT_IN, OF_TOKENIZER):
        return recipe.model_dump()
    return recipe.model_dump() | {"chat_template": _below(root, name)}


def _below(root: str | None, address: str) -> str:
    if "://" in address or os.path.isabs(address):
        return address
    if root is None:
        raise click.UsageError(f"the recipe names {address!r}: say with --inputs which folder or address holds it")
    return f"{root.rstrip('/')}/{address}"


def _standard_input(inputs: tuple[str, ...], options: dict[str, Any], folder: Path) -> Path | None:
    """The file that holds standard input, if that is one of the inputs."""
    from weftrain.data_prep.inputs.standard_input import spool
    from weftrain.data_prep.readers.listing import STANDARD_INPUT

    count = sum(address in STANDARD_INPUT for address in inputs)
    if not count:
        return None
    if count > 1:
        raise click.UsageError("standard input is named twice: it can be read once")
    if options["executor"] == "task":
        raise click.UsageError(
            "--executor task: each member would read a standard input of its own; write it to a file first"
        )
    if sys.stdin is None or sys.stdin.isatty():
        raise click.UsageError(
            "standard input is closed or a terminal: pipe the text in, as in `zcat t.jsonl.gz | weftrain prep - --name "
            "x`"
        )
    return spool(sys.stdin.buffer, folder, options["name"])


def _of_parent(options: dict[str, Any]) -> dict[str, Any]:
    """The options, completed with the settings of the dataset that grows; those given on the command line must equal
    them.
    """
    from weftrain.core.formats.dataset import CHAT_TEMPLATE
    from weftrain.data_prep.growth import parents_options

    context = click.get_current_context()
    found = {
        key: value
        for key, value in parents_options(options["grow"]).items()
        if key in options and context.get_parameter_source(key) is not ParameterSource.COMMANDLINE
    }
    if "normalise" in found:
        found["normalise"] = tuple(filter(None, str(found["normalise"] or "").split(",")))
    if found.get("preferences") == "pairs" and "sequence_length" in found:
        found["sequence_length"] //= 2  # of a side
    if found.get("chat_template") is not None:  # recorded by its hash
        found["chat_template"] = str(options["grow"] / CHAT_TEMPLATE)
        found["turn_end"] = tuple(filter(None, str(found["turn_end"] or "").split(",")))
    for key in ("fim_spm_share", "fim_mode"):  # which have a value also where no FIM is asked for
        if found.get(key) is None:
            found.pop(key, None)
    return options | found


def _read_options(values: dict[str, Any]) -> ReadOptions:
    """ReadOptions from the command's options or a recipe's keys, which have the same names."""
    from weftrain.data_prep.readers.read_options import ReadOptions

    keys = ("text_key", "source_key", "weight_key", "tokens_key", "tokens_dtype", "sequence_length")
    preferences = None if values["preferences"] is None else True
    conversations = None if values["chat_template"] is None or preferences else True
    return ReadOptions(
        **{key: values[key] for key in keys},
        normalise=tuple(values["normalise"]),
        conversations=conversations,
        preferences=preferences,
    )


def _record_keys(read: ReadOptions) -> tuple[str, ...]:
    """The fields by which JSON records are known."""
    from weftrain.data_prep.conversations.messages import FIELDS
    from weftrain.data_prep.conversations.preferences import FIELDS as OF_PREFERENCES

    if read.preferences:
        return OF_PREFERENCES
    return FIELDS if read.conversations else (read.text_key,)


def _of_records(values: dict[str, Any], tokenizer: Path | None) -> tuple[Conversations | None, Preferences | None]:
    """How conversations or preferences become rows, from the command's options or a recipe's keys; None for what INPUTS
    do not hold. Raises DataError.
    """
    from weftrain.data_prep.conversations.template import load_template
    from weftrain.data_prep.stages.settings import Conversations, Preferences

    template = None
    if values["chat_template"] is not None:
        template = load_template(values["chat_template"], tokenizer, values["turn_end"])
    if values["preferences"] is None:
        if values["max_prompt"] is not None:
            raise DataError("--max-prompt: is of preferences: say with --preferences what their rows hold")
        if template is None:
            return None, None
        told = Conversations(template.text, template.name, template.turn_end, values["loss"], values["too_long"])
        return told, None
    if values["too_long"] == "split" or values["loss"] != "answers":
        raise DataError("--preferences: only the answers bear loss, and none is split: leave --loss and split out")
    side, most = values["sequence_length"], values["max_prompt"]
    if most is not None and most >= side:
        raise DataError(f"--max-prompt {most}: leaves no token of {side} to an answer: give a smaller one")
    if most is None and side < 2:
        raise DataError(f"--sequence-length {side}: holds no prompt and answer: give a larger one")
    named = (None, None, ()) if template is None else (template.text, template.name, template.turn_end)
    rows, keep = values["preferences"], values["keep_prompt"]
    return None, Preferences(rows, most or side // 2, keep, values["too_long"], *named)


def _fim(options: dict[str, Any]) -> FimSettings | None:
    from weftrain.core.formats.dataset_manifest import FimSettings

    rate, spm_share = options["fim_rate"], options["fim_spm_share"]
    if rate is None:
        if (option := given(("fim_spm_share", "fim_mode"))) is not None:
            raise click.UsageError(
                f"{option} needs --fim-rate, the share of documents that are turned into fill-in-the-middle"
            )
        return None
    if not 0 < rate <= 1 or not 0 <= spm_share <= 1:
        raise DataError(f"--fim-rate {rate:g} must lie in (0, 1], and --fim-spm-share {spm_share:g} in [0, 1]")
    return FimSettings(rate=rate, spm_share=spm_share, mode=options["fim_mode"])
