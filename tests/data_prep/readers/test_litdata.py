"""litdata's chunks that litdata 0.2.76 wrote (files/litdata_*), and the library itself where it is installed.

The files were written by `write` below of `ITEMS` and `SETTINGS`.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weftrain.core.errors import DataError
from weftrain.data_prep.readers.documents import Document, Failure
from weftrain.data_prep.readers.listing import list_inputs

FILES = Path(__file__).parent / "files"
DOCUMENTS = [np.arange(number, number + 3 + number % 5) * 7 % 300 for number in range(12)]
SETTINGS: dict[str, dict[str, Any]] = {
    "litdata_tokens": {"chunk_size": 17, "item_loader": "TokensLoader"},
    "litdata_numpy": {"chunk_size": 17, "item_loader": "TokensLoader"},
    "litdata_tree": {"chunk_size": 5},
    "litdata_zstd": {"chunk_size": 5, "compression": "zstd", "compression_level": "chunk"},
    "litdata_batch": {"chunk_size": 5, "compression": "zstd", "compression_batch_size": 2},
}


def items(name: str) -> list[Any]:
    torch = pytest.importorskip("torch")
    if name == "litdata_tokens":
        return [torch.tensor(ids, dtype=torch.int32) for ids in DOCUMENTS]
    if name == "litdata_numpy":
        return [ids.astype("u2") for ids in DOCUMENTS]
    return [
        {"input_ids": torch.tensor(ids), "n": number, "name": f"document {number}"}
        for number, ids in enumerate(DOCUMENTS)
    ]


def tokens(found: Sequence[Document | Failure]) -> list[list[int]]:
    assert all(
        isinstance(item, Document) and item.tokens is not None and item.tokens.dtype == np.int32 for item in found
    ), found
    return [item.tokens.tolist() for item in found if isinstance(item, Document) and item.tokens is not None]


@pytest.mark.parametrize("name", SETTINGS)
def test_files_that_the_library_wrote_in_any_cut(read_all: Callable[..., Any], name: str) -> None:
    for part_bytes in (1 << 40, 30):
        found = read_all(FILES / name, part_bytes)
        assert tokens(found) == [ids.tolist() for ids in DOCUMENTS]
    assert all(file.name.endswith(".bin") for file in list_inputs([str(FILES / name)], source=None))


@pytest.mark.parametrize("name", SETTINGS)
def test_files_that_the_library_writes_now(read_all: Callable[..., Any], tmp_path: Path, name: str) -> None:
    writers = pytest.importorskip("litdata.streaming.writer", reason="litdata is not installed")
    loaders = pytest.importorskip("litdata.streaming.item_loader")
    arguments = dict(SETTINGS[name])
    if "item_loader" in arguments:
        arguments["item_loader"] = getattr(loaders, arguments["item_loader"])()
    writer = writers.BinaryWriter(str(tmp_path / name), **arguments)
    for number, item in enumerate(items(name)):
        writer[number] = item
    writer.done()
    writer.merge()
    assert tokens(read_all(tmp_path / name)) == [ids.tolist() for ids in DOCUMENTS]
    for path in (FILES / name).glob("*.bin"):
        assert (tmp_path / name / path.name).read_bytes() == path.read_bytes()


def test_text_packed_rows_and_arrow(read_all: Callable[..., Any], tmp_path: Path) -> None:
    assert [item.text for item in read_all(FILES / "litdata_text")] == [f"text {number} é" for number in range(6)]
    with pytest.raises(DataError, match=r"its samples all hold equally many ids: say with --format litdata_rows"):
        read_all(FILES / "litdata_rows")
    rows = read_all(FILES / "litdata_rows" / "chunk-0-0.bin", format="litdata_rows", sequence_length=8)
    assert tokens(rows) == [list(range(number, number + 9)) for number in range(5)]
    with pytest.raises(DataError, match=r"chunk-0-0\.bin: keeps its rows as Arrow"):
        read_all(FILES / "litdata_arrow" / "chunk-0-0.bin", format="litdata")
    shutil.copy(FILES / "litdata_tree" / "chunk-0-0.bin", tmp_path)
    with pytest.raises(DataError, match=r"is named by no index\.json of litdata beside it"):
        read_all(tmp_path / "chunk-0-0.bin", format="litdata")
    with pytest.raises(DataError, match=r"is named by no index\.json of litdata beside it"):
        read_all(tmp_path)  # and not skipped as a binary file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree["config"].update(encryption={"level": "chunk"}), "its chunks are encrypted"),
        (lambda tree: tree["config"].update(compression="lz4"), "its chunks are compressed as lz4"),
        (
            lambda tree: tree["config"].update(compression="zstd", compression_level="sample"),
            "compressed as zstd, level sample",
        ),
        (lambda tree: tree["config"].update(item_loader="ParquetLoader"), "its items are of ParquetLoader"),
        (
            lambda tree: tree["config"].update(data_format=["pickle", "int", "str"]),
            "'input_ids' is pickled, .* could run any code",
        ),
        (lambda tree: tree["config"].update(data_format=["jpeg", "int", "str"]), "is known to hold ids"),
        (lambda tree: tree["config"].update(data_format=[]), "'data_format' is no list of encodings"),
        (lambda tree: tree["chunks"][1].update(filename="../x.bin"), "is not a path within the folder"),
        (lambda tree: tree["chunks"][1].update(filename="absent.bin"), r"chunk-0-1\.bin: is named by no index\.json"),
        (
            lambda tree: tree["chunks"].append({"filename": "absent.bin", "chunk_size": 1}),
            "names the chunk absent.bin, which is not there",
        ),
        (lambda tree: tree["chunks"][1].update(chunk_size=4), r"chunk-0-1\.bin: holds 5 items, index\.json says 4"),
    ],
)
def test_an_index_that_cannot_be_followed(
    tmp_path: Path, read_all: Callable[..., Any], change: Any, message: str
) -> None:
    folder = shutil.copytree(FILES / "litdata_tree", tmp_path / "in")
    tree = json.loads((folder / "index.json").read_text())
    change(tree)
    (folder / "index.json").write_text(json.dumps(tree))
    options = {"tokens_key": "input_ids"} if "pickled" in message else {}
    with pytest.raises(DataError, match=message):
        read_all(folder, **options)
        read_all(folder / "chunk-0-0.bin", format="litdata", **options)


def test_chunks_of_another_file_system_are_refused_by_name(read_all: Callable[..., Any]) -> None:
    root = f"memory://{uuid.uuid4().hex}/in"
    system, base = fsspec.core.url_to_fs(root)
    for path in (FILES / "litdata_tree").iterdir():
        system.pipe_file(f"{base}/{path.name}", path.read_bytes())
    with pytest.raises(DataError, match="litdata's chunks are read from local folders only; copy them here first"):
        read_all(root)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(list(SETTINGS)), st.booleans(), st.integers(0, 900), st.binary(max_size=9), st.booleans())
def test_any_damage_is_documents_failures_or_one_error(
    tmp_path: Path, check_damaged: Callable[..., None], name: str, index: bool, place: int, data: bytes, cut: bool
) -> None:
    folder = shutil.copytree(FILES / name, tmp_path / uuid.uuid4().hex)
    damaged = folder / "index.json" if index else min(folder.glob("*.bin"))
    whole = damaged.read_bytes()
    place %= len(whole)
    damaged.write_bytes(whole[:place] + data + (b"" if cut else whole[place + len(data) :]))
    check_damaged(min(folder.glob("*.bin")), 100)
