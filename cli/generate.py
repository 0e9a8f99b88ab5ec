"""`weftrain generate`: continue a prompt with a run's newest checkpoint, with one that is named, or with a Hugging Face
model.

The prompt begins as the documents of the run's dataset do: with the start token if the dataset was prepared with
`--bos`. A Hugging Face model's begins as its own tokenizer.json has it. With `--tokenizer`, which says nothing about a
dataset, nothing is added.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import click

from weftrain.cli import arguments, remote


@click.command()
@remote.run
@arguments.overrides
@click.option("--prompt", help="Text to continue.")
@click.option("--ids", help="Token ids to continue, such as 1,2,3; prints ids, and needs no tokenizer.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="New tokens at most.")
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Sampling temperature; 0: always the most likely token.",
)
@click.option("--top-k", type=click.IntRange(min=1), help="Sample among this many of the most likely tokens.")
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, max=1, min_open=True),
    help="Sample among the most likely tokens with this total probability.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Sampling seed.")
@click.option(
    "--stop-id", "stop_ids", type=click.IntRange(min=0), multiple=True, help="Stop before this id (repeatable)."
)
@click.option(
    "--tokenizer",
    type=arguments.NamedPath(path_type=Path),
    help="A tokenizer.json.  [default: of the recipe's first dataset, or the Hugging Face folder's]",
)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
def generate(
    run: Path,
    overrides: tuple[str, ...],
    prompt: str | None,
    ids: str | None,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    stop_ids: tuple[int, ...],
    tokenizer: Path | None,
    device: str,
) -> None:
    """Continue a prompt. RUN is a run (its newest whole checkpoint), a checkpoint's folder, or a Hugging Face model's.

    KEY.SUB=VALUE overrides a value of the recorded recipe, e.g. data.root=/other/place.
    """
    if (prompt is None) == (ids is None):
        raise click.UsageError("give one of --prompt and --ids")
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise click.UsageError("--top-k and --top-p need a --temperature above 0")
    given = None if ids is None else parse_ids(ids)

    from weftrain.analysis.evaluation.generation import Generator
    from weftrain.analysis.evaluation.tokenizer import open_tokenizer
    from weftrain.cli.opened_model import opened_model
    from weftrain.core.formats.tokenizer_file import panics_refused

    opened = opened_model(run, overrides, device)
    encoder = None
    if given is None:
        # begins: whether every text that was trained on began with the start token
        file, dataset, begins = (tokenizer, None, False) if tokenizer is not None else opened.tokenizer()
        encoder, _ = open_tokenizer(file, opened.config.vocab_size, dataset)
        with panics_refused(str(file)):
            given = encoder.encode(prompt, add_special_tokens=begins).ids
    generator = Generator(opened.load())
    decode = None if encoder is None else partial(encoder.decode, skip_special_tokens=False)
    output = _Stream(given or [], decode)
    generator.generate(
        [given or []],
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop_ids=stop_ids,
        told=lambda row, token: output.add(token),
    )
    output.end()


class _Stream:
    """Prints a continuation as its tokens come: as text after its prompt, or, without `decode`, as ids.

    Prompt and new tokens are decoded together, and only what can no longer change is printed: a character may take
    several tokens, and may begin within the prompt.
    """

    def __init__(self, prompt: Sequence[int], decode: Callable[[Sequence[int]], str] | None) -> None:
        self._ids, self._decode, self._printed = list(prompt), decode, ""
        self._first = True
        if decode is not None:
            self._print(decode(self._ids))

    def add(self, token: int) -> None:
        self._ids.append(token)
        if self._decode is None:
            click.echo(f"{'' if self._first else ','}{token}", nl=False)
            self._first = False
        else:
            self._print(self._decode(self._ids))

    def end(self) -> None:
        if self._decode is not None:
            text = self._decode(self._ids)
            if not text.startswith(self._printed):  # a later token changed what earlier ones mean: the whole text again
                click.echo()
                self._printed = ""
            self._print(text, whole=True)
        click.echo()

    def _print(self, text: str, whole: bool = False) -> None:
        whole = whole or not text.endswith("\N{REPLACEMENT CHARACTER}")
        if whole and text.startswith(self._printed):
            click.echo(_visible(text[len(self._printed) :]), nl=False)
            self._printed = text


def parse_ids(text: str) -> list[int]:
    """'1, 2,3' -> [1, 2, 3]. Raises BadParameter."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"'{text[:80]}' is not a list of ids such as 1,2,3", param_hint="--ids") from None


def _visible(text: str) -> str:
    """Text with control characters as escapes, except line ends and tabs."""
    return "".join(
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode() for char in text
    )
