"""`weftrain prep` and what training says of a dataset that is missing, damaged or does not fit: before step 0, one line, exit code 2."""

from __future__ import annotations

import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

Weftrain = Callable[..., Result]
SMALL = ["model.num_layers=1", "data.sequence_length=32", "batch.global_batch_size=2", "batch.micro_batch_size=2", "schedule.steps=2"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for source in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:30]:
        (folder / source.name).write_bytes(source.read_bytes()[:15_000])
    return folder


@pytest.fixture
def dataset(weftrain: Weftrain, texts: Path, tmp_path: Path) -> Path:
    arguments = ["--name", "python_stdlib", "--vocab-size", "512", "--sequence-length", "32", "--heldout-fraction", "0.2"]
    result = weftrain("prep", texts, "--output", tmp_path / "datasets", *arguments)
    assert result.exit_code == 0, result.output
    assert "is ready" in result.output
    return tmp_path / "datasets" / "python_stdlib"


def train(weftrain: Weftrain, tmp_path: Path, *arguments: str) -> Result:
    return weftrain("train", "crystal_demo", "--runs", tmp_path / "runs", f"data.root={tmp_path / 'datasets'}", *SMALL, *arguments)


def test_prep_again_and_with_other_settings(weftrain: Weftrain, texts: Path, dataset: Path, tmp_path: Path) -> None:
    arguments = ["--output", tmp_path / "datasets", "--name", "python_stdlib", "--vocab-size", "512", "--heldout-fraction", "0.2"]
    again = weftrain("prep", texts, *arguments, "--sequence-length", "32")
    assert again.exit_code == 0
    assert "is up to date" in again.output
    other = weftrain("prep", texts, *arguments, "--sequence-length", "16")
    assert other.exit_code == 2
    assert str(dataset) in other.output


def test_prep_needs_a_name_and_inputs_that_exist(weftrain: Weftrain, texts: Path, tmp_path: Path) -> None:
    assert "--name" in weftrain("prep", texts).output
    missing = weftrain("prep", tmp_path / "absent.jsonl", "--name", "x", "--output", tmp_path)
    assert missing.exit_code == 2
    assert "absent.jsonl" in missing.output
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"txt": "bad"}\n')
    bad = weftrain("prep", tmp_path / "bad.jsonl", "--name", "x", "--output", tmp_path / "out")
    assert bad.exit_code == 2
    assert "bad.jsonl:2" in bad.output


def test_train_and_eval_on_it(weftrain: Weftrain, dataset: Path, tmp_path: Path) -> None:
    result = train(weftrain, tmp_path, "log.evaluate_every_steps=2")
    assert result.exit_code == 0, result.output
    assert "held-out     python_stdlib" in result.output
    evaluated = weftrain("eval", tmp_path / "runs" / "crystal_demo", "--rows", "4")
    assert evaluated.exit_code == 0, evaluated.output
    assert "128" in evaluated.output  # 4 rows x 32 tokens
    assert weftrain("eval", tmp_path).exit_code == 2


@pytest.mark.parametrize(
    ("damage", "arguments", "expected"),
    [
        (lambda folder: shutil.rmtree(folder), (), "weftrain prep"),
        (lambda folder: (folder / "train" / "00000.h5").unlink(), (), "train/00000.h5"),
        (lambda folder: _truncate(folder / "train" / "00000.h5"), (), "train/00000.h5"),
        (lambda folder: _flip(folder / "train" / "00000.h5", 0.5), (), "train/00000.h5"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), (), "tokenizer"),
        (lambda folder: _flip(folder / "manifest.json", 0.5), (), "manifest.json"),
        (lambda folder: None, ("model.vocab_size=500",), "vocab"),
        (lambda folder: None, ("data.sequence_length=16",), "sequence"),
        (lambda folder: None, ("data.sources.0.fim={rate: 0.5, spm_share: 0.5}",), "fim"),
    ],
)
def test_a_dataset_that_cannot_be_used(
    weftrain: Weftrain, dataset: Path, tmp_path: Path, damage: Callable[[Path], object], arguments: tuple[str, ...], expected: str
) -> None:
    damage(dataset)
    result = train(weftrain, tmp_path, *arguments)
    assert result.exit_code == 2, result.output
    assert expected in result.output
    assert "Traceback" not in result.output
    assert len([line for line in result.output.splitlines() if line.startswith("weftrain: ")]) == 1


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path: Path, place: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 4
    path.write_bytes(data)
