"""HDF5 without trust: what leads out of the file or is of another type is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from weftrain.core.formats.hdf5 import UntrustedFileError, open_dataset, read_attributes


@pytest.mark.parametrize(
    ("write", "problem"),
    [
        (lambda file: file.create_dataset("x", data=np.zeros(3, "<i8")), "has type int64"),
        (lambda file: file.create_dataset("x", data=np.zeros((3, 1), "<i4")), "has rank 2, not 1"),
        (lambda file: file.create_group("x"), "is not a dataset"),
        (lambda file: file.__setitem__("x", h5py.ExternalLink("other.h5", "/x")), "links are not followed"),
        (lambda file: file.create_dataset("x", (1 << 30,), "<i4", chunks=(1 << 10,)), "truncated or lies"),
        (lambda file: file.create_dataset("x", (64,), "<i4", chunks=(64,), compression="lzf"), "a filter other than"),
    ],
)
def test_a_dataset_that_is_not_what_it_should_be(
    tmp_path: Path, write: Callable[[h5py.File], object], problem: str
) -> None:
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        write(file)
        file.attrs["n"] = "text"
    with h5py.File(path, "r") as file:
        with pytest.raises(UntrustedFileError, match=problem):
            open_dataset(file, "x", np.dtype("<i4"), 1, path.stat().st_size)
        with pytest.raises(UntrustedFileError, match="n: is not a"):
            read_attributes(file, ("n",), {})
        with pytest.raises(UntrustedFileError, match="attributes: are"):
            read_attributes(file, (), {})
