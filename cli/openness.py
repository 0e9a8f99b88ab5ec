"""`weftrain openness`: what a release gives, as the table by which LLM360 compared releases."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click
from rich.table import Table
from rich.text import Text

from weftrain.cli.display import Console
from weftrain.cli.remote import RunPath

_COLOURS = {"present": "green", "partial": "yellow", "absent": "red"}


@click.command("openness")
@click.argument("release", type=RunPath(exists=True, file_okay=False))
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def openness(release: Path, as_json: bool) -> None:
    """Show what RELEASE, a weftrain release or a model from the Hugging Face hub, contains, and what each absence
    prevents.

    Exit code 1 if two revisions have the same weights, which is an error of the series.
    """
    from weftrain.exchange.release.openness import openness as judge
    from weftrain.exchange.release.openness import repeats

    kind, items = judge(release)
    if as_json:
        click.echo(
            json.dumps(
                {"folder": str(release), "kind": kind, "items": [dataclasses.asdict(item) for item in items]}, indent=2
            )
        )
        raise SystemExit(int(repeats(items)))
    table = Table("", "", "seen by", "an absence prevents", title=f"{release}: {kind}", title_justify="left", box=None)
    for item in items:
        prevents = "" if item.status == "present" else item.prevents
        table.add_row(item.name, Text(item.status, _COLOURS[item.status]), item.evidence, prevents)
    Console(soft_wrap=False).print(table)
    raise SystemExit(int(repeats(items)))
