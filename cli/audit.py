"""`weftrain audit`: whether the revisions of an open checkpoint series are what their names and configs say."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from weftrain.cli.arguments import complete_runs
from weftrain.cli.display import Bar, Console
from weftrain.cli.remote import RunPath

if TYPE_CHECKING:
    from weftrain.exchange.audit.audit import Audit, Depth

MAX_SHOWN = 60  # findings in the terminal
TOKEN = "HF_TOKEN"


class SeriesPath(RunPath):
    """The folder of a series or of a run, the address of one, or a repository on the hub as `hub:owner/name`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if str(value).startswith("hub:") else super().convert(value, param, ctx)


endpoint = click.option(
    "--endpoint",
    envvar="HF_ENDPOINT",
    default="https://huggingface.co",
    show_default=True,
    show_envvar=True,
    metavar="URL",
    help="Of hub:owner/name: the server.",
)


@click.command("audit")
@click.argument("series", type=SeriesPath(exists=True, file_okay=False), shell_complete=complete_runs)
@click.option("--listing", is_flag=True, help="Read lists of files alone: no header and no config.")
@click.option("--deep", is_flag=True, help="Also read a sample of the weights: norms, order, near duplicates.")
@click.option(
    "--probe",
    is_flag=True,
    help="With --deep: also load each revision, and compare its loss on a small fixed text with its neighbours'.",
)
@endpoint
@click.option(
    "--threads", type=click.IntRange(1, 64), default=8, show_default=True, help="Revisions that are read at once."
)
@click.option("--to", type=click.Path(path_type=Path, dir_okay=False), help="Also write a page, *.html.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def audit(
    series: Path | str,
    listing: bool,
    deep: bool,
    probe: bool,
    endpoint: str,
    threads: int,
    to: Path | None,
    as_json: bool,
) -> None:
    """Check the revisions of SERIES against their names, their configs and each other.

    SERIES is a repository on the hub (hub:owner/name), a folder with a sub-folder for each revision, a git clone, or a
    run or release of weftrain. Hashes and headers show duplicates, gaps and changes without downloading weights. Exit
    code 1 if something was found.
    """
    from weftrain.core.formats import fsops
    from weftrain.core.formats.plain_file import real_path
    from weftrain.exchange.audit.audit import audit as examine
    from weftrain.exchange.audit.audit import open_series

    if listing and deep:
        raise click.UsageError("--listing reads no weights, and --deep reads some: leave one of them out")
    if probe and not deep:
        raise click.UsageError("--probe has no effect without --deep")
    if to is not None and to.suffix.lower() not in (".html", ".htm"):
        raise click.BadParameter(f"'{to}' does not end in .html, and a page is what is written", param_hint="--to")
    opened = open_series(str(series), endpoint, os.environ.get(TOKEN) or None)
    probing = None
    if probe:
        from weftrain.analysis.evaluation.probe import prober

        probing = prober(opened)
    with Bar(Console(stderr=True), "audit", 1) as bar:
        depth: Depth = "listing" if listing else "deep" if deep else "headers"
        found = examine(
            opened,
            depth,
            threads=threads,
            progress=lambda done, total, what: bar.update(done, what, None, total),
            probe=probing,
        )
    if to is not None:
        from weftrain.analysis.report.audit_page import audit_html

        fsops.make_dirs(real_path(to).parent)
        fsops.write_bytes(to, audit_html(found).encode())
    if as_json:
        click.echo(json.dumps(as_fields(found), indent=1))
    else:
        _print(found)
    if to is not None:
        click.echo(f"{to}: open it in a browser; it needs no network", err=as_json)
    raise SystemExit(int(bool(found.findings)))


def as_fields(found: Audit) -> dict[str, Any]:
    """The fields that docs/json-output.md names."""
    return {
        "schema_version": 1,
        "series": found.series,
        "kind": found.kind,
        "depth": found.depth,
        "revisions": found.revisions,
        "others": found.others,
        "facts": [dataclasses.asdict(fact) for fact in found.facts],
        "findings": [dataclasses.asdict(finding) for finding in found.findings],
    }


def _print(found: Audit) -> None:
    console = Console(soft_wrap=False)
    facts = Table("", "", "seen", title=f"{found.series}: {found.kind}", title_justify="left", box=None)
    for fact in found.facts:
        facts.add_row(fact.name, fact.status, fact.evidence)
    console.print(facts)
    if found.findings:
        table = Table("finding", "seen by", "evidence", box=None)
        for finding in found.findings[:MAX_SHOWN]:
            table.add_row(finding.kind, finding.found_by, finding.evidence)
        console.print(table)
        if len(found.findings) > MAX_SHOWN:
            console.print(f"and {len(found.findings) - MAX_SHOWN:,} more: --json or --to has them all")
    count = len(found.findings)
    kinds = ", ".join(f"{number} {kind}" for kind, number in Counter(one.kind for one in found.findings).most_common())
    verdict = f"{count:,} finding{'' if count == 1 else 's'}: {kinds}" if count else "no mistake found"
    console.print(f"{len(found.revisions):,} revisions, {verdict}")
