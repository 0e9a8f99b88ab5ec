"""`weftrain sign`: sign a release, and make the key for it."""

from __future__ import annotations

from pathlib import Path

import click

from weftrain.cli.arguments import NamedPath
from weftrain.cli.remote import RunPath
from weftrain.cli.verify import verified_release


@click.command("sign")
@click.argument("release", type=RunPath(here=True, exists=True, file_okay=False), required=False)
@click.option(
    "--key", type=click.Path(path_type=Path, dir_okay=False), required=True, help="EC or Ed25519 private key in PEM."
)
@click.option("--new-key", is_flag=True, help="Generate the key first (ECDSA on P-256), and KEY.pub beside it.")
@click.option(
    "--statements",
    type=NamedPath(path_type=Path),
    metavar="FOLDER",
    help="Also write the provenance of each checkpoint there, in-toto statements in signed envelopes.",
)
def sign(release: Path | None, key: Path, new_key: bool, statements: Path | None) -> None:
    """Sign RELEASE after verifying every byte; without RELEASE, only generate a key.

    An EC key writes model.sig, which `model_signing verify key` reads too; an Ed25519 key writes signature.json.
    """
    from weftrain.exchange.release.signature import new_key as make_key
    from weftrain.exchange.release.signature import sign as sign_release
    from weftrain.exchange.release.statements import write_statements

    if new_key:
        click.echo(f"{key}: keep it secret; its public key, to publish: {make_key(key)}")
    if release is not None:
        verified = verified_release(release, signature=False)
        if statements is not None:
            count = write_statements(release, verified.release, statements, key)
            click.echo(f"{statements}: {count} statements of provenance, to publish beside the release")
        public = sign_release(release, verified.release, key)
        click.echo(f"{release}: root {verified.release.root} signed by {public}")
