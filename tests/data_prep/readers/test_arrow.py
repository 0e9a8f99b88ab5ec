"""Arrow files and streams, and the folders that `datasets` saves: the rows, any cut, and every kind of damage."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weftrain.core.errors import DataError
from weftrain.data_prep.readers.documents import Document, Failure
from weftrain.data_prep.readers.listing import Wanted, find_inputs, list_inputs
from weftrain.data_prep.readers.read_options import ReadOptions
from weftrain.data_prep.readers.shares import read_part, split_parts

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install 'weftrain[data]'")
feather = pytest.importorskip("pyarrow.feather")
Read = Callable[..., list[Document | Failure]]
NULL = "column 'text' is null; give it a text, or leave the row out"


def found(items: list[Document | Failure]) -> list[str | None]:
    """Texts, and the reasons of failures."""
    return [item.text if isinstance(item, Document) else item.reason for item in items]


def write(path: Path, table: Any, form: str, rows: int = 7) -> Path:
    """A table in batches of a few rows."""
    options = pa.ipc.IpcWriteOptions(compression="zstd" if form.endswith("zstd") else None)
    new = pa.ipc.new_file if form.startswith("file") else pa.ipc.new_stream
    with new(str(path), table.schema, options=options) as writer:
        writer.write_table(table, rows)
    return path


@pytest.mark.parametrize("form", ["file", "file, zstd", "stream", "stream, zstd"])
@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "binary", "dictionary"])
def test_any_cut_gives_the_rows_of_the_whole(tmp_path: Path, read_all: Read, form: str, kind: str) -> None:
    texts = [None if number % 11 == 5 else f"text é {number % 17}" for number in range(60)]
    column = pa.array(texts).dictionary_encode() if kind == "dictionary" else pa.array(texts).cast(getattr(pa, kind)())
    table = pa.table(
        {"n": range(60), "text": column, "meta": [{"text": f"m{number}", "from": "x"} for number in range(60)]}
    )
    path = write(tmp_path / "t.arrow", table, form)
    wanted = [text or NULL for text in texts]
    size = path.stat().st_size
    for pieces in (1, 2, 7, 100):
        items = read_all(path, -(-size // pieces))
        assert found(items) == wanted
        assert [item.record for item in items] == list(range(60))
    nested = read_all(path, text_key="meta.text", source_key="meta.from")
    assert found(nested) == [f"m{number}" for number in range(60)]
    assert {item.source for item in nested if isinstance(item, Document)} == {"x"}


def test_feather_and_files_without_a_suffix(tmp_path: Path, read_all: Read) -> None:
    table = pa.table({"text": ["a", "b"]})
    feather.write_feather(table, str(tmp_path / "t.feather"))
    feather.write_feather(table, str(tmp_path / "plain"))
    assert found(read_all(tmp_path / "t.feather")) == found(read_all(tmp_path / "plain")) == ["a", "b"]
    (tmp_path / "old.feather").write_bytes(b"FEA1" + bytes(40) + b"FEA1")
    with pytest.raises(DataError, match=r"old\.feather: is Feather version 1"):
        read_all(tmp_path / "old.feather")
    (tmp_path / "t.arrow.gz").write_bytes(b"ARROW1")
    with pytest.raises(DataError, match=r"compressed as a whole; decompress it"):
        read_all(tmp_path / "t.arrow.gz", format="arrow")


def test_bad_utf8_is_its_rows_failure(tmp_path: Path, read_all: Read) -> None:
    for column in (
        pa.array([b"a", b"\xff", b"c"]).view(pa.string()),
        pa.array([b"a", b"\xff", b"c"]).dictionary_encode(),
    ):
        path = write(tmp_path / "t.arrow", pa.table({"text": column}), "stream")
        bad = "column 'text': byte 0 is not UTF-8 (invalid start byte); convert it to UTF-8"
        assert found(read_all(path)) == ["a", bad, "c"]


@pytest.mark.parametrize("form", ["file", "stream"])
def test_a_file_that_is_cut_off(tmp_path: Path, read_all: Read, form: str) -> None:
    path = write(tmp_path / "t.arrow", pa.table({"text": ["some text"] * 30}), form)
    data = path.read_bytes()
    for size in range(0, len(data), 37):
        path.write_bytes(data[:size] or b"\0")
        with pytest.raises(DataError, match=r"t\.arrow: (cannot be read as Arrow|is no whole Arrow file or stream)"):
            read_all(path)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    form=st.sampled_from(["file", "stream", "file, zstd"]),
    place=st.floats(0, 1),
    damage=st.binary(min_size=1, max_size=8),
)
def test_any_damage_is_documents_failures_or_one_error(
    tmp_path: Path, check_damaged: Callable[..., None], form: str, place: float, damage: bytes
) -> None:
    table = pa.table(
        {"text": ["some text", None, "é"] * 10, "kind": pa.array(["a", "b", "a"] * 10).dictionary_encode()}
    )
    data = bytearray(write(tmp_path / "t.arrow", table, form).read_bytes())
    begin = int(place * (len(data) - len(damage)))
    data[begin : begin + len(damage)] = damage
    (tmp_path / "t.arrow").write_bytes(data)
    check_damaged(tmp_path / "t.arrow", source_key="kind")


def saved(folder: Path, texts: list[str], cut: int) -> None:
    """What `datasets` writes, in two files."""
    folder.mkdir(parents=True)
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, rows in zip(names, (texts[:cut], texts[cut:]), strict=True):
        write(folder / name, pa.table({"text": rows}), "stream")
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": name} for name in names], "_split": None}, indent=2)
    )
    (folder / "dataset_info.json").write_text(
        json.dumps({"citation": "", "features": {"text": {"dtype": "string"}}}, indent=2)
    )


def test_a_folder_of_datasets_in_splits_without_its_caches(tmp_path: Path, read_all: Read) -> None:
    saved(tmp_path / "in" / "train", ["a", "b", "c"], 2)
    saved(tmp_path / "in" / "test", ["d", "e"], 1)
    (tmp_path / "in" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    write(tmp_path / "in" / "train" / "cache-0123456789abcdef.arrow", pa.table({"text": ["mapped"]}), "stream")
    listed = find_inputs([Wanted((str(tmp_path / "in"),))])
    assert [file.name for file in listed.files] == [
        f"in/{split}/data-0000{number}-of-00002.arrow" for split in ("test", "train") for number in range(2)
    ]
    assert [(entry.name, entry.reason) for entry in listed.skipped] == [
        ("in/train/cache-0123456789abcdef.arrow", "not in state.json")
    ]
    assert found(read_all(tmp_path / "in")) == ["d", "e", "a", "b", "c"]
    (tmp_path / "in" / "train" / "state.json").unlink()  # as in the cache of load_dataset
    assert [entry.reason for entry in find_inputs([Wanted((str(tmp_path / "in"),))]).skipped] == ["cache of datasets"]


def test_a_folder_whose_rows_are_selected_by_an_index(tmp_path: Path, read_all: Read) -> None:
    saved(tmp_path / "in", ["a", "b"], 1)
    state = json.loads((tmp_path / "in" / "state.json").read_text()) | {
        "_indices_data_files": [{"filename": "indices.arrow"}]
    }
    (tmp_path / "in" / "state.json").write_text(json.dumps(state))
    with pytest.raises(
        DataError, match=r"state\.json beside it selects rows by an index; call flatten_indices\(\) and save"
    ):
        read_all(tmp_path / "in")


@pytest.mark.prove
def test_what_datasets_itself_saves(tmp_path: Path, read_all: Read) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed: pip install datasets")
    rows = {
        "text": [f"text {number}" for number in range(25)],
        "meta": [{"text": f"m{number}"} for number in range(25)],
    }
    whole = datasets.Dataset.from_dict(rows)
    datasets.DatasetDict(train=whole, test=whole.select([3, 1])).save_to_disk(
        str(tmp_path / "in"), num_shards={"train": 3, "test": 1}
    )
    assert found(read_all(tmp_path / "in")) == ["text 3", "text 1", *rows["text"]]
    assert found(read_all(tmp_path / "in" / "test", text_key="meta.text")) == ["m3", "m1"]
    loaded = datasets.load_from_disk(str(tmp_path / "in"))["train"]
    loaded.map(lambda row: {"text": row["text"].upper()})  # leaves a cache beside the data
    assert len(read_all(tmp_path / "in")) == 27


def test_another_file_system(tmp_path: Path) -> None:
    system, base = fsspec.core.url_to_fs("memory://arrow-test/in")
    for form in ("file", "stream"):
        path = write(tmp_path / "t.arrow", pa.table({"text": [f"{number}" for number in range(30)]}), form)
        system.pipe_file(f"{base}/{form}.arrow", path.read_bytes())
    files = list_inputs(["memory://arrow-test/in"], source=None)
    for part_bytes in (1 << 40, path.stat().st_size // 3):
        items = [item for part in split_parts(files, part_bytes) for item in read_part(files, part, ReadOptions())]
        assert [item.text for item in items if isinstance(item, Document)] == [f"{number}" for number in range(30)] * 2


@pytest.mark.skipif(
    sys.platform != "linux", reason="peak memory without what the parent process had is told by Linux's /proc alone"
)
def test_memory_follows_neither_the_file_nor_a_batch(tmp_path: Path) -> None:
    text = "word " * 40_000  # 200 kB
    for form, rows in (("file", 400), ("stream", 40)):
        write(tmp_path / f"{form}.arrow", pa.table({"text": [text] * 400}), form, rows)
    script = """
import os, re, sys
import pyarrow.ipc
from weftrain.data_prep.readers.documents import Document, InputFile, Share
from weftrain.data_prep.readers.read_options import ReadOptions
from weftrain.data_prep.readers import arrow
arrow._RELEASE_BYTES = 8 << 20
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read()).group(1))
before = peak()
for path in sys.argv[1:]:
    file = InputFile(path, "t", "s", "arrow", os.path.getsize(path), None)
    assert sum(isinstance(item, Document) for item in arrow.READERS[0].read(0, file, Share(0, 0, -1), ReadOptions())) == 400
print(peak() - before)
"""
    paths = [str(tmp_path / "file.arrow"), str(tmp_path / "stream.arrow")]
    done = subprocess.run(
        [sys.executable, "-c", script, *paths], capture_output=True, text=True, check=True, timeout=120
    )
    assert int(done.stdout) < 50 << 10  # KiB, of two files of 80 MB
