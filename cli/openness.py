"""`weftrain openness`: what a release gives, as the table by which LLM360 compared releases."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import click
from rich.table import Table
from rich.text import Text

from weftrain.cli.audit import TOKEN, SeriesPath, endpoint
from weftrain.cli.display import Console

_COLOURS = {"present": "green", "partial": "yellow", "absent": "red"}


@click.command("openness")
@click.argument("release", type=SeriesPath(exists=True, file_okay=False))
@endpoint
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def openness(release: Path | str, endpoint: str, as_json: bool) -> None:
    """Show what RELEASE contains, and what each absence prevents: a weftrain release, a model's folder from the Hugging
    Face hub, or a repository there (hub:owner/name).

    Exit code 1 if two revisions have the same weights, which is an error of the series.
    """
    from weftrain.exchange.audit.hub import HubSeries
    from weftrain.exchange.release.openness import hub_openness, repeats
    from weftrain.exchange.release.openness import openness as judge

    if isinstance(release, str):
        kind, items = hub_openness(HubSeries(release, endpoint, os.environ.get(TOKEN) or None))
    else:
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
