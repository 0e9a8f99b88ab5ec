"""What `weftrain release` writes, and which runs it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from record_runs import done, trainer, weftrain
from release_cases import flip, verdicts

from weftrain.core import checkpoint
from weftrain.core.formats.dataset import read_dataset_manifest


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


def test_a_licence_is_an_spdx_expression(made: Path, tmp_path: Path) -> None:
    run = made / "runs" / "crystal_demo"
    for licence in ("Apache 2", "free", "<img src=x>", ""):
        result = weftrain("release", run, "--to", tmp_path / "release", "--licence", licence)
        assert result.exit_code == 2
        assert "is not an SPDX licence expression" in result.output
        assert "https://spdx.org/licenses, such as Apache-2.0" in result.output
    assert not list(tmp_path.iterdir())
