"""A dataset that is there already, compared with what is asked for: it is that, or the difference is named.

Whatever determines its bytes must be equal. So must what it says of itself and of the documents that may be missing; what cannot change a
token, such as which implementation encoded, is reported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from weftrain.core.dataset import MANIFEST, Manifest, ShardSet, open_inputs, read_manifest
from weftrain.core.errors import DataError
from weftrain.data_prep.plan import NOT_STATED, Plan, Progress, preparation
from weftrain.data_prep.shares import share_sha256

_REMEDY = "give another --name, or remove it"


def compare_existing(folder: Path, plan: Plan, max_failures: int, progress: Progress) -> tuple[Manifest, tuple[str, ...]]:
    """The manifest of a folder that is what was asked for, and what else differs. Raises DataError where it is another, or damaged."""
    if not (folder / MANIFEST).exists():
        raise DataError(f"{folder}: exists and is no dataset; {_REMEDY}")
    manifest = read_manifest(folder)
    wanted = preparation(plan.settings, plan.inputs)
    del wanted["heldout_rule"]  # a dataset keeps the one that it was made by, and stays what it is
    for key, value in wanted.items():
        if manifest.preparation.get(key) != value:
            raise DataError(f"{folder}: was prepared with {key} {manifest.preparation.get(key)!r}, not {value!r}; {_REMEDY}")
    licence, failed = plan.inputs.licence, manifest.documents.failed
    if licence not in (NOT_STATED, manifest.corpus.licence):
        raise DataError(
            f"{folder}: is recorded with licence {manifest.corpus.licence!r}, not {licence!r}: leave --licence out, or {_REMEDY}"
        )
    if failed > max_failures:
        raise DataError(
            f"{folder}: {failed:,} documents could not be read when it was prepared ({folder / 'failures.jsonl'}), --max-failures allows "
            f"{max_failures:,}: allow them, or {_REMEDY}"
        )
    _compare_inputs(folder, manifest, plan, progress)
    for set_name in manifest.sets:
        ShardSet(folder, manifest, set_name)
    return manifest, tuple(_differences(manifest, plan))


def _differences(manifest: Manifest, plan: Plan) -> Iterator[str]:
    """What is recorded otherwise than asked for, and changes no token."""
    engine = manifest.tokenization.engine
    if plan.engine not in ("auto", engine):
        yield f"its documents were encoded by {engine}, not by {plan.engine}; the ids are the same"
    skipped = dict(Counter(file.reason for file in plan.inputs.skipped))
    if skipped != manifest.inputs_skipped:
        now, then = (
            ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items())) or "none"
            for counts in (skipped, manifest.inputs_skipped)
        )
        yield f"files left out: {now}; when it was prepared: {then}"


def _compare_inputs(folder: Path, manifest: Manifest, plan: Plan, progress: Progress) -> None:
    """Raises DataError where the plan's files are not those that the dataset was made of."""
    files = plan.inputs.files
    if manifest.corpus.files != len(files):
        raise DataError(f"{folder}: was prepared from {manifest.corpus.files:,} files, and these are {len(files):,}; {_REMEDY}")
    with open_inputs(folder, manifest) as recorded:
        for number, (file, entry) in enumerate(zip(files, recorded, strict=False)):  # what was left out comes after
            if (entry.name, entry.num_bytes) != (file.name, file.num_bytes):
                was, given = (f"'{one.name}' of {one.num_bytes:,} bytes" for one in (entry, file))
                raise DataError(f"{folder}: was prepared from other text: file {number + 1} was {was}, and here is {given}; {_REMEDY}")
        shares = Counter[int]()  # of each file so far
        for done, part in enumerate(plan.parts, start=1):
            for share in part.shares:
                hashes, place = recorded[share.file].sha256, shares[share.file]
                if place >= len(hashes) or hashes[place] != share_sha256(files[share.file], share):
                    raise DataError(f"{folder}: was prepared from other text: '{files[share.file].name}' held something else; {_REMEDY}")
                shares[share.file] += 1
            progress("compare inputs", done, len(plan.parts), "parts")
