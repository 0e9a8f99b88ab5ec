"""`weftrain data`: what it prints of a dataset, and that it says one line where something is wrong."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import h5py
import pytest
from click.testing import Result
from json_page import documented
from made_texts import sentences
from places import ROOT

from weftrain.core.formats.units import gb

Weftrain = Callable[..., Result]


def texts() -> list[str]:
    return [*sentences(120), "evil \x1b[31m red\n<script>alert(1)</script> </s> end"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from click.testing import CliRunner

    from weftrain.cli.main import main

    root = tmp_path_factory.mktemp("data")
    (root / "t.jsonl").write_text("".join(json.dumps({"text": text, "kind": "<b>s</b>"}) + "\n" for text in texts()))
    arguments = [
        "--output",
        root / "datasets",
        "--name",
        "d",
        "--vocab-size",
        "300",
        "--sequence-length",
        "32",
        "--source-key",
        "kind",
    ]
    arguments += ["--fim-rate", "0.5", "--heldout-fraction", "0.2", "--workers", "1"]
    result = CliRunner().invoke(main, ["prep", str(root / "t.jsonl"), *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return root


def test_stats(weftrain: Weftrain, root: Path) -> None:
    output = weftrain("data", "stats", root / "datasets" / "d").output
    assert "121 read, 0 failed, 0 duplicates" in output
    assert re.search(r"fim +exact, rate 0.5, SPM share 0.5: plain \d\d\.\d\d%, PSM", output)
    assert re.search(r"source +<b>s</b> +[\d,]+ tokens 100.000%", output)
    held = weftrain("data", "stats", root / "datasets" / "d", "--set", "heldout", "--json")
    assert held.exit_code == 0
    found = json.loads(held.stdout)
    assert set(found) - {"schema_version"} == documented("data stats FOLDER")
    assert found["tokens_by_source"] == {"<b>s</b>": sum(found["tokens_by_source"].values())}
    assert (
        f"{found['tokens_by_source']['<b>s</b>']:,} tokens 100.000%"
        in weftrain("data", "stats", root / "datasets" / "d", "--set", "heldout").output
    )


def test_head_names_documents_and_shows_control_characters_as_escapes(weftrain: Weftrain, root: Path) -> None:
    rows = (
        weftrain("data", "head", root / "datasets" / "d", "--rows", "400").output
        + weftrain("data", "head", root / "datasets" / "d", "--rows", "400", "--set", "heldout").output
    )
    assert "t.jsonl:121  source <b>s</b>" in rows
    assert "\\x1b[31m" in rows
    assert "\x1b" not in rows
    assert "<|fim_prefix|>" in rows
    beyond = weftrain("data", "head", root / "datasets" / "d", "--from", "100000")
    assert beyond.exit_code == 2
    assert "--from 100000: the set has rows 0.." in beyond.output


def test_where_a_sample_came_from(weftrain: Weftrain, root: Path) -> None:
    recipe = [
        "amber_demo",
        f"data.root={root / 'datasets'}",
        "data.sources=[{name: d, path: d, weight: 1, fim: {rate: 0.5, spm_share: 0.5}}]",
    ]
    recipe += ["data.sequence_length=32", "batch.global_batch_size=4", "batch.micro_batch_size=4"]
    output = weftrain("data", "where", *recipe, "--step", "2", "--row", "3").output
    assert "step 2, row 3: source d, epoch 0" in output
    places = re.findall(r"t\.jsonl:(\d+)  source", output)
    assert places
    shown = "\n".join(line.removeprefix("    | ") for line in output.splitlines() if line.startswith("    | "))
    number = int(places[0]) - 1
    assert any(word in shown for word in texts()[number].split())
    assert weftrain("data", "where", *recipe, "--step", "2", "--row", "4").exit_code == 2
    synthetic = weftrain("data", "where", "bench_70m", "--step", "0", "--row", "0")
    assert "reads synthetic rows" in synthetic.output


def test_a_dataset_of_format_2_stays_readable(
    weftrain: Weftrain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept as it was prepared then: names in shards and manifest, padding counted as a source. The same command finds
    it up to date.
    """
    with tarfile.open(ROOT / "tests" / "data_prep" / "format_2.tar.gz") as kept:
        kept.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    assert "lists of 2 inputs and of 2 sources agree" in weftrain("data", "verify", "old").output
    stats = weftrain("data", "stats", "old").output
    assert re.findall(r"source +(\S+) +(\S+) tokens", stats) == [("verse", "512"), ("prose", "493")]
    rows = weftrain("data", "head", "old", "--rows", "32").output
    assert rows.count("  padding  source <padding>, document 0000") == 7
    assert rows.splitlines()[1] == "  inputs 0..31  b.jsonl:16  source prose, document 7346ff3b47e7786c7d56c34f61e211c4"
    recipe = [
        "amber_demo",
        "data.root=.",
        "data.sources=[{name: old, path: old, weight: 1}]",
        "data.sequence_length=32",
    ]
    where = weftrain("data", "where", *recipe, "model.vocab_size=352", "--step", "0", "--row", "0").output
    assert "a.jsonl:2  source verse, document" in where
    again = [
        "a.jsonl",
        "b.jsonl",
        "--name",
        "old",
        "--vocab-size",
        "300",
        "--sequence-length",
        "32",
        "--packing",
        "best_fit",
    ]
    again += [
        "--heldout-fraction",
        "0.2",
        "--rows-per-shard",
        "16",
        "--source-key",
        "kind",
        "--licence",
        "CC0-1.0",
        "--output",
        ".",
    ]
    assert "is up to date" in weftrain("prep", *again).output


def test_verify_and_a_flipped_bit(weftrain: Weftrain, root: Path, tmp_path: Path) -> None:
    import shutil

    assert "whole, id" in weftrain("data", "verify", root / "datasets" / "d").output
    copy = tmp_path / "d"
    shutil.copytree(root / "datasets" / "d", copy)
    for name, message in (
        ("train/00000.h5", "train/00000.h5"),
        ("inputs.jsonl", "inputs.jsonl"),
        ("sources.jsonl", "sources.jsonl"),
        ("manifest.json", "manifest.json"),
    ):
        before = (copy / name).read_bytes()
        damaged = bytearray(before)
        damaged[len(damaged) * 2 // 3] ^= 1
        (copy / name).write_bytes(damaged)
        result = weftrain("data", "verify", copy)
        assert result.exit_code == 2
        assert message in result.output
        assert len(result.output.strip().splitlines()[-1:]) == 1
        (copy / name).write_bytes(before)
    assert weftrain("data", "verify", copy).exit_code == 0


def test_the_description_follows_from_the_manifest(weftrain: Weftrain, root: Path, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(root / "datasets" / "d", tmp_path / "d"))
    path = copy / "croissant.json"
    written = path.read_bytes()
    assert "croissant.json follows from the manifest" in weftrain("data", "verify", copy).output
    for other in (written.replace(b"in rows", b"in good rows"), b"\xff", b"[" * 100_000):
        path.write_bytes(other)
        result = weftrain("data", "verify", copy)
        assert result.exit_code == 2
        assert "croissant.json: is not the description that follows from manifest.json" in result.output
    path.unlink()
    assert "croissant.json is not there" in weftrain("data", "verify", copy).output
    assert weftrain("data", "croissant", copy).output.split() == [str(path)]
    assert path.read_bytes() == written


def test_export(weftrain: Weftrain, root: Path, tmp_path: Path) -> None:
    done = weftrain("data", "export", "cerebras", root / "datasets" / "d", tmp_path / "c", "--rows-per-file", "40")
    assert done.exit_code == 0, done.output
    with h5py.File(tmp_path / "c" / "00000.h5") as file:
        assert file["data"].shape == (40, 3, 32)
    assert weftrain("data", "export", "megatron", root / "datasets" / "d", tmp_path / "m" / "x").exit_code == 0
    assert (tmp_path / "m" / "x.idx").exists()
    again = weftrain("data", "export", "megatron", root / "datasets" / "d", tmp_path / "m" / "x")
    assert again.exit_code == 2
    assert "exists already" in again.output


def test_report(weftrain: Weftrain, root: Path, tmp_path: Path) -> None:
    assert weftrain("data", "report", root / "datasets" / "d", "--to", tmp_path / "r.html").exit_code == 0
    page = (tmp_path / "r.html").read_text()
    assert "<script" not in page
    assert "&lt;b&gt;s&lt;/b&gt;" in page
    assert "http:" not in page
    assert page.count("<section>") == 8
    assert re.search(r"PSM</td>.*SPM</td>", page)


def test_publish_and_fetch(weftrain: Weftrain, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arguments = [
        "--name",
        "e",
        "--vocab-size",
        "300",
        "--sequence-length",
        "32",
        "--workers",
        "1",
        "--heldout-fraction",
        "0",
    ]
    made = weftrain("prep", root / "t.jsonl", "--output", "memory://published/datasets", *arguments)
    assert made.exit_code == 0, made.output
    assert "copied   to memory://published/datasets/e" in made.output
    fetched = weftrain("data", "fetch", "memory://published/datasets/e", tmp_path / "e")
    assert fetched.exit_code == 0, fetched.output
    assert "croissant.json follows from" in weftrain("data", "verify", tmp_path / "e").output


def test_no_dataset(weftrain: Weftrain, tmp_path: Path) -> None:
    for verb in ("stats", "verify", "head", "report"):
        result = weftrain("data", verb, tmp_path / "absent")
        assert result.exit_code == 2
        assert "manifest.json" in result.output
        assert "Traceback" not in result.output


def test_the_data_path_is_measured_beside_h5py_which_reads_the_same_rows(weftrain: Weftrain, root: Path) -> None:
    from weftrain.analysis.bench.data import row_places, rows_by_h5py
    from weftrain.core.data import open_training
    from weftrain.core.order.data_section import DataConfig

    fim = {"rate": 0.5, "spm_share": 0.5, "mode": "exact"}
    data = {"root": str(root / "datasets"), "sequence_length": 32, "shuffle_seed": 1}
    data["sources"] = [{"name": "d", "path": "d", "weight": 1.0, "fim": fim}]
    source = open_training(DataConfig.model_validate(data), 16, vocab_size=332)
    for step in range(3):
        places = row_places(source, step, lambda path: h5py.File(path, "r", locking=False)["data"])
        assert (rows_by_h5py(places, 33) == source.rows(step, 0, 16).ids).all()
    overrides = [f"data.{key}={json.dumps(value)}" for key, value in data.items()]
    result = weftrain("bench", "data", "amber_demo", *overrides, "model.vocab_size=332", "--steps", "5", "--h5py")
    assert result.exit_code == 0, result.output
    assert re.search(
        r"h5py, row by row: [\d.,]+ M tokens/s; the median ratio of a pair of batches is [\d.]+\n", result.output
    )
    files = {place.file for step in range(0, 10, 2) for place in (source.locate(step, row) for row in range(16))}
    size = 5 * 16 * 33 * 2 + 5 * 16 * 32 * ("loss_mask" in source.sources[0].shards.reader(0).planes)
    there = len(source.sources[0].shards.entry.shards)
    assert (
        f"reads 80 rows of 33 tokens from {len(files)} of {there} shard files, {gb(size)} as stored\n" in result.output
    )
    tokens, rows, bandwidth = re.search(
        r"([\d.]+) M tokens/s = ([\d,]+) rows/s = ([\d.]+) GB/s\n", result.output
    ).groups()  # type: ignore[union-attr]
    assert float(tokens) * 1e6 == pytest.approx(float(rows.replace(",", "")) * 32, rel=0.1)
    assert float(bandwidth) * 1e9 == pytest.approx(float(tokens) * 1e6 * size / (80 * 32), rel=0.1)
    result = weftrain("bench", "data", "bench_70m", "--h5py")
    assert (result.exit_code, "synthetic rows lie in no file" in result.output) == (2, True)
