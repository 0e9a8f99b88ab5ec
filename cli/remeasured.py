"""`weftrain replay --scores`: scores that a release records are measured again from its checkpoints, and compared.

Held-out losses and memorization need nothing but the release. Tasks and programs need their documents, which a release
does not hold: they stay in the table of claims as not covered.
"""

from __future__ import annotations

import json
import math
import random
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weftrain.core.errors import DataError, ReleaseError, file_problem
from weftrain.core.formats.plain_file import read_plain
from weftrain.exchange.release.claims import SCORES, Claim

if TYPE_CHECKING:
    pass

_TOLERANCE = 1e-3  # of a loss, where the versions that measured it are others
_VERSIONS = ("weftrain", "torch")


@dataclass
class Remeasured:
    """different: a line for each score that is not what was measured again."""

    drawn: int
    equal: int = 0
    near: int = 0
    without_inputs: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)

    def claim(self, of: int) -> Claim:
        again = self.equal + self.near
        if self.different or not again:
            why = "inputs not given" if self.without_inputs and not self.different else "not what was measured again"
            return Claim(SCORES, "not covered", f"{why}: {', '.join(self.without_inputs[:3]) or 'see above'}")
        words = f"{again} of {of} measured again" + (f", {self.near} within {_TOLERANCE:g}" if self.near else "")
        left = f"; inputs not given: {', '.join(self.without_inputs[:3])}" if self.without_inputs else ""
        return Claim(SCORES, "replay", words + left)


def remeasure(release: Path, share: float, seed: int) -> tuple[Remeasured, Claim]:
    """Measure a share of the release's scores again, at least one. The release must have been verified just before.

    Raises ReleaseError for a share that cannot be or a record that cannot be read, DataError, CheckpointError.
    """
    if not 0 < share <= 1:
        raise ReleaseError(f"--scores {share}: give a share of the scores, above 0 and up to 1")
    files = sorted((release / "analyses" / "evaluations").glob("*.json"))
    files += sorted(path for path in (release / "analyses" / "memorization").glob("*/*/*.json"))
    if not files:
        raise ReleaseError(f"{release}: records no score: leave --scores out")
    drawn = sorted(random.Random(seed).sample(files, max(1, math.ceil(share * len(files)))))
    found = Remeasured(len(drawn))
    checkpoints = _checkpoints(release)
    for path in drawn:
        try:
            record = json.loads(read_plain(path, "record"))
            kind, root = record.get("format"), record.get("checkpoint", record.get("root"))
        except (OSError, ValueError, AttributeError) as error:
            raise ReleaseError(f"{path}: is no record of a score: {error}: fetch the release again") from error
        name = path.relative_to(release / "analyses").as_posix()
        if root not in checkpoints:
            found.different.append(f"{name}: is of the checkpoint {str(root)[:12]}, which is not in the release")
        elif kind == "weftrain-evaluation" and record.get("inputs", {}).get("kind") == "heldout":
            _of_heldout(checkpoints[root], record, name, found)
        elif kind == "weftrain-memorization":
            _of_memorization(release, checkpoints, record, name, found)
        else:
            found.without_inputs.append(str(record.get("task", name))[:60])
    return found, found.claim(len(files))


def _checkpoints(release: Path) -> dict[str, Path]:
    from weftrain.core.formats.checkpoint_manifest import read_checkpoint_manifest

    return {read_checkpoint_manifest(path)["root"]: path for path in sorted((release / "checkpoints").iterdir())}


def _of_heldout(path: Path, record: Mapping[str, Any], name: str, found: Remeasured) -> None:
    from weftrain.analysis.evaluation.heldout import attend_within_documents, run_heldout
    from weftrain.analysis.evaluation.records import EvaluatedCheckpoint, EvaluationSettings
    from weftrain.cli.evaluated import RunCheckpoint

    inputs = record["inputs"]
    try:
        settings = EvaluationSettings(
            inputs["batch_size"], inputs["seed"], inputs["limit"], inputs["precision"], "cpu", None
        )
        opened = RunCheckpoint(path, (), settings, None, True)
        sets, within = opened.heldout((), inputs["rows"])
        source = next(one for one in sets if one.name == inputs["set"] and one.dataset_id == inputs["dataset_id"])
    except (KeyError, StopIteration, OSError, DataError) as error:
        found.without_inputs.append(f"{name} ({file_problem(error) if isinstance(error, OSError) else 'its set'})")
        return
    if within:
        attend_within_documents(opened.decoder)
    with tempfile.TemporaryDirectory(prefix="weftrain-scores-") as folder:
        subject = EvaluatedCheckpoint(opened.root, opened.step)
        (again,) = run_heldout(
            [source], subject, settings, lambda: opened.decoder, Path(folder), lambda line: None, opened.objective
        )
    same = inputs["device"] == "cpu" and _software(record) == _software(again)
    told = {key: record.get(key) for key in ("metrics", "value", "samples", "tokens", "step")}
    measured = {key: again.get(key) for key in told}
    if told == measured:
        found.equal += 1
    elif not same and _near(told["value"], measured["value"]):
        found.near += 1
    else:
        found.different.append(f"{name}: {record['metric']} is {told['value']}, and measured again {measured['value']}")


def _of_memorization(
    release: Path, checkpoints: Mapping[str, Path], record: Mapping[str, Any], name: str, found: Remeasured
) -> None:
    from weftrain.analysis.memorization.scores import LazyCheckpoint, MemorizationResult, measure
    from weftrain.cli.assembly import recipe_of_checkpoint
    from weftrain.cli.memorize import chunks_of, load_generator
    from weftrain.core.formats.checkpoint_manifest import read_checkpoint_manifest
    from weftrain.core.formats.strict_model import validated

    told = validated(MemorizationResult, dict(record))
    newest = max(checkpoints.values())
    recipe = recipe_of_checkpoint(newest, read_checkpoint_manifest(newest)).recipe
    steps = [int(path.name.removeprefix("step_")) for path in checkpoints.values()]
    chunk = next((one for one in chunks_of(release, recipe, steps) if one.name == told.chunk), None)
    if chunk is None:
        found.without_inputs.append(f"{name} (rows of no chunk of the release)")
        return
    snapshot = LazyCheckpoint(told.step, told.root, partial(load_generator, checkpoints[told.root], recipe, "cpu"))
    with tempfile.TemporaryDirectory(prefix="weftrain-scores-") as folder:
        (again,) = measure(Path(folder), [snapshot], [chunk], told.parameters)
    if (told.sample_numbers, told.rows_sha256, told.matches) == (
        again.sample_numbers,
        again.rows_sha256,
        again.matches,
    ):
        found.equal += 1
    else:
        wrong = sum(one != other for one, other in zip(told.matches, again.matches, strict=False))
        found.different.append(
            f"{name}: {told.extractible_percent:.2f} % extractible, and measured again {again.extractible_percent:.2f} "
            f"%: {wrong} of {len(told.matches)} rows differ"
        )


def _software(record: Mapping[str, Any]) -> list[Any]:
    return [record.get("software", {}).get(name) for name in _VERSIONS]


def _near(told: Any, measured: Any) -> bool:
    both = isinstance(told, float) and isinstance(measured, float)
    return both and math.isclose(told, measured, rel_tol=_TOLERANCE)
