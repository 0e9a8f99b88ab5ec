"""`weftrain report`: one HTML page about a run or a release.

The page is written from the record and verifies nothing. The page of a release lies beside its folder, because the
folder may hold only what release.json names.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import click

from weftrain.cli import arguments, remote

DEFAULT_PORT = 8360


@click.command("report")
@click.argument(
    "run",
    type=remote.RunPath(exists=True, file_okay=False),
    shell_complete=arguments.complete_runs,
)
@click.option(
    "--to",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The page, *.html.  [default: RUN/report.html; beside a release: RUN.report.html; of an address: here]",
)
@click.option(
    "--serve",
    "port",
    is_flag=False,
    flag_value=DEFAULT_PORT,
    type=click.IntRange(0, 65535),
    metavar="[PORT]",
    help=f"Serve the page to this machine, and write none; 0: on a free port.  [port: {DEFAULT_PORT}]",
)
@click.option(
    "--refresh",
    "refresh_s",
    type=click.IntRange(0, 86_400),
    default=30,
    show_default=True,
    metavar="SECONDS",
    help="With --serve: how often a browser asks for the page again; 0: never.",
)
def report(run: Path, to: Path | None, port: int | None, refresh_s: int) -> None:
    """Write one self-contained HTML page about RUN, a run or a release: curves, checkpoints, evaluations, ledger.

    With --serve, a browser on this machine shows the run as it goes on, until Ctrl-C.
    """
    if port is not None:
        if to is not None:
            raise click.UsageError("--serve writes no page: leave --to out")
        return _serve(run, port, refresh_s)
    from weftrain.analysis.report.collect import collect
    from weftrain.analysis.report.page import write_page
    from weftrain.cli.show import arithmetic
    from weftrain.core.formats import fsops
    from weftrain.core.formats.plain_file import real_path
    from weftrain.core.run.ledger import no_collection
    from weftrain.exchange.release.release import RELEASE

    released = (run / RELEASE).exists()
    beside = Path() if remote.is_opened(run) else real_path(run).parent if released else None
    page = to or (run / "report.html" if beside is None else beside / f"{real_path(run).name}.report.html")
    if page.suffix.lower() not in (".html", ".htm"):
        raise click.BadParameter(
            f"'{page}' does not end in .html, and a page is all that is written", param_hint="--to"
        )
    if released and real_path(page).is_relative_to(real_path(run)):
        raise click.BadParameter(
            f"'{page}' lies in the release, which holds only what release.json names: name a file outside",
            param_hint="--to",
        )
    with no_collection():
        found = collect(run, arithmetic)
        fsops.make_dirs(real_path(page).parent)
        write_page(found, page)
    for words in found.warnings:
        click.echo(f"warning: {words}", err=True)
    click.echo(f"{page}: open it in a browser; it needs no network")


def _serve(run: Path, port: int, refresh_s: int) -> None:
    """Serve the page until Ctrl-C. Raises RunFolderError where there is no run, or the port cannot be had."""
    from weftrain.analysis.report.collect import collect
    from weftrain.analysis.report.page import page_html
    from weftrain.analysis.watch.served_report import Page, Server
    from weftrain.cli.show import arithmetic
    from weftrain.core.formats.plain_file import real_path

    page = Page(run, lambda: page_html(collect(run, arithmetic), real_path(run)))
    with Server(page, port, refresh_s) as server:
        again = f", again every {refresh_s} s" if refresh_s else ""
        click.echo(f"{server.url}  shows {run}{again}; Ctrl-C ends it")
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever(poll_interval=0.2)
