"""The vendor's checkpoint form: bits unchanged both ways, the vendor agrees, and a file that lies is refused by
name.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from fault_injection import KINDS, Death, Faults, injected
from hypothesis import given, settings
from hypothesis import strategies as st
from model_cases import amber, crystal
from modelzoo_checkpoints import ADAMW, EMBEDDING, FAMILIES, HEAD, Build, assert_same_state, random_state, same, small
from torch import Tensor

from weftrain.core.errors import CheckpointError
from weftrain.core.formats import fsops
from weftrain.core.formats.fsops import TEMPORARY_PREFIX
from weftrain.core.formats.lazy_tensors import LazyTensors, meta
from weftrain.core.model_config import ModelConfig
from weftrain.core.optim import beta_power
from weftrain.core.parameters import parameter_specs
from weftrain.core.recipe_file import load_recipe
from weftrain.exchange.layouts import foreign_tensors, import_tensor
from weftrain.exchange.modelzoo.checkpoint_format import MOMENTS
from weftrain.exchange.modelzoo.checkpoint_reader import read_checkpoint
from weftrain.exchange.modelzoo.checkpoint_writer import (
    OptimizerState,
    Prefix,
    _datasets,
    _Image,
    _planes,
    _state_dict,
    write_checkpoint,
)
from weftrain.exchange.modelzoo.lz4 import LZ4


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    heads, pairs = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    changes: dict[str, Any] = {
        "num_heads": heads,
        "hidden_size": 2 * heads * pairs,
        "vocab_size": draw(st.integers(1, 30)),
    }
    changes |= {"num_layers": draw(st.integers(1, 3)), "intermediate_size": draw(st.integers(1, 20))}
    changes |= {"tie_embeddings": draw(st.booleans()), "linear_bias": draw(st.booleans())}
    changes |= {"qkv_bias": draw(st.booleans()), "feed_forward": draw(st.sampled_from(["swiglu", "gelu"]))}
    changes["num_kv_heads"] = draw(st.sampled_from([1, heads]))
    if draw(st.booleans()):
        # rotate-half over the whole head: q and k lie permuted in the file
        return amber(rotary_dim=2 * pairs, **changes)
    return crystal(rotary_dim=2 * draw(st.integers(1, pairs)), base_hidden_size=1, **changes)


@pytest.mark.prove
@settings(max_examples=40, deadline=None)
@given(
    config=configs(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    with_optimizer=st.booleans(),
    prefix=st.sampled_from(["model", "model.model"]),
    updates=st.integers(0, 50),
    seed=st.integers(0, 2**31),
)
def test_round_trip_is_bit_exact(
    config: ModelConfig, dtype: torch.dtype, with_optimizer: bool, prefix: Prefix, updates: int, seed: int
) -> None:
    planes = ("weights", "exp_avg", "exp_avg_sq") if with_optimizer else ("weights",)
    state = random_state(config, dtype, seed, planes)
    optimizer = OptimizerState(ADAMW, updates, 0.01) if with_optimizer else None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "new" / "checkpoint.mdl"
        size = write_checkpoint(path, config, state, step=7, optimizer=optimizer, prefix=prefix)
        assert path.stat().st_size == size
        back = read_checkpoint(path, config, optimizer=with_optimizer)
        assert_same_state(back, state)
        assert (back.step, back.optimizer_updates) == (7, updates if with_optimizer else 7)
        assert back.ignored == ()
        if with_optimizer:
            weights = read_checkpoint(path, config)
            assert set(weights) == {name for name in state if name.startswith("weights/")}
            assert weights.ignored == ("optimizer",)


def test_plain_names_are_weights(tmp_path: Path) -> None:
    state = random_state(small())
    write_checkpoint(
        tmp_path / "a", small(), {name.removeprefix("weights/"): tensor for name, tensor in state.items()}, step=0
    )
    assert_same_state(read_checkpoint(tmp_path / "a", small()), state)


def test_equal_arguments_give_equal_bytes(tmp_path: Path) -> None:
    state = random_state(small(), planes=("weights", "exp_avg", "exp_avg_sq"))
    for name in ("a", "b"):
        write_checkpoint(tmp_path / name, small(), state, step=3, optimizer=OptimizerState(ADAMW, 3))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@FAMILIES
def test_tensors_stream_one_at_a_time(tmp_path: Path, family: Build) -> None:
    """Each tensor of a lazy mapping is asked for once, and no two are held while the file is written."""
    config = small(family)
    state = random_state(config, planes=("weights", "exp_avg", "exp_avg_sq"))
    asked: list[str] = []

    def read(name: str) -> Tensor:
        asked.append(name)
        return state[name]

    lazy = LazyTensors({name: tensor.to("meta") for name, tensor in state.items()}, read)
    write_checkpoint(tmp_path / "lazy", config, lazy, step=3, optimizer=OptimizerState(ADAMW, 3))
    assert asked == list(state)  # in execution order, plane by plane
    write_checkpoint(tmp_path / "eager", config, state, step=3, optimizer=OptimizerState(ADAMW, 3))
    assert (tmp_path / "lazy").read_bytes() == (tmp_path / "eager").read_bytes()


def test_names_in_the_file(tmp_path: Path) -> None:
    """Flat dotted names; a second name of a tensor has no dataset of its own; uncompressed, in the vendor's types."""
    config = small(num_layers=2)
    state = random_state(config, torch.bfloat16, planes=("weights", "exp_avg", "exp_avg_sq"))
    write_checkpoint(tmp_path / "a", config, state, step=3, optimizer=OptimizerState(ADAMW, 4, 0.5))
    with h5py.File(tmp_path / "a") as file:
        names = {entry.name for entry in foreign_tensors(config, "cerebras")}
        parts = ("exp_avg", "exp_avg_sq", "beta1_power", "beta2_power")
        assert set(file) == names | {
            f"optimizer.state.{number}.{part}" for number in range(len(names)) for part in parts
        }
        assert file[EMBEDDING].dtype == np.int16
        assert list(file[EMBEDDING].attrs["dtypes"]) == ["torch.bfloat16"]
        assert file["optimizer.state.0.beta1_power"].dtype == np.float32
        link = json.loads(file.attrs[f"{HEAD}.__metadata__"])[f"{HEAD}.__metadata__"]
        assert link == {"key": EMBEDDING, "__LINKED__": True, "__TYPE__": "LinkedObject", "__NONE__": True}
        group = {
            key: json.loads(file.attrs[f"{key}.__metadata__"]) for key in ("optimizer.param_groups.1.lr", "global_step")
        }
        assert group["global_step"]["global_step.__metadata__"]["scalar_value"] == 3
        # CrystalCoder's decoder matrices learn at 1/m: width 32 over a proxy of 16
        assert group["optimizer.param_groups.1.lr"]["optimizer.param_groups.1.lr.__metadata__"]["scalar_value"] == 0.25
        # numbered by weftrain's groups: embeddings, decoder matrices, norms and biases
        name = json.loads(file.attrs["optimizer.param_groups.2.param_names.0.__metadata__"])
        assert name["optimizer.param_groups.2.param_names.0.__metadata__"]["string_value"].endswith(
            "layers.0.norm1.weight"
        )


@pytest.mark.prove
def test_the_layout_of_a_7b_model_takes_no_memory_for_its_tensors() -> None:
    """Everything but the tensors of CrystalCoder-7B with optimizer state: 2,569 datasets and 4,152 leaves in a few
    MB.
    """
    config = load_recipe("crystalcoder_7b_phase1").recipe.model

    def read(name: str) -> Tensor:
        raise AssertionError(f"{name} was read")

    metas = {
        f"{plane}/{spec.name}": meta(spec.shape) for plane in ("weights", *MOMENTS) for spec in parameter_specs(config)
    }
    optimizer = OptimizerState(ADAMW, 1)
    planes = _planes(config, LazyTensors(metas, read), optimizer, Path("x"))
    state = _state_dict(config, planes, 1, optimizer, "model")
    image = _Image(state, [key for key, _, _ in _datasets(config, optimizer, "model")])
    tensors = 3 * 6_575_278_720 * 4
    own = 4096 * len(image._pages)
    assert image.size - own <= tensors + 2 * 4 * len(image.offsets) < image.size + own
    assert own < 20 << 20
    places = sorted(image.offsets.values())
    assert all(first + count <= following for (first, count), (following, _) in itertools.pairwise(places))


# What cannot be written.


def test_what_the_form_cannot_hold_is_refused(tmp_path: Path) -> None:
    config, path = small(), tmp_path / "checkpoint.mdl"
    state = random_state(config)
    half = state | {"weights/final_norm.bias": state["weights/final_norm.bias"].half()}
    wrong = state | {"weights/final_norm.bias": torch.zeros(5)}
    less = {name: tensor for name, tensor in state.items() if not name.endswith("final_norm.bias")}
    for tensors, optimizer, reason in (
        (
            half,
            None,
            r"checkpoint\.mdl: tensor 'weights/final_norm\.bias' is torch\.float16: the format holds float32 and bfloat16",
        ),
        (wrong, None, r"tensor 'final_norm\.bias' has shape \[5\]"),
        (less, None, r"missing tensors final_norm\.bias"),
        (state | {"weights/other": torch.zeros(1)}, None, "unknown tensors other"),
        (state, OptimizerState(ADAMW, 1), r"checkpoint\.mdl: no tensors 'exp_avg/\.\.\.' were given"),
        ({}, None, r"no tensors 'weights/\.\.\.' were given"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            write_checkpoint(path, config, tensors, step=0, optimizer=optimizer)
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(CheckpointError, match="layout cerebras cannot hold this model"):
        write_checkpoint(path, small(amber, rotary_dim=4), random_state(config), step=0)


def test_a_file_is_never_replaced(written: Path) -> None:
    before = written.read_bytes()
    with pytest.raises(CheckpointError, match=r"checkpoint\.mdl: exists: choose another name"):
        write_checkpoint(written, small(), random_state(small(), seed=1), step=4)
    assert written.read_bytes() == before


def test_a_full_disk_is_noticed_before_it_is_written_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsops, "free_bytes", lambda path: 10)
    with pytest.raises(CheckpointError, match=r"the disk is full: [\d,]+ bytes needed, 10 free: make room"):
        write_checkpoint(tmp_path / "a", small(), random_state(small()), step=0)


@pytest.mark.parametrize("kind", KINDS)
def test_each_file_operation_may_fail(tmp_path: Path, kind: str) -> None:
    """Afterwards there is the whole file or none; an error says why, and leaves nothing behind."""
    config = small(amber)
    state = random_state(config)
    with injected(Faults()) as counting:
        write_checkpoint(tmp_path / "whole", config, state, step=1)
    operations = len(counting.trace)
    assert {"create", "write", "sync_file", "rename"} <= {name for name, _ in counting.trace}
    for at in range(operations):
        folder = tmp_path / f"{at}"
        folder.mkdir()
        path = folder / "checkpoint.mdl"
        with injected(Faults(kind, at)):
            try:
                write_checkpoint(path, config, state, step=1)
                failed = False
            except CheckpointError as error:
                failed = True
                message = str(error)
            except Death:
                failed = True
                message = ""
        if path.exists():
            assert_same_state(read_checkpoint(path, config), state)
        else:
            assert failed
        if failed and message:
            assert message.startswith(f"{path}: cannot be written: ")
            assert [entry.name for entry in folder.iterdir() if entry.name.startswith(TEMPORARY_PREFIX)] == []


# The vendor's own package, where it is there.

LOAD_AND_SAVE = """
import sys
import cerebras.pytorch as cstorch
import torch
source, plain, again = sys.argv[1:]
state = cstorch.load(source)
assert state["model"][sys.stdin.read().strip()].shape
def materialized(tree):
    if isinstance(tree, torch.Tensor):
        return tree.to("cpu").clone() if not hasattr(tree, "_materialize") else tree._materialize().clone()
    if isinstance(tree, dict):
        return {name: materialized(item) for name, item in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(map(materialized, tree))
    return tree
torch.save(materialized(state), plain)
cstorch.save(state, again)
"""


def ask_vendor(python: Path, program: str, *arguments: Path, text: str = "") -> None:
    environment = {**os.environ, "PATH": f"{python.parent}:{os.environ['PATH']}"}
    command = [str(python), "-c", program, *map(str, arguments)]
    result = subprocess.run(
        command, input=text, capture_output=True, text=True, env=environment, timeout=110, cwd=arguments[0].parent
    )
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.cerebras
@FAMILIES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_vendor_loads_it(vendor: Path, tmp_path: Path, family: Build, dtype: torch.dtype) -> None:
    """cerebras.pytorch.load gives every bit and number; what cerebras.pytorch.save makes of them is read here, with
    every bit again.
    """
    config = small(family, num_layers=2, vocab_size=300, intermediate_size=150)  # large enough for chunks at an edge
    state = random_state(config, dtype, planes=("weights", "exp_avg", "exp_avg_sq"))
    state["weights/embedding.weight"][7:] = 0.25  # compresses
    path, plain, again = tmp_path / "ours.mdl", tmp_path / "plain.pt", tmp_path / "theirs.mdl"
    write_checkpoint(path, config, state, step=7, optimizer=OptimizerState(ADAMW, 5, 0.01))
    ask_vendor(vendor, LOAD_AND_SAVE, path, plain, again, text=EMBEDDING.removeprefix("model."))

    loaded = torch.load(plain, weights_only=True)
    assert loaded.keys() == {"model", "optimizer", "optimizer_updates", "global_step"}
    assert (loaded["global_step"], loaded["optimizer_updates"]) == (7, 5)
    groups = loaded["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.0]
    assert groups[0]["betas"] == (0.9, 0.95)
    assert all(group["correct_bias"] and not group["amsgrad"] for group in groups)
    names = {
        number: name for group in groups for number, name in zip(group["params"], group["param_names"], strict=True)
    }
    by_name = {entry.name: entry for entry in foreign_tensors(config, "cerebras")}
    assert sorted(names.values()) == sorted(by_name)
    for number, name in names.items():
        of_parameter = loaded["optimizer"]["state"][number]
        entry = by_name[name]
        for plane, tensor in (
            ("weights", loaded["model"][name.removeprefix("model.")]),
            *((p, of_parameter[p]) for p in MOMENTS),
        ):
            canonical = next(import_tensor(entry, {name: tensor}))[1]
            assert same(canonical, state[f"{plane}/{entry.parameters[0]}"]), (plane, name)
        for copy in entry.copies:
            assert same(loaded["model"][copy.removeprefix("model.")], loaded["model"][name.removeprefix("model.")])
        assert of_parameter["beta1_power"] == torch.tensor(beta_power(0.9, 5))
        assert of_parameter["beta2_power"] == torch.tensor(beta_power(0.95, 5))

    with h5py.File(again) as file:
        assert file[EMBEDDING].id.get_create_plist().get_filter(0)[0] == LZ4
        # to optimizer.param_groups.0.params.N: the same 7 of Python's
        assert "LinkedObject" in file.attrs["global_step.__metadata__"]
    back = read_checkpoint(again, config, optimizer=True)
    assert_same_state(back, state)
    assert (back.step, back.optimizer_updates) == (7, 5)

    with h5py.File(path) as ours, h5py.File(again) as theirs:
        """Attribute for attribute ours is what the vendor writes, but that it links equal small numbers of Python's."""
        assert set(ours) == set(theirs)
        assert set(ours.attrs) == set(theirs.attrs)
        for name in ours.attrs:
            if "LinkedObject" not in str(theirs.attrs[name]):
                assert ours.attrs[name] == theirs.attrs[name], name
        for key in ours:
            assert {name: str(value) for name, value in ours[key].attrs.items()} == {
                name: str(value) for name, value in theirs[key].attrs.items()
            }


VENDOR_TRAINS = """
import sys
import cerebras.pytorch as cstorch
import torch
cstorch.backend("cpu")
state = cstorch.load(sys.argv[1])
def parameters(group):
    return [torch.nn.Parameter(torch.zeros(state["model"][name.removeprefix("model.")].shape)) for name in group["param_names"]]
groups = [{"params": parameters(group)} for group in state["optimizer"]["param_groups"]]
optimizer = cstorch.optim.AdamW(groups, lr=0.1, betas=(0.5, 0.5))
optimizer.load_state_dict(state["optimizer"])
assert [group["betas"] for group in optimizer.param_groups] == [(0.9, 0.95)] * 3
first = optimizer.param_groups[0]["params"][0]
assert abs(float(optimizer.state[first]["beta2_power"]) - 0.95**5) < 1e-6
"""


@pytest.mark.cerebras
def test_the_vendors_optimizer_takes_the_state(vendor: Path, tmp_path: Path) -> None:
    config = small()
    zeros = {
        name: torch.zeros_like(tensor)
        for name, tensor in random_state(config, planes=("weights", "exp_avg", "exp_avg_sq")).items()
    }
    write_checkpoint(tmp_path / "a.mdl", config, zeros, step=4, optimizer=OptimizerState(ADAMW, 4, 0.01))
    ask_vendor(vendor, VENDOR_TRAINS, tmp_path / "a.mdl")
