"""`weftrain release`, `verify`, `replay`, `sign`: publish a run, and check what others published."""

from __future__ import annotations

import contextlib
import importlib.metadata
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from rich.table import Table

from weftrain.cli.arguments import NamedPath
from weftrain.cli.display import Bar, Console, program
from weftrain.cli.remote import RunPath

if TYPE_CHECKING:
    from weftrain.core.config import Recipe
    from weftrain.exchange.release.release import Link
    from weftrain.exchange.release.replay import LinkReport

ReleasePath = RunPath(exists=True, file_okay=False)


@click.command("release")
@click.argument("run", type=ReleasePath)
@click.option("--to", "target", type=click.Path(path_type=Path), required=True, help="The new folder.")
@click.option("--licence", required=True, help="Licence of the weights, by its SPDX identifier, e.g. Apache-2.0.")
@click.option(
    "--weights-dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Dtype of the weights in revisions/.",
)
@click.option(
    "--data",
    type=click.Choice(["shards", "manifest"]),
    default="shards",
    show_default=True,
    help="Include whole datasets, or only their hashes.",
)
@click.option(
    "--data-root", type=NamedPath(path_type=Path), help="The folder of datasets.  [default: the recipe's data.root]"
)
@click.option(
    "--sign", "key", type=NamedPath(path_type=Path, exists=True, dir_okay=False), help="Ed25519 private key in PEM."
)
def release(
    run: Path,
    target: Path,
    licence: str,
    weights_dtype: Literal["float32", "bfloat16"],
    data: Literal["shards", "manifest"],
    data_root: Path | None,
    key: Path | None,
) -> None:
    """Write a release of RUN: checkpoints, weights, data, metrics, recipe, ledger and a model card, all from the
    record.
    """
    from weftrain.analysis.report.model_card import model_card, revision_card
    from weftrain.core.run.run_folder import held_run
    from weftrain.exchange.release.build import Writers, build
    from weftrain.exchange.release.release import SIGNATURE
    from weftrain.exchange.release.signature import sign
    from weftrain.exchange.release.verify import verify as verify_release

    console = Console(stderr=True)
    with held_run(run):
        made = build(
            run,
            target,
            Writers(
                card=lambda draft, line, recipe: model_card(run, draft, line, recipe),
                revision_card=revision_card,
                weights=partial(_write_weights, weights_dtype, data_root),
            ),
            version=importlib.metadata.version("weftrain"),
            weights_dtype=weights_dtype,
            licence=licence,
            data=data,
            check=lambda folder: verify_release(folder, signature=False),
            data_root=data_root,
            progress=lambda words: console.print(words),
        )
    if key is not None:
        public = sign(target / SIGNATURE, made.root, key)
        click.echo(f"signed by {public}")
    click.echo(f"{target}: {len(made.links)} links, {len(made.files)} files, root {made.root}")
    click.echo(f"verify it with: {program()} verify {target}; replay it with: {program()} replay {target}")


def _write_weights(
    dtype: str, data_root: Path | None, folder: Path, weights: Mapping[str, Any], recipe: Recipe
) -> None:
    """Write weights with the tokenizer of the recipe's first source, if it has one, as a Hugging Face folder."""
    import torch

    from weftrain.core.formats.dataset import read_dataset_manifest, read_tokenizer
    from weftrain.exchange.huggingface.files import tokenizer_files
    from weftrain.exchange.huggingface.folder import write_huggingface

    beside: dict[str, bytes] = {}
    ids: dict[str, Any] = {}
    if recipe.data.sources:
        source = (Path(recipe.data.root) if data_root is None else data_root) / recipe.data.sources[0].path
        prepared = read_dataset_manifest(source)
        beside, ids = tokenizer_files(
            read_tokenizer(source), prepared.separator_id, prepared.bos_id, recipe.model, f"{source}: tokenizer.json"
        )
    write_huggingface(folder, weights, recipe.model, getattr(torch, dtype), extra_config=ids, beside=beside)


@click.command("sign")
@click.argument("release", type=RunPath(here=True, exists=True, file_okay=False), required=False)
@click.option(
    "--key", type=click.Path(path_type=Path, dir_okay=False), required=True, help="Ed25519 private key in PEM."
)
@click.option("--new-key", is_flag=True, help="Generate the key first.")
def sign(release: Path | None, key: Path, new_key: bool) -> None:
    """Sign the root of RELEASE after verifying every byte; without RELEASE, only generate a key."""
    from weftrain.exchange.release.release import SIGNATURE
    from weftrain.exchange.release.signature import new_key as make_key
    from weftrain.exchange.release.signature import sign as sign_root
    from weftrain.exchange.release.verify import verify

    if new_key:
        click.echo(f"{key}: keep it secret; its public key, to publish: {make_key(key)}")
    if release is not None:
        verified = verify(release, signature=False)
        public = sign_root(release / SIGNATURE, verified.release.root, key)
        click.echo(f"{release}: root {verified.release.root} signed by {public}")


@click.command("verify")
@click.argument("path", type=ReleasePath)
@click.option("--key", metavar="HEX", help="The public key that must have signed the release.")
def verify(path: Path, key: str | None) -> None:
    """Read every byte of PATH, a release or one checkpoint's folder, and check every hash and every claim in it."""
    from weftrain.core import checkpoint
    from weftrain.core.errors import ReleaseError
    from weftrain.exchange.release.release import RELEASE
    from weftrain.exchange.release.verify import verify as verify_release

    if not (path / RELEASE).exists() and (path / "manifest.json").exists():
        with Bar(Console(stderr=True), f"verify {path.name}", 1) as bar:
            manifest = checkpoint.verify(path, bar.sizes)
        click.echo(
            f"{path}: step {manifest['step']}, {len(manifest['tensors'])} tensors, root {manifest['root']}: complete"
        )
        return
    with Bar(Console(stderr=True), f"verify {path.name}", 1) as bar:
        verified = verify_release(path, progress=bar.sizes)
    if key is not None and verified.signer != key.lower():
        signer = "nobody" if verified.signer is None else verified.signer
        raise ReleaseError(f"{path}: is signed by {signer}, not by {key}: fetch it from whoever holds that key")
    release = verified.release
    click.echo(
        f"{path}: {len(release.files):,} files, {verified.num_bytes:,} bytes, {len(release.links)} links: complete and "
        "consistent"
    )
    click.echo(f"root {release.root}, " + ("not signed" if verified.signer is None else f"signed by {verified.signer}"))
    click.echo(f"to check that the states were trained as recorded: {program()} replay {path}")


@click.command("replay")
@click.argument("release", type=ReleasePath)
@click.option("--link", "links", type=int, multiple=True, help="Link to replay, from 1 (repeatable).  [default: all]")
@click.option(
    "--sample", "share", type=float, metavar="P", help="Random share of the links to replay instead, e.g. 0.1."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of --sample.")
@click.option("--backend", help="Backend instead of the run's; bits may then differ, and the fingerprint says why.")
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    help="Largest difference allowed under another fingerprint, as a share of the weights' change.",
)
@click.option(
    "--data-root",
    type=NamedPath(path_type=Path, exists=True),
    help="Folder of datasets, for a release that has only their hashes.",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Device that trains the links.",
)
def replay(
    release: Path,
    links: tuple[int, ...],
    share: float | None,
    seed: int,
    backend: str | None,
    tolerance: float | None,
    data_root: Path | None,
    device: str,
) -> None:
    """Train links of RELEASE again, each from checkpoint k-1 over chunk k, and compare every tensor with checkpoint k,
    bit for bit.
    """
    from weftrain.core.errors import ReleaseError
    from weftrain.exchange.release.replay import DEFAULT_TOLERANCE, chosen_links, replay_link
    from weftrain.exchange.release.verify import verify as verify_release

    console = Console()
    with Bar(Console(stderr=True), f"verify {release.name}", 1) as bar:
        verified = verify_release(release, progress=bar.sizes)
    if verified.release.data == "manifest" and data_root is None:
        raise ReleaseError(
            f"{release}: holds only hashes of its data: name the folder of its datasets with --data-root"
        )
    chosen = chosen_links(verified.release.links, links, share, seed)
    if share is not None:
        console.print(
            f"links {', '.join(str(link.link) for link in chosen)} of {len(verified.release.links)}, drawn with seed "
            f"{seed}"
        )
    table = Table("link", "chunk", "steps", "tensors equal", "losses equal", "verdict", box=None)
    failed = False
    notes: list[str] = []
    steps = sum(link.stop_step - link.first_step for link in chosen)
    with (
        _prepare(release, data_root, backend, device, notes.append) as (open_source, prepare),
        Bar(Console(stderr=True), "replay, steps", steps) as bar,
    ):
        before = 0
        for link in chosen:
            report = replay_link(
                release,
                verified,
                link,
                open_source,
                prepare,
                DEFAULT_TOLERANCE if tolerance is None else tolerance,
                partial(_replayed, bar, link, before),
            )
            before += link.stop_step - link.first_step
            failed |= report.verdict == "different"
            table.add_row(*_row(report))
            notes += _notes(report)
    console.print(table)
    for note in dict.fromkeys(notes):
        console.print(note)
    if failed:
        raise SystemExit(3)


def _replayed(bar: Bar, link: Link, before: int, step: int) -> None:
    bar.update(before + step - link.first_step, f"link {link.link}")


def _row(report: LinkReport) -> tuple[str, ...]:
    link = report.link
    place = (str(link.link), "-" if link.chunk is None else str(link.chunk), f"{link.first_step}..{link.stop_step}")
    equal = (f"{report.equal} of {report.tensors}", f"{report.equal_losses} of {report.losses}")
    return (*place, *equal, report.verdict)


def _notes(report: LinkReport) -> Iterator[str]:
    for difference in report.differences[:3]:
        yield (
            f"link {report.link.link}: {difference.name}: {difference.differing:,} of {difference.elements:,} elements "
            "differ, by up to "
            f"{difference.ulps:,} ulp ({difference.largest:.3g})"
        )
    if len(report.differences) > 3:
        yield f"link {report.link.link}: and {len(report.differences) - 3} more tensors"
    if report.differences or report.equal_losses < report.losses:
        yield f"link {report.link.link}: the weights are {report.relative:.2e} of the link's movement apart"
        if not report.fingerprint:
            yield f"link {report.link.link}: the fingerprint is the same, so every bit must be: the release was altered"
    for key, old, new in report.fingerprint:
        yield f"link {report.link.link}: fingerprint: {key}: released {old}, here {new}"


@contextlib.contextmanager
def _prepare(
    release: Path, data_root: Path | None, backend: str | None, device: str, say: Callable[[str], None]
) -> Iterator[tuple[Callable[..., Any], Callable[..., Any]]]:
    """How a link's source is opened and its run prepared: on the release's data, with the threads of its fingerprint.

    Only portable backend.options are taken from the release, and a backend's files go to a temporary folder.
    """
    from weftrain.backends.common.registry import find_backends
    from weftrain.cli.resolve import backend_options, resolve_foreign
    from weftrain.core.backend import Job
    from weftrain.core.data import training_source
    from weftrain.core.recipe_file import RecipeFile
    from weftrain.core.run.prepare import prepare_run

    root = release / "data" if data_root is None else data_root
    with tempfile.TemporaryDirectory(prefix="weftrain-replay-") as folder:

        def placed(recipe: Any) -> RecipeFile:
            tree = recipe.model_dump(mode="json")
            tree["data"]["root"] = str(root)
            file = resolve_foreign(tree, f"{release}: its recipe", (), backend, say)
            if device == "auto" or "device" not in find_backends()[file.recipe.backend.name].options.model_fields:
                return file
            return resolve_foreign(tree, f"{release}: its recipe", (f"backend.options.device={device}",), backend)

        def prepare(recipe: Any, plan: Any, fingerprint: Mapping[str, Any]) -> Any:
            file = placed(recipe)
            chosen, options = backend_options(file)
            wanted = fingerprint.get("threads")
            threads = wanted if type(wanted) is int and wanted > 0 else None
            own = Path(folder) / str(plan.start_step)  # for a backend that keeps state on disk
            return prepare_run(
                chosen, Job(file.recipe, plan, options, folder=own, threads=threads, stored_state="replace")
            )

        yield (lambda recipe: training_source(placed(recipe).recipe)), prepare
