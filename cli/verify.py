"""`weftrain verify`: read every byte of a release, and check every hash and every claim in it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Column, Table
from rich.text import Text

from weftrain.cli.arguments import NamedPath
from weftrain.cli.display import Bar, Console, program
from weftrain.cli.inputs_again import inputs_options, parsed_reading, parsed_sample, prepared_again, words_of
from weftrain.cli.remote import RunPath, is_opened

if TYPE_CHECKING:
    from weftrain.core.config import Recipe
    from weftrain.core.run.lineage import Lineage
    from weftrain.data_prep.again import Sample
    from weftrain.exchange.release.bundle import Trust
    from weftrain.exchange.release.claims import Claim
    from weftrain.exchange.release.keyless import IdentityTrust
    from weftrain.exchange.release.release import Release
    from weftrain.exchange.release.verify import Verified


def verified_release(folder: Path, **more: Any) -> Verified:
    from weftrain.analysis.report.model_card import model_card, revision_card
    from weftrain.core.config import Recipe
    from weftrain.exchange.release.release import CARD, revisions
    from weftrain.exchange.release.verify import verify

    def cards(release: Release, line: Lineage, recipes: Mapping[str, Recipe]) -> dict[str, str]:
        steps = {link.end: link.stop_step for link in release.links} | {
            link.start: link.first_step for link in release.links if link.start
        }
        last = Recipe.from_record(line.segments[-1].recipe)
        return {CARD: model_card(folder, release, line, last)} | {
            f"revisions/{name}/{CARD}": revision_card(release, name, steps[root], recipes[root])
            for name, root in revisions(release)
        }

    return verify(folder, cards=cards, **more)


def claims_table(claims: Iterable[Claim]) -> Table:
    """Every claim of a release, and how it is covered."""
    table = Table(Column("claim", no_wrap=True), Column("covered by", no_wrap=True), "", box=None)
    for claim in claims:
        table.add_row(claim.name, Text(claim.cover, "yellow" if claim.cover == "not covered" else ""), claim.detail)
    return table


@click.command("verify")
@click.argument("path", type=RunPath(exists=True, file_okay=False))
@click.option(
    "--key", metavar="KEY", help="The public key that must have signed: a file in PEM, or hexadecimal digits."
)
@click.option(
    "--root",
    "roots",
    type=NamedPath(path_type=Path, exists=True, dir_okay=False),
    multiple=True,
    help="Certificates in PEM that must have led to the signature (repeatable).",
)
@click.option(
    "--trusted-root",
    type=NamedPath(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="The trust root of a Sigstore, its trusted_root.json, that must have certified the identity that signed.",
)
@click.option("--identity", metavar="NAME", help="With --trusted-root: who must have signed, e.g. an address of mail.")
@click.option("--issuer", metavar="URL", help="With --identity: the provider that must have vouched for it.")
@click.option(
    "--statements",
    type=NamedPath(path_type=Path, exists=True, file_okay=False),
    metavar="FOLDER",
    help="Statements of provenance that must follow from the release, and be signed by --key where it is given.",
)
@inputs_options
@click.option("--from-start", is_flag=True, help="Read also what an interrupted verify of this release has read.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option(
    "--lineage",
    "walks",
    is_flag=True,
    help="Also walk from the release to those that it began from, as far as --parent gives them.",
)
@click.option(
    "--parent",
    "parents",
    type=RunPath(exists=True, file_okay=False),
    multiple=True,
    metavar="RELEASE",
    help="A release on that chain, a folder or an address (repeatable, in any order).",
)
def verify(
    path: Path,
    key: str | None,
    roots: tuple[Path, ...],
    trusted_root: Path | None,
    identity: str | None,
    issuer: str | None,
    statements: Path | None,
    inputs: tuple[str, ...],
    reading: tuple[str, ...],
    share: float | None,
    seed: int,
    from_start: bool,
    as_json: bool,
    walks: bool,
    parents: tuple[Path, ...],
) -> None:
    """Read every byte of PATH, a release or one checkpoint's folder, and check every hash and every claim in it.

    Interrupted with Ctrl-C, the next verify of the same release goes on with the files that were not read yet.
    """
    from weftrain.core.errors import ReleaseError
    from weftrain.exchange.release.bundle import Trust
    from weftrain.exchange.release.claims import covered_by
    from weftrain.exchange.release.release import RELEASE
    from weftrain.exchange.release.signature import expected_key
    from weftrain.exchange.release.statements import check_statements

    if parents and not walks:
        raise click.UsageError("--parent has no effect without --lineage")
    given, sample = parsed_reading(reading, inputs), parsed_sample(share, seed, inputs)
    if not (path / RELEASE).exists() and (path / "manifest.json").exists():
        _verify_checkpoint(path, as_json)
        return
    hexadecimal, file = (None, None) if key is None else expected_key(key)
    trust = Trust(file, roots, _identity_trust(trusted_root, identity, issuer))
    verified, taken = _verify_release(path, trust, from_start)
    known = verified.bundle is not None and verified.bundle.known
    if (hexadecimal is not None and verified.signer != hexadecimal) or (trust != Trust() and not known):
        trusted = hexadecimal or str(trust)
        raise ReleaseError(f"{path}: {_signed(verified)}, not by {trusted}: fetch it from whoever that is")
    release = verified.release
    if walks:
        verified = dataclasses.replace(verified, claims=_walk(path, verified, parents, as_json))
    if inputs:
        covers = covered_by(verified.claims, _prepared_again(path, release, inputs, given, sample))
        verified = dataclasses.replace(verified, claims=covers)
    if statements is not None:
        told = check_statements(path, release, statements, file)
        verified = dataclasses.replace(verified, claims=(*verified.claims, told))
    if as_json:
        click.echo(json.dumps(_fields(verified, taken), indent=1))
        return
    click.echo(
        f"{path}: {len(release.files):,} files, {verified.num_bytes:,} bytes, {len(release.links)} links: complete and "
        "consistent"
    )
    if taken:
        click.echo(f"{taken} files were read by a verify that was interrupted: --from-start reads them again")
    Console().print(claims_table(verified.claims))
    click.echo(f"root {release.root}, {_signed(verified)}")
    click.echo(f"to check that the states were trained as recorded: {program()} replay {path}")


def _identity_trust(root: Path | None, identity: str | None, issuer: str | None) -> IdentityTrust | None:
    from weftrain.exchange.release.keyless import Identity, IdentityTrust

    if (identity is None) != (issuer is None):
        raise click.UsageError(
            "--identity, --issuer: an identity counts with the provider that vouches for it: give both"
        )
    if root is None:
        if identity is not None:
            raise click.UsageError(
                "--identity: is checked with the trust root of its Sigstore: give its file with --trusted-root"
            )
        return None
    return IdentityTrust(root, None if identity is None or issuer is None else Identity(identity, issuer))


def _prepared_again(
    path: Path, release: Release, inputs: tuple[str, ...], reading: Mapping[str, str], sample: Sample | None
) -> Iterator[Claim]:
    """Prepare the datasets again whose inputs are given. Raises ReleaseError, DataError."""
    from weftrain.core.errors import ReleaseError
    from weftrain.exchange.release.claims import TEXTS, Claim

    manifests = [name for name in release.files if name.startswith("data/") and name.endswith("/manifest.json")]
    names = sorted(name[len("data/") : -len("/manifest.json")] for name in manifests)
    wanted: dict[str, list[str]] = {}
    for one in inputs:
        name, equals, address = one.partition("=")
        if not (equals and name in names):
            if len(names) != 1:
                raise ReleaseError(f"--inputs {one}: say of which dataset, as NAME=PATH: {', '.join(names) or 'none'}")
            name, address = names[0], one
        wanted.setdefault(name, []).append(address)
    shards_here = release.data == "shards"
    found = {
        name: prepared_again(path / "data" / name, addresses, reading, sample, shards_here)
        for name, addresses in wanted.items()
    }
    words = words_of(found, sample)
    if lacking := sorted(set(names) - wanted.keys()):
        yield Claim(TEXTS, "not covered", f"{words}; inputs not given: {', '.join(lacking)}")
    else:
        yield Claim(TEXTS, "derivation", words)


def _walk(path: Path, verified: Verified, parents: tuple[Path, ...], quiet: bool) -> tuple[Claim, ...]:
    """Print the chain from a release to its ancestors; its claims with what the parents cover.

    quiet: on standard error, because standard output has JSON.
    """
    from weftrain.exchange.release.ancestry import covered_by_lineage, walk
    from weftrain.exchange.release.claims import covered_by

    def whole(folder: Path) -> tuple[Release, Lineage]:
        with Bar(Console(stderr=True), f"verify {folder.name}", 1) as bar:
            found = verified_release(folder, progress=bar.sizes)
        return found.release, found.lineage

    chain = walk(path, verified.release, verified.lineage, parents, whole)
    for one in chain:
        named = one.parent
        at = f"revision {named.revision} (step {named.step:,}) of {named.name}, root {named.release[:12]}"
        where = "absent: give it with --parent" if one.where is None else f"verified in {one.where}"
        same = f", {one.compared:,} tensors equal" if one.compared else ""
        click.echo(f"began from {at}: {where}{same}", err=quiet)
    if not chain:
        click.echo("began from no release", err=quiet)
    return covered_by(verified.claims, covered_by_lineage(chain))


def _signed(verified: Verified) -> str:
    """Who signed, in words that follow `is` or a root."""
    signers = [] if verified.signer is None else [verified.signer]
    if verified.bundle is not None:
        signers.append(f"{'' if verified.bundle.known else 'an unknown '}{verified.bundle.name}")
    return f"signed by {' and by '.join(signers)}" if signers else "not signed"


def _verify_checkpoint(path: Path, as_json: bool) -> None:
    from weftrain.core import checkpoint

    with Bar(Console(stderr=True), f"verify {path.name}", 1) as bar:
        manifest = checkpoint.verify(path, bar.sizes)
    if as_json:
        fields = {"step": manifest["step"], "tensors": len(manifest["tensors"]), "root": manifest["root"]}
        click.echo(json.dumps({"schema_version": 1, "kind": "checkpoint", **fields}, indent=1))
        return
    click.echo(
        f"{path}: step {manifest['step']}, {len(manifest['tensors'])} tensors, root {manifest['root']}: complete"
    )


def _verify_release(path: Path, trust: Trust, from_start: bool) -> tuple[Verified, int]:
    """The verified release, and how many files an interrupted verify had read before."""
    from weftrain.exchange.release.notes import noted
    from weftrain.exchange.release.release import read_release

    with contextlib.ExitStack() as stack:
        notes = None
        if not is_opened(path):  # what an address holds can change without a sign of it
            notes = stack.enter_context(noted(path, read_release(path).root, from_start=from_start))
        bar = stack.enter_context(Bar(Console(stderr=True), f"verify {path.name}", 1))
        verified = verified_release(path, progress=bar.sizes, notes=notes, trust=trust)
        return verified, 0 if notes is None else notes.taken


def _fields(verified: Verified, taken: int) -> dict[str, Any]:
    """The fields that docs/json-output.md names."""
    release = verified.release
    return {
        "schema_version": 1,
        "kind": "release",
        "name": release.name,
        "root": release.root,
        "weftrain": release.weftrain,
        "files": len(release.files),
        "bytes": verified.num_bytes,
        "files_read_before": taken,
        "links": len(release.links),
        "signer": verified.signer,
        "bundle": None if verified.bundle is None else dataclasses.asdict(verified.bundle),
        "claims": [dataclasses.asdict(claim) for claim in verified.claims],
    }
