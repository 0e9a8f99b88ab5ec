"""What follows in a release from something else in it is computed again and compared: counts of checkpoints, learning
rates, which lines the log must have, what stands beside the weights of a revision.

A forger who edits one of these and makes every hash again is refused here, without a step of training. Each function
gives the claims that it has covered and raises ReleaseError for one that is not so.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from weftrain.core.backend import plan_of
from weftrain.core.config import Recipe
from weftrain.core.errors import ReleaseError
from weftrain.core.formats.canonical import canonical_json
from weftrain.core.formats.checkpoint_manifest import folder_name
from weftrain.core.formats.dataset import TOKENIZER, read_dataset_manifest, read_tokenizer
from weftrain.core.formats.plain_file import read_plain
from weftrain.core.formats.shard_reader import read_rows
from weftrain.core.formats.shard_set import ShardSet, open_set
from weftrain.core.formats.strict_yaml import LineMap, parse_mapping
from weftrain.core.optim import group_learning_rates, parameter_groups
from weftrain.core.recipe_file import recorded_recipe
from weftrain.core.run.ledger_schema import LEDGER
from weftrain.core.run.lineage import Lineage, TrainingSegment
from weftrain.core.run.metrics import METRICS, effective_records
from weftrain.core.run.run_folder import ENVIRONMENT, READABLE_RECIPE
from weftrain.exchange.huggingface.card import card_problem, has_library
from weftrain.exchange.huggingface.files import tokenizer_files
from weftrain.exchange.huggingface.folder import INDEX, small_files, weight_files
from weftrain.exchange.release.claims import Claim
from weftrain.exchange.release.release import (
    CARD,
    CARD_MARK,
    RELEASE,
    Release,
    checked_name,
    read_json,
    revisions,
)

_RATE_TOLERANCE = 1e-6  # a backend may hold its rates in fp32
_TWIN_SHARE = 0.5  # of the held-out rows that are rows of the training set: more is no chance
_LEAST_TOKENS = 8  # different ones in a row, for an equal row to mean anything
_BLOCK_ROWS, _MOST_ROWS = 4096, 1 << 20


def check_header(folder: Path, line: Lineage, release: Release, recipes: Sequence[Recipe]) -> Iterator[Claim]:
    """What release.json tells by itself: name, dataset, the licences of the sources."""
    last = line.segments[-1]
    for key, told, follows in (
        ("name", release.name, _recipe(last).name),
        ("dataset_id", release.dataset_id, last.dataset_id),
    ):
        if told != follows:
            raise ReleaseError(
                f"{folder / RELEASE}: {key} is {told[:80]!r}, and the ledger has {follows[:80]!r}: altered"
            )
    if release.data != "none":
        stated: dict[str, set[str]] = {}
        for source in (source for recipe in (_recipe(last), *recipes) for source in recipe.data.sources):
            licence = read_dataset_manifest(folder / "data" / checked_name(source.path)).corpus.licence
            for name in (source.name, source.path):
                stated.setdefault(name, set()).add(licence)
        for name, licence in release.licences.data.items():
            if licence not in stated.get(name, ()):
                raise ReleaseError(
                    f"{folder / RELEASE}: the licence of {name[:80]!r} is {licence[:80]!r}, and its dataset states "
                    f"{', '.join(sorted(stated.get(name, ()))) or 'none'}: one was altered"
                )
        yield Claim("licences of the data", "derivation", "those that the datasets state")
    yield Claim("licence of the weights", "not covered", f"{release.licences.weights}, as whoever made it states")
    if (supply := release.supply) is not None:
        how = f"{supply.name}, {supply.download_location}, as whoever made it states"
        yield Claim("supplier and place of download", "not covered", how)
    yield Claim("version, times and speeds", "not covered", f"weftrain {release.weftrain}; nothing here shows them")


def check_counts(folder: Path, line: Lineage, manifests: Mapping[str, Mapping[str, Any]]) -> Iterator[Claim]:
    """Steps, updates, positions and tokens of every checkpoint, by the ledger and the recipe."""
    ordered = sorted(manifests.values(), key=lambda manifest: manifest["step"])
    first = ordered[0]
    from_seed = line.segments[0].first_step == 0 and first["step"] > 0
    base = {"step": 0, "optimizer_updates": 0, "tokens": 0} if from_seed else first
    for manifest in ordered:
        step = manifest["step"]
        segment = line.segment_of(step)
        skipped = sum(base["step"] < skip <= step for skip in line.skips)
        expected = {
            "optimizer_updates": base["optimizer_updates"] + step - base["step"] - skipped,
            "tokens": base["tokens"] + line.tokens_read(step) - line.tokens_read(base["step"]),
            "position": _recipe(segment).timeline.sample(step),
            "kernels": manifest["fingerprint"].get("kernels", {}),
        }
        for key, value in expected.items():
            if manifest[key] != value:
                shown = f"{value}" if isinstance(value, int) else "that of its fingerprint"
                raise ReleaseError(
                    f"{folder / 'checkpoints' / folder_name(step)}: its {key} is not {shown}, which follows from "
                    "ledger and recipe: one was altered"
                )
    yield Claim("counts of the checkpoints", "derivation", f"updates, tokens, positions of {len(ordered)} checkpoints")


def tokens_before(line: Lineage, manifests: Mapping[str, Mapping[str, Any]]) -> int:
    """Positions read before the ledger's first step: of a run that went on from another's checkpoint."""
    first = min(manifests.values(), key=lambda manifest: int(manifest["step"]))
    return int(first["tokens"]) - line.tokens_read(first["step"])


def check_length(line: Lineage, release: Release) -> Iterator[Claim]:
    """Whether the run was trained to the end of its plan, which nobody can derive who has a shorter record only."""
    recipe, done = _recipe(line.segments[-1]), release.links[-1].stop_step
    if done == recipe.schedule.steps:
        yield Claim("the whole run", "derivation", f"all {done:,} steps of the recipe")
    else:
        why = f"ends after {done:,} of the recipe's {recipe.schedule.steps:,} steps: what came later is not here"
        yield Claim("the whole run", "not covered", why)


def check_lines(folder: Path, line: Lineage, release: Release, tokens_before: int) -> Iterator[Claim]:
    """Every line that the recipe asks for is in the log, its rates and counts are the recipe's, and no other is.

    tokens_before: read before the first step of the ledger. A long run has a million lines: none is kept, only which
    steps have one.
    """
    first, stop = release.links[0].first_step, release.links[-1].stop_step
    segments = [_LoggedSegment(folder, release, line, segment, first, stop) for segment in line.segments]
    segments = [segment for segment in segments if segment.steps]
    begins = [segment.steps.start for segment in segments]
    steps: set[int] = set()
    evaluated: dict[int, set[str]] = {}
    for record in effective_records(folder, kinds=("step", "evaluation")):
        if not first < (completed := record["step"]) <= stop:
            continue
        if record["kind"] == "evaluation":
            evaluated.setdefault(completed, set()).add(record["set"])
            check_perplexity(folder, record)
            continue
        steps.add(completed)
        segment = segments[bisect_right(begins, completed) - 1]
        if not segment.logs(completed):
            raise ReleaseError(
                f"{folder / METRICS}: has a line of step {completed}, which the recipe does not log: one was altered"
            )
        segment.check(record, tokens_before)
    lines = evaluations = 0
    for segment in segments:
        for completed in segment.steps:
            if segment.logs(completed):
                lines += 1
                if completed not in steps:
                    raise _missing(folder, f"the line of step {completed}")
            if segment.plan.wants_evaluation(completed):
                evaluations += len(segment.held_out)
                if lacking := sorted(segment.held_out - evaluated.get(completed, set())):
                    raise _missing(folder, f"the loss of held-out set '{lacking[0]}' of step {completed}")
    yield Claim("lines of the log", "derivation", f"{lines:,} step lines are there, and no other")
    yield Claim("learning rates", "derivation", f"of {lines:,} step lines, from the recipe's schedule")
    yield Claim("lines of held-out losses", "derivation", f"all {evaluations:,} that the recipe asks for")


class _LoggedSegment:
    """A segment's part of a release: its completed steps, and what their lines must say."""

    def __init__(
        self, folder: Path, release: Release, line: Lineage, segment: TrainingSegment, first: int, stop: int
    ) -> None:
        self._folder, self._line, self._recipe = folder, line, _recipe(segment)
        end = stop if segment.stop_step is None else min(stop, segment.stop_step)
        self.steps = range(max(first, segment.first_step) + 1, end + 1)
        self.plan, self._skips = plan_of(self._recipe, segment.first_step), frozenset(line.skips)
        self._groups = parameter_groups(self._recipe.model, self._recipe.optimizer, self._recipe.tuning)
        sources = () if release.data == "none" else self._recipe.data.sources
        self.held_out = {
            source.name
            for source in sources
            if self.steps and read_dataset_manifest(folder / "data" / checked_name(source.path)).heldout is not None
        }

    def logs(self, completed: int) -> bool:
        return self.plan.wants_log(completed) or completed in self._skips

    def check(self, record: Mapping[str, Any], tokens_before: int) -> None:
        """Raises ReleaseError where the line of a step has other rates, tokens or skips than follow."""
        path, completed = self._folder / METRICS, record["step"]
        rates = group_learning_rates(self._groups, self._recipe.schedule, completed - 1)
        _check_rates(path, completed, record.get("learning_rate"), rates)
        if record.get("tokens") != (tokens := tokens_before + self._line.tokens_read(completed)):
            raise ReleaseError(
                f"{path}: step {completed}: tokens is {record.get('tokens')}, and ledger and recipe give {tokens}: one "
                "was altered"
            )
        if bool(record.get("skipped")) != (completed in self._skips):
            which = "skipped" if record.get("skipped") else "not skipped"
            raise ReleaseError(
                f"{path}: step {completed} is {which} there, and the ledger says otherwise: one was altered"
            )


def _missing(folder: Path, what: str) -> ReleaseError:
    return ReleaseError(
        f"{folder / METRICS}: lacks {what}, which the recipe asks for: it was removed; restore the file from a copy"
    )


def _check_rates(path: Path, step: int, found: Any, expected: Mapping[str, float]) -> None:
    if not isinstance(found, Mapping) or found.keys() != expected.keys():
        raise ReleaseError(
            f"{path}: step {step}: its learning rates are not of the groups {', '.join(expected)}: altered"
        )
    for name, rate in expected.items():
        if not math.isclose(float(found[name]), rate, rel_tol=_RATE_TOLERANCE, abs_tol=1e-30):
            raise ReleaseError(
                f"{path}: step {step}: the learning rate of {name} is {found[name]:g}, and the recipe's "
                f"schedule gives {rate:g}: one was altered"
            )


def check_perplexity(folder: Path, record: Mapping[str, Any]) -> None:
    """Of next_token it is exp(loss)."""
    perplexity, loss = record.get("perplexity"), float(record.get("loss", math.nan))
    if perplexity is not None and loss < 700 and not math.isclose(float(perplexity), math.exp(loss), rel_tol=1e-9):
        raise ReleaseError(
            f"{folder / METRICS}: step {record['step']}: the perplexity of {record['set']} is {perplexity:g}, and its "
            f"loss gives {math.exp(loss):g}: one was altered"
        )


def check_beside(folder: Path, line: Lineage, recipe: Mapping[str, Any]) -> Iterator[Claim]:
    """recipe.yaml and environment.json say what recipe.json and the ledger say."""
    path = folder / READABLE_RECIPE
    if path.exists():
        try:
            read = parse_mapping(read_plain(path, "recipe").decode(), LineMap(str(path)))
        except (OSError, ValueError) as error:
            raise ReleaseError(f"{path}: {error}: fetch the release again") from error
        if canonical_json(read) != canonical_json(recipe):
            raise ReleaseError(f"{path}: is not the recipe that recipe.json and the ledger have: one was altered")
        yield Claim("recipe.yaml", "derivation", "the same recipe as recipe.json, and the ledger's last")
    else:
        yield Claim("recipe.yaml", "not covered", "it is not there; recipe.json is")
    path = folder / ENVIRONMENT
    if path.exists():
        if canonical_json(read_json(path)) not in {canonical_json(dict(one.environment)) for one in line.segments}:
            raise ReleaseError(f"{path}: is the environment of no start in the ledger: one was altered")
        yield Claim("environment.json", "derivation", "that of a start in the ledger")
    else:
        yield Claim("environment.json", "not covered", "it is not there; the ledger has one of each start")


def check_beside_weights(
    folder: Path, release: Release, steps: Mapping[str, int], recipes: Mapping[str, Recipe]
) -> Iterator[Claim]:
    """Every file of a revision but its weights is the one that this program writes there, and there is no other.

    steps, recipes: of each checkpoint's root.
    """
    for name, root in revisions(release):
        place, recipe = folder / "revisions" / name, recipes[root]
        beside, ids = _tokenizer(folder, release, recipe)
        expected = small_files(place, recipe.model, getattr(torch, release.weights_dtype), ids, beside)
        present = {path.name for path in place.iterdir()}
        weights = weight_files(place)
        for file in sorted((present | expected.keys()) - {CARD, *weights, *({INDEX} if len(weights) > 1 else ())}):
            if file not in expected:
                raise ReleaseError(
                    f"{place / file}: is none of the files that a revision has ({', '.join(sorted(expected))}, {CARD} "
                    "and those of the weights): do not trust the release"
                )
            if file not in present:
                raise ReleaseError(f"{place / file}: is missing: fetch the release again")
            if read_plain(place / file, "tokenizer" if file == TOKENIZER else "card") != expected[file]:
                raise ReleaseError(
                    f"{place / file}: is not what follows from recipe and dataset at step {steps[root]}: one was "
                    "altered"
                )
    yield Claim("config.json and what lies beside weights", "derivation", f"of {len(revisions(release))} revisions")


def _tokenizer(folder: Path, release: Release, recipe: Recipe) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The tokenizer's files and config.json's keys."""
    if release.data == "none" or not recipe.data.sources:
        return {}, {}
    source = folder / "data" / checked_name(recipe.data.sources[0].path)
    prepared = read_dataset_manifest(source)
    beside, ids = tokenizer_files(
        read_tokenizer(source), prepared.separator_id, prepared.bos_id, recipe.model, f"{source}: tokenizer.json"
    )
    return beside, ids


def check_cards(folder: Path, expected: Mapping[str, str]) -> Iterator[Claim]:
    """The model cards are those that follow from the record. expected: file -> its text, with CARD_MARK, which those of
    earlier versions of this program lack.
    """
    other = []
    for name, text in expected.items():
        if (found := read_plain(folder / name, "card")) != text.encode():
            if CARD_MARK.encode() in found:
                raise ReleaseError(f"{folder / name}: is not the card that follows from the record: it was altered")
            other.append(name)
    ours = {name: text for name, text in expected.items() if name not in other}
    if other:
        yield Claim("model cards", "not covered", f"{len(other)} are not of this version's form: read them as prose")
    else:
        yield Claim("model cards", "derivation", f"{len(expected)} cards, from the record")
    if not has_library():
        yield Claim("metadata of the cards", "not covered", "huggingface_hub is not installed, which reads it")
        return
    for name, text in ours.items():
        if (problem := card_problem(text)) is not None:
            raise ReleaseError(
                f"{folder / name}: its metadata {problem}: correct the licence, and release the run again"
            )
    how = f"huggingface_hub reads that of {len(ours)} cards as it is written"
    yield Claim("metadata of the cards", "derivation", how)


def check_apart(folder: Path, release: Release, recipes: Sequence[Recipe]) -> Iterator[Claim]:
    """No held-out set is made of rows of its own training set. Which documents are held out is a rule of their text
    (data_prep/heldout.py), and the texts are not here; equal rows are. Of a large set blocks all over it are looked at.
    """
    name = "held-out sets are no training data"
    if release.data != "shards":
        yield Claim(name, "not covered", "the release has no shards")
        return
    rows = twins = looked_at = 0
    for path in sorted({source.path for recipe in recipes for source in recipe.data.sources}):
        place = folder / "data" / checked_name(path)
        if read_dataset_manifest(place).heldout is None:
            continue
        held = set(_row_hashes(open_set(place, "heldout")[1]))
        if not held:
            continue
        train = open_set(place, "train")[1]
        found = {each for each in _row_hashes(train) if each in held}
        looked_at += min(train.num_rows, _MOST_ROWS)
        rows, twins = rows + len(held), twins + len(found)
        if len(found) > _TWIN_SHARE * len(held) * min(1.0, _MOST_ROWS / train.num_rows):
            raise ReleaseError(
                f"{place}: {len(found):,} of {len(held):,} held-out rows are rows of the training set, and no text is "
                "in both: one was altered"
            )
    how = f"{twins:,} of {rows:,} held-out rows are among {looked_at:,} rows for training; the texts are not here"
    yield Claim(name, "derivation", how)


def _row_hashes(shards: ShardSet) -> Iterator[int]:
    """A hash of every row that has a few different tokens, of at most so many rows."""
    length = shards.manifest.sequence_length
    stride = _BLOCK_ROWS * max(1, -(-shards.num_rows // _MOST_ROWS))
    for first in range(0, shards.num_rows, stride):
        numbers = np.arange(first, min(first + _BLOCK_ROWS, shards.num_rows), dtype=np.int64)
        readers, positions = shards.positions(numbers)
        ids = np.empty((len(numbers), length + 1), dtype=np.int64)
        read_rows(ids, readers, positions)
        yield from (hash(row.tobytes()) for row in ids if len(np.unique(row)) >= _LEAST_TOKENS)


def _recipe(segment: TrainingSegment) -> Recipe:
    return recorded_recipe(dict(segment.recipe), f"{LEDGER}:{segment.entry + 1}").recipe
