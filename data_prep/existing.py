"""An existing dataset is compared with what was asked for: either it is that dataset, or the difference is an error.

Whatever determines bytes must be equal, and so must the licence and the failure budget. A difference that cannot change
a token, such as the engine that encoded, is only reported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

from weftrain.core.errors import DataError
from weftrain.core.formats.dataset import MANIFEST, open_inputs, read_dataset_manifest
from weftrain.core.formats.dataset_manifest import DatasetManifest
from weftrain.core.formats.shard_set import ShardSet
from weftrain.data_prep.choices import NOT_STATED
from weftrain.data_prep.growth import joined, parent_manifest
from weftrain.data_prep.readers.shares import share_sha256
from weftrain.data_prep.stages.plan import PrepPlan, Progress
from weftrain.data_prep.stages.settings import preparation

_REMEDY = "give another --name, or remove it"


def compare_existing(
    folder: Path, plan: PrepPlan, max_failures: int, progress: Progress
) -> tuple[DatasetManifest, tuple[str, ...]]:
    """The manifest of a folder that is what was asked for, and other differences. Raises DataError where it is not."""
    if not (folder / MANIFEST).exists():
        raise DataError(f"{folder}: exists and is no dataset; {_REMEDY}")
    manifest = read_dataset_manifest(folder)
    wanted = preparation(plan.settings, plan.inputs)
    del wanted["heldout_rule"]  # a dataset keeps the one that it was made by, and stays what it is
    for key, value in wanted.items():
        if manifest.preparation.get(key) != value:
            raise DataError(
                f"{folder}: was prepared with {key} {manifest.preparation.get(key)!r}, not {value!r}; {_REMEDY}"
            )
    before = _parent(folder, manifest, plan)
    licence = plan.inputs.licence if before is None else joined(before.corpus.licence, plan.inputs.licence)
    if plan.inputs.licence != NOT_STATED and licence != manifest.corpus.licence:
        raise DataError(
            f"{folder}: is recorded with licence {manifest.corpus.licence!r}, not {licence!r}: leave --licence out, or "
            f"{_REMEDY}"
        )
    failed = manifest.documents.failed - (0 if before is None else before.documents.failed)
    if failed > max_failures:
        raise DataError(
            f"{folder}: {failed:,} documents could not be read when it was prepared ({folder / 'failures.jsonl'}), "
            f"--max-failures allows {max_failures:,}: allow them, or {_REMEDY}"
        )
    _compare_inputs(folder, manifest, plan, progress)
    for set_name in manifest.sets:
        ShardSet(folder, manifest, set_name)
    return manifest, tuple(_differences(manifest, plan, {} if before is None else before.inputs_skipped))


def _parent(folder: Path, manifest: DatasetManifest, plan: PrepPlan) -> DatasetManifest | None:
    """The manifest of the parent. Raises DataError where it is not the dataset named with --grow."""
    grew_from = manifest.parents[-1] if manifest.parents else None
    if plan.parent is None or grew_from is None or grew_from.root != plan.parent.root:
        if plan.parent is None and grew_from is None:
            return None
        was = (
            "was not grown from another"
            if grew_from is None
            else f"grew from '{grew_from.name}', manifest {grew_from.root[:12]}"
        )
        given = (
            "--grow is not given"
            if plan.parent is None
            else f"--grow names {plan.parent.folder}, manifest {plan.parent.root[:12]}"
        )
        raise DataError(f"{folder}: {was}, and {given}; {_REMEDY}")
    return parent_manifest(plan)


def _differences(manifest: DatasetManifest, plan: PrepPlan, before: Mapping[str, int]) -> Iterator[str]:
    """What is recorded differently from what was asked for, but changes no token."""
    engine = manifest.tokenization.engine
    if plan.engine not in ("auto", engine):
        yield f"its documents were encoded by {engine}, not by {plan.engine}; the ids are the same"
    skipped = dict(Counter(file.reason for file in plan.inputs.skipped))
    recorded = dict(Counter(manifest.inputs_skipped) - Counter(before))  # without what the parent skipped
    if skipped != recorded:
        now, then = (
            ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items())) or "none"
            for counts in (skipped, recorded)
        )
        yield f"files skipped: {now}; when it was prepared: {then}"


def _compare_inputs(folder: Path, manifest: DatasetManifest, plan: PrepPlan, progress: Progress) -> None:
    """Raises DataError where the plan's files are not those that the dataset was made of."""
    files, first = plan.inputs.files, 0 if plan.parent is None else plan.parent.files
    if manifest.corpus.files - first != len(files):
        raise DataError(
            f"{folder}: was prepared from {manifest.corpus.files - first:,} files, and these are {len(files):,}; "
            f"{_REMEDY}"
        )
    with open_inputs(folder, manifest) as recorded:
        # what was skipped comes after
        for number, (file, entry) in enumerate(zip(files, islice(recorded, first, None), strict=False)):
            if (entry.name, entry.num_bytes) != (file.name, file.num_bytes):
                was, given = (f"'{one.name}' of {one.num_bytes:,} bytes" for one in (entry, file))
                raise DataError(
                    f"{folder}: was prepared from other text: file {number + 1} was {was}, and here is {given}; "
                    f"{_REMEDY}"
                )
        shares = Counter[int]()  # of each file so far
        for done, part in enumerate(plan.parts, start=1):
            for share in part.shares:
                hashes, place = recorded[first + share.file].sha256, shares[share.file]
                if place >= len(hashes) or hashes[place] != share_sha256(files[share.file], share):
                    raise DataError(
                        f"{folder}: was prepared from other text: '{files[share.file].name}' held something else; "
                        f"{_REMEDY}"
                    )
                shares[share.file] += 1
            progress("compare inputs", done, len(plan.parts), "parts")
