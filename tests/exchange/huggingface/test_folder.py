"""Hugging Face folders in and out: bits unchanged, memory that does not grow, and strangers' folders that are refused
by name.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from crystalcoder_reference import crystalcoder_logits
from fault_injection import Death, Faults, injected
from model_cases import amber, crystal, decoder, large_weights, tokens
from safetensors.torch import load_file, save_file
from torch import Tensor

from weftrain.core.errors import CheckpointError, RecipeError
from weftrain.core.model_config import ModelConfig
from weftrain.exchange.family import config_differences
from weftrain.exchange.huggingface.config import config_to_huggingface
from weftrain.exchange.huggingface.files import MODELING
from weftrain.exchange.huggingface.folder import (
    CONFIG,
    INDEX,
    SINGLE,
    HuggingFaceWeights,
    layout_of,
    read_config,
    state_tensors,
    write_huggingface,
)
from weftrain.exchange.layouts import export_weights

FAMILIES = pytest.mark.parametrize("build", [amber, crystal])
Build = Callable[..., ModelConfig]


def read_back(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    state = state_tensors(HuggingFaceWeights(folder), config)
    return {name.removeprefix("weights/"): tensor for name, tensor in state.items()}


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def written(folder: Path, config: ModelConfig, **changes: Any) -> dict[str, Tensor]:
    weights = large_weights(config)
    write_huggingface(folder, weights, config, torch.float32, **changes)
    return weights


# There and back


@FAMILIES
@pytest.mark.parametrize("max_shard_bytes", [1, 40_000, 4 << 30])
def test_round_trip_is_bit_exact(tmp_path: Path, build: Build, max_shard_bytes: int) -> None:
    config = build()
    weights = written(tmp_path / "model", config, max_shard_bytes=max_shard_bytes)
    assert equal(read_back(tmp_path / "model", config), weights)
    assert config_differences(config, read_config(tmp_path / "model")) == []
    names = {path.name for path in (tmp_path / "model").iterdir()} - {MODELING}
    if max_shard_bytes == 4 << 30:
        assert names == {CONFIG, SINGLE}
    else:
        shards = names - {CONFIG, INDEX}
        assert f"model-00001-of-{len(shards):05d}.safetensors" in shards
        index = json.loads((tmp_path / "model" / INDEX).read_text())
        assert set(index["weight_map"].values()) == shards
        stored = {name: tensor for shard in shards for name, tensor in load_file(tmp_path / "model" / shard).items()}
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())
        assert equal(stored, dict(export_weights(weights, config, layout_of(config))))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@FAMILIES
def test_bfloat16_values_survive_bfloat16(tmp_path: Path, build: Build) -> None:
    config = build()
    weights = {name: tensor.bfloat16().float() for name, tensor in large_weights(config).items()}
    write_huggingface(tmp_path / "model", weights, config, torch.bfloat16)
    assert (
        HuggingFaceWeights(tmp_path / "model")
        .meta("lm_head.weight" if build is amber else "transformer.wte.weight")
        .dtype
        == torch.bfloat16
    )
    assert equal(read_back(tmp_path / "model", config), weights)
    assert json.loads((tmp_path / "model" / CONFIG).read_text())["torch_dtype"] == "bfloat16"


def test_rounding_is_to_the_nearest(tmp_path: Path) -> None:
    weights = large_weights(amber())
    write_huggingface(tmp_path / "model", weights, amber(), torch.bfloat16)
    assert equal(
        read_back(tmp_path / "model", amber()), {name: tensor.bfloat16().float() for name, tensor in weights.items()}
    )


def test_float16_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    weights = {name: tensor.half().float() for name, tensor in written(folder, amber()).items()}
    half = {name: tensor.half() for name, tensor in load_file(folder / SINGLE).items()}
    save_file(half, folder / SINGLE, metadata={"format": "pt", "made by": "another"})
    assert equal(read_back(folder, amber()), weights)


def test_equal_arguments_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        written(
            tmp_path / name,
            crystal(),
            max_shard_bytes=50_000,
            extra_config={"eos_token_id": 2},
            beside={"note.txt": b"x"},
        )
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert "note.txt" in files
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)
    assert json.loads((tmp_path / "a" / CONFIG).read_text())["eos_token_id"] == 2


def test_an_exported_amber_loads_in_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = amber(rope_theta=500.0)
    weights, ids = written(tmp_path / "model", config, max_shard_bytes=60_000), tokens(config, 2, 21)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    assert model.dtype == torch.float32
    with torch.no_grad():
        # Both sum in the same order on a CPU; what may differ between releases is the order within a product.
        torch.testing.assert_close(model(ids).logits, decoder(config, weights).logits(ids), rtol=1e-5, atol=1e-4)


def test_what_transformers_saves_in_shards_is_read(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = amber()
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**config_to_huggingface(config), attn_implementation="eager")
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.35)
    model.save_pretrained(tmp_path / "saved", max_shard_size="100KB")
    assert len(HuggingFaceWeights(tmp_path / "saved").files) > 3
    assert read_config(tmp_path / "saved") == config
    ids = tokens(config, 2, 21)
    with torch.no_grad():
        found = decoder(config, read_back(tmp_path / "saved", config)).logits(ids)
        torch.testing.assert_close(found, model.float()(ids).logits, rtol=1e-5, atol=1e-4)


def test_an_exported_crystalcoder_is_the_released_form(tmp_path: Path) -> None:
    """By the reference that reads the released names and layouts."""
    config = crystal()
    weights, ids = written(tmp_path / "model", config, max_shard_bytes=60_000), tokens(config, 2, 21)
    stored = dict(HuggingFaceWeights(tmp_path / "model"))
    hyper = json.loads((tmp_path / "model" / CONFIG).read_text())
    with torch.no_grad():
        expected = crystalcoder_logits(stored, ids, hyper)
        torch.testing.assert_close(decoder(config, weights).logits(ids), expected, rtol=1e-4, atol=1e-4)


def test_buffers_of_any_dtype_are_passed_over_and_named(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    weights = written(folder, crystal())
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    buffers = {"transformer.h.0.attn.bias": mask, "transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}
    tied = {"lm_head.weight": weights["embedding.weight"].clone()}
    save_file({**load_file(folder / SINGLE), **buffers, **tied}, folder / SINGLE)
    assert HuggingFaceWeights(folder).buffers == sorted(buffers)
    assert equal(read_back(folder, crystal()), weights)


# What is refused


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def edit_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def edit_header(path: Path, change: Callable[[bytes], bytes]) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = change(data[8 : 8 + length])
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


def replace_tensor(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def duplicate(header: bytes) -> bytes:
    """The first tensor's entry a second time."""
    name = next(key for key in json.loads(header) if key != "__metadata__")
    entry = json.dumps({name: json.loads(header)[name]})[1:-1]
    return header.rstrip()[:-1] + f",{entry}}}".encode()


def link_out(folder: Path) -> None:
    shard = shards_of(folder)[0]
    shutil.move(shard, folder.parent / "elsewhere.safetensors")
    shard.symlink_to(folder.parent / "elsewhere.safetensors")


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 8)


def claim(path: Path, length: int) -> None:
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])


def first(tensors: Mapping[str, Tensor]) -> str:
    return next(iter(tensors))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (lambda f: shards_of(f)[1].unlink(), "model-00002-of-.*No such file"),
    "extra tensor": (
        lambda f: replace_tensor(shards_of(f)[0], lambda t: t.update({"model.surprise.weight": torch.zeros(2)})),
        r"'model\.surprise\.weight' is not one that the index puts here",
    ),
    "tensor of another shard too": (
        lambda f: replace_tensor(shards_of(f)[0], lambda t: t.update({"lm_head.weight": torch.zeros(97, 64)})),
        r"'lm_head\.weight' is not one that the index puts here",
    ),
    "tensor not in its shard": (
        lambda f: replace_tensor(shards_of(f)[-1], lambda t: t.pop("lm_head.weight") is None),
        r"'lm_head\.weight' is missing, and the index puts it here",
    ),
    "a model's tensor nowhere": (
        lambda f: [
            replace_tensor(shards_of(f)[-1], lambda t: t.pop("lm_head.weight") is None),
            edit_index(f, lambda m: m.pop("lm_head.weight") is None),
        ],
        r"missing tensors lm_head\.weight",
    ),
    "wrong shape": (
        lambda f: replace_tensor(shards_of(f)[-1], lambda t: t.update({"lm_head.weight": torch.zeros(98, 64)})),
        r"'lm_head\.weight' has shape \[98, 64\]",
    ),
    "wrong dtype": (
        lambda f: replace_tensor(
            shards_of(f)[-1], lambda t: t.update({"lm_head.weight": torch.zeros(97, 64, dtype=torch.int64)})
        ),
        r"'lm_head\.weight' is I64; weights are read from F32, BF16, F16",
    ),
    "truncated": (lambda f: truncate(shards_of(f)[0]), "the tensors end at byte"),
    "empty": (lambda f: shards_of(f)[0].write_bytes(b""), "claims a header of 0 bytes in a file of 0"),
    "header of 2^60 bytes": (lambda f: claim(shards_of(f)[0], 1 << 60), f"claims a header of {1 << 60} bytes"),
    "tensor of 2^60 bytes": (
        lambda f: edit_header(shards_of(f)[0], lambda h: h.replace(b"[97,64]", b"[1152921504606846976]")),
        "bytes do not hold F32",
    ),
    "duplicate names": (lambda f: edit_header(shards_of(f)[0], duplicate), "appears twice"),
    "metadata of numbers": (
        lambda f: edit_header(shards_of(f)[0], lambda h: h.replace(b'"pt"', b"1")),
        "__metadata__ is not text",
    ),
    "path in a tensor's name": (
        lambda f: edit_header(
            shards_of(f)[0], lambda h: h.replace(b"model.embed_tokens.weight", b"../../../embed_tokens.wei")
        ),
        "is not words of letters",
    ),
    "path out": (
        lambda f: edit_index(f, lambda m: m.update({"lm_head.weight": "../x.safetensors"})),
        r"'\.\./x\.safetensors', which is not",
    ),
    "absolute path": (
        lambda f: edit_index(f, lambda m: m.update({"lm_head.weight": "/x.safetensors"})),
        "which is not the plain name",
    ),
    "a pickle as a shard": (
        lambda f: edit_index(f, lambda m: m.update({"lm_head.weight": "x.bin"})),
        "which is not the plain name",
    ),
    "index of nothing": (lambda f: (f / INDEX).write_text("{}"), "has no weight_map"),
    "index too large": (lambda f: (f / INDEX).write_bytes(b" " * (17 << 20)), "more than the"),
    "symbolic link": (link_out, "symbolic link.*--local-dir"),
    "two models": (lambda f: shutil.copy(shards_of(f)[0], f / SINGLE), "holds both"),
    "no weights": (lambda f: (f / INDEX).unlink(), "holds neither"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_hostile_folder_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "model"
    written(folder, amber(), max_shard_bytes=170_000)
    assert len(shards_of(folder)) > 3
    break_it, reason = DAMAGE[damage]
    break_it(folder)
    with pytest.raises(CheckpointError, match=reason) as caught:
        state_tensors(HuggingFaceWeights(folder), amber())
    assert str(folder) in str(caught.value) or damage in ("wrong shape", "a model's tensor nowhere")
    assert "\n" not in str(caught.value)


def test_a_file_that_shrinks_after_it_was_opened_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "model", amber())
    weights = HuggingFaceWeights(tmp_path / "model")
    os.truncate(tmp_path / "model" / SINGLE, 5000)
    with pytest.raises(CheckpointError, match="bytes too early"):
        dict(state_tensors(weights, amber()))


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        (
            {"model_type": "phimoe", "num_local_experts": 8},
            RecipeError,
            r"model_type 'phimoe', a mixture of experts \(num_local_experts: 8\), is not one that converts; there is",
        ),
        ({"model_type": ["llama"]}, RecipeError, "is not one that converts"),
        ({"num_key_value_heads": 3}, RecipeError, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"mlp_bias": ..., "attention_bias": True}, RecipeError, "mlp_bias is False"),
        ({"quantization_config": {"bits": 4}}, RecipeError, "quantization_config"),
        ({"hidden_size": "64"}, RecipeError, "hidden_size is '64'"),
        ({"num_attention_heads": 0}, RecipeError, "num_attention_heads is 0"),
        ({"vocab_size": -1}, RecipeError, "vocab_size"),
        ({"num_hidden_layers": 10**12}, RecipeError, "key 'num_layers': Input should be less than or equal to 10000"),
        ({"rope_parameters": [1]}, RecipeError, "rope_parameters is not an object"),
        ({"rms_norm_eps": "1e-6"}, RecipeError, "norm_eps"),
    ],
)
def test_a_config_of_another_model_is_refused_by_key(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], reason: str
) -> None:
    config = {**config_to_huggingface(amber()), **change}
    (tmp_path / CONFIG).write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    with pytest.raises(error, match=reason) as caught:
        read_config(tmp_path)
    assert str(tmp_path / CONFIG) in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"[1]", b'{"a":1,"a":2}', b"[" * 100_000, b" " * (2 << 20), b"\xff"])
def test_a_config_that_is_none_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / CONFIG).write_bytes(data)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(tmp_path)
    (tmp_path / CONFIG).unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: No such file"):
        read_config(tmp_path)


def test_null_means_what_follows_from_the_rest(tmp_path: Path) -> None:
    config = {**config_to_huggingface(amber()), "head_dim": None, "num_key_value_heads": None}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    assert read_config(tmp_path) == amber()


def test_differences_are_those_of_the_function() -> None:
    ours = amber()
    started = ours.initialization.model_copy(update={"matrix_std": 0.5})  # type: ignore[union-attr]
    assert config_differences(ours, amber(initialization=started, max_position_embeddings=32)) == []
    assert config_differences(ours, amber(rope_theta=1.0, num_layers=2)) == [
        "num_layers: 3 -> 2",
        "rope_theta: 10000.0 -> 1.0",
    ]
    # A muP width of 4 with its logits scale, and the same scale under another width.
    assert config_differences(crystal(), crystal(base_hidden_size=32, base_logits_scale=1.11)) == []
    assert config_differences(crystal(), crystal(base_hidden_size=32)) == ["logits_scale: 0.555 -> 1.11"]


@pytest.mark.parametrize(
    ("build", "changes", "reason"),
    [
        (lambda: crystal(norm="rms_norm"), {}, "norm: layer_norm"),
        (lambda: amber(logits_scale=0.5), {}, "mup.fold"),
        (lambda: crystal(tie_embeddings=False), {}, "tie_embeddings: true"),
        (amber, {"dtype": torch.float16}, "float16 is not written"),
        (amber, {"extra_config": {"hidden_size": 1}}, "'hidden_size' follows from the model"),
        (amber, {"extra_config": {"auto_map": {}}}, "auto_map"),
        (amber, {"beside": {"../x": b""}}, "'../x' cannot stand beside"),
        (amber, {"beside": {CONFIG: b""}}, "config.json' cannot stand beside"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is(
    tmp_path: Path, build: Build, changes: dict[str, Any], reason: str
) -> None:
    config = build()
    changes = {"dtype": torch.float32, **changes}
    with pytest.raises(CheckpointError, match=reason):
        write_huggingface(tmp_path / "model", large_weights(config), config, **changes)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    written(tmp_path / "model", amber())
    before = (tmp_path / "model" / SINGLE).stat().st_mtime_ns
    with pytest.raises(CheckpointError, match="exists: choose another name"):
        written(tmp_path / "model", amber())
    assert (tmp_path / "model" / SINGLE).stat().st_mtime_ns == before
    assert len(list(tmp_path.iterdir())) == 1


def test_wrong_tensors_leave_nothing(tmp_path: Path) -> None:
    weights = large_weights(amber())
    for change in ({"head.weight": torch.zeros(3)}, {"head.weight": torch.zeros(97, 64, dtype=torch.int32)}):
        with pytest.raises(CheckpointError, match="weight"):
            write_huggingface(tmp_path / "model", {**weights, **change}, amber(), torch.float32)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["ENOSPC", "disk stays full", "dies after", "dies torn"])
def test_every_operation_of_a_write_may_fail_or_be_the_last(tmp_path: Path, kind: str) -> None:
    config = amber(num_layers=1)
    with injected(Faults()) as counted:
        written(tmp_path / "count", config, max_shard_bytes=130_000)
    assert len(counted.trace) > 15
    for at in range(len(counted.trace)):
        folder = tmp_path / str(at)
        folder.mkdir()
        try:
            with injected(Faults(kind, at)):
                written(folder / "model", config, max_shard_bytes=130_000)
        except (CheckpointError, Death) as error:
            if isinstance(error, CheckpointError):
                assert not list(folder.glob(".tmp-*"))
        if (folder / "model").exists():  # then all of it
            assert len(read_back(folder / "model", config)) == len(large_weights(config))
            assert read_config(folder / "model").num_layers == 1


# Memory

MEMORY_PROGRAM = """
import json, sys
from collections.abc import Mapping
from pathlib import Path
import torch
from model_cases import amber
from weftrain.core import checkpoint
from weftrain.core.formats import checkpoint_files
from weftrain.core.backend import State
from weftrain.exchange.huggingface.folder import HuggingFaceWeights, state_tensors, write_huggingface
from weftrain.core.parameters import parameter_specs

torch.set_num_threads(1)
folder, layers = Path(sys.argv[1]), int(sys.argv[2])
checkpoint_files.HASH_BACKLOG_BYTES = 32 << 20  # what a slow hash may leave in memory, which is 512 MiB of any model
config = amber(num_layers=layers, hidden_size=1024, num_heads=8, rotary_dim=128, intermediate_size=2816, vocab_size=2048)
shapes = {spec.name: spec.shape for spec in parameter_specs(config)}

class Drawn(Mapping):
    def __getitem__(self, name):
        return torch.full(shapes[name], float(len(name)))
    def __iter__(self):
        return iter(shapes)
    def __len__(self):
        return len(shapes)

def peak():  # not ru_maxrss, which a process inherits from the one that started it
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024

import weftrain.exchange.huggingface.folder
before = peak()
written = write_huggingface(folder / "model", Drawn(), config, torch.float32, max_shard_bytes=200 << 20)
after_write = peak()
state = State(0, 0, state_tensors(HuggingFaceWeights(folder / "model"), config))
claims = dict(recipe={}, dataset_id="", fingerprint={}, tokens=0, position=0, parent=None, kernels={})
checkpoint.save(folder / "checkpoints", state, **claims)
print(json.dumps({"size": written.size_bytes, "write": after_write - before, "read": peak() - before}))
"""


def measured(folder: Path, layers: int) -> dict[str, int]:
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "core")}
    command = [sys.executable, "-c", MEMORY_PROGRAM, str(folder), str(layers)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(folder)
    found: dict[str, int] = json.loads(done.stdout)
    return found


@pytest.mark.prove
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    small, large = measured(tmp_path / "small", 3), measured(tmp_path / "large", 12)
    assert large["size"] > 600e6
    assert small["size"] < 180e6
    for direction in ("write", "read"):
        assert small[direction] > 10e6  # a tensor of 11.5 MB goes through: the figure is one
        assert large[direction] < 200e6, large  # a third of the model
        assert large[direction] < small[direction] + 120e6, (small, large)
