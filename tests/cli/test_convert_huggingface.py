"""`weftrain convert` from and to Hugging Face folders, as a user meets it; and pickled weights, which run nothing."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

from weftrain.core import checkpoint
from weftrain.core.backend import State
from weftrain.core.checkpoint import Weights
from weftrain.core.errors import CheckpointError
from weftrain.core.parameters import parameter_specs
from weftrain.core.recipe_file import load_recipe
from weftrain.core.run.starting_checkpoint import other_checkpoint
from weftrain.exchange.huggingface import pickled_worker
from weftrain.exchange.huggingface.folder import HuggingFaceWeights, write_huggingface
from weftrain.exchange.huggingface.pickled import open_weights

Weftrain = Callable[..., Result]
AMBER = [
    "model.vocab_size=97",
    "model.num_layers=2",
    "model.hidden_size=48",
    "model.num_heads=3",
    "model.intermediate_size=70",
    "model.max_position_embeddings=16",
    "model.rotary_dim=16",
    "data.sequence_length=13",
    "data.sources=[]",
    "data.synthetic_rows=12",
    "log.evaluate_every_steps=0",
    "log.tensorboard=false",
]


@pytest.fixture
def amber_folder(tmp_path: Path) -> Path:
    """A small Amber as a Hugging Face folder in three shards."""
    config = load_recipe("amber_demo", AMBER).recipe.model
    generator = torch.Generator().manual_seed(0)
    weights = {spec.name: torch.randn(spec.shape, generator=generator) for spec in parameter_specs(config)}
    write_huggingface(tmp_path / "amber", weights, config, torch.float32, max_shard_bytes=100_000)
    return tmp_path / "amber"


@pytest.fixture
def pickled_folder(amber_folder: Path) -> Path:
    """The same, pickled: two .bin files and their index."""
    folder = amber_folder.with_name("pickled")
    folder.mkdir()
    shutil.copy(amber_folder / "config.json", folder)
    tensors = dict(HuggingFaceWeights(amber_folder))
    names = sorted(tensors)
    parts = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, part in parts.items():
        torch.save({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    )
    return folder


def newest(run: Path) -> Path:
    path = checkpoint.newest(run / "checkpoints", print)
    assert path is not None
    return path


def test_there_and_back_with_every_bit(
    weftrain: Weftrain, amber_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weftrain.cli.display.QUIET_SECONDS", -1)  # every line of the progress, as a log has them
    done = weftrain(
        "convert", "from-huggingface", amber_folder, "amber_demo", *AMBER, "--runs", tmp_path / "runs", "--run", "amber"
    )
    assert done.exit_code == 0, done.output
    assert "start from it with start_from={run: amber, state: weights}" in done.stdout
    assert all(f" GB {word}\n" in done.stderr for word in ("hashed", "written"))
    state, manifest = checkpoint.load(newest(tmp_path / "runs" / "amber"))
    assert (state.step, manifest["tokens"], manifest["position"]) == (0, 0, 0)
    assert all(name.startswith("weights/") and tensor.dtype == torch.float32 for name, tensor in state.tensors.items())
    done = weftrain("convert", "to-huggingface", tmp_path / "runs" / "amber", tmp_path / "back", "--dtype", "float32")
    assert done.exit_code == 0, done.output
    assert all(f" GB {word}\n" in done.stderr for word in ("verified", "written"))
    ours, theirs = dict(HuggingFaceWeights(tmp_path / "back")), dict(HuggingFaceWeights(amber_folder))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["weftrain_checkpoint"] == manifest["root"]
    again = weftrain("convert", "to-huggingface", tmp_path / "runs" / "amber", tmp_path / "back", "--dtype", "float32")
    assert (again.exit_code, "exists: choose another name" in again.output) == (2, True)
    again = weftrain(
        "convert", "from-huggingface", amber_folder, "amber_demo", *AMBER, "--runs", tmp_path / "runs", "--run", "amber"
    )
    assert (again.exit_code, "name another --run" in again.output) == (2, True)


def test_a_run_starts_from_a_folder(weftrain: Weftrain, tmp_path: Path, tiny_overrides: list[str]) -> None:
    """A CrystalCoder's checkpoint, exported and read in, is to the trainer what the checkpoint itself is: the same
    weights at step 0.
    """
    recipe = load_recipe("crystal_demo", tiny_overrides).recipe
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"weights/{spec.name}": torch.randn(spec.shape, generator=generator) for spec in parameter_specs(recipe.model)
    }
    tensors |= {name.replace("weights/", "exp_avg/"): tensor for name, tensor in tensors.items()}
    claims: dict[str, Any] = {
        "dataset_id": "x",
        "fingerprint": {},
        "tokens": 7,
        "position": 7,
        "parent": None,
        "kernels": {},
    }
    ours = checkpoint.save(
        tmp_path / "runs" / "ours" / "checkpoints",
        State(7, 7, tensors),
        recipe=recipe.model_dump(mode="json"),
        **claims,
    )
    done = weftrain("convert", "to-huggingface", ours.path, tmp_path / "model", "--dtype", "float32")
    assert done.exit_code == 0, done.output
    runs = ["--runs", tmp_path / "runs"]
    done = weftrain(
        "convert", "from-huggingface", tmp_path / "model", "crystal_demo", *tiny_overrides, *runs, "--run", "read_in"
    )
    assert done.exit_code == 0, done.output
    starts = []
    for source in ("ours", "read_in"):
        follower = load_recipe(
            "crystal_demo", [*tiny_overrides, f"start_from={{run: {source}, state: weights}}"]
        ).recipe
        start = other_checkpoint(follower, tmp_path / "runs", print)
        assert start.state.step == 0
        starts.append(start.weights(follower, {}) or {})
    assert starts[0].keys() == starts[1].keys() == {spec.name for spec in parameter_specs(recipe.model)}
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])


def test_another_model_is_refused_with_the_keys_that_differ(
    weftrain: Weftrain, amber_folder: Path, tmp_path: Path
) -> None:
    command = [
        "convert",
        "from-huggingface",
        amber_folder,
        "amber_demo",
        *AMBER,
        "--runs",
        tmp_path / "runs",
        "--run",
        "x",
    ]
    done = weftrain(*command, "model.rope_theta=500", "model.intermediate_size=72")
    assert done.exit_code == 2
    assert "intermediate_size: 72 -> 70, rope_theta: 500.0 -> 10000.0" in done.output
    assert not (tmp_path / "runs").exists()


def test_buffers_are_named_on_stderr(weftrain: Weftrain, amber_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = dict(HuggingFaceWeights(amber_folder))
    for path in amber_folder.glob("*.safetensors*"):
        path.unlink()
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file({**tensors, name: torch.ones(8)}, amber_folder / "model.safetensors", metadata={"format": "pt"})
    done = weftrain(
        "convert", "from-huggingface", amber_folder, "amber_demo", *AMBER, "--runs", tmp_path / "runs", "--run", "x"
    )
    assert done.exit_code == 0, done.output
    assert f"ignored: {name}" in done.stderr
    assert name not in done.stdout


def test_the_tokenizer_stands_beside(weftrain: Weftrain, amber_folder: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "a": 1, "b": 2, "?": 3}, unk_token="?"))
    words.save(str(tmp_path / "words.json"))
    runs = ["--runs", tmp_path / "runs", "--run", "amber"]
    assert weftrain("convert", "from-huggingface", amber_folder, "amber_demo", *AMBER, *runs).exit_code == 0
    command = [
        "convert",
        "to-huggingface",
        tmp_path / "runs" / "amber",
        tmp_path / "out",
        "--dtype",
        "bfloat16",
        "--tokenizer",
    ]
    done = weftrain(*command, tmp_path / "words.json")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "words.json").read_bytes()
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    expected = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "model_max_length": 16}
    assert settings == expected | {"clean_up_tokenization_spaces": False}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 0
    shutil.rmtree(tmp_path / "out")
    assert weftrain(*command, tmp_path / "words.json", "--bos", "b", "--eos", "none").exit_code == 0
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (settings["bos_token"], settings["eos_token"]) == ("b", "b")  # a text ends where the next one would begin
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (2, 2)
    large = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "a": 97}, unk_token="a"))
    large.save(str(tmp_path / "large.json"))
    shutil.rmtree(tmp_path / "out")
    done = weftrain(*command, tmp_path / "large.json")
    assert (done.exit_code, "the model's vocab_size is 97" in done.output) == (2, True)
    assert not (tmp_path / "out").exists()


@pytest.mark.prove
def test_the_folder_opens_in_transformers(weftrain: Weftrain, amber_folder: Path, tmp_path: Path) -> None:
    """With its tokenizer, as a user and an evaluation harness open it."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "a": 1, "b": 2, "?": 3}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "words.json"))
    runs = ["--runs", tmp_path / "runs", "--run", "amber"]
    assert weftrain("convert", "from-huggingface", amber_folder, "amber_demo", *AMBER, *runs).exit_code == 0
    command = ["convert", "to-huggingface", tmp_path / "runs" / "amber", tmp_path / "out", "--dtype", "bfloat16"]
    assert weftrain(*command, "--tokenizer", tmp_path / "words.json").exit_code == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer("b a")["input_ids"], tokenizer.eos_token_id) == ([2, 1], 0)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert model.config.eos_token_id == 0
    weights = dict(HuggingFaceWeights(amber_folder))
    assert all(torch.equal(tensor, weights[name].bfloat16()) for name, tensor in model.state_dict().items())


# Pickled weights


def test_pickled_weights_are_read_when_asked_for(
    weftrain: Weftrain, pickled_folder: Path, amber_folder: Path, tmp_path: Path
) -> None:
    command = [
        "convert",
        "from-huggingface",
        pickled_folder,
        "amber_demo",
        *AMBER,
        "--runs",
        tmp_path / "runs",
        "--run",
        "x",
    ]
    refused = weftrain(*command)
    assert refused.exit_code == 2
    assert "--allow-pickle" in refused.output
    done = weftrain(*command, "--allow-pickle")
    assert done.exit_code == 0, done.output
    same = [
        "convert",
        "from-huggingface",
        amber_folder,
        "amber_demo",
        *AMBER,
        "--runs",
        tmp_path / "runs",
        "--run",
        "y",
    ]
    assert weftrain(*same).exit_code == 0
    states = [Weights(checkpoint.load(newest(tmp_path / "runs" / run))[0].tensors) for run in "xy"]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["x", "y"]  # nothing temporary is left


class Payload:
    """Unpickled as it asks, it runs a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def test_a_malicious_pickle_is_refused_and_runs_nothing(
    weftrain: Weftrain, pickled_folder: Path, tmp_path: Path
) -> None:
    marker = tmp_path / "ran"
    file = pickled_folder / "pytorch_model-00002-of-00002.bin"
    torch.save({"model.norm.weight": Payload(marker)}, file)
    command = [
        "convert",
        "from-huggingface",
        pickled_folder,
        "amber_demo",
        *AMBER,
        "--runs",
        tmp_path / "runs",
        "--run",
        "x",
    ]
    done = weftrain(*command, "--allow-pickle")
    assert done.exit_code == 2, done.output
    assert file.name in done.output
    assert "unsupported GLOBAL posix.system" in done.output
    assert len(done.output.splitlines()) == 1
    assert not marker.exists()
    assert not (tmp_path / "runs").exists()
    torch.load(file, weights_only=False)  # the payload is a live one
    assert marker.exists()


@pytest.mark.prove
def test_the_worker_starts_no_process_even_where_the_loader_would(tmp_path: Path) -> None:
    """The second line: a torch.load that believes everything, as releases before 2.6 could be made to."""
    marker, evil = tmp_path / "ran", tmp_path / "evil.bin"
    torch.save({"x": Payload(marker)}, evil)
    program = """
import sys, torch
from weftrain.exchange.huggingface import pickled_worker
real = torch.load
torch.load = lambda source, **_: real(source, weights_only=False)
sys.exit(pickled_worker.main())
"""
    job = json.dumps({"jobs": [[str(evil), str(tmp_path / "out")]], "parent": os.getpid()})
    done = subprocess.run([sys.executable, "-c", program], input=job, capture_output=True, text=True, check=False)
    assert done.returncode == pickled_worker.FAILED, done.stderr
    assert "the file asked for os.system" in done.stderr
    assert not marker.exists()


def test_an_old_torch_is_not_trusted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch, "__version__", "2.5.1+cu124")
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"jobs": []}'))
    assert pickled_worker.main() == pickled_worker.FAILED
    assert "CVE-2025-32434" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ([torch.zeros(2)], "not a state dict"),
        ({}, "not a state dict"),
        ({"a": {"b": torch.zeros(2)}}, "'a' is not a plain tensor"),
        ({1: torch.zeros(2)}, "no text: 1"),
        ({"../a": torch.zeros(2)}, "is not words"),
        ({"a": torch.zeros(1).expand(1 << 20, 1 << 20)}, "claims tensors of 4,398,046,511,104 bytes"),
        ({"a": torch.zeros(3).to_sparse()}, "not a plain tensor"),
        ({"a": torch.zeros(3, dtype=torch.complex64)}, "complex64, which is not converted"),
    ],
)
def test_a_pickle_that_is_no_state_dict_is_refused(tmp_path: Path, state: Any, reason: str) -> None:
    torch.save(state, tmp_path / "a.bin")
    with pytest.raises(ValueError, match=reason):
        pickled_worker.convert(tmp_path / "a.bin", tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()


def test_only_the_zipped_form_is_unpickled(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    (tmp_path / "junk.bin").write_bytes(b"junk" * 100)
    (tmp_path / "empty.bin").write_bytes(b"")
    for name in ("old.bin", "junk.bin", "empty.bin"):
        with pytest.raises(ValueError, match="since release"):
            pickled_worker.convert(tmp_path / name, tmp_path / "out")


def test_a_truncated_pickle_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(5000)}, tmp_path / "a.bin")
    whole = (tmp_path / "a.bin").read_bytes()
    for length in (10, len(whole) // 2, len(whole) - 100):
        (tmp_path / "a.bin").write_bytes(whole[:length])
        with pytest.raises(Exception):  # noqa: B017 - torch's own, of several kinds; the worker turns each into a line
            pickled_worker.convert(tmp_path / "a.bin", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_views_ties_and_parameters_are_written_out(tmp_path: Path) -> None:
    shared = torch.arange(12.0).reshape(3, 4)
    torch.save({"a": shared, "b": shared.t(), "c": torch.nn.Parameter(torch.ones(2).bfloat16())}, tmp_path / "a.bin")
    pickled_worker.convert(tmp_path / "a.bin", tmp_path / "model.safetensors")
    found = HuggingFaceWeights(tmp_path)
    assert torch.equal(found["b"], shared.t())
    assert torch.equal(found["a"], shared)
    assert found.meta("c").dtype == torch.bfloat16


def refuse_pickled(folder: Path, scratch: Path, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason), open_weights(folder, unpickle=True, scratch=scratch):
        pass


def test_pickled_folders_are_checked_before_a_process_starts(pickled_folder: Path, tmp_path: Path) -> None:
    index = pickled_folder / "pytorch_model.bin.index.json"
    file = pickled_folder / "pytorch_model-00001-of-00002.bin"
    original = index.read_text()
    index.write_text(original.replace(file.name, "../x.bin"))
    refuse_pickled(pickled_folder, tmp_path, "which is not the plain name of a .bin file")
    index.write_text(original)
    shutil.move(file, tmp_path / "elsewhere.bin")
    refuse_pickled(pickled_folder, tmp_path, "No such file")
    file.symlink_to(tmp_path / "elsewhere.bin")
    refuse_pickled(pickled_folder, tmp_path, "symbolic link")
    shutil.copy(tmp_path / "elsewhere.bin", pickled_folder / "pytorch_model.bin")
    refuse_pickled(pickled_folder, tmp_path, "holds both")


def test_a_tokenizer_is_carried_in_and_out_and_the_vocabulary_fitted(
    weftrain: Weftrain, amber_folder: Path, tmp_path: Path
) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = Tokenizer(WordLevel({f"w{index}": index for index in range(97)}, unk_token="w0")).to_str()
    (amber_folder / "tokenizer.json").write_text(words)
    (amber_folder / "merges.txt").write_bytes(b"#version: 0.2\n")
    told = json.loads((amber_folder / "config.json").read_text()) | {"eos_token_id": [5, 6]}
    (amber_folder / "config.json").write_text(json.dumps(told))
    where = ["--runs", tmp_path / "runs", "--run"]
    command = ["convert", "from-huggingface", amber_folder, "amber_demo", *AMBER]
    assert (done := weftrain(*command, *where, "kept")).exit_code == 0, done.output
    done = weftrain(
        *["convert", "to-huggingface", tmp_path / "runs" / "kept", tmp_path / "back", "--dtype", "float32"],
        *["--family", "mistral", "--vocab-size", "104"],
    )
    assert done.exit_code == 0, done.output
    assert "vocabulary: head.weight: 97 rows padded with zeros to 104: --vocab-size" in done.stderr
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (written["model_type"], written["vocab_size"], written["eos_token_id"]) == ("mistral", 104, [5, 6])
    for name in ("tokenizer.json", "merges.txt"):
        assert (tmp_path / "back" / name).read_bytes() == (amber_folder / name).read_bytes()
    smaller = [part.replace("vocab_size=97", "vocab_size=90") for part in command if isinstance(part, str)]
    done = weftrain("convert", "from-huggingface", amber_folder, *smaller[2:], *where, "cut", "--fit-vocabulary")
    assert (done.exit_code, "has ids up to 96, the model's vocab_size is 90" in done.output) == (2, True)
    (amber_folder / "tokenizer.json").unlink()
    done = weftrain("convert", "from-huggingface", amber_folder, *smaller[2:], *where, "cut", "--fit-vocabulary")
    assert done.exit_code == 0, done.output
    assert "vocabulary: embedding.weight: 97 rows cut to the first 90: the recipe's vocab_size" in done.stderr
    state, _ = checkpoint.load(newest(tmp_path / "runs" / "cut"))
    assert tuple(state.tensors["weights/embedding.weight"].shape) == (90, 48)


def test_a_weight_that_is_no_number_is_refused_unless_allowed(
    weftrain: Weftrain, amber_folder: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    for path in amber_folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors.keys() & {"model.norm.weight"}:
            tensors[name][2] = float("inf")
        save_file(tensors, path)
    command = [
        "convert",
        "from-huggingface",
        amber_folder,
        "amber_demo",
        *AMBER,
        "--runs",
        tmp_path / "runs",
        "--run",
        "x",
    ]
    done = weftrain(*command)
    assert done.exit_code == 2
    assert "final_norm.weight' holds 1 values that are NaN or infinite" in done.output
    assert not (tmp_path / "runs" / "x").exists()
    assert (done := weftrain(*command, "--allow-nonfinite")).exit_code == 0, done.output


def test_training_starts_from_a_folder_directly(weftrain: Weftrain, amber_folder: Path, tmp_path: Path) -> None:
    from weftrain.core.run.ledger import Ledger
    from weftrain.exchange.huggingface.importing import open_start

    asked = ["schedule.steps=1", f"start_from={{huggingface: {amber_folder}, state: weights}}"]
    done = weftrain("train", "amber_demo", *AMBER, *asked, "--runs", tmp_path / "runs", "--run", "tuned")
    assert done.exit_code == 0, done.output
    begun = Ledger(tmp_path / "runs" / "tuned").entries[0]
    assert begun["parent"] == open_start(amber_folder).sha256
