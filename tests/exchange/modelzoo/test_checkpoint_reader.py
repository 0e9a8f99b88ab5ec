"""Checkpoint files of the Model Zoo from strangers: read to the last bit, or refused with the name of what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from modelzoo_checkpoints import ADAMW, EMBEDDING, HEAD, NORM, NORM_AGAIN, assert_same_state, random_state, small

from weftrain.core.errors import CheckpointError
from weftrain.core.model_config import ModelConfig
from weftrain.exchange.layouts import foreign_tensors
from weftrain.exchange.modelzoo.checkpoint_reader import read_checkpoint
from weftrain.exchange.modelzoo.checkpoint_writer import OptimizerState, write_checkpoint


def change(path: Path, key: str, array: np.ndarray | None, **attributes: Any) -> None:
    """Replace a dataset (None: remove it) by an ordinary one."""
    with h5py.File(path, "r+") as file:
        if key in file:
            kept = dict(file[key].attrs)
            del file[key]
        else:
            kept = {}
        if array is not None:
            dataset = file.create_dataset(key, data=array)
            dataset.attrs.update(kept | attributes)


def assert_refused(path: Path, reason: str, config: ModelConfig | None = None, **arguments: Any) -> None:
    with pytest.raises(CheckpointError, match=reason) as caught:
        dict(read_checkpoint(path, config or small(), **arguments))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_truncated_anywhere(written: Path) -> None:
    """Cut at 200 places: refused when opened or when the tensor is read, and never an invented zero."""
    data = written.read_bytes()
    for length in np.linspace(0, len(data) - 1, 200).astype(int):
        written.write_bytes(data[:length])
        assert_refused(written, "checkpoint.mdl")


@pytest.mark.prove
def test_damaged_anywhere(written: Path) -> None:
    """One byte at 400 places: read as something, or refused in one line; nothing else is raised."""
    data, generator = written.read_bytes(), np.random.default_rng(0)
    outcomes = set()
    for place in generator.integers(0, len(data), 400):
        damaged = bytearray(data)
        damaged[place] ^= 1 << int(generator.integers(0, 8))
        written.write_bytes(damaged)
        try:
            dict(read_checkpoint(written, small()))
            outcomes.add("read")
        except CheckpointError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}  # there are no checksums in this form


def test_names_missing_and_unknown(written: Path) -> None:
    change(written, "model.surplus", np.zeros(3, np.float32))
    assert_refused(written, r"checkpoint\.mdl: model\.surplus: unknown; is the file of this model\?")
    change(written, "model.surplus", None)
    dict(read_checkpoint(written, small()))
    assert_refused(written, r"transformer_decoder\.layers\.1\..* and 14 more: missing", small(num_layers=2))
    assert_refused(
        written, rf"{HEAD}: is a link to '{EMBEDDING}', which is not another name", small(tie_embeddings=False)
    )
    change(written, NORM, None)
    assert_refused(written, rf"{NORM}: is stored as 'TorchTensorSerializer', without data in this file")


def test_wrong_shapes_and_types(written: Path) -> None:
    shape = (11, 32)
    for array, reason in (
        (np.zeros((32, 11), np.float32), r"has shape \(32, 11\), the config makes it \(11, 32\)"),
        (np.zeros(352, np.float32), r"has shape \(352,\)"),
        (np.zeros(shape, np.float64), "holds float64"),
        (np.zeros(shape, np.float16), "holds float16"),
        (np.zeros(shape, ">f4"), "holds >f4"),
        (np.zeros(shape, np.int32), "holds int32"),
        (np.zeros(shape, np.int16), r"holds int16 \(and no mark of bfloat16\)"),
    ):
        change(written, EMBEDDING, array)
        assert_refused(written, f"{EMBEDDING}: {reason}")
    change(written, EMBEDDING, None)
    with h5py.File(written, "r+") as file:
        file.create_group(EMBEDDING)
    assert_refused(written, f"{EMBEDDING}: is not a dataset")


def test_links_are_not_followed(written: Path, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["secret"] = np.zeros((11, 32), np.float32)
    for link in (h5py.ExternalLink(str(tmp_path / "other.h5"), "secret"), h5py.SoftLink(f"/{NORM}")):
        change(written, EMBEDDING, None)
        with h5py.File(written, "r+") as file:
            file[EMBEDDING] = link
        assert_refused(written, f"{EMBEDDING}: is a soft or external link")
    (tmp_path / "link.mdl").symlink_to(written)
    assert_refused(tmp_path / "link.mdl", "file: is a symbolic link or no plain file")
    assert_refused(tmp_path, "file: is a symbolic link or no plain file")
    assert_refused(tmp_path / "absent", "file: is missing")
    (tmp_path / "text").write_text("not HDF5")
    assert_refused(tmp_path / "text", "cannot be read as HDF5")


def test_storage_elsewhere_and_storage_invented(written: Path, tmp_path: Path) -> None:
    shape, size = (11, 32), 11 * 32 * 4
    (tmp_path / "raw").write_bytes(bytes(size))

    def external(file: h5py.File) -> None:
        file.create_dataset(EMBEDDING, shape, "<f4", external=[(str(tmp_path / "raw"), 0, size)])

    def virtual(file: h5py.File) -> None:
        layout = h5py.VirtualLayout(shape, "<f4")
        layout[...] = h5py.VirtualSource(str(tmp_path / "absent"), "x", shape)
        file.create_virtual_dataset(EMBEDDING, layout)

    def never_allocated(file: h5py.File) -> None:
        file.create_dataset(EMBEDDING, shape, "<f4")

    def one_chunk_missing(file: h5py.File) -> None:
        file.create_dataset(EMBEDDING, shape, "<f4", chunks=(6, 32), compression="gzip")[:6] = 1

    def huge_chunk(file: h5py.File) -> None:
        file.create_dataset(EMBEDDING, shape, "<f4", chunks=(1 << 20, 32), maxshape=(None, 32), compression="gzip")[
            ...
        ] = 1

    def other_filter(file: h5py.File) -> None:
        file.create_dataset(EMBEDDING, data=np.zeros(shape, "<f4"), compression="lzf")

    for make, reason in (
        (external, "is a virtual, compact or externally stored dataset"),
        (virtual, "is a virtual, compact or externally stored dataset"),
        (never_allocated, "should have 1,408 bytes at offset None"),
        (one_chunk_missing, "has 1 of 2 chunks: it was not finished"),
        (huge_chunk, "has chunks of 134,217,728 bytes"),
        (other_filter, r"uses filters \[32000\]; LZ4"),
    ):
        change(written, EMBEDDING, None)
        with h5py.File(written, "r+") as file:
            make(file)
        assert_refused(written, f"{EMBEDDING}: {reason}")


def test_gzip_is_read(written: Path) -> None:
    state = random_state(small())
    change(written, EMBEDDING, None)
    with h5py.File(written, "r+") as file:
        file.create_dataset(
            EMBEDDING, data=state["weights/embedding.weight"].numpy(), chunks=(3, 5), compression="gzip", shuffle=True
        )
    assert_same_state(read_checkpoint(written, small()), state)


@pytest.mark.parametrize(("first", "again"), [(EMBEDDING, HEAD), (NORM, NORM_AGAIN)])
def test_copies_must_be_equal_in_every_bit(written: Path, first: str, again: str) -> None:
    """Copies full of NaNs are equal copies."""
    state = random_state(small())
    with h5py.File(written) as file:
        values = file[first][...]
    assert np.isnan(state["weights/embedding.weight"].numpy()).any()
    change(written, again, values)
    assert_same_state(read_checkpoint(written, small()), state)
    values.view(np.uint8).reshape(-1)[-1] ^= 1
    change(written, again, values)
    assert_refused(written, f"{again}: differs from '{first}'")


def test_versions(written: Path) -> None:
    """Unfinished and future files are refused. A file of an old release has no JSON: every tensor has a dataset, bf16
    another mark.
    """
    with h5py.File(written, "r+") as file:
        file.attrs["__SUCCESS__"] = False
    assert_refused(written, "__SUCCESS__: is not set: the program that wrote the file did not finish")
    with h5py.File(written, "r+") as file:
        del file.attrs["__SUCCESS__"]
    assert_refused(written, "__SUCCESS__: is not set")
    with h5py.File(written, "r+") as file:
        file.attrs["__version__"] = 0.6
    assert_refused(written, r"__version__: is 0\.6, this program reads up to 0\.5")
    with h5py.File(written, "r+") as file:
        file.attrs["__version__"] = np.array([0.3, 0.3])
    assert_refused(written, "__version__: is not a scalar attribute")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_of_release_1_9_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    """Its `__spec__` is a pickle, which is not opened: here it is one that would be seen."""
    config = small()
    state, path = random_state(config, dtype), tmp_path / "old.mdl"
    with h5py.File(path, "w") as file:
        file.attrs["__version__"] = 0.3
        file.attrs["__spec__"] = b"cos\nsystem\n(S'exit 1'\ntR.".hex()
        for entry in foreign_tensors(config, "cerebras"):
            tensor = state[f"weights/{entry.parameters[0]}"]
            for name in (entry.name, *entry.copies):
                dataset = file.create_dataset(
                    name, data=tensor.view(torch.int16).numpy() if dtype == torch.bfloat16 else tensor.numpy()
                )
                dataset.attrs["__H5_TYPE__"] = "TorchTensorH5Type"
                dataset.attrs["is_bfloat16"] = dtype == torch.bfloat16
        file.create_dataset("global_step", data=np.int64(12))
        file.create_dataset("lr_scheduler.last_epoch", data=np.int64(12))
    back = read_checkpoint(path, config)
    assert_same_state(back, state)
    assert (back.step, back.optimizer_updates, back.ignored) == (12, 12, ("lr_scheduler",))
    change(path, HEAD, None)
    assert_same_state(read_checkpoint(path, config), state)  # copies may be absent
    assert_refused(path, "do not name their parameters", optimizer=True)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is not JSON"),
        ("[]", "does not describe its leaf"),
        (
            json.dumps({f"{HEAD}.__metadata__": {"__TYPE__": "ObjectSerializer"}}),
            "is stored as 'ObjectSerializer', without data",
        ),
        (json.dumps({f"{HEAD}.__metadata__": {"__TYPE__": "LinkedObject", "key": 3}}), "is a link to nothing"),
        (
            json.dumps({f"{HEAD}.__metadata__": {"__TYPE__": "LinkedObject", "key": NORM}}),
            "is a link to .* not another name of the same",
        ),
        (
            json.dumps({f"{HEAD}.__metadata__": {"__TYPE__": "LinkedObject", "key": HEAD}}),
            "is a link to .* not another name of the same",
        ),
        (3, "is not text"),
    ],
)
def test_metadata_that_lies(written: Path, text: Any, reason: str) -> None:
    with h5py.File(written, "r+") as file:
        file.attrs[f"{HEAD}.__metadata__"] = text
    assert_refused(written, f"{HEAD}.*: {reason}")


def test_optimizer_state_that_lies(tmp_path: Path) -> None:
    state, path = random_state(small(), planes=("weights", "exp_avg", "exp_avg_sq")), tmp_path / "a"
    write_checkpoint(path, small(), state, step=3, optimizer=OptimizerState(ADAMW, 3))
    key = "optimizer.param_groups.0.param_names.0.__metadata__"
    with h5py.File(path, "r+") as file:
        good = file.attrs[key]
        file.attrs[key] = good.replace("word_embeddings", "other")
    assert_refused(path, rf"optimizer\.state\.None\.exp_avg: is missing, exp_avg of '{EMBEDDING}'", optimizer=True)
    number = "optimizer.param_groups.0.params.0.__metadata__"
    with h5py.File(path, "r+") as file:
        file.attrs[key] = good
        index = file.attrs[number]
        file.attrs[number] = index.replace('"scalar_value": 0', '"scalar_value": "0"')
    assert_refused(path, "names a parameter that it does not number, or one twice", optimizer=True)
    other = key.replace("groups.0", "groups.2")
    with h5py.File(path, "r+") as file:
        file.attrs[number] = index
        second = file.attrs[other]
        file.attrs[other] = good.replace("groups.0", "groups.2")
    assert_refused(path, "names a parameter that it does not number, or one twice", optimizer=True)
    with h5py.File(path, "r+") as file:
        file.attrs[other] = second
        shape = file["optimizer.state.0.exp_avg"].shape
    dict(read_checkpoint(path, small(), optimizer=True))
    change(path, "optimizer.state.0.exp_avg", np.zeros(shape[::-1], np.float32))
    assert_refused(path, r"optimizer\.state\.0\.exp_avg: has shape", optimizer=True)
    dict(read_checkpoint(path, small()))
