"""`weftrain data reference`, and DPO against it: what is stored is the model's, and nothing else is trained against."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from preference_runs import DPO, START, T, command, do, make, reference, succeed, train
from transformers import LlamaConfig, LlamaForCausalLM

from weftrain.analysis.evaluation import pair_scores
from weftrain.analysis.evaluation.generation import load_model
from weftrain.core import checkpoint
from weftrain.core.config import Recipe
from weftrain.core.formats.dataset import read_dataset_manifest
from weftrain.core.formats.reference_file import read_reference, training_id
from weftrain.core.formats.shard_set import open_set
from weftrain.core.run.ledger import read_ledger
from weftrain.core.run.metrics import read_metrics
from weftrain.data_prep.tokens.training import train_encoder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("reference"))


def test_what_is_stored_is_the_models_to_float64(made: Path) -> None:
    folder = made / "datasets" / "pairs"
    stored = read_reference(folder, "frozen", read_dataset_manifest(folder))
    newest = checkpoint.newest(made / "runs" / "sft" / "checkpoints", print)
    assert newest is not None
    state, manifest = checkpoint.load(newest)
    model = load_model(checkpoint.Weights(state.tensors), Recipe.from_record(manifest["recipe"]).model)
    for set_name in ("train", "heldout"):
        _, shards = open_set(folder, set_name)
        ids, mask = shards.rows(np.arange(shards.num_rows))
        assert mask is not None
        for pair in range(shards.num_rows):
            for side in range(2):
                row = torch.from_numpy(ids[pair, side * T : side * T + T + 1])
                bears = torch.from_numpy(mask[pair, side * T : side * T + T])
                logits = model.logits(row[None, :-1])[0].double()
                wanted = logits.log_softmax(-1).gather(1, row[1:, None])[:, 0][bears].sum()
                found = stored.values[set_name][pair, side]
                assert found == pytest.approx(float(wanted), rel=2e-6)


def test_the_batch_size_changes_nothing_but_last_bits(made: Path) -> None:
    reference(made, "--batch-size", "2", name="slow")
    folder = made / "datasets" / "pairs"
    manifest = read_dataset_manifest(folder)
    slow, fast = (read_reference(folder, name, manifest) for name in ("slow", "frozen"))
    assert np.allclose(slow.values["train"], fast.values["train"], rtol=1e-6, atol=0)
    assert slow.manifest.weights_sha256 == fast.manifest.weights_sha256


def test_a_killed_computation_goes_on_and_gives_the_same_bytes(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after the second of several shards, it reads two and computes the rest; a damaged part is made again, and
    those of another batch size are not taken.
    """
    place = made / "datasets" / "sharded"
    words = ["prep", made / "records.jsonl", "--name", "sharded", "--output", place.parent, "--preferences", "pairs"]
    words += ["--sequence-length", T, "--heldout-fraction", 0.3, "--tokenizer", made / "tokenizer.json"]
    succeed(*words, "--workers", 1, "--rows-per-shard", 7)
    ask = ["data", "reference", place, "--of", made / "runs" / "sft", "--batch-size", 4]
    calls: list[range] = []
    compute = pair_scores.pair_log_probabilities

    def counted(*arguments: Any) -> np.ndarray:
        calls.append(arguments[-1])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compute(*arguments)

    monkeypatch.setattr(pair_scores, "pair_log_probabilities", counted)
    assert do(*ask, "--name", "killed").exit_code != 0
    folder = place / "references"
    (parts,) = (folder / "killed.parts").iterdir()
    assert sorted(path.name for path in parts.iterdir()) == ["train-00000", "train-00001"]
    assert not (folder / "killed.json").exists()
    (parts / "train-00001").write_bytes((parts / "train-00001").read_bytes()[:-1])
    succeed(*ask, "--name", "killed")
    succeed(*ask, "--name", "straight")
    assert [pairs.start for pairs in calls[:5]] == [0, 7, 14, 7, 14]  # read: that of pair 0
    for suffix in ("h5", "json"):
        assert (folder / f"killed.{suffix}").read_bytes() == (folder / f"straight.{suffix}").read_bytes()
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["killed.h5", "killed.json", "straight.h5", "straight.json"]


def test_a_hugging_face_folder_is_a_reference(made: Path) -> None:
    """Its log-probabilities are those that transformers computes, and DPO begins from it."""
    config = LlamaConfig(
        vocab_size=352,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(config).eval()
    folder = made / "llama"
    theirs.save_pretrained(folder)
    shutil.copy(made / "tokenizer.json", folder)
    place = made / "datasets" / "pairs"
    told = succeed("data", "reference", place, "--of", folder, "--name", "theirs")
    assert "of llama in float32" in told
    assert "does not say here which tokenizer" not in told
    stored = read_reference(place, "theirs", read_dataset_manifest(place)).values["heldout"]
    _, shards = open_set(place, "heldout")
    ids, mask = shards.rows(np.arange(shards.num_rows))
    assert mask is not None
    sides = torch.from_numpy(np.stack([ids[:, : T + 1], ids[:, T:]], 1)).flatten(0, 1)
    bears = torch.from_numpy(mask).reshape(-1, T)
    with torch.no_grad():
        log_p = theirs(sides[:, :-1]).logits.double().log_softmax(-1)
    wanted = (log_p.gather(2, sides[:, 1:, None])[..., 0] * bears).sum(1)
    assert stored.flatten() == pytest.approx(wanted.numpy(), rel=1e-5)

    start = f"start_from={{huggingface: {folder}, state: weights}}"
    like = ["model.max_position_embeddings=512", "model.norm_eps=1e-6", "objective.reference=theirs"]
    train(made, "from_theirs", "pairs", *DPO, start, *like)
    first = next(line for line in read_metrics(made / "runs" / "from_theirs") if line["kind"] == "step")
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-5)
    (folder / "tokenizer.json").write_bytes(train_encoder(["quite another text, of other words"] * 3, 280).data)
    result = do("data", "reference", place, "--of", folder)
    assert result.exit_code == 2
    assert "was prepared with tokenizer" in result.output


def test_dpo_begins_where_the_reference_is_and_records_it(made: Path) -> None:
    train(made, "dpo", "pairs", *DPO, START)
    run = made / "runs" / "dpo"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first = next(line for line in lines if line.get("loss") is not None and line["kind"] == "step")
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-5)  # the policy is the reference
    assert first["reward_margin"] == pytest.approx(0, abs=1e-5)
    assert any("reward_margin" in line for line in lines if line["kind"] == "evaluation")
    folder = made / "datasets" / "pairs"
    manifest = read_dataset_manifest(folder)
    wanted = training_id([manifest.train.id], [read_reference(folder, "frozen", manifest).root])
    newest = checkpoint.newest(run / "checkpoints", print)
    assert newest is not None
    assert checkpoint.load(newest)[1]["dataset_id"] == wanted
    assert (
        next(entry for entry in read_ledger(run / "ledger.jsonl") if entry["kind"] == "start")["dataset_id"] == wanted
    )

    target = made / "release"
    succeed("release", run, "--to", target, "--licence", "Apache-2.0")
    succeed("verify", target)
    numbers = target / "data" / "pairs" / "references" / "frozen.h5"
    numbers.write_bytes(numbers.read_bytes()[:-1])
    assert do("verify", target).exit_code == 2


def refused(made: Path, why: str, dataset: str, *words: str) -> None:
    result = do(*command(made, "refused", dataset, *words))
    assert result.exit_code == 2, result.output
    assert why in " ".join(result.output.split())
    assert not (made / "runs" / "refused").exists()


def test_what_is_not_the_objectives_is_refused_before_step_0(made: Path) -> None:
    refused(made, "there is no such reference: compute it with", "pairs", *DPO, "objective.reference=other")
    refused(made, "holds preference pairs, and the objective is next_token", "pairs", f"data.row_length={2 * T}")
    refused(made, f"prepared with sequence_length {T}, the recipe says {2 * T}", "chosen", *DPO)
    narrow = ["model.intermediate_size=48", "start_from={run: sft, state: weights}"]
    words = "is of another architecture than the weights that the run starts from: model.intermediate_size: 64 -> 48"
    refused(made, words, "pairs", *DPO, *narrow)


def test_a_model_of_another_tokenizer_is_refused(made: Path) -> None:
    (made / "other.json").write_bytes(train_encoder(["quite another text, of other words"] * 3, 280).data)
    words = ["prep", made / "records.jsonl", "--name", "other", "--output", made / "datasets", "--preferences", "pairs"]
    succeed(*words, "--sequence-length", T, "--heldout-fraction", 0, "--tokenizer", made / "other.json", "--workers", 1)
    result = do("data", "reference", made / "datasets" / "other", "--of", made / "runs" / "sft")
    assert result.exit_code == 2
    assert "was prepared with tokenizer" in result.output
    assert do("data", "reference", made / "datasets" / "chosen", "--of", made / "runs" / "sft").exit_code == 2


@pytest.mark.prove
def test_a_run_does_not_go_on_against_another_reference(made: Path) -> None:
    reference(made, name="mine")
    mine = [*DPO, "objective.reference=mine", START]
    train(made, "again", "pairs", *mine)
    train(made, "sft2", "chosen", "seed=5")
    reference(made, of="sft2", name="mine")
    result = do(*command(made, "again", "pairs", *mine), "schedule.steps=6", "--allow", "schedule.steps")
    assert result.exit_code == 2, result.output
