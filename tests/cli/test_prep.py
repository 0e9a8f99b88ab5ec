"""`weftrain prep` and what training says of a dataset that is missing, damaged or does not fit: before step 0, one
line, exit code 2.
"""

from __future__ import annotations

import gzip
import io
import re
import shlex
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from weftrain.cli.main import main
from weftrain.cli.prep import prep
from weftrain.cli.prep_report import epoch_lines
from weftrain.core.formats.dataset import read_dataset_manifest
from weftrain.core.formats.dataset_manifest import Chunks
from weftrain.data_prep.inputs.standard_input import forget, spool

Weftrain = Callable[..., Result]
SMALL = [
    "model.num_layers=1",
    "data.sequence_length=32",
    "batch.global_batch_size=2",
    "batch.micro_batch_size=2",
    "schedule.steps=2",
]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for source in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:30]:
        (folder / source.name).write_bytes(source.read_bytes()[:15_000])
    return folder


@pytest.fixture
def dataset(weftrain: Weftrain, texts: Path, tmp_path: Path) -> Path:
    arguments = [
        "--name",
        "python_stdlib",
        "--vocab-size",
        "512",
        "--sequence-length",
        "32",
        "--heldout-fraction",
        "0.2",
    ]
    result = weftrain("prep", texts, "--output", tmp_path / "datasets", *arguments)
    assert result.exit_code == 0, result.output
    assert "is ready" in result.output
    return tmp_path / "datasets" / "python_stdlib"


def train(weftrain: Weftrain, tmp_path: Path, *arguments: str) -> Result:
    return weftrain(
        "train", "crystal_demo", "--runs", tmp_path / "runs", f"data.root={tmp_path / 'datasets'}", *SMALL, *arguments
    )


def test_prep_again_and_with_other_settings(weftrain: Weftrain, texts: Path, dataset: Path, tmp_path: Path) -> None:
    arguments = [
        "--output",
        tmp_path / "datasets",
        "--name",
        "python_stdlib",
        "--vocab-size",
        "512",
        "--heldout-fraction",
        "0.2",
    ]
    again = weftrain("prep", texts, *arguments, "--sequence-length", "32")
    assert again.exit_code == 0
    assert "is up to date" in again.output
    other = weftrain("prep", texts, *arguments, "--sequence-length", "16")
    assert other.exit_code == 2
    assert str(dataset) in other.output


def test_the_help_names_every_option_once(weftrain: Weftrain) -> None:
    shown = re.findall(r"^  (--[a-z-]+)", weftrain("prep", "--help").output, re.MULTILINE)
    assert sorted(shown) == sorted(option.opts[0] for option in prep.params if isinstance(option, click.Option))


@pytest.mark.parametrize("option", [["--fim-mode", "context"], ["--fim-spm-share", "0.5"]])
def test_an_option_of_fim_without_a_rate_is_refused(
    weftrain: Weftrain, texts: Path, tmp_path: Path, option: list[str]
) -> None:
    refused = weftrain("prep", texts, "--name", "x", "--output", tmp_path, *option)
    assert refused.exit_code == 2
    assert f"{option[0]} needs --fim-rate" in refused.output


def test_names_and_addresses_that_cannot_be_are_refused_before_the_work(
    weftrain: Weftrain, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for arguments, message in (
        (["--name", "", "--output", tmp_path / "datasets"], "give the dataset a --name"),
        (["--name", "x", "--output", ""], "--output is ''"),
        (["--name", "x", "--output", "absent://bucket/datasets"], "absent://bucket/datasets: no such file system"),
    ):
        refused = weftrain("prep", texts, *arguments)
        assert refused.exit_code == 2
        assert message in refused.output
    assert not list(tmp_path.iterdir())


def test_prep_needs_a_name_and_inputs_that_exist(weftrain: Weftrain, texts: Path, tmp_path: Path) -> None:
    assert "--name" in weftrain("prep", texts).output
    missing = weftrain("prep", tmp_path / "absent.jsonl", "--name", "x", "--output", tmp_path)
    assert missing.exit_code == 2
    assert "absent.jsonl" in missing.output
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"txt": "bad"}\n')
    bad = weftrain("prep", tmp_path / "bad.jsonl", "--name", "x", "--output", tmp_path / "out")
    assert bad.exit_code == 2
    assert "bad.jsonl:2" in bad.output


def test_the_command_that_prep_prints_trains_as_it_is(weftrain: Weftrain, texts: Path, tmp_path: Path) -> None:
    (texts / "_SUCCESS").touch()
    arguments = [
        "--name",
        "sets/2024",
        "--vocab-size",
        "512",
        "--sequence-length",
        "64",
        "--fim-rate",
        "0.5",
        "--heldout-fraction",
        "0.2",
    ]
    for state in ("is ready", "is up to date"):
        made = weftrain("prep", texts, "--output", tmp_path / "data sets", *arguments)
        assert made.exit_code == 0, made.output
        assert state in made.output
        manifest = read_dataset_manifest(tmp_path / "data sets" / "sets" / "2024")
        lines = {line.split()[0]: line for line in made.output.splitlines() if line.startswith("  ")}
        assert (
            f"{manifest.documents.read:,} documents, {manifest.documents.duplicates} duplicates dropped, 0 failed"
            in lines["read"]
        )
        assert f"{manifest.train.n_examples:,} rows x 64 = {manifest.train.tokens:,} tokens" in lines["train"]
        assert "skipped  1 entry beside the inputs" in lines["skipped"]
        assert "marker file (1): texts" in made.output
        assert f"{manifest.train.n_examples // 16:,} steps of 16 rows (amber_demo)" in lines["epoch"]
    command = shlex.split(lines["next"].removeprefix("  next"))
    assert command[:3] == ["weftrain", "train", "amber_demo"]
    assert all(len(override.split("=", 1)) == 2 for override in command[3:-2])
    done = weftrain(*command[1:], "--runs", tmp_path / "runs", *SMALL[:1], *SMALL[-1:], "log.evaluate_every_steps=0")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "runs" / "2024").is_dir()


@pytest.mark.prove
@pytest.mark.parametrize(
    "options",
    [
        ["--packing", "best_fit"],
        ["--fim-rate", "0.5", "--fim-mode", "released"],
        ["--fim-rate", "0.5", "--fim-mode", "context"],
        ["--chunks", "2", "--global-batch-size", "4"],
        ["--sequence-length", "600"],
    ],
    ids=" ".join,
)
def test_the_printed_command_fits_every_kind_of_dataset(
    weftrain: Weftrain, texts: Path, tmp_path: Path, options: list[str]
) -> None:
    arguments = ["--name", "yes", "--vocab-size", "512", "--sequence-length", "64", "--heldout-fraction", "0", *options]
    made = weftrain("prep", texts, "--output", tmp_path, *arguments)
    assert made.exit_code == 0, made.output
    (line,) = [line for line in made.output.splitlines() if line.startswith("  next")]
    command = shlex.split(line)[2:]
    done = weftrain(
        *command, "--runs", tmp_path / "runs", "model.num_layers=1", "schedule.steps=1", "batch.global_batch_size=16"
    )
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("columns", ["30", "200"])
def test_lines_are_whole_at_any_width_and_without_colour(
    weftrain: Weftrain, dataset: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    for name, value in (("COLUMNS", columns), ("NO_COLOR", "1"), ("FORCE_COLOR", "1")):
        monkeypatch.setenv(name, value)
    arguments = [
        "--name",
        "python_stdlib",
        "--vocab-size",
        "512",
        "--sequence-length",
        "32",
        "--heldout-fraction",
        "0.2",
    ]
    again = weftrain("prep", texts, "--output", tmp_path / "datasets", *arguments)
    assert again.exit_code == 0, again.output
    (line,) = [line for line in again.output.splitlines() if "weftrain train" in line]
    assert (
        f"weftrain train amber_demo data.root={tmp_path}/datasets model.vocab_size=544 data.sequence_length=32" in line
    )
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", again.output)  # no colour


def test_steps_an_epoch_of_each_recipe_that_the_rows_fit(dataset: Path) -> None:
    manifest = read_dataset_manifest(dataset)
    rows = manifest.train.epochs[0]
    assert epoch_lines(manifest) == [f"{rows // 16:,} steps of 16 rows (amber_demo)"]
    large = manifest.model_copy(update={"vocab_size": 32_000, "sequence_length": 2048})
    of_amber = f"{rows / 2240:,.1f} steps of 2,240 rows (amber_7b)"
    of_demo, of_chat = (f"{rows // size:,} steps of {size} rows" for size in (16, 256))
    assert epoch_lines(large) == [of_amber, f"{of_demo} (amber_demo)", f"{of_chat} (amberchat)"]
    pairs = manifest.model_copy(
        update={"preparation": {"preferences": "pairs"}, "vocab_size": 8224, "sequence_length": 128}
    )
    assert epoch_lines(pairs) == [f"{of_demo.replace('rows', 'pairs')} (chat_demo_dpo)"]
    chunks = Chunks(count=3, rows=40, global_batch_size=20)
    assert (
        epoch_lines(manifest.model_copy(update={"chunks": chunks}))[0] == "6 steps of 20 rows, in 3 chunks of 2 steps"
    )


def test_standard_input(weftrain: Weftrain, tmp_path: Path) -> None:
    lines = "".join(f'{{"text": "document number {number} with a few words"}}\n' for number in range(60))
    common = ["--output", tmp_path, "--vocab-size", "300", "--sequence-length", "8", "--heldout-fraction", "0"]
    (tmp_path / "stdin").write_text(lines)
    of_file = weftrain("prep", tmp_path / "stdin", *common, "--name", "file")
    assert of_file.exit_code == 0, of_file.output
    for address, state in (("-", "is ready"), ("/dev/stdin", "is up to date")):
        piped = CliRunner().invoke(main, ["prep", address, *map(str, common), "--name", "piped"], input=lines)
        assert piped.exit_code == 0, piped.output
        assert state in piped.output
    assert read_dataset_manifest(tmp_path / "piped").train.id == read_dataset_manifest(tmp_path / "file").train.id
    other = CliRunner().invoke(
        main, ["prep", "-", *map(str, common), "--name", "piped"], input=lines.replace("words", "texts")
    )
    assert "was prepared from other text" in other.output
    for arguments, message in (
        (["-", "/dev/stdin", "--name", "x"], "named twice"),
        (["-", "--name", "x", "--executor", "task", "--index", "0", "--of", "2"], "write it to a file first"),
    ):
        refused = CliRunner().invoke(main, ["prep", *arguments, *map(str, common)], input=lines)
        assert refused.exit_code == 2
        assert message in refused.output
    binary = CliRunner().invoke(
        main, ["prep", "-", *map(str, common), "--name", "x"], input=gzip.compress(lines.encode())
    )
    assert binary.exit_code == 2
    assert "<stdin>: is no text by its first bytes; decompress" in binary.output
    assert not list(tmp_path.glob(".*stdin*"))


def test_standard_input_goes_on_where_it_was(tmp_path: Path) -> None:
    first = spool(io.BytesIO(b"text"), tmp_path, "a/x")
    status = first.stat()
    assert spool(io.BytesIO(b"text"), tmp_path, "a/x") == first
    assert (first.stat().st_mtime_ns, first.stat().st_size) == (status.st_mtime_ns, 4)
    second = spool(io.BytesIO(b"other"), tmp_path, "a/x")
    assert (second.read_bytes(), first.exists()) == (b"other", False)
    (tmp_path / "a" / ".x.partial").mkdir()
    forget(tmp_path, "a/x")
    assert second.exists()  # an interrupted run goes on from it
    (tmp_path / "a" / ".x.partial").rmdir()
    forget(tmp_path, "a/x")
    assert not list((tmp_path / "a").glob(".x.stdin*"))


def test_json_that_is_read_as_text_is_said_before_the_work(weftrain: Weftrain, texts: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for source in sorted(texts.glob("*.py"))[:3]:
        shutil.copy(source, tmp_path / "in")
    (tmp_path / "in" / "package.json").write_text('{\n  "name": "loom"\n}\n')
    common = ["--output", tmp_path, "--vocab-size", "300", "--sequence-length", "8", "--heldout-fraction", "0"]
    made = weftrain("prep", f"file://{tmp_path}/in", *common, "--name", "x")
    assert made.exit_code == 0, made.output
    assert made.output.startswith(
        "JSON without a field 'text' is read as text, a file a document (1): in/package.json;"
    )


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
    weftrain: Weftrain,
    dataset: Path,
    tmp_path: Path,
    damage: Callable[[Path], object],
    arguments: tuple[str, ...],
    expected: str,
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
