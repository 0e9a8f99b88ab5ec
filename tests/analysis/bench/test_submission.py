"""A submission is checked byte by byte and figure by figure: what was altered is found, also where the forger sealed
the folder anew; what remains to be believed is listed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from weftrain.analysis.bench.report import BenchReport, ReportError
from weftrain.analysis.bench.submission import (
    FILES,
    FORMAT,
    MANIFEST,
    SubmissionError,
    check_submission,
    write_submission,
)
from weftrain.core.formats.canonical import sealed


@pytest.fixture
def folder(report: BenchReport, tmp_path: Path) -> Path:
    write_submission(report, tmp_path / "submission")
    return tmp_path / "submission"


def problems(folder: Path) -> list[str]:
    with pytest.raises(SubmissionError) as caught:
        check_submission(folder)
    return caught.value.problems


def seal_again(folder: Path) -> None:
    """What a forger does after changing a file."""
    listed = {}
    for name in FILES:
        data = (folder / name).read_bytes()
        listed[name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    (folder / MANIFEST).write_bytes(sealed({"format": FORMAT, "version": 1, "files": listed}))


def leaves(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    empty = True
    for key, item in items:
        empty = False
        yield from leaves(item, (*at, key))
    if empty:
        yield at


def changed(value: Any, at: tuple[Any, ...]) -> Any:
    """A copy with the leaf at `at` altered."""
    copy = json.loads(json.dumps(value))
    holder = copy
    for key in at[:-1]:
        holder = holder[key]
    old = holder[at[-1]]
    match old:
        case bool():
            holder[at[-1]] = not old
        case int():
            holder[at[-1]] = old + 1
        case float():
            holder[at[-1]] = old * 1.001 + 1e-6
        case str():
            holder[at[-1]] = old + "x"
        case None:
            holder[at[-1]] = 0.5
        case _:
            holder[at[-1]] = [1.0] if isinstance(old, list) else {"x": 1}
    return copy


def test_it_is_whole_and_says_what_the_report_says(folder: Path, report: BenchReport) -> None:
    found, root = check_submission(folder)
    assert found == BenchReport.model_validate_json(report.model_dump_json())
    assert len(root) == 64
    assert sorted(os.listdir(folder)) == sorted([*FILES, MANIFEST])
    assert os.listdir(folder.parent) == ["submission"]
    with pytest.raises(ReportError, match="is there already"):
        write_submission(report, folder)


def test_any_byte_of_any_file_that_changes_is_found(folder: Path) -> None:
    for name in (*FILES, MANIFEST):
        data = (folder / name).read_bytes()
        for place in range(0, len(data), max(1, len(data) // 25)):
            (folder / name).write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            assert problems(folder)[0].startswith(name)
        for shorter in (b"", data[:-1], data + b"\n"):
            (folder / name).write_bytes(shorter)
            assert problems(folder)[0].startswith(name)
        (folder / name).write_bytes(data)
    check_submission(folder)


@pytest.mark.parametrize(
    ("section", "claims"),  # claims: what a forger who seals the folder anew can change alone, since nothing implies it
    [
        ("name", ()),
        ("speed", ()),
        ("shape", ()),
        ("efficiency", ("measured_peak_origin", "sourced_peak_origin")),
        ("identity", ("version", "commit", "dirty", "command", "dataset_id")),
        ("correctness", ("checked_steps", "largest_relative_difference", "words")),
        ("breakdown_ms", ()),
        ("rounds", ()),
        ("probes", ()),
        ("losses", ()),
        ("environment", ()),
    ],
)
def test_each_field_that_follows_from_others_is_checked(folder: Path, section: str, claims: tuple[str, ...]) -> None:
    """Leaves of the report are altered in turn, and the folder sealed anew."""
    whole = json.loads((folder / "report.json").read_bytes())
    chosen = [at for at in leaves(whole) if at[0] == section]
    if section == "identity":  # every 12th key of the recipe is enough: it is compared as a whole
        chosen = [at for at in chosen if at[1] != "recipe"] + [at for at in chosen if at[1] == "recipe"][::12]
    unseen = []
    for at in chosen:
        (folder / "report.json").write_text(json.dumps(changed(whole, at)))
        seal_again(folder)
        try:
            check_submission(folder)
        except SubmissionError:
            continue
        unseen.append(at[1])
    assert chosen
    assert set(unseen) <= set(claims)


@pytest.mark.parametrize("name", ["environment.json", "steps.json"])
def test_a_file_beside_the_report_that_differs_from_it(folder: Path, name: str) -> None:
    whole = json.loads((folder / name).read_bytes())
    for at in leaves(whole):
        (folder / name).write_text(json.dumps(changed(whole, at)))
        seal_again(folder)
        assert problems(folder)[0].startswith(name), at


def test_another_recipe_is_found(folder: Path) -> None:
    path = folder / "recipe.yaml"
    path.write_text(path.read_text().replace("seed: 0", "seed: 1"))
    seal_again(folder)
    assert any("recipe_sha256" in line for line in problems(folder))


def test_files_that_are_missing_or_more(folder: Path, tmp_path: Path) -> None:
    (folder / "more.txt").write_text("x")
    assert problems(folder) == ["more.txt: is not part of a submission"]
    (folder / "more.txt").unlink()
    (folder / "folder").mkdir()
    assert problems(folder) == ["folder: is not part of a submission"]
    (folder / "folder").rmdir()
    outside = tmp_path / "outside.json"
    (folder / "steps.json").rename(outside)
    assert problems(folder) == ["steps.json: is missing"]
    (folder / "steps.json").symlink_to(outside)
    assert problems(folder)[0].startswith("steps.json: is a symbolic link")
    (folder / "steps.json").unlink()
    os.mkfifo(folder / "steps.json")
    assert problems(folder)[0].startswith("steps.json: ")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe",
        b"[" * 100_000,
        b"{}",
        b"null",
        b'{"rounds": [[NaN]], "probes": [[]], "losses": []}',
        b'{"rounds": [[1e999]], "probes": [[]], "losses": []}',
        b'{"rounds": 1, "rounds": 2}',
        b'{"rounds": [["1"]], "probes": [], "losses": []}',
    ],
)
@pytest.mark.parametrize("name", ["report.json", "environment.json", "steps.json", "recipe.yaml", MANIFEST])
def test_hostile_files(folder: Path, name: str, data: bytes) -> None:
    (folder / name).write_bytes(data)
    if name != MANIFEST:
        seal_again(folder)
    assert problems(folder)[0].startswith(name)


def test_more_steps_than_can_be_evaluated(folder: Path) -> None:
    whole = json.loads((folder / "report.json").read_bytes())
    whole["rounds"] = [[1.0] * 60_000]
    whole["probes"] = [[]]
    (folder / "report.json").write_text(json.dumps(whole))
    seal_again(folder)
    assert "more than 50,000 steps" in problems(folder)[0]


def test_a_failed_benchmark_is_not_submitted(report: BenchReport, tmp_path: Path) -> None:
    wrong = {"largest_relative_difference": 0.5, "passed": False}
    failed = report.model_copy(update={"correctness": report.correctness.model_copy(update=wrong)})
    with pytest.raises(ReportError, match="the benchmark failed"):
        write_submission(failed, tmp_path / "submission")
    endless = report.model_copy(update={"losses": [float("nan")] * len(report.losses)})
    with pytest.raises(ReportError, match="cannot be submitted"):
        write_submission(endless, tmp_path / "submission")
    assert list(tmp_path.iterdir()) == []
