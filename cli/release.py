"""`weftrain release` and `replay`: publish a run, and train again what others published."""

from __future__ import annotations

import contextlib
import importlib.metadata
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from rich.table import Table

from weftrain.cli.arguments import NamedPath
from weftrain.cli.display import Bar, Console, program
from weftrain.cli.remote import RunPath
from weftrain.cli.verify import claims_table, verified_release

if TYPE_CHECKING:
    from weftrain.core.config import Recipe
    from weftrain.core.evaluations_section import EvaluationConfig
    from weftrain.core.evaluators import Evaluator
    from weftrain.core.run.lineage import Lineage
    from weftrain.exchange.release.release import Link
    from weftrain.exchange.release.replay import LinkReport, Replayed, Sources

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
    "--sign",
    "key",
    type=NamedPath(path_type=Path, exists=True, dir_okay=False),
    help="Private key in PEM: see `weftrain sign`.",
)
@click.option("--supplier", metavar="NAME", help="Who supplies the release, for the AI profile of its SPDX bill.")
@click.option("--download-location", metavar="URL", help="With --supplier: where the release will be downloaded.")
def release(
    run: Path,
    target: Path,
    licence: str,
    weights_dtype: Literal["float32", "bfloat16"],
    data: Literal["shards", "manifest"],
    data_root: Path | None,
    key: Path | None,
    supplier: str | None,
    download_location: str | None,
) -> None:
    """Write a release of RUN: checkpoints, weights, data, metrics, recipe, ledger and a model card, all from the
    record.
    """
    from weftrain.analysis.report.model_card import model_card, revision_card
    from weftrain.core.run.run_folder import held_run
    from weftrain.exchange.release.build import Writers, build, checked_supply
    from weftrain.exchange.release.signature import sign

    console, supply = Console(stderr=True), checked_supply(supplier, download_location, int(time.time()))
    with held_run(run):
        made = build(
            run,
            target,
            Writers(
                card=lambda draft, line, recipe: model_card(run, draft, line, recipe),
                revision_card=revision_card,
                weights=partial(write_weights, weights_dtype, data_root),
            ),
            version=importlib.metadata.version("weftrain"),
            weights_dtype=weights_dtype,
            licence=licence,
            data=data,
            check=lambda folder: verified_release(folder, signature=False),
            data_root=data_root,
            supply=supply,
            progress=lambda words: console.print(words),
        )
    if key is not None:
        public = sign(target, made, key)
        click.echo(f"signed by {public}")
    click.echo(f"{target}: {len(made.links)} links, {len(made.files)} files, root {made.root}")
    click.echo(f"verify it with: {program()} verify {target}; replay it with: {program()} replay {target}")


def write_weights(dtype: str, data_root: Path | None, folder: Path, weights: Mapping[str, Any], recipe: Recipe) -> None:
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


@click.command("replay")
@click.argument("release", type=ReleasePath)
@click.option("--link", "links", type=int, multiple=True, help="Link to replay, from 1 (repeatable).  [default: all]")
@click.option(
    "--sample", "share", type=float, metavar="P", help="Random share of the links to replay instead, e.g. 0.1."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of --sample and --scores.")
@click.option(
    "--scores",
    type=float,
    metavar="P",
    help="Also measure this random share of the recorded scores again: held-out losses, memorization, tasks.",
)
@click.option(
    "--include",
    type=NamedPath(path_type=Path, exists=True, file_okay=False),
    help="With --scores: the folder of task files that tasks were evaluated with; runs their code.",
)
@click.option(
    "--tasks", "own_tasks", is_flag=True, help="With --scores: also lm-eval's own tasks, whose data it may fetch."
)
@click.option("--backend", help="Backend instead of the run's; bits may then differ, and the fingerprint says why.")
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    help="Largest distance of weights and moments allowed under another fingerprint, as a share of their change.",
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
    scores: float | None,
    include: Path | None,
    own_tasks: bool,
    backend: str | None,
    tolerance: float | None,
    data_root: Path | None,
    device: str,
) -> None:
    """Train links of RELEASE again, each from checkpoint k-1 over chunk k, and compare every tensor with checkpoint k,
    bit for bit. Exit code 3: what was released is not what was trained. 4: a difference that neither shows nor refutes
    it.
    """
    from weftrain.core.errors import ReleaseError
    from weftrain.exchange.release.claims import covered_by
    from weftrain.exchange.release.replay import chosen_links, covered, replay_link

    console = Console()
    if scores is None and (include is not None or own_tasks):
        raise click.UsageError(f"{'--tasks' if own_tasks else '--include'} has no effect without --scores")
    with Bar(Console(stderr=True), f"verify {release.name}", 1) as bar:
        verified = verified_release(release, progress=bar.sizes)
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
    table = Table("link", "chunk", "steps", "tensors equal", "step lines", "held-out", "verdict", box=None)
    before: Replayed | None
    notes: list[str] = []
    reports: list[LinkReport] = []
    steps = sum(link.stop_step - link.first_step for link in chosen)
    with (
        _prepare(release, verified.lineage, data_root, backend, device, notes.append) as (sources, prepare),
        Bar(Console(stderr=True), "replay, steps", steps) as bar,
    ):
        done, before = 0, None
        for link in chosen:
            told = partial(_replayed, bar, link, done)
            before = replay_link(release, verified, link, sources, prepare, tolerance, told, before)
            done += link.stop_step - link.first_step
            table.add_row(*_row(before.report))
            notes += _notes(before.report, tolerance, reports)
            reports.append(before.report)
    console.print(table)
    for note in dict.fromkeys(notes):
        console.print(note)
    claims, wrong = covered(reports, verified), list[str]()
    if scores is not None:
        from weftrain.cli.remeasured import Inputs, remeasure

        found, claim = remeasure(release, scores, seed, Inputs(include, own_tasks))
        claims, wrong = [*claims, claim], found.different
        for line in wrong:
            console.print(f"score {line}")
    console.print(claims_table(covered_by(verified.claims, claims)))
    if wrong or any(report.verdict == "different" for report in reports):
        raise SystemExit(3)
    if any(report.verdict == "not covered" for report in reports):
        raise SystemExit(4)


def _replayed(bar: Bar, link: Link, before: int, step: int) -> None:
    bar.update(before + step - link.first_step, f"link {link.link}")


def _row(report: LinkReport) -> tuple[str, ...]:
    link = report.link
    place = (str(link.link), "-" if link.chunk is None else str(link.chunk), f"{link.first_step}..{link.stop_step}")
    lines = report.lines
    counts = (f"{lines.equal[kind]} of {lines.lines[kind]}" for kind in ("step", "evaluation"))
    return (*place, f"{report.equal} of {report.tensors}", *counts, report.verdict)


def _notes(report: LinkReport, tolerance: float | None, earlier: Sequence[LinkReport]) -> Iterator[str]:
    from weftrain.exchange.release.tolerance import rows_of, tolerance_is_used

    where = f"link {report.link.link}"
    for difference in report.differences[:3]:
        yield (
            f"{where}: {difference.name}: {difference.differing:,} of {difference.elements:,} elements differ, by up "
            f"to {difference.ulps:,} ulp ({difference.largest:.3g})"
        )
    if len(report.differences) > 3:
        yield f"{where}: and {len(report.differences) - 3} more tensors"
    if report.lines.first is not None:
        yield f"{where}: the first line that is not equal is of step {report.lines.first}"
    yield from (f"{where}: {words}" for words in report.lines.words())
    yield from (f"{where}: {words}" for words in _distances(report))
    if report.chained > 1:
        yield f"{where}: trained in one piece with the {report.chained - 1} links before it"
    computes = tolerance_is_used(rows_of(report.fingerprint))
    if tolerance is not None and report.verdict == "different" and not computes:
        yield f"{where}: --tolerance is not used: nothing of the fingerprint differs that computes"
    if report.verdict == "different" and not report.fingerprint:
        known = ", as far as both record it" if report.unrecorded else ""
        yield f"{where}: the fingerprint is the same{known}, so every bit must be: the release was altered"
    elif report.verdict == "different" and not computes:
        keys = ", ".join(sorted({key.partition(".")[0] for key, _, _ in report.fingerprint}))
        yield (
            f"{where}: only {keys} of the fingerprint differ, and compute nothing by themselves: the release was "
            "altered, or its version of weftrain computes otherwise: replay it with that one"
        )
    if report.unrecorded and report.verdict != "equal":
        yield f"{where}: fingerprint: recorded on one side only, so not compared: {', '.join(report.unrecorded)}"
    same = next((one.link.link for one in earlier if one.fingerprint == report.fingerprint), None)
    if report.fingerprint and same is not None:
        yield f"{where}: fingerprint: differs as that of link {same}"
    else:
        yield from (f"{where}: fingerprint: {words}" for words in _differing(report.fingerprint))


def _differing(fingerprint: Sequence[tuple[str, Any, Any]]) -> Iterator[str]:
    """A line for each entry that differs; for each op one, of its function or of the first entry there is."""
    ops: dict[str, list[tuple[str, Any, Any]]] = {}
    for entry in fingerprint:
        name = ".".join(entry[0].split(".")[:3]) if entry[0].startswith("kernels.ops.") else entry[0]
        ops.setdefault(name, []).append(entry)
    for name, entries in ops.items():
        key, old, new = next((entry for entry in entries if entry[0].endswith(".function")), entries[0])
        more = f" (and {len(entries) - 1} more entries of it)" if len(entries) > 1 else ""
        yield f"{name if key.endswith('.function') else key}: released {old}, here {new}{more}"


def _distances(report: LinkReport) -> Iterator[str]:
    """Each distance in words, in units of what is allowed, and what that is made from."""
    beyond, not_covered = report.allowed.beyond(report.distances), report.not_covered
    for kind, distance in report.distances.items():
        room = report.allowed.room(kind)
        units = f", {distance / room.near:.2g} x the {room.near:.2g} allowed" if room.near else ""
        verdict = f": not covered: {not_covered[kind]}" if kind in not_covered else ""
        if kind in beyond:
            verdict = f": too far: beyond {room.far:.2g}" if room.far else ": too far"
        yield f"{kind} {distance:.2e} apart{units}{verdict}"
    if report.distances and report.allowed.basis:
        yield f"allowed is {report.allowed.basis}"


@contextlib.contextmanager
def _prepare(
    release: Path, line: Lineage, data_root: Path | None, backend: str | None, device: str, say: Callable[[str], None]
) -> Iterator[tuple[Sources, Callable[..., Any]]]:
    """How a link's source is opened and its run prepared: on the release's data, with the threads of its fingerprint.

    Only portable backend.options are taken from the release, and a backend's files go to a temporary folder.
    """
    from weftrain.analysis.evaluation.scores import DatasetScores
    from weftrain.backends.common.registry import find_backends
    from weftrain.cli.assembly import open_data
    from weftrain.cli.resolve import backend_options, resolve_foreign
    from weftrain.core.backend import Job
    from weftrain.core.recipe_file import RecipeFile
    from weftrain.core.run.first_model import first_weights
    from weftrain.core.run.prepare import prepare_run
    from weftrain.exchange.release.replay import Sources

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
            job = Job(file.recipe, plan, options, folder=own, threads=threads, stored_state="replace")
            return prepare_run(chosen, replace(job, first_weights=first_weights(file.recipe, line, release)))

        def scored(recipe: Recipe) -> list[Evaluator]:
            here = placed(recipe).recipe
            return [DatasetScores(one, here, lambda: False) for one in _on_datasets(here, root)]

        sources = Sources(
            lambda recipe: open_data(placed(recipe).recipe)[0],
            lambda recipe: open_data(placed(recipe).recipe)[1],
            scored,
        )
        yield sources, prepare


def _on_datasets(recipe: Recipe, root: Path) -> list[EvaluationConfig]:
    """The recipe's evaluations on datasets while it trains, with those of them that lie in `root`."""
    found = []
    for one in recipe.evaluations:
        there = tuple(path for path in one.datasets if (root / path).is_dir())
        if one.where == "train" and there:
            found.append(one.model_copy(update={"datasets": there}))
    return found
