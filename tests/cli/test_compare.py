"""`weftrain compare` on two runs, a release and a GPT-NeoX series: what stands in the table, the files, the notes; and
what is refused.
"""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from record_runs import done, prepare, trainer, weftrain

from weftrain.core.formats.canonical import canonical_json
from weftrain.core.formats.dataset import read_dataset_manifest
from weftrain.core.run.metrics import read_metrics

TOKENS_PER_STEP = 4 * 13


@pytest.fixture(autouse=True)
def _one_thread(_two_threads: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs on one dataset, a third on another of the same name, the first one's release, and a
    GPT-NeoX series.
    """
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("compare")
    torch.set_num_threads(1)  # so small a model gains nothing from a second
    prepare(folder)
    train = trainer(folder)
    done(train())
    done(train("--run", "longer", "schedule.steps=9", "seed=7"))
    options = ["--name", "words", "--sequence-length", "13", "--vocab-size", "400", "--heldout-fraction", "0.3"]
    done(weftrain("prep", folder / "texts", "--output", folder / "elsewhere", *options))
    done(train("--run", "other", f"data.root={folder / 'elsewhere'}"))
    run = folder / "runs" / "crystal_demo"
    done(weftrain("memorize", run, "--k", "5", "--l", "6", "--samples", "5", "--no-plots"))
    # a record of the whole held-out set
    done(weftrain("eval", folder / "runs" / "longer", "--watch", "--until-step", "3"))
    done(weftrain("release", run, "--to", folder / "release", "--licence", "Apache-2.0"))
    settings = {
        "vocab_size": 512,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    transformers.utils.logging.disable_progress_bar()
    for step in (1, 2):
        torch.manual_seed(step)
        config = transformers.GPTNeoXConfig(**settings, max_position_embeddings=16)
        transformers.GPTNeoXForCausalLM(config).save_pretrained(folder / "neox" / f"step{step}")
    return folder


def compared(*arguments: str | Path) -> dict[str, Any]:
    """compare.json as --json prints it: its notes, and `rows` of (series, tokens) -> heading -> value."""
    output = done(weftrain("compare", *arguments, "--json")).splitlines()  # stderr's lines are among them
    value: dict[str, Any] = json.loads(next(line for line in output if line.startswith("{")))
    named = {column["key"]: column["heading"] for column in value["columns"]}
    value["rows"] = {
        (one["name"], point["tokens"]): {named[key]: number for key, number in point["values"].items()}
        for one in value["series"]
        for point in one["points"]
    }
    value["note"] = "\n".join(value["notes"])
    return value


def test_runs_and_a_release_in_one_table(made: Path) -> None:
    paths = [made / "runs" / "crystal_demo", made / "runs" / "longer", made / "release"]
    value = compared(*paths)
    assert [(one["name"], one["kind"]) for one in value["series"]] == [
        ("crystal_demo", "run"),
        ("longer", "run"),
        ("release", "release"),
    ]
    assert value["positions"] == [2 * TOKENS_PER_STEP, 4 * TOKENS_PER_STEP, 6 * TOKENS_PER_STEP]
    heldout_id = read_dataset_manifest(made / "datasets" / "words").sets["heldout"].id
    measured = {
        (record["step"], record["kind"]): record["loss"] for record in read_metrics(paths[0]) if "loss" in record
    }
    rows = [
        (record["rows"], record["rows_available"])
        for record in read_metrics(paths[0])
        if record["kind"] == "evaluation"
    ]
    assert rows[0][0] == 4 < rows[0][1]
    held = f"held-out loss words {heldout_id[:8]}, 4 of {rows[0][1]} rows"
    for step in (2, 4, 6):
        row = value["rows"]["crystal_demo", step * TOKENS_PER_STEP]
        assert row[held] == measured[step, "evaluation"]
        assert row["train loss of the step"] == measured[step, "step"], "six steps have no mean of more"
        assert row["memorized trained on, k 5 l 6, extractible, %"] == 0.0
        assert value["rows"]["release", step * TOKENS_PER_STEP] == row, "a release says what its run says"
        assert held in value["rows"]["longer", step * TOKENS_PER_STEP], "one dataset, one column"
    row = value["rows"]["longer", 3 * TOKENS_PER_STEP]  # its first checkpoint
    whole = [heading for heading in row if heading.startswith("held-out loss words") and heading != held]
    assert len(whole) == 1, "the whole set is another column than its first rows"
    assert "held-out losses are over other rows of one set" in value["note"]
    assert "differ" not in value["note"]
    assert "tokens of longer: step x 4 x 13 = step x 52" in value["note"]
    assert len(value["series"][1]["points"]) > 3
    assert whole[0].endswith(f", all {rows[0][1]} rows")
    # The table that people read: a block a measure, within 80 columns, and - where there is nothing.
    output = done(weftrain("compare", *paths))
    lines = output.splitlines()
    table = lines[: next(number for number, line in enumerate(lines) if line.startswith("note: "))]
    assert max(map(len, table)) <= 80
    row = value["rows"]["longer", 104]
    for heading in ("train loss of the step", held):
        block = table[table.index(heading) + 1 :]
        assert block[0].split() == ["tokens", "seen", "crystal_demo", "longer", "release"]
        first = next(line.split() for line in block[1:] if line.split()[0] == "104")
        assert first[2] == f"{row[heading]:.4f}"
    assert "note: train loss of the step, as logged; none where fewer steps were trained" in output


def test_other_datasets_of_one_name_are_other_columns(made: Path) -> None:
    value = compared(made / "runs" / "longer", made / "runs" / "other")
    ids = {name: read_dataset_manifest(made / name / "words").sets["heldout"].id for name in ("datasets", "elsewhere")}
    assert ids["datasets"] != ids["elsewhere"]
    rows = [value["rows"][name, 104] for name in ("longer", "other")]
    headings = [[heading for heading in row if heading.startswith("held-out")] for row in rows]
    assert [[heading.rpartition(", ")[0] for heading in some] for some in headings] == [
        [f"held-out loss words {ids['datasets'][:8]}"],
        [f"held-out loss words {ids['elsewhere'][:8]}"],
    ]
    assert "held-out losses are over different sets: words: " in value["note"]
    assert "train losses are over different data: longer " in value["note"]


def test_a_dataset_that_is_gone_or_another_leaves_its_id_unknown(made: Path, tmp_path: Path) -> None:
    run = tmp_path / "moved"
    shutil.copytree(made / "runs" / "longer", run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # as earlier versions wrote them
    without = [{key: value for key, value in line.items() if key != "dataset_id"} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in without))
    recipe = json.loads((run / "recipe.json").read_bytes())
    for root, words in ((made / "nowhere", "is not there"), (made / "elsewhere", "holds other data by now")):
        recipe["data"]["root"] = str(root)
        (run / "recipe.json").write_bytes(canonical_json(recipe) + b"\n")
        value = compared(run, made / "runs" / "longer")
        headings = [
            {heading for heading in value["rows"][name, 104] if heading.startswith("held-out")}
            for name in ("moved", "longer")
        ]
        assert not headings[0] & headings[1]
        assert "the ids of its held-out sets are unknown" in value["note"]
        assert words in value["note"]


def test_a_hugging_face_series_beside_a_run(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = tmp_path / "rows.jsonl"
    sample.write_text(json.dumps({"source": "s", "prompt": [1, 2, 3], "continuation": [4, 5]}) + "\n")
    arguments = [
        made / "runs" / "longer",
        made / "neox",
        "--tokens-per-step",
        "1",
        "--tokens-per-step",
        "neox=156",
        "--to",
        tmp_path / "to",
    ]
    arguments += ["--loss-on", made / "datasets" / "words", "--rows", "3", "--sample", sample]
    value = compared(*arguments)
    assert value["positions"] == [156, 312]
    shared = set(value["rows"]["longer", 156]) & set(value["rows"]["neox", 156])
    assert len(shared) == 3, "the loss, and memorization's two"
    assert "train loss of the step" not in value["rows"]["neox", 156]
    assert "neox: loss on words: no tokenizer is known" in value["note"]
    written = {
        path.relative_to(tmp_path / "to").as_posix(): path.read_bytes()
        for path in (tmp_path / "to").rglob("*")
        if path.is_file()
    }
    assert {"compare.json", "compare.md", "compare.png"} <= written.keys()
    assert len(written) > 3 + 4
    assert written["compare.png"].startswith(b"\x89PNG")
    assert "| neox | 1 | 156 |" in written["compare.md"].decode()

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("weftrain.analysis.compare.measure.load_revision", refuse)
    monkeypatch.setattr("weftrain.core.checkpoint.load", refuse)
    assert compared(*arguments, "--no-plot")["rows"] == value["rows"]
    assert (tmp_path / "to" / "compare.json").read_bytes() == written["compare.json"]


def test_a_release_that_was_altered_is_refused(made: Path, tmp_path: Path) -> None:
    release = tmp_path / "release"
    shutil.copytree(made / "release", release)
    record = sorted((release / "analyses" / "memorization").glob("*/step_*/*.json"))[0]
    shutil.copyfile(record, record.with_name("again.json"))
    assert "again.json is not in release.json: it was added since" in done(weftrain("compare", release))
    metrics = (release / "metrics.jsonl").read_text()
    (release / "metrics.jsonl").write_text(metrics.replace('"loss": 6', '"loss": 5', 1))
    refused = weftrain("compare", release)
    assert refused.exit_code == 2
    assert "metrics.jsonl: has changed since the release was made" in refused.output


def test_a_releases_own_revisions_are_computed_without_their_code(made: Path, tmp_path: Path) -> None:
    """They carry auto_map and weftrain's modelling code, which is never run; with another code they are refused."""
    chunk = {step: made / "release" / "checkpoints" / f"step_{step:08d}" for step in (2, 4, 6)}
    assert all(path.is_dir() for path in chunk.values())
    options = ("--loss-on", made / "datasets" / "words", "--rows", "3", "--to", tmp_path / "to", "--no-plot")
    value = compared(
        made / "release", made / "release" / "revisions", "--tokens-per-step", str(2 * TOKENS_PER_STEP), *options
    )
    for step in (2, 4, 6):
        ours, theirs = (value["rows"][name, step * TOKENS_PER_STEP] for name in ("release", "revisions"))
        (heading,) = theirs
        assert ours[heading] == theirs[heading]
    folder = shutil.copytree(made / "release" / "revisions", tmp_path / "revisions")
    with open(folder / "ckpt_002" / "modeling_crystalcoder.py", "a") as file:
        file.write("# other\n")
    refused = weftrain("compare", folder, "--tokens-per-step", "1")
    assert refused.exit_code == 2
    assert "ckpt_002/config.json: 'auto_map' asks for code of the model's own" in refused.output


def test_what_is_asked_wrongly(made: Path) -> None:
    run, neox = made / "runs" / "longer", made / "neox"
    for arguments, words in (
        ((run, run), "is named twice"),
        ((neox,), "--tokens-per-step N (Pythia: 2097152)"),
        ((neox, "--tokens-per-step", "many"), "'many' is not a number of tokens"),
        ((neox, "--tokens-per-step", "pythia=3"), "there is no series 'pythia'"),
        ((run, "--loss-on", made / "datasets" / "words"), "need --to FOLDER"),
        ((made / "texts",), "none of them: name one"),
    ):
        refused = weftrain("compare", *arguments)
        assert refused.exit_code == 2
        assert words in refused.output


def test_the_papers_figures_of_a_run_and_of_its_release(made: Path, tmp_path: Path) -> None:
    """Numbers, pictures and what is not drawn, with its reason; matplotlib or not."""
    output = done(weftrain("figures", made / "release", made / "runs" / "longer", "--output", tmp_path / "drawn"))
    value = json.loads((tmp_path / "drawn" / "figures.json").read_text())
    drawn = [one["figure"] for one in value["figures"]]
    missing = {one["figure"]: one["why"] for one in value["not_drawn"]}
    kinds = (
        "distribution",
        "chunks",
        "correlation",
    )  # the last needs rows that differ, which so small a model may lack
    assert drawn[0] == "perplexity"
    assert {*drawn, *missing} == {
        *("tasks", "perplexity"),
        *(f"memorization_{kind}_{name}" for kind in kinds for name in ("release", "longer")),
    }
    assert {f"memorization_{kind}_release" for kind in kinds[:2]} <= {*drawn}
    assert {"tasks", *(f"memorization_{kind}_longer" for kind in kinds)} <= {*missing}
    assert missing["memorization_chunks_longer"].endswith(f"weftrain memorize {made / 'runs' / 'longer'}")
    assert "not drawn" in output
    loss = {
        record["step"]: record["loss"] for record in read_metrics(made / "release") if record["kind"] == "evaluation"
    }
    lines = [line for panel in value["figures"][0]["panels"] for line in panel["lines"] if line["label"] == "release"]
    points = [point for line in lines for point in line["points"]]
    assert points
    assert all(point[1] == pytest.approx(math.exp(loss[point[0] / TOKENS_PER_STEP])) for point in points)
    if importlib.util.find_spec("matplotlib") is not None:
        found = {path.name for path in (tmp_path / "drawn").iterdir()}
        assert found == {"figures.json", *(f"{name}.{kind}" for name in drawn for kind in ("png", "svg"))}
