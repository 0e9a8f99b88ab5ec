"""The safetensors files of a checkpoint: hostile ones are refused, contiguous tensors are not copied."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_cases import forge, save, state_of
from safetensors.torch import load_file

from weftrain.core import checkpoint
from weftrain.core.errors import CheckpointError
from weftrain.core.formats import tensor_file


def test_other_programs_read_the_tensors(tmp_path: Path) -> None:
    read = load_file(save(tmp_path, 3).path / "state-00001-of-00001.safetensors")
    for name, tensor in state_of(3).tensors.items():
        assert tensor_file.tensor_memory(read[name]) == tensor_file.tensor_memory(tensor)


def test_writing_does_not_copy_a_contiguous_tensor() -> None:
    tensor = torch.randn(5, 3)
    assert np.shares_memory(np.frombuffer(tensor_file.tensor_memory(tensor), np.uint8), tensor.numpy())


def header(text: str, data: bytes = b"", length: int | None = None) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text.encode() + data


def entry(begin: int = 0, end: int = 4, dtype: str = "F32", shape: str = "[1]") -> str:
    return f'{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}'


HOSTILE_FILES = {
    "duplicate name": (header(f'{{"a":{entry()},"a":{entry(4, 8)}}}', bytes(8)), "'a' appears twice"),
    "path as a name": (header(f'{{"../../x":{entry()}}}', bytes(4)), r"tensor name '\.\./\.\./x'"),
    "header larger than the file": (header("{}", length=2**62), "claims a header"),
    "header larger than allowed": (header("{}", length=10**8 + 1), "claims a header"),
    "not JSON": (header("{"), "Expecting|delimiter|property name"),
    "not an object": (header("[]"), "not (one this program writes|a JSON object)"),
    "nested": (header("[" * 100_000), "nested too deeply|Expecting"),
    "foreign metadata": (header('{"__metadata__":{"x":"y"}}'), "not (one this program writes|a JSON object)"),
    "unknown dtype": (header(f'{{"a":{entry(dtype="F1024")}}}', bytes(4)), "unknown dtype"),
    "size that does not fit the shape": (header(f'{{"a":{entry(shape="[2]")}}}', bytes(4)), "do not hold"),
    "shape bomb": (header(f'{{"a":{entry(shape="[9999999999999999999999]")}}}', bytes(4)), "short lists of numbers"),
    "negative shape": (header(f'{{"a":{entry(shape="[-1,-1]")}}}', bytes(4)), "short lists of numbers"),
    "shape of floats": (header(f'{{"a":{entry(shape="[1.0]")}}}', bytes(4)), "short lists of numbers"),
    "overlap": (header(f'{{"a":{entry()},"b":{entry()}}}', bytes(4)), "begins at byte"),
    "hole": (header(f'{{"a":{entry()},"b":{entry(8, 12)}}}', bytes(12)), "begins at byte"),
    "beyond the end": (header(f'{{"a":{entry()},"b":{entry(4, 8)}}}', bytes(4)), "the tensors end at"),
    "bytes after the end": (header(f'{{"a":{entry()}}}', bytes(5)), "the tensors end at"),
    "extra key": (
        header('{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0],"x":1}}'),
        "not dtype, shape and data_offsets",
    ),
    "other tensors": (header(f'{{"a":{entry()}}}', bytes(4)), "is missing|not in the manifest"),
}


@pytest.mark.parametrize("case", HOSTILE_FILES)
def test_hostile_tensor_files_are_refused(tmp_path: Path, case: str) -> None:
    data, message = HOSTILE_FILES[case]
    path = save(tmp_path, 1).path
    forge(path, lambda manifest: None, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.verify(path)
    assert "\n" not in str(caught.value)
    assert "state-00001" in str(caught.value)
