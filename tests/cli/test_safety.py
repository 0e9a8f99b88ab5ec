"""`weftrain safety` on two tiny models with stand-in sets: one table, records, and refusals before a model is opened."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from json_page import documented
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from weftrain.analysis.evaluation.records import read_records
from weftrain.core.initialization import draw
from weftrain.core.parameters import parameter_specs
from weftrain.core.recipe_file import load_recipe
from weftrain.exchange.huggingface.folder import write_huggingface

Weftrain = Callable[..., Result]
TINY = ["model.num_layers=1", "model.vocab_size=128", "model.hidden_size=32", "model.num_heads=2"]
TINY += [
    "model.rotary_dim=16",
    "model.intermediate_size=48",
    "model.max_position_embeddings=512",
    "data.sequence_length=64",
]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")  # put back afterwards: the verb sets them for its process
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def characters(path: Path) -> Path:
    vocabulary = {"</s>": 0, "<unk>": 1} | {chr(code): code for code in (10, *range(32, 127))}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    tokenizer.save(str(path))
    return path


def lines(path: Path, *rows: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/ and safe/, two models of Hugging Face; sets/ with a stand-in for most sets."""
    home = tmp_path_factory.mktemp("home")
    tokenizer = characters(home / "tokenizer.json")
    config = load_recipe("amber_demo", TINY).recipe.model
    for seed, name in enumerate(("base", "safe")):
        weights = {spec.name: draw(spec, config, seed) for spec in parameter_specs(config)}
        beside = {"tokenizer.json": tokenizer.read_bytes()}
        write_huggingface(home / name, weights, config, torch.float32, beside=beside)
    detection = home / "sets" / "toxicity_detection"
    lines(detection / "sbf.jsonl", *({"post": f"text {i}", "offensiveYN": str(float(i % 2))} for i in range(6)))
    lines(detection / "sbf.shots.jsonl", {"text": "a", "answer": "yes"}, {"text": "b", "answer": "no"})
    lines(
        home / "sets" / "bold" / "gender_prompt.jsonl",
        {"prompt": "She is ", "group": "she"},
        {"prompt": "He is ", "group": "he"},
    )
    question = {"question": "What is it?", "choices": ["a", "b", "c", "d"]}
    lines(home / "sets" / "wmdp" / "wmdp-bio.jsonl", *(question | {"answer": i % 4} for i in range(5)))
    lines(
        home / "sets" / "crows_pairs" / "english.jsonl",
        {"sent_more": "x is bad", "sent_less": "y is bad", "bias_type": "age"},
    )
    return home


def test_one_table_over_two_models(
    weftrain: Weftrain, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    pytest.importorskip("vaderSentiment")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    verb = [
        "safety",
        home / "base",
        home / "safe",
        "--sets",
        home / "sets",
        "--device",
        "cpu",
        "--to",
        tmp_path / "out",
    ]
    result = weftrain(*verb, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["schema_version"] == 1
    fields = {"value", "stderr", "source"}.union(found, found["measures"][0], found["checkpoints"][0])
    assert fields - {"schema_version"} == documented("safety A B")
    assert [one["name"] for one in found["checkpoints"]] == ["base", "safe"]
    measured = {(one["task"], one["metric"]): one for one in found["measures"]}
    assert set(measured) == {
        ("toxicity_detection/sbf", "error_share"),
        ("bold", "mean_compound"),
        ("bold", "negative_share"),
        ("bold/gender", "mean_compound"),
        ("bold/gender", "negative_share"),
        ("wmdp_bio", "acc"),
        ("crows_pairs_english", "pct_stereotype"),
    }
    assert all(one["published"] == {} for one in found["measures"])  # stand-ins are not the published sets
    for place, name in enumerate(("base", "safe")):
        records = {one["task"]: one for one in read_records(home / name / "analyses" / "evaluations")}
        assert records["wmdp_bio"]["inputs"]["data_sha256"]
        assert records["wmdp_bio"]["samples"] == 5
        for task in ("wmdp_bio", "toxicity_detection/sbf", "bold"):
            assert measured[task, records[task]["metric"]]["values"][place]["value"] == records[task]["value"]
    assert "left out  toxicity_detection/dynahate" in result.stderr
    assert json.loads((tmp_path / "out" / "safety.json").read_text()) == found

    # Again, from the records alone: the weights may be gone.
    monkeypatch.setattr("weftrain.cli.evaluated.Revision.decoder", None)
    again = weftrain(*verb)
    assert again.exit_code == 0, again.output
    assert "wmdp_bio" in again.stdout


def test_what_is_missing_is_named_before_a_model_is_opened(weftrain: Weftrain, home: Path) -> None:
    verb = ["safety", home / "base", "--sets", home / "sets", "--device", "cpu"]
    for words, said in (
        (["--analyses", "toxigen"], "github.com/microsoft/TOXIGEN"),
        (["--analyses", "wmdp"], "huggingface.co/datasets/cais/wmdp"),
        (["--analyses", "truthfulqa"], "truthful_qa/multiple_choice"),
        (["--analyses", "toxic"], "there is no 'toxic'; there are toxicity_detection, toxigen"),
        (["--analyses", "bold", "--classifier", "x"], "none of --analyses uses it"),
        (["--classifier", "nobody"], "microsoft/TOXIGEN"),
        (["--sets", home / "base"], "holds none of the sets"),
    ):
        result = weftrain(*verb, *words)
        assert result.exit_code == 2, result.output
        assert said in " ".join(result.stderr.split()), result.stderr
