"""`weftrain bench compare` of reports: the table, JSON, the picture, narrow terminals and exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from json_page import documented

from weftrain.analysis.bench.report import BenchReport
from weftrain.cli.main import main
from weftrain.core.recipe_file import load_recipe

TINY = ["model.num_layers=1", "model.vocab_size=300", "data.sequence_length=32", "--backend", "null", "--steps", "6"]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three reports; the second has slower steps, the third another CPU."""
    folder = tmp_path_factory.mktemp("reports")
    result = CliRunner().invoke(main, ["bench", "train", "bench_70m", *TINY, "--report", str(folder / "a")])
    assert result.exit_code == 0, result.output
    found = json.loads((folder / "a" / "report.json").read_bytes())
    found["rounds"] = [[2.0, 1.0, 1.01, 1.02, 1.01, 1.0]]
    found["probes"] = [[]]
    for name, factor, cpu in (("a", 1, None), ("b", 2, None), ("c", 4, "another CPU \x1b[2J")):
        found["environment"]["cpu"] = cpu or found["environment"]["cpu"]
        rounds = [[ms * factor for ms in values] for values in found["rounds"]]
        (folder / f"{name}.json").write_text(json.dumps({**found, "rounds": rounds}))
        BenchReport.model_validate_json((folder / f"{name}.json").read_bytes())
    return [folder / f"{name}.json" for name in "abc"]


def test_a_table_of_three(weftrain: Callable[..., Result], reports: list[Path], tmp_path: Path) -> None:
    picture = tmp_path / "speeds.svg"
    result = weftrain("bench", "compare", *map(str, reports), "--plot", str(picture))
    assert result.exit_code == 0, result.output
    assert "step time B / A = 2.0000" in result.output
    assert "C differs: environment.cpu: " in result.output
    assert "of one round each" in result.output
    assert "\x1b" not in result.output
    assert b"<svg" in picture.read_bytes()
    slower = weftrain("bench", "compare", *map(str, reports), "--fail-above", "50")
    assert slower.exit_code == 5
    assert weftrain("bench", "compare", *map(str, reports[::-1]), "--fail-above", "50").exit_code == 0


def test_json_has_the_fields_of_the_page(weftrain: Callable[..., Result], reports: list[Path]) -> None:
    found = json.loads(weftrain("bench", "compare", *map(str, reports), "--json").stdout)
    assert set(found["sides"][0]) | {"sides"} == documented("bench compare A B ...")
    assert [side["time_ratio_unit"] for side in found["sides"]] == [None, "wall clock", "wall clock"]


def test_forty_columns(weftrain: Callable[..., Result], reports: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    result = weftrain("bench", "compare", *map(str, reports))
    assert "recipe: bench_70m-null-bfloat16" in result.output.splitlines()


@pytest.mark.parametrize(
    ("count", "more", "words"),
    [
        (1, [], "1 given: give two reports or more"),
        (3, ["--rounds", "2"], "give 2 rounds of two sides"),
        (2, ["--rounds", "2"], "2 given: give 2 rounds"),
    ],
)
def test_reports_that_do_not_come_out_even(
    weftrain: Callable[..., Result], reports: list[Path], count: int, more: list[str], words: str
) -> None:
    result = weftrain("bench", "compare", *map(str, reports[:count]), *more)
    assert (result.exit_code, words in result.output) == (2, True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rounds": []}, "no step after the warm-up"),
        ({"rounds": [[1.0]]}, "no step after the warm-up"),
        ({"rounds": [[1.0, 2.0, 0.0, 1.0]]}, "not above 0"),
        ({"probes": [[], []]}, "another number of rounds"),
        ({"environment": {}}, "'environment.device' is missing"),
        ({"identity": {"recipe": {}}}, "'identity.recipe_sha256' is missing"),
        ({"shape": "x"}, "key 'shape'"),
    ],
)
def test_a_report_that_cannot_be(
    weftrain: Callable[..., Result], reports: list[Path], tmp_path: Path, change: dict[str, object], words: str
) -> None:
    (tmp_path / "report.json").write_text(json.dumps(json.loads(reports[0].read_bytes()) | change))
    result = weftrain("bench", "compare", str(reports[0]), str(tmp_path))
    assert (result.exit_code, words in result.output) == (2, True), result.output


def test_a_submission_and_its_check(weftrain: Callable[..., Result], reports: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "submission"
    result = weftrain("bench", "train", "bench_70m", *TINY, "--submission", str(folder))
    assert result.exit_code == 0, result.output
    result = weftrain("bench", "verify", str(folder))
    assert result.exit_code == 0, result.output
    assert "every byte is as it was sealed" in result.output
    assert result.output.count("not proven: ") == 3
    again = weftrain("bench", "train", "bench_70m", *TINY, "--submission", str(folder))
    assert (again.exit_code, "is there already: name a new folder" in again.output) == (2, True)
    copy = weftrain("bench", "submission", str(folder), str(tmp_path / "copy"))
    assert copy.exit_code == 0, copy.output
    (folder / "steps.json").write_text("{}")
    result = weftrain("bench", "verify", str(folder))
    assert (result.exit_code, "WRONG: steps.json: its bytes are not those" in result.output) == (1, True)
    assert weftrain("bench", "verify", str(tmp_path / "none")).exit_code == 2
    invented = weftrain("bench", "submission", str(reports[0]), str(tmp_path / "invented"))
    assert (invented.exit_code, "cannot be submitted: speed." in invented.output) == (2, True), invented.output


def test_mlperf_log_of_a_run(weftrain: Callable[..., Result], tmp_path: Path) -> None:
    """What the lines are: tests/analysis/bench/test_mlperf.py."""
    recipe = load_recipe("llama31_8b").recipe.model_dump(mode="json")
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    start = {"kind": "start", "time": 100.0, "step": 0}
    evaluation = {"kind": "evaluation", "time": 520.0, "step": 384, "set": "c4", "loss": 3.2, "rows": 1024}
    (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(start)}\n{json.dumps(evaluation)}\n")
    file = tmp_path / "result_0.txt"
    result = weftrain("bench", "mlperf", str(tmp_path), str(file), "--org", "us", "--platform", "8xH200")
    assert result.exit_code == 0, result.output
    lines = file.read_text().splitlines()
    assert all(line.startswith(":::MLLOG {") for line in lines)
    assert f"wrote {len(lines)} lines" in result.output
