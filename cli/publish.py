"""`weftrain publish`: put a release where others find it, and compare what arrived."""

from __future__ import annotations

from pathlib import Path

import click
from rich.table import Table

from weftrain.cli.audit import endpoint
from weftrain.cli.display import Bar, Console, program
from weftrain.cli.remote import RunPath


@click.command("publish")
@click.argument("release", type=RunPath(here=True, exists=True, file_okay=False))
@click.option(
    "--to",
    "target",
    required=True,
    metavar="TO",
    help="hub:owner/name, an address such as s3://bucket/name, or a folder.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would be sent.")
@click.option("--private", is_flag=True, help="Of hub:owner/name: make a new repository private.")
@endpoint
def publish(release: Path, target: str, dry_run: bool, private: bool, endpoint: str) -> None:
    """Publish RELEASE, a verified release of weftrain, at TO.

    On the hub, each checkpoint is a branch, and main has the last one and the release's record. Elsewhere the release
    is copied as it is. The same command continues what was interrupted, and sends nothing twice.
    """
    from weftrain.cli.verify import verified_release
    from weftrain.core.formats.units import gb
    from weftrain.exchange.audit.hub import is_hub
    from weftrain.exchange.release.publish import StoreTarget, Target
    from weftrain.exchange.release.publish import publish as send
    from weftrain.exchange.release.publish_hub import HubTarget
    from weftrain.exchange.remote.store import Store, is_address

    if private and not is_hub(target):
        raise click.UsageError("--private has no effect where TO is no repository on the hub: leave it out")
    with Bar(Console(stderr=True), f"verify {release.name}", 1) as bar:
        verified = verified_release(release, progress=bar.sizes)
    place: Target
    if is_hub(target):
        place = HubTarget(target, endpoint, private=private)
    else:
        place = StoreTarget(Store(target if is_address(target) else f"file://{Path(target).absolute()}"))
    table = Table("part", "files", "would be sent" if dry_run else "sent", "size", box=None)
    sent = sent_bytes = 0
    with Bar(Console(stderr=True), "publish", 1) as bar:
        for number, part in enumerate(send(release, verified.release, place, dry_run=dry_run), 1):
            bar.update(number, part.name, total=number + 1)
            table.add_row(part.name, str(part.files), str(part.sent), gb(part.sent_bytes))
            sent, sent_bytes = sent + part.sent, sent_bytes + part.sent_bytes
    console = Console()
    console.print(table)
    words = "would be sent" if dry_run else "sent, and all files there are the release's"
    console.print(f"{target}: {sent:,} files, {gb(sent_bytes)}, {words}")
    if not dry_run and is_hub(target):
        console.print(f"look at it as others see it: {program()} audit {target}")
