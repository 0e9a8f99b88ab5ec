"""`weftrain release`, `verify`, `replay`, `sign`: a third party with the folder alone, and everything a forger may
try.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from forgery import Tensors, forge, write_release
from record_runs import done, prepare, trainer, weftrain

from weftrain.core import checkpoint
from weftrain.core.formats.canonical import canonical_json, sha256_json
from weftrain.core.formats.dataset import read_dataset_manifest
from weftrain.core.formats.fsops import sha256_file


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset, a run of three chunks and its release."""
    folder = tmp_path_factory.mktemp("release")
    torch.set_num_threads(2)
    prepare(folder)
    done(trainer(folder)())
    done(weftrain("release", folder / "runs" / "crystal_demo", "--to", folder / "release", "--licence", "Apache-2.0"))
    return folder


@pytest.fixture
def release(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may edit. The original run and datasets are not there for whoever has it."""
    return Path(shutil.copytree(made / "release", tmp_path / "release"))


def verdicts(result: Result) -> list[str]:
    rows = [line.split() for line in result.output.splitlines() if line.strip()[:1].isdigit() and " of " in line]
    return [row[-1] for row in rows]


def test_a_third_party_verifies_replays_resumes_and_evaluates(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    output = done(weftrain("verify", release))
    assert "3 links: whole, and of one story" in output
    assert "not signed" in output
    assert verdicts(weftrain("replay", release)) == ["equal"] * 3
    sampled = done(weftrain("replay", release, "--sample", "0.3", "--seed", "1"))
    assert len(verdicts(weftrain("replay", release, "--sample", "0.3"))) == 1
    assert "drawn with seed 1" in sampled
    # resume: the release's folder is laid out as a run's
    run = tmp_path / "runs" / "crystal_demo"
    shutil.copytree(release, run)
    more = ["schedule.steps=8", "data.chunks=4", "log.tensorboard=false"]
    allow = [word for key in ("schedule.steps", "data.chunks", "data.root") for word in ("--allow", key)]
    output = done(
        weftrain(
            "train", run / "recipe.yaml", *more, f"data.root={release / 'data'}", "--runs", tmp_path / "runs", *allow
        )
    )
    assert "resumed after step 6" in output
    assert (run / "checkpoints" / "step_00000008").is_dir()
    # evaluate
    assert "words" in done(weftrain("eval", release))
    assert "words" in done(weftrain("eval", release / "checkpoints" / "step_00000002"))


def test_what_stands_in_a_release(release: Path, made: Path) -> None:
    names = {path.relative_to(release).as_posix() for path in release.rglob("*") if path.is_file()}
    for name in (
        "release.json",
        "README.md",
        "recipe.json",
        "recipe.yaml",
        "environment.json",
        "ledger.jsonl",
        "metrics.jsonl",
    ):
        assert name in names
    for number, step in ((1, 2), (2, 4), (3, 6)):
        assert f"checkpoints/step_{step:08d}/manifest.json" in names
        assert {
            f"revisions/ckpt_{number:03d}/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json")
        } <= names
    value = json.loads((release / "release.json").read_bytes())
    assert [(link["link"], link["chunk"], link["first_step"], link["stop_step"]) for link in value["links"]] == [
        (1, 0, 0, 2),
        (2, 1, 2, 4),
        (3, 2, 4, 6),
    ]
    assert [link["start"] for link in value["links"]] == [None, *(link["end"] for link in value["links"][:-1])]
    card = (release / "README.md").read_text()
    for words in (
        "license: apache-2.0",
        value["links"][2]["end"],
        value["dataset_id"],
        "Held-out words (4 of ",
        "| training | 6 of 6 steps, 312 tokens |",
    ):
        assert words in card
    again = weftrain("release", made / "runs" / "crystal_demo", "--to", release, "--licence", "MIT")
    assert again.exit_code == 2
    assert "is there already" in again.output


# What a forger edits, and then hashes again so that nothing contradicts anything: only replay can tell.


def one_ulp(step: int, tensors: Tensors) -> None:
    if step == 4:
        weight = tensors["weights/layers.1.ffn.up_proj.weight"].view(torch.int32)
        weight[3, 5] += 1


def a_moment(step: int, tensors: Tensors) -> None:
    if step == 4:
        tensors["exp_avg_sq/embedding.weight"] *= 1.5


def a_rate(recipe: dict[str, Any]) -> None:
    recipe["schedule"]["learning_rate"][0]["end"] *= 1.001


def swapped(recipe: dict[str, Any]) -> None:
    recipe["data"]["skip"] = [{"reason": "x", "chunk": 0, "action": "defer", "source": None, "rows": None}]


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        ({}, ["equal", "equal", "equal"]),
        ({"tensors": one_ulp}, ["equal", "different", "different"]),
        ({"tensors": a_moment}, ["equal", "different", "different"]),
        ({"recipe": a_rate}, ["different", "different", "different"]),
        ({"recipe": swapped, "chunks": {0: 1, 1: 2, 2: 0}}, ["different", "different", "different"]),
    ],
    ids=["nothing", "one weight by 1 ulp", "an optimizer moment", "a learning rate", "chunks swapped"],
)
def test_a_consistent_forgery_passes_verify_and_fails_replay(
    edit: dict[str, Any], expected: list[str], release: Path
) -> None:
    forge(release, **edit)
    done(weftrain("verify", release))
    result = weftrain("replay", release)
    assert verdicts(result) == expected, result.output
    assert result.exit_code == (0 if set(expected) == {"equal"} else 3)
    if "different" in expected:
        assert "the fingerprint is the same, so every bit must be: the release was altered" in result.output
    if edit.get("tensors") is one_ulp:
        assert "weights/layers.1.ffn.up_proj.weight: 1 of 3,360 elements differ, by up to 1 ulp" in result.output


def test_reordered_rows_consistently_hashed_fail_replay(release: Path, tmp_path: Path) -> None:
    """The same documents in another order: a valid dataset with an id of its own, put in the place of the run's."""
    datasets = prepare(tmp_path)
    shutil.rmtree(datasets)
    own = release / "data" / "words"
    options = [
        "--name",
        "words",
        "--sequence-length",
        "13",
        "--heldout-fraction",
        "0.1",
        "--tokenizer",
        own / "tokenizer.json",
        "--eos",
        "</s>",
    ]
    done(weftrain("prep", tmp_path / "texts", "--output", datasets, *options, "--seed", "7"))
    new_id = read_dataset_manifest(datasets / "words").train.id
    assert new_id != read_dataset_manifest(own).train.id
    shutil.rmtree(own)
    shutil.copytree(datasets / "words", own, ignore=shutil.ignore_patterns("failures.jsonl"))
    forge(release, dataset_id=new_id)
    done(weftrain("verify", release))
    assert verdicts(weftrain("replay", release)) == ["different"] * 3


def test_a_removed_link_is_seen_though_all_else_was_made_to_fit(release: Path) -> None:
    forge(release, drop_step=4)
    result = weftrain("verify", release)
    assert result.exit_code == 2
    assert "no checkpoint at the end of chunk 1 (step 4)" in result.output


def test_a_removed_link_of_a_run_without_chunks_is_seen_by_the_parent_that_is_not_there(
    made: Path, tmp_path: Path
) -> None:
    (tmp_path / "datasets").symlink_to(made / "datasets")
    done(trainer(tmp_path)("data.chunks=null", "checkpoint.every_steps=2"))
    target = tmp_path / "release"
    done(weftrain("release", tmp_path / "runs" / "crystal_demo", "--to", target, "--licence", "MIT"))
    forge(target, drop_step=4, keep_parents=True)
    result = weftrain("verify", target)
    assert result.exit_code == 2
    assert "the checkpoint of step 6 does not follow that of step 2: a link was removed" in result.output


# What contradicts itself, or the folder.


def edited(release: Path, **changes: Any) -> None:
    value = json.loads((release / "release.json").read_bytes()) | changes
    value["root"] = sha256_json({key: item for key, item in value.items() if key != "root"})
    (release / "release.json").write_bytes(canonical_json(value) + b"\n")


def flip(path: Path, at: int = -5) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def swap_chunks_in_release(release: Path) -> None:
    links = json.loads((release / "release.json").read_bytes())["links"]
    links[0]["chunk"], links[1]["chunk"] = links[1]["chunk"], links[0]["chunk"]
    edited(release, links=links)


def outside(release: Path) -> None:
    value = json.loads((release / "release.json").read_bytes())
    edited(release, files=value["files"] | {"../../etc/passwd": {"size": 1, "sha256": "0" * 64}})


def another_chunk(release: Path) -> None:
    shutil.rmtree(release / "checkpoints" / "step_00000004")
    shutil.copytree(release / "checkpoints" / "step_00000006", release / "checkpoints" / "step_00000004")
    write_release(release)


def link_out(release: Path) -> None:
    (release / "metrics.jsonl").rename(release.parent / "metrics.jsonl")
    (release / "metrics.jsonl").symlink_to(release.parent / "metrics.jsonl")


def change_metrics(release: Path) -> None:
    text = (release / "metrics.jsonl").read_text().splitlines()
    record = next(number for number, line in enumerate(text) if '"kind": "step"' in line)
    value = json.loads(text[record]) | {"loss": 0.5}
    text[record] = json.dumps(value)
    (release / "metrics.jsonl").write_text("\n".join(text) + "\n")
    write_release(release)


def change_recipe(release: Path) -> None:
    value = json.loads((release / "recipe.json").read_bytes())
    value["seed"] = 99
    (release / "recipe.json").write_bytes(canonical_json(value) + b"\n")
    write_release(release)


def change_hub_weights(release: Path) -> None:
    path = release / "revisions" / "ckpt_002" / "model.safetensors"
    flip(path)
    write_release(release)


def another_tokenizer(release: Path) -> None:
    path = release / "data" / "words" / "tokenizer.json"
    path.write_text(path.read_text().replace('"added_tokens"', '"added_tokens" ', 1))
    write_release(release)


def another_dataset(release: Path) -> None:
    """A valid dataset, whole in itself, that the run was not trained on."""
    own = release / "data" / "words"
    tokenizer = Path(shutil.copy(own / "tokenizer.json", release.parent / "tokenizer.json"))
    shutil.rmtree(own)
    options = [
        "--name",
        "words",
        "--sequence-length",
        "13",
        "--heldout-fraction",
        "0.1",
        "--tokenizer",
        tokenizer,
        "--eos",
        "</s>",
    ]
    texts = release.parent / "texts"
    texts.mkdir()
    for number in range(20):
        (texts / f"{number}.txt").write_text(f"other words {number} " * 30)
    done(weftrain("prep", texts, "--output", release.parent / "other", *options))
    shutil.copytree(release.parent / "other" / "words", own, ignore=shutil.ignore_patterns("failures.jsonl"))
    write_release(release)


def truncate_ledger(release: Path) -> None:
    lines = (release / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (release / "ledger.jsonl").write_bytes(b"".join(lines[:-1]))
    write_release(release)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda release: flip(release / "README.md"), "README.md: has changed"),
        (
            lambda release: flip(release / "checkpoints" / "step_00000004" / "state-00001-of-00001.safetensors"),
            "step_00000004/state-00001-of-00001.safetensors: has changed",
        ),
        (lambda release: flip(release / "data" / "words" / "train" / "00000.h5", 5000), "00000.h5: has changed"),
        (lambda release: (release / "metrics.jsonl").unlink(), "metrics.jsonl: is missing"),
        (lambda release: (release / "extra.txt").write_text("x"), "extra.txt: does not belong there"),
        (
            lambda release: (release / "checkpoints" / "step_00000004" / "x").mkdir(),
            "step_00000004: x: does not belong there",
        ),
        (link_out, "metrics.jsonl: is a symbolic link"),
        (another_chunk, "step_00000004.*so the folder was renamed"),
        (outside, "'../../etc/passwd' is not a path within the folder"),
        (swap_chunks_in_release, "links are not the 3 that follow from the ledger"),
        (change_metrics, "measurements up to step 2 are not those of the ledger"),
        (change_recipe, "recipe.json: is not the recipe of the ledger's last segment"),
        (change_hub_weights, "ckpt_002: weight .* is not that of step 4"),
        (another_tokenizer, "tokenizer.json: SHA-256 .* the shards were made with another tokenizer"),
        (another_dataset, "data: holds dataset .* step . was trained on"),
        (truncate_ledger, "does not end in the line that release.json names"),
        (lambda release: edited(release, version=2), "version 2 is not one that this program reads"),
        (lambda release: edited(release, format="else"), "is not a file of the format"),
        (lambda release: (release / "release.json").write_text("{"), "release.json"),
        (lambda release: (release / "release.json").unlink(), "release.json: No such file"),
    ],
)
def test_what_contradicts_is_refused_with_its_file(damage: Callable[[Path], Any], words: str, release: Path) -> None:
    import re

    damage(release)
    result = weftrain("verify", release)
    assert re.search(words, result.output), result.output
    assert result.exit_code == 2
    assert len(result.output.strip().splitlines()) == 1


def test_another_fingerprint_gets_a_tolerance_report(release: Path) -> None:
    """Other threads change bits: the states differ, by little, and the report says what differs in the fingerprint."""
    result = weftrain("replay", release, "--link", "2", "--backend", "cuda")
    assert result.exit_code == 0, result.output
    assert verdicts(result) in (["tolerance"], ["equal"])
    assert "fingerprint: backend: released local, here cuda" in result.output
    strict = weftrain("replay", release, "--link", "2", "--backend", "cuda", "--tolerance", "0")
    assert strict.exit_code == (3 if verdicts(result) == ["tolerance"] else 0)


def test_links_that_are_not_there_are_refused(release: Path) -> None:
    for arguments, words in (
        (("--link", "4"), "there is no link 4: the release has 3"),
        (("--sample", "0"), "above 0 and up to 1"),
    ):
        result = weftrain("replay", release, *arguments)
        assert result.exit_code == 2
        assert words in result.output


def test_signatures(release: Path, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    key, other = tmp_path / "key.pem", tmp_path / "other.pem"
    public = done(weftrain("sign", "--new-key", "--key", key)).split()[-1]
    stranger = done(weftrain("sign", "--new-key", "--key", other)).split()[-1]
    assert os.stat(key).st_mode & 0o777 == 0o600
    assert "is there already" in weftrain("sign", "--new-key", "--key", key).output
    assert public in done(weftrain("sign", release, "--key", key))
    assert f"signed by {public}" in done(weftrain("verify", release))
    done(weftrain("verify", release, "--key", public))
    refused = weftrain("verify", release, "--key", stranger)
    assert refused.exit_code == 2
    assert f"is signed by {public}, not by {stranger}" in refused.output
    signature = json.loads((release / "signature.json").read_bytes())
    (release / "signature.json").write_bytes(canonical_json(signature | {"public_key": stranger}))
    assert "the signature is not valid" in weftrain("verify", release).output
    (release / "signature.json").write_bytes(canonical_json(signature))
    (release / "README.md").write_text("another story")
    write_release(release)  # consistent, but of another root
    assert "is of another root" in weftrain("verify", release).output
    assert "is no unencrypted private key" in weftrain("sign", release, "--key", release / "README.md").output


def test_a_release_with_hashes_of_its_data_only(made: Path, tmp_path: Path) -> None:
    target = tmp_path / "small"
    done(
        weftrain(
            "release",
            made / "runs" / "crystal_demo",
            "--to",
            target,
            "--licence",
            "MIT",
            "--data",
            "manifest",
            "--weights-dtype",
            "bfloat16",
        )
    )
    assert not list(target.rglob("*.h5"))
    done(weftrain("verify", target))
    refused = weftrain("replay", target, "--link", "1")
    assert refused.exit_code == 2
    assert "holds only hashes of its data: name the folder of its datasets with --data-root" in refused.output
    assert verdicts(weftrain("replay", target, "--link", "1", "--data-root", made / "datasets")) == ["equal"]


def test_a_run_that_began_from_anothers_state_keeps_that_state(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "runs", tmp_path / "runs")
    (tmp_path / "datasets").symlink_to(made / "datasets")
    train = trainer(tmp_path)
    done(train("--run", "second", "start_from={run: crystal_demo, state: all}"))
    run = tmp_path / "runs" / "second"
    assert checkpoint.verify(run / "checkpoints" / "step_00000000")["step"] == 0
    done(weftrain("release", run, "--to", tmp_path / "release", "--licence", "MIT"))
    assert sorted(path.name for path in (tmp_path / "release" / "revisions").iterdir()) == [
        "ckpt_000",
        "ckpt_001",
        "ckpt_002",
        "ckpt_003",
    ]
    assert verdicts(weftrain("replay", tmp_path / "release")) == ["equal"] * 3


def test_a_run_without_a_ledger_or_a_whole_checkpoint_is_not_released(made: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(made / "runs" / "crystal_demo", tmp_path / "run"))
    flip(run / "checkpoints" / "step_00000004" / "state-00001-of-00001.safetensors")
    result = weftrain("release", run, "--to", tmp_path / "release", "--licence", "MIT")
    assert result.exit_code == 2
    assert "step_00000004" in result.output
    assert not (tmp_path / "release").exists()
    (run / "ledger.jsonl").unlink()
    assert "there is no ledger" in weftrain("release", run, "--to", tmp_path / "release", "--licence", "MIT").output


def test_openness_of_a_release(release: Path) -> None:
    found = {
        item["name"]: item["status"] for item in json.loads(done(weftrain("openness", release, "--json")))["items"]
    }
    assert {name for name, status in found.items() if status != "present"} == {"analyses"}
    printed = done(weftrain("openness", release))
    assert "checking the published scores" in " ".join(printed.split())


def test_analyses_go_into_the_release_and_onto_its_card(made: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(made / "runs" / "crystal_demo", tmp_path / "run"))
    done(weftrain("eval", run, "--watch", "--until-step", "6", "--every-seconds", "0.1"))
    done(weftrain("memorize", run, "--samples", "3", "--k", "4", "--l", "4", "--no-plots"))
    target = tmp_path / "release"
    done(weftrain("release", run, "--to", target, "--licence", "MIT"))
    done(weftrain("verify", target))
    roots = [json.loads(path.read_bytes())["root"] for path in sorted(target.glob("checkpoints/*/manifest.json"))]
    card = (target / "README.md").read_text()
    for step, root in zip((2, 4, 6), roots, strict=True):
        assert any(
            line.startswith(f"| {step} | heldout/words") and line.endswith(f"`{root[:16]}` |")
            for line in card.splitlines()
        ), card
    found = {item["name"]: item["status"] for item in json.loads(done(weftrain("openness", target, "--json")))["items"]}
    assert set(found.values()) == {"present"}


def test_every_revision_is_a_folder_that_transformers_opens_with_its_tokenizer_and_end(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    import transformers

    end = read_dataset_manifest(release / "data" / "words").eos_id
    card = (release / "README.md").read_text()
    assert "library_name" not in card.split("---")[1]  # no library opens the folder of the whole release
    for number, folder in enumerate(sorted((release / "revisions").iterdir()), 1):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        assert (tokenizer.eos_token_id, tokenizer.eos_token) == (end, "</s>")
        card = (folder / "README.md").read_text()
        assert card.startswith(
            "---\nlibrary_name: transformers\nlicense: apache-2.0\npipeline_tag: text-generation\n---\n"
        )
        assert f"after step {2 * number}," in card
        config = json.loads((folder / "config.json").read_text())
        assert (config["eos_token_id"], config["bos_token_id"]) == (end, tokenizer.bos_token_id)
        assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == end
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert model.generation_config.eos_token_id == end
    told = model.generate(**tokenizer("abc", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert told.shape[1] <= 4 + len(tokenizer("abc").input_ids)


def test_code_of_a_strangers_in_a_revision_fails_verify(release: Path) -> None:
    path = release / "revisions" / "ckpt_002" / "modeling_crystalcoder.py"
    path.write_text(path.read_text() + "\nimport os\n")
    write_release(release)
    result = weftrain("verify", release)
    assert result.exit_code == 2
    assert "ckpt_002/modeling_crystalcoder.py: is code, and no modelling code that weftrain wrote" in result.output


def test_a_licence_is_an_spdx_expression(made: Path, tmp_path: Path) -> None:
    run = made / "runs" / "crystal_demo"
    for licence in ("Apache 2", "free", "<img src=x>", ""):
        result = weftrain("release", run, "--to", tmp_path / "release", "--licence", licence)
        assert result.exit_code == 2
        assert "is not an SPDX licence expression" in result.output
        assert "https://spdx.org/licenses, such as Apache-2.0" in result.output
    assert not list(tmp_path.iterdir())


Entries = list[dict[str, Any]]


def rechained(entries: Entries) -> bytes:
    """The entries as a ledger whose chain is right, whatever they hold."""
    lines: list[bytes] = []
    previous = None
    for number, entry in enumerate(entries):
        line = {**entry, "n": number, "previous": previous}
        line.pop("hash", None)
        previous = sha256_json(line)
        lines.append(canonical_json(line | {"hash": previous}) + b"\n")
    return b"".join(lines)


def with_line(kind: str, **fields: Any) -> Callable[[Entries], Entries]:
    return lambda entries: [*entries, {"kind": kind, "step": 6, "time": 1.0, **fields}]


def with_key(kind: str, key: str, value: Any) -> Callable[[Entries], Entries]:
    return lambda entries: [entry | ({key: value} if entry["kind"] == kind else {}) for entry in entries]


HOSTILE: dict[str, Callable[[Entries], Entries]] = {
    "a branch outside": with_line("rollback", root="a" * 64, branch="../../../ESCAPED", abandoned=[], reason="x"),
    "a time beyond the calendar": with_key("start", "time", 1e30),
    "a recipe of text": with_key("start", "recipe", "x"),
    "a root of a number": with_key("checkpoint", "root", 5),
    "half a pair of samples": with_key("chunk_begin", "samples", [1]),
    "changes of a number": with_line("recipe", changes=5, recipe={}, recipe_sha256="a" * 64),
    "a step beyond counting": with_key("end", "step", 10**300),
    "a chunk of text": with_line("defer", chunk="x", action="defer", reason="y"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_ledger_is_one_line_for_every_verb(case: str, release: Path, tmp_path: Path) -> None:
    ledger = release / "ledger.jsonl"
    ledger.write_bytes(rechained(HOSTILE[case]([json.loads(line) for line in ledger.read_bytes().splitlines()])))
    value = json.loads((release / "release.json").read_bytes())
    sizes = {"size": ledger.stat().st_size, "sha256": sha256_file(ledger)}
    edited(
        release,
        files=value["files"] | {"ledger.jsonl": sizes},
        ledger=json.loads(ledger.read_bytes().splitlines()[-1])["hash"],
    )
    for verb in (
        ("log", release),
        ("report", release),
        ("verify", release),
        ("compare", release),
        ("replay", release),
        ("rollback", release, "--to", "2", "--reason", "x"),
        ("defer", release, "--chunk", "2", "--reason", "x"),
        ("release", release, "--to", tmp_path / "again", "--licence", "MIT"),
        ("train", release / "recipe.yaml", "--runs", release.parent, "--run", release.name),
    ):
        result = weftrain(*verb)
        assert (result.exit_code, isinstance(result.exception, SystemExit)) == (2, True), (verb, result.exception)
        (line,) = result.output.strip().splitlines()
        assert "ledger.jsonl:" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["release"]


HOSTILE_RECIPES: dict[str, Callable[[dict[str, Any]], None]] = {
    "a source outside": lambda recipe: recipe["data"]["sources"][0].update(path="../../words"),
    "a billion layers": lambda recipe: recipe["model"].update(num_layers=10**9),
    "a million threads": lambda recipe: recipe["backend"]["options"].update(threads=10**6),
    "no batch": lambda recipe: recipe.pop("batch"),
}


@pytest.mark.parametrize("case", HOSTILE_RECIPES)
def test_a_hostile_recipe_is_one_line_for_every_verb(case: str, release: Path) -> None:
    recipe = json.loads((release / "recipe.json").read_bytes())
    HOSTILE_RECIPES[case](recipe)
    (release / "recipe.json").write_bytes(canonical_json(recipe) + b"\n")
    entries = with_key("start", "recipe", recipe)(
        [json.loads(line) for line in (release / "ledger.jsonl").read_bytes().splitlines()]
    )
    (release / "ledger.jsonl").write_bytes(rechained(entries))
    last = json.loads((release / "ledger.jsonl").read_bytes().splitlines()[-1])["hash"]
    write_release(
        release,
        json.loads((release / "release.json").read_bytes()) | {"recipe_sha256": sha256_json(recipe), "ledger": last},
    )
    for verb in (("verify", release), ("compare", release), ("replay", release), ("eval", release)):
        result = weftrain(*verb)
        assert result.exit_code in ((0, 2) if verb[0] in ("compare", "eval") else (2,)), (verb, result.output)
        assert result.exit_code == 0 or isinstance(result.exception, SystemExit), (verb, result.exception)


def test_folders_without_end_are_refused(release: Path) -> None:
    (release / "analyses" / "/".join("a" * 40)).mkdir(parents=True)
    result = weftrain("verify", release)
    assert result.exit_code == 2
    assert "more than 16 folders deep" in result.output
