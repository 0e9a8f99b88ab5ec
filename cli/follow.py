"""`weftrain follow`: measure and audit the revisions of a series as they appear on a hub, in a bucket, in a folder."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from weftrain.cli import arguments
from weftrain.cli.arguments import complete_runs
from weftrain.cli.audit import TOKEN, SeriesPath, endpoint
from weftrain.cli.display import Console
from weftrain.exchange.remote.store import is_address

if TYPE_CHECKING:
    from weftrain.analysis.evaluation.follow import Event, Measure
    from weftrain.exchange.audit.names import Place
    from weftrain.exchange.audit.series import Revision, Series

LOCK = "lock"


class FollowedPath(SeriesPath):
    """As `weftrain audit` takes it; an address is opened anew at every look."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if is_address(value) else super().convert(value, param, ctx)


@click.command("follow")
@click.argument("series", type=FollowedPath(exists=True, file_okay=False), shell_complete=complete_runs)
@click.option(
    "--to",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder for the records and for follow.json, which says what is done.",
)
@click.option("--once", is_flag=True, help="Look once; exit code 1 if something was found, or waits.")
@click.option(
    "--every-seconds",
    type=click.FloatRange(min=0.1),
    default=300.0,
    show_default=True,
    help="Seconds between two looks.",
)
@click.option(
    "--audit",
    "depth",
    type=click.Choice(["none", "listing", "headers", "deep"]),
    default="listing",
    show_default=True,
    help="How deep the series is audited when something is new; a new revision's own headers are always read.",
)
@click.option("--measure/--no-measure", default=True, help="Measure losses and tasks.  [default: measure]")
@click.option(
    "--loss-on",
    "loss_on",
    type=arguments.NamedPath(path_type=Path, exists=True),
    multiple=True,
    help="Of Hugging Face models: a dataset, for the loss on its held-out rows, or an ids.jsonl.",
)
@click.option("--rows", type=click.IntRange(min=1), help="Rows of each held-out set.  [default: all]")
@click.option("--tasks", help="lm-eval tasks or groups, separated by commas.")
@click.option("--shots", type=click.IntRange(min=0), help="Few-shot examples of --tasks.")
@click.option("--include", type=arguments.NamedPath(path_type=Path), help="Folder of task YAML files.")
@click.option("--limit", type=click.IntRange(min=1), help="Documents of each task.")
@click.option(
    "--tokenizer", type=arguments.NamedPath(path_type=Path), help="tokenizer.json, for tasks of a series on a hub."
)
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True, help="Sequences in a batch.")
@click.option("--precision", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@endpoint
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each event.")
def follow(
    series: Path | str,
    folder: Path,
    once: bool,
    every_seconds: float,
    depth: Any,
    measure: bool,
    endpoint: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure each revision of SERIES once as it appears, and audit the series, until it says that it has ended.

    SERIES is a repository on the hub (hub:owner/name), a folder with a sub-folder for each revision, a git clone, or a
    run or release of weftrain, also by its address in a bucket. A revision that is half uploaded or vanishes is named
    and tried again. A killed follower goes on where it was.
    """
    from weftrain.analysis.evaluation.follow import Follower
    from weftrain.analysis.evaluation.watcher import poll
    from weftrain.core.errors import RunInUseError
    from weftrain.core.formats import fsops

    console = Console(stderr=as_json)
    fsops.make_dirs(folder)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(fsops.held_lock(folder / LOCK, f"{os.getpid()}\n".encode()))
        except BlockingIOError as error:
            raise RunInUseError(f"{folder}: another `follow` writes there: stop it, or name another folder") from error
        opened = _Opened(str(series), endpoint)
        measuring = _measure(folder, options, console) if measure else lambda series, revision, place: ()
        where = str(series) if "://" in str(series) or str(series).startswith("hub:") else str(Path(series).absolute())
        follower = Follower(
            where,
            opened.now,
            folder,
            measuring,
            depth=None if depth == "none" else depth,
            tell=(lambda event: click.echo(json.dumps(event))) if as_json else (lambda event: _tell(console, event)),
        )
        if not once:
            poll(lambda: _looked(follower.look, console), every_seconds=every_seconds)
            return
        follower.look()
        console.print(f"{len(follower.done):,} revisions are done, {follower.waiting:,} wait")
        raise SystemExit(int(bool(follower.found or follower.waiting)))


def _looked(look: Any, console: Console) -> bool:
    """One look of many: a hub or a bucket that cannot be reached now is asked again at the next."""
    from weftrain.core.errors import RemoteError

    try:
        return bool(look())
    except RemoteError as error:
        console.print(f"warning: {error}; it is asked again at the next look")
        return False


class _Opened:
    """The series as it is at each look. A hub's is kept, with the lists of files that it knows."""

    def __init__(self, address: str, endpoint: str) -> None:
        self._address, self._endpoint = address, endpoint
        self._hub: Series | None = None

    @contextlib.contextmanager
    def now(self) -> Iterator[Series]:
        from weftrain.exchange.audit.audit import open_series
        from weftrain.exchange.remote.opening import opened

        token = os.environ.get(TOKEN) or None
        if is_address(self._address):
            with opened(self._address) as folder:
                yield open_series(str(folder))
        elif self._address.startswith("hub:"):
            self._hub = self._hub or open_series(self._address, self._endpoint, token)
            yield self._hub
        else:
            yield open_series(self._address)


def _measure(folder: Path, options: dict[str, Any], console: Console) -> Measure:
    """Measures what the options ask for; of a run's or a release's checkpoint its own held-out sets too."""
    from weftrain.analysis.evaluation.follow import fetch
    from weftrain.cli.evaluate_tasks import records_of, settings_from
    from weftrain.cli.evaluated import Evaluated, RunCheckpoint
    from weftrain.cli.evaluated import Revision as HuggingFaceRevision
    from weftrain.core.formats.checkpoint_manifest import MANIFEST

    asked = {"preset": None, "code": None, "seed": 1234, **options}
    settings, tokenizer = settings_from(asked), options["tokenizer"]

    def measure(series: Series, revision: Revision, place: Place) -> Iterator[Event]:
        own = series.folder_of(revision)
        with tempfile.TemporaryDirectory(prefix="weftrain-follow-") as temporary:
            opened: Evaluated
            if own is not None and (own / MANIFEST).exists():
                opened = RunCheckpoint(own, (), settings, tokenizer, False)
            elif not (options["loss_on"] or options["tasks"]):
                return
            else:
                if own is None:
                    own = Path(temporary) / "revision"
                    fetch(series, revision, own)
                opened = HuggingFaceRevision(own, place.step, settings, tokenizer)
            for record in records_of(opened, settings, asked, console, folder / "evaluations"):
                yield {key: record[key] for key in ("task", "metric", "value", "samples", "root")}

    return measure


def _tell(console: Console, event: Event) -> None:
    name, why = event.get("revision"), event.get("why")
    words = {
        "revision": f"{name}: whole",
        "score": f"{name}: {event.get('task')} {event.get('metric')} {event.get('value')}",
        "finding": f"{event.get('kind')}: {event.get('evidence')}",
        "waiting": f"{name}: waits: {why}; it is tried again",
        "failed": f"{name}: cannot be measured: {why}; it is tried again when it changes",
        "gone": f"{name}: is not there any more",
    }
    console.print(words[event["event"]])
