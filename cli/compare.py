"""`weftrain compare`: runs, releases and Hugging Face series side by side, by tokens seen.

The table holds what was recorded, and `-` for the rest; only --loss-on and --sample compute anything.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from weftrain.cli.arguments import NamedPath
from weftrain.cli.display import Console, drawing
from weftrain.cli.remote import RunPath

if TYPE_CHECKING:
    from weftrain.analysis.compare.series import Series
    from weftrain.analysis.compare.table import Comparison


@click.command()
@click.argument("series", nargs=-1, required=True, type=RunPath(), metavar="A [B]...")
@click.option(
    "--to",
    type=click.Path(path_type=Path),
    help="Folder for compare.json, compare.md, compare.png and measurements.",
)
@click.option(
    "--window",
    type=click.IntRange(min=1),
    help="Steps over which a training loss is averaged.  [default: a tenth of the shortest series' steps, at most 100]",
)
@click.option(
    "--tokens-per-step",
    multiple=True,
    metavar="[NAME=]N",
    help="Tokens a step of a Hugging Face series (Pythia: 2097152); once, or for each.",
)
@click.option(
    "--loss-on",
    multiple=True,
    type=NamedPath(path_type=Path),
    help="Measure the loss on a dataset's held-out set, or ids.jsonl.",
)
@click.option("--rows", type=click.IntRange(min=1), help="Rows of each --loss-on.  [default: all]")
@click.option(
    "--sample",
    "samples",
    multiple=True,
    type=NamedPath(path_type=Path),
    help="Measure memorization of released rows, JSON Lines.",
)
@click.option("--max-rows", type=click.IntRange(min=1), default=1000, show_default=True, help="Rows of each --sample.")
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="Sequences in a batch, for --loss-on.",
)
@click.option(
    "--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N: where --loss-on and --sample are computed."
)
@click.option("--all-positions", is_flag=True, help="Show every number of tokens, not only those that all series have.")
@click.option(
    "--plot/--no-plot", default=True, show_default=True, help="Draw compare.png under --to; needs weftrain[plot]."
)
@click.option("--json", "as_json_", is_flag=True, help="Print compare.json instead of the table.")
def compare(
    series: tuple[Path, ...],
    to: Path | None,
    window: int | None,
    tokens_per_step: tuple[str, ...],
    loss_on: tuple[Path, ...],
    rows: int | None,
    samples: tuple[Path, ...],
    max_rows: int,
    batch_size: int,
    device: str,
    all_positions: bool,
    plot: bool,
    as_json_: bool,
) -> None:
    """Compare A, B, ... by tokens seen: losses, scores, memorization.

    Each is a run, a release, or a folder with one sub-folder for each revision (step1000, step2000, ...; ckpt_001, ...)
    of a Hugging Face model in safetensors. --loss-on and --sample measure every series and keep the results in --to.
    """
    if (loss_on or samples) and to is None:
        raise click.UsageError("--loss-on and --sample need --to FOLDER, where what is measured is kept")
    from weftrain.analysis.compare import table as comparing
    from weftrain.analysis.compare.plot import plot as draw
    from weftrain.core.formats import fsops
    from weftrain.core.formats.canonical import canonical_json

    console = Console(stderr=as_json_)
    names = comparing.names_of(series)
    rates = _rates(tokens_per_step, names)
    opened = [comparing.read_series(path, name, rates.get(name)) for path, name in zip(series, names, strict=True)]
    notes: list[str] = []
    if to is not None and (loss_on or samples):
        opened, notes = _measured(opened, to, loss_on, rows, samples, max_rows, batch_size, device, console)
    found = comparing.compare(opened, window_steps=window, every_position=all_positions, notes=notes)
    data = canonical_json(comparing.as_json(found))
    if as_json_:
        click.echo(data.decode())
    else:
        _show(found, console)
    if to is None:
        return
    fsops.make_dirs(to)
    fsops.write_bytes(to / "compare.json", data + b"\n")
    drawn = None
    if plot:
        with drawing():
            drawn = draw(found, to / "compare.png")
    fsops.write_bytes(to / "compare.md", comparing.as_markdown(found, "compare.png" if drawn else None).encode())
    written = ("compare.json", "compare.md", *(("compare.png",) if drawn else ()))
    console.print("\n".join(f"written   {to / name}" for name in written))
    if drawn is False:
        console.print("compare.png was not drawn: none of the series has a loss, a score or a memorization")


def _rates(given: tuple[str, ...], names: list[str]) -> dict[str, int]:
    """Series -> tokens a step. A number without a name applies to all series that are not named."""
    rates: dict[str, int] = {}
    for one in sorted(given, key=lambda text: "=" in text):  # those with a name last
        name, equals, digits = one.rpartition("=")
        if not digits.replace("_", "").isdecimal() or int(digits) < 1:
            raise click.BadParameter(
                f"'{one[:80]}' is not a number of tokens, or NAME=N", param_hint="--tokens-per-step"
            )
        if equals and name not in names:
            raise click.BadParameter(
                f"there is no series '{name[:80]}'; there are {', '.join(names)}", param_hint="--tokens-per-step"
            )
        rates.update(dict.fromkeys([name] if equals else names, int(digits)))
    return rates


def _measured(
    opened: list[Series],
    to: Path,
    loss_on: tuple[Path, ...],
    rows: int | None,
    samples: tuple[Path, ...],
    max_rows: int,
    batch_size: int,
    device: str,
    console: Console,
) -> tuple[list[Series], list[str]]:
    """The series with their measurements, and notes."""
    from weftrain.analysis.compare.measure import MeasureRequest, measure_series, open_held, open_sample
    from weftrain.analysis.evaluation.records import EvaluationSettings
    from weftrain.cli.display import Bar

    wanted = MeasureRequest(
        tuple(open_held(path, rows) for path in loss_on), tuple(open_sample(path, max_rows) for path in samples)
    )
    settings = EvaluationSettings(batch_size=batch_size, device=device)
    measured, notes, done = [], [], 0
    with Bar(console, "compare", sum(len(one.places) for one in opened)) as bar:

        def progress(note: str) -> None:
            nonlocal done
            done += 1
            bar.update(done, note)

        for one in opened:
            found, said = measure_series(one, wanted, to / "measured", settings, bar.say, progress)
            measured.append(found)
            notes += said
    return measured, notes


def _show(found: Comparison, console: Console) -> None:
    from weftrain.analysis.compare.text import as_text

    console.print(as_text(found, console.width))
    for note in found.notes:
        console.print(f"note: {note}")
