"""`weftrain replay --scores`: scores that a release records are measured again from its checkpoints, and compared.

Held-out losses and memorization need nothing but the release. Tasks of lm-eval need their documents: those of the
folder given with --include, if it is the one that the record names by its hash, and with --tasks lm-eval's own, which
it may fetch. Scores without their inputs, such as those of programs, stay in the table of claims as not covered.
"""

from __future__ import annotations

import json
import math
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weftrain.core.errors import DataError, ReleaseError, file_problem, one_line
from weftrain.core.formats.plain_file import read_plain
from weftrain.exchange.release.claims import SCORES, Claim

if TYPE_CHECKING:
    from weftrain.analysis.evaluation.records import EvaluationRecord, EvaluationSettings
    from weftrain.cli.evaluated import RunCheckpoint
    from weftrain.core.order.batch import EvaluationSource

_TOLERANCE = 1e-3  # of a loss, where the versions that measured it are others
_VERSIONS = ("weftrain", "torch")
_VERSIONS_OF_TASKS = (*_VERSIONS, "lm_eval", "tokenizers")
_MOST_AT_ONCE = 1 << 20  # sequences


@dataclass(frozen=True)
class Inputs:
    """What the reader gives for tasks. include: a folder of task files. own_tasks: whether lm-eval's own are computed,
    whose data it loads from the hub or its cache.
    """

    include: Path | None = None
    own_tasks: bool = False


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


@dataclass(frozen=True)
class _Checkpoints:
    """The checkpoints of a release by their roots, and by the hashes of their weights."""

    by_root: Mapping[str, Path]
    by_weights: Mapping[str, Path]

    def of(self, record: Mapping[str, Any]) -> Path | None:
        """The one that an evaluation is of: it names the checkpoint, or the weights of a state while it trained."""
        root = record.get("checkpoint")
        return self.by_weights.get(str(record.get("weights_sha256"))) if root is None else self.by_root.get(str(root))


def remeasure(release: Path, share: float, seed: int, given: Inputs) -> tuple[Remeasured, Claim]:
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
    found, checkpoints = Remeasured(len(drawn)), _checkpoints(release)
    for path in drawn:
        try:
            record = json.loads(read_plain(path, "record"))
            kind = record.get("format")
        except (OSError, ValueError, AttributeError) as error:
            raise ReleaseError(f"{path}: is no record of a score: {error}: fetch the release again") from error
        name = path.relative_to(release / "analyses").as_posix()
        if kind == "weftrain-memorization" and record.get("root") in checkpoints.by_root:
            _of_memorization(release, checkpoints.by_root, record, name, found)
        elif kind == "weftrain-evaluation":
            _of_evaluation(checkpoints, record, name, found, given)
        else:
            found.different.append(f"{name}: is of a checkpoint that is not in the release, or no score")
    return found, found.claim(len(files))


def _checkpoints(release: Path) -> _Checkpoints:
    from weftrain.core.formats.checkpoint_manifest import read_checkpoint_manifest, weights_sha256_of

    found = [(read_checkpoint_manifest(path), path) for path in sorted((release / "checkpoints").iterdir())]
    return _Checkpoints(
        {manifest["root"]: path for manifest, path in found},
        {weights_sha256_of(manifest): path for manifest, path in found},
    )


def _of_evaluation(
    checkpoints: _Checkpoints, record: Mapping[str, Any], name: str, found: Remeasured, given: Inputs
) -> None:
    """Measure one evaluation again; what cannot be is noted with the reason."""
    inputs, path = record.get("inputs"), checkpoints.of(record)
    if not isinstance(inputs, dict) or any(
        record.get(key) != value for key, value in inputs.items() if value is not None
    ):
        found.different.append(f"{name}: says other things of itself than its inputs do")
        return
    kind = inputs.get("kind")
    if path is None and record.get("checkpoint") is None:
        found.without_inputs.append(f"{name} (no checkpoint of the release has the state of step {record.get('step')})")
        return
    if path is None:
        found.different.append(f"{name}: is of the checkpoint {str(record['checkpoint'])[:12]}, which is not here")
        return
    try:
        if kind == "heldout":
            again = _heldout(path, record)
        elif kind == "task":
            again = _task(path, record, given)
        else:
            raise DataError("its problems are not in the release")
        _judge(record, again, name, found)
    except (KeyError, StopIteration, TypeError, AttributeError, OSError, DataError) as error:
        words = file_problem(error) if isinstance(error, OSError) else one_line(error, 160)
        found.without_inputs.append(f"{name} ({'its set' if isinstance(error, StopIteration) else words})")


def _settings(inputs: Mapping[str, Any], include: Path | None) -> EvaluationSettings:
    """Those of a record, on this machine's CPU. Raises DataError for what no evaluation has."""
    from weftrain.analysis.evaluation.records import EvaluationSettings

    batch, seed, limit, precision = (inputs[key] for key in ("batch_size", "seed", "limit", "precision"))
    whole = all(type(one) is int and one > 0 for one in (batch, limit) if one is not None) and type(seed) is int
    if not whole or not batch or batch > _MOST_AT_ONCE or precision not in ("float32", "bfloat16", "float16"):
        raise DataError("its batch size, limit, seed or precision is none that an evaluation has")
    return EvaluationSettings(batch, seed, limit, precision, "cpu", include, inputs.get("evaluation"))


def _heldout(path: Path, record: Mapping[str, Any]) -> EvaluationRecord:
    from weftrain.analysis.evaluation.heldout import attend_within_documents, run_heldout
    from weftrain.analysis.evaluation.records import EvaluatedCheckpoint
    from weftrain.cli.evaluated import RunCheckpoint

    inputs = record["inputs"]
    settings = _settings(inputs, None)
    opened = RunCheckpoint(path, (), settings, None, True)
    sets, within = _sets(opened, inputs)
    source = next(one for one in sets if one.name == inputs["set"] and one.dataset_id == inputs["dataset_id"])
    if within:
        attend_within_documents(opened.decoder)
    with tempfile.TemporaryDirectory(prefix="weftrain-scores-") as folder:
        subject = EvaluatedCheckpoint(opened.root, opened.step)
        (again,) = run_heldout(
            [source], subject, settings, lambda: opened.decoder, Path(folder), lambda line: None, opened.objective
        )
    return again


def _sets(opened: RunCheckpoint, inputs: Mapping[str, Any]) -> tuple[Sequence[EvaluationSource], bool]:
    """The held-out sets that a record may be of: the run's own, or those of an evaluation of its recipe."""
    from weftrain.analysis.evaluation.scores import open_datasets

    if (name := inputs.get("evaluation")) is None:
        return opened.heldout((), inputs["rows"])
    evaluation = next(one for one in opened.recipe.evaluations if one.name == name and inputs["set"] in one.datasets)
    one_set = evaluation.model_copy(update={"datasets": (inputs["set"],)})
    return open_datasets(one_set, opened.recipe), opened.recipe.data.document_attention


def _task(path: Path, record: Mapping[str, Any], given: Inputs) -> EvaluationRecord:
    """Raises DataError where the reader gave no documents of it, or other ones."""
    from weftrain.analysis.evaluation.generation import Generator
    from weftrain.analysis.evaluation.lm_eval_model import CheckpointLM
    from weftrain.analysis.evaluation.records import EvaluatedCheckpoint
    from weftrain.analysis.evaluation.tasks import TaskRequest, run_tasks
    from weftrain.cli.evaluated import RunCheckpoint
    from weftrain.core.formats.tokenizer_file import panics_refused

    inputs = record["inputs"]
    include = _documents(inputs, given)
    settings = _settings(inputs, include)
    opened = RunCheckpoint(path, (), settings, None, True)
    tokenizer, sha256, eos_id = opened.tokenizer
    if sha256 != inputs["tokenizer_sha256"]:
        raise DataError("its tokenizer is not the release's")
    request = TaskRequest(str(inputs["task"]), inputs["shots"], inputs["metric"])
    subject = EvaluatedCheckpoint(inputs["checkpoint"], opened.step, sha256, inputs.get("weights_sha256"))

    def model() -> CheckpointLM:
        length, batch = opened.config.max_position_embeddings, settings.batch_size
        return CheckpointLM(
            Generator(opened.decoder),
            tokenizer,
            eos_id,
            length,
            batch_size=batch,
            seed=settings.seed,
            report=lambda done, total, what: None,
        )

    with (
        tempfile.TemporaryDirectory(prefix="weftrain-scores-") as folder,
        panics_refused(str(opened.tokenizer_file[0])),
    ):
        found = run_tasks([request], subject, settings, model, Path(folder), lambda line: None)
    return next(one for one in found if one["task"] == record["task"])


def _documents(inputs: Mapping[str, Any], given: Inputs) -> Path | None:
    """The folder of task files that a record of a task is computed with; None: lm-eval's own. Raises DataError."""
    from weftrain.analysis.evaluation.tasks import folder_sha256

    if "data_sha256" in inputs:
        raise DataError("its documents were a file that the release does not hold")
    if (wanted := inputs["include_sha256"]) is None:
        if not given.own_tasks:
            raise DataError(f"task {str(inputs['task'])[:60]} of lm-eval: --tasks measures it again")
        return None
    if given.include is None:
        raise DataError(f"task {str(inputs['task'])[:60]}: give its folder of task files with --include")
    if folder_sha256(given.include) != wanted:
        raise DataError(
            f"task {str(inputs['task'])[:60]}: {given.include} holds other task files than it was made with"
        )
    return given.include


def _judge(record: Mapping[str, Any], again: Mapping[str, Any], name: str, found: Remeasured) -> None:
    """Equal in every digit where the same software measured both on a CPU; else near."""
    task = record["inputs"]["kind"] == "task"
    versions = _VERSIONS_OF_TASKS if task else _VERSIONS
    same = record["inputs"].get("device") == "cpu" and all(
        record.get("software", {}).get(one) == again["software"].get(one) for one in versions
    )
    keys = ("metric", "metrics", "value", "value_percent", "stderr", "samples", "tokens", "step")
    told = {key: record.get(key) for key in (*keys, *(("subtasks", "shots", "task_version") if task else ()))}
    measured = {key: again.get(key) for key in told}
    flip = 1 / max(1, again["samples"]) if again.get("value_percent") is not None else 0.0  # one document's answer
    if told == measured:
        found.equal += 1
    elif not same and told["samples"] == measured["samples"] and _near(told["value"], measured["value"], flip):
        found.near += 1
    else:
        key = next(key for key in ("value", *told) if told[key] != measured[key])
        shown = f"{record['metric']} is" if key == "value" else f"{key} is"
        found.different.append(f"{name}: {shown} {told[key]}, and measured again {measured[key]}")


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


def _near(told: Any, measured: Any, flip: float) -> bool:
    both = isinstance(told, float) and isinstance(measured, float)
    return both and math.isclose(told, measured, rel_tol=_TOLERANCE, abs_tol=flip * 1.001)
