"""The options of `weftrain prep`, under the headings that its help prints."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import get_args

import click
from click.core import ParameterSource

from weftrain.cli.arguments import FETCH, NamedPath
from weftrain.data_prep.choices import (
    NOT_STATED,
    STAGE_NAMES,
    Engine,
    KeepPrompt,
    Loss,
    Order,
    Packing,
    PreferenceRows,
    TokensDtype,
    TooLong,
)

_PATH = NamedPath(path_type=Path)
_COUNT = click.IntRange(min=1)

_DATASET = [
    click.Option(
        ["--name"], help="Name of the dataset's folder.  [default: python_stdlib without INPUTS, else required]"
    ),
    click.Option(
        ["--output"],
        default="datasets",
        show_default=True,
        help="Folder of datasets, or an fsspec address to copy them to.",
    ),
    click.Option(
        ["--grow"],
        type=NamedPath(path_type=Path, remedy=FETCH),
        help="A dataset that INPUTS are added to; the result is a folder of its own, --name.",
    ),
]
_READING = [
    click.Option(
        ["--text-key"],
        default="text",
        show_default=True,
        help="The field of a JSON object or the column that holds the text.",
    ),
    click.Option(
        ["--source-key"], help="The field that names a document's source.  [default: the folder's or file's name]"
    ),
    click.Option(
        ["--weight-key"],
        help="The field or column of the weight of a text's loss: 0, or 0.000001 to 1,000,000.  [default: all weigh 1]",
    ),
    click.Option(
        ["--tokens-key"],
        help="The field of token files that holds the ids.  [default: tokens, input_ids, or the only one]",
    ),
    click.Option(
        ["--tokens-dtype"],
        type=click.Choice(get_args(TokensDtype)),
        help="Type of ids in files that do not state it (.npy, MDS bytes).  [default: by the vocabulary; MDS: int64]",
    ),
    click.Option(
        ["--format", "format_"],
        help="Format of all INPUTS; an unknown name lists all.  [default: by name and content]",
    ),
    click.Option(
        ["--suffix", "suffixes"],
        multiple=True,
        help="Within folders, read only names with this ending, e.g. .jsonl.gz (repeatable).  [default: all]",
    ),
    click.Option(["--licence"], default=NOT_STATED, show_default=True, help="Licence of INPUTS, for the manifest."),
]
_DOCUMENTS = [
    click.Option(
        ["--normalise"],
        multiple=True,
        help="NFC, NFKC, newlines, strip_bom, in this order (repeatable).  [default: nothing]",
    ),
    click.Option(
        ["--max-failures"],
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        help="Unreadable documents that are allowed.",
    ),
    click.Option(
        ["--heldout-fraction"],
        type=float,
        default=0.02,
        show_default=True,
        help="Share of documents that are held out.",
    ),
]
_TOKENS = [
    click.Option(
        ["--tokenizer"],
        type=_PATH,
        help="A tokenizer.json or SentencePiece .model.  [default: a BPE trained on the text]",
    ),
    click.Option(
        ["--vocab-size"],
        type=click.IntRange(min=300),
        help="Ids of the trained tokenizer, beside 32 special ones.  [default: 8192]",
    ),
    click.Option(["--eos"], help="The token after each document, or none.  [default: </s> or <|endoftext|>]"),
    click.Option(["--bos"], help="The token before each document, such as <s>.  [default: none]"),
    click.Option(
        ["--engine"],
        type=click.Choice(get_args(Engine)),
        default="auto",
        show_default=True,
        help="Library that encodes; auto: gigatoken where its ids are known to be those of tokenizers.",
    ),
]
_CONVERSATIONS = [
    click.Option(
        ["--chat-template"],
        metavar="NAME|FILE",
        help="INPUTS hold conversations, rendered by this template: amberchat, chatml, crystalchat, a file, or "
        "`tokenizer` for the one beside --tokenizer; rows are then packed by best_fit unless told otherwise.",
    ),
    click.Option(
        ["--loss"],
        type=click.Choice(get_args(Loss)),
        default="answers",
        show_default=True,
        help="What bears loss: the assistant's answers, the last of them, or every token.",
    ),
    click.Option(
        ["--turn-end"],
        multiple=True,
        metavar="TOKEN",
        help="A control token that ends an answer and bears loss with it (repeatable).  [default: the one behind it]",
    ),
    click.Option(
        ["--too-long"],
        type=click.Choice(get_args(TooLong)),
        default="cut",
        show_default=True,
        help="Of a conversation longer than a row: its end is cut off, its turns are divided over rows, or it fails.",
    ),
]
_PREFERENCES = [
    click.Option(
        ["--preferences"],
        type=click.Choice(get_args(PreferenceRows)),
        help="INPUTS hold preferences. pairs: a row has both answers, a side each of --sequence-length tokens, for "
        "objective dpo; chosen: a row has the preferred answer alone. Without --chat-template texts are joined.",
    ),
    click.Option(
        ["--max-prompt"],
        type=_COUNT,
        help="Tokens that are left of a prompt which does not fit with its answers.  [default: half of a side]",
    ),
    click.Option(
        ["--keep-prompt"],
        type=click.Choice(get_args(KeepPrompt)),
        default="end",
        show_default=True,
        help="Which end of such a prompt is left.",
    ),
]
_ROWS = [
    click.Option(["--sequence-length"], type=_COUNT, default=256, show_default=True, help="Sequence length in tokens."),
    click.Option(
        ["--packing"],
        type=click.Choice(get_args(Packing)),
        default="concatenate",
        show_default=True,
        help="How documents fill rows: one stream cut into rows; whole documents and padding; a document a row.",
    ),
    click.Option(
        ["--order"],
        type=click.Choice(get_args(Order)),
        default="shuffled",
        show_default=True,
        help="Document order; as_read also keeps duplicates.",
    ),
    click.Option(
        ["--seed"],
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        help="Seed of the order and of fill-in-the-middle.",
    ),
    click.Option(
        ["--epochs"],
        type=_COUNT,
        default=1,
        show_default=True,
        help="Passes over the documents, with FIM drawn anew in each.",
    ),
    click.Option(["--chunks"], type=_COUNT, help="Number of equal chunks of the training rows."),
    click.Option(
        ["--global-batch-size"],
        type=_COUNT,
        help="Global batch size of the run, so that each chunk is a whole number of steps.",
    ),
    click.Option(
        ["--rows-per-shard"], type=_COUNT, help="Rows of a shard file.  [default: as many as hold 2^25 tokens]"
    ),
]
_FIM = [
    click.Option(
        ["--fim-rate"], type=float, help="Share of documents that fill-in-the-middle transforms.  [default: none]"
    ),
    click.Option(
        ["--fim-spm-share"],
        type=float,
        default=0.5,
        show_default=True,
        help="Share of those that have the suffix first.",
    ),
    click.Option(
        ["--fim-mode"],
        type=click.Choice(["exact", "context", "released"]),
        default="exact",
        show_default=True,
        help="exact: whole documents; context: their pieces within each row; released: as CrystalCoder's scripts did.",
    ),
    click.Option(
        ["--fim-tokens"],
        metavar="PREFIX,MIDDLE,SUFFIX[,PAD]",
        help="The tokenizer's control tokens for FIM.  [default: <|fim_prefix|> or <fim_prefix> and so on]",
    ),
]
_RECIPE = [
    click.Option(["--inputs", "root"], help="The folder or address that holds the recipe's inputs and tokenizer."),
    click.Option(["--only"], multiple=True, help="Make only the dataset of this name (repeatable)."),
    click.Option(
        ["--set", "overrides"], multiple=True, metavar="KEY.SUB=VALUE", help="Override a recipe value (repeatable)."
    ),
]
_PROCESSES = [
    click.Option(["--workers"], type=_COUNT, help="Processes.  [default: one a core; one for inputs below 0.001 GB]"),
    click.Option(
        ["--executor"],
        type=click.Choice(["local", "task", "ray"]),
        default="local",
        show_default=True,
        help="Processes of this machine, one member of a job array, or a Ray cluster.",
    ),
    click.Option(["--index"], type=click.IntRange(min=0), help="For task: this member of the array, from 0."),
    click.Option(["--of"], type=_COUNT, help="For task: members of the array."),
    click.Option(["--stage"], type=click.Choice([*STAGE_NAMES, "finish"]), help="For task: do only this stage."),
    click.Option(["--ray-address"], help="For ray: the cluster's address.  [default: start one here]"),
]
GROUPS = {
    "Dataset": _DATASET,
    "What INPUTS are": _READING,
    "Documents": _DOCUMENTS,
    "Tokens": _TOKENS,
    "Conversations": _CONVERSATIONS,
    "Preferences": _PREFERENCES,
    "Rows": _ROWS,
    "Fill-in-the-middle": _FIM,
    "With a recipe": _RECIPE,
    "Processes and clusters": _PROCESSES,
}
OF_INPUTS = frozenset(str(option.name) for option in _READING)
OF_RECIPE = frozenset(str(option.name) for option in _RECIPE)
BESIDE_RECIPE = OF_RECIPE.union(["output"], (str(option.name) for option in _PROCESSES))


class GroupedCommand(click.Command):
    """A command whose help has the options under the headings of GROUPS."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for heading, options in GROUPS.items():
            with formatter.section(heading):
                formatter.write_dl(
                    [record for option in options if (record := option.get_help_record(ctx)) is not None]
                )
        with formatter.section("Help"):
            formatter.write_dl([(", ".join(ctx.help_option_names), "Show this message and exit.")])


def given(names: Collection[str], *, but: bool = False) -> str | None:
    """The first option given on the command line that is one of `names`, as spelled there; with `but`, the first that
    is not one of them.
    """
    context = click.get_current_context()
    for option in context.command.params:
        if isinstance(option, click.Option) and (option.name in names) != but and _is_given(context, option):
            return option.opts[0]
    return None


def _is_given(context: click.Context, option: click.Option) -> bool:
    return context.get_parameter_source(str(option.name)) is ParameterSource.COMMANDLINE
