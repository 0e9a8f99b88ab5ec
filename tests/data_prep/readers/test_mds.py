"""MDS shards that mosaicml-streaming 0.13 wrote (files/mds_*), shards made here, and the library itself where it is
installed.

The files were written by `MDSWriter(columns=COLUMNS[name], out=name, **SETTINGS[name])` of the samples that
`samples(name)` gives.
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
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weftrain.cli.main import main
from weftrain.core.errors import DataError
from weftrain.core.formats.dataset import read_dataset_manifest
from weftrain.core.formats.shard_set import ShardSet
from weftrain.data_prep.readers import sample_table
from weftrain.data_prep.readers.documents import Document, Failure
from weftrain.data_prep.readers.listing import list_inputs
from weftrain.data_prep.tokens.tokenization import TextEncoder

FILES = Path(__file__).parent / "files"
DOCUMENTS = [np.arange(number, number + 3 + number % 5) * 7 % 300 for number in range(12)]
COLUMNS = {
    "mds_uint16": {"tokens": "ndarray:uint16", "id": "str"},
    "mds_any": {"input_ids": "ndarray", "attention_mask": "ndarray", "extra": "pkl"},
    "mds_zstd": {"tokens": "ndarray:int64"},
    "mds_bytes": {"tokens": "bytes"},
    "mds_json": {"ids": "json", "n": "int"},
    "mds_rows": {"tokens": "ndarray:int32:9"},
    "mds_text": {"text": "str", "source": "str"},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "mds_uint16": {"size_limit": 300},
    "mds_any": {"size_limit": 500},
    "mds_zstd": {"size_limit": 600, "compression": "zstd:3"},
    "mds_bytes": {"size_limit": None, "compression": "gz"},
    "mds_json": {"size_limit": None},
    "mds_rows": {"size_limit": None},
    "mds_text": {"size_limit": 260},
}


def samples(name: str) -> list[dict[str, Any]]:
    if name == "mds_rows":
        return [{"tokens": np.arange(number, number + 9).astype("i4")} for number in range(5)]
    if name == "mds_text":
        return [{"text": f"text {number} é", "source": "ab"[number % 2]} for number in range(6)]
    made: list[dict[str, Any]] = []
    for number, ids in enumerate(DOCUMENTS):
        made.append(
            {
                "mds_uint16": {"tokens": ids.astype("u2"), "id": f"document {number}"},
                "mds_any": {
                    "input_ids": ids.astype("i4"),
                    "attention_mask": np.ones(len(ids), "u1"),
                    "extra": {"n": number},
                },
                "mds_zstd": {"tokens": ids.astype("i8")},
                "mds_bytes": {"tokens": ids.astype("i8").tobytes()},
                "mds_json": {"ids": ids.tolist(), "n": number},
            }[name]
        )
    return made


def tokens(items: Sequence[Document | Failure]) -> list[list[int]]:
    assert all(
        isinstance(item, Document) and item.tokens is not None and item.tokens.dtype == np.int32 for item in items
    ), items
    return [item.tokens.tolist() for item in items if isinstance(item, Document) and item.tokens is not None]


def texts(items: Sequence[Document | Failure]) -> list[tuple[str | None, str]]:
    return [(item.text, item.source) for item in items if isinstance(item, Document)]


def check(read_all: Callable[..., Any], folder: Path, name: str) -> None:
    """Everything in order, in any cut."""
    for part_bytes in (1 << 40, 100):
        if name == "mds_text":
            found = read_all(folder, part_bytes, source_key="source")
            assert texts(found) == [(sample["text"], sample["source"]) for sample in samples(name)]
            continue
        options = {"tokens_key": "ids"} if name == "mds_json" else {}
        given_format = {"mds_rows": "mds_rows", "mds_json": "mds"}.get(name)
        shards = sorted(folder.glob("*.mds*")) if given_format else [folder]
        items = [item for shard in shards for item in read_all(shard, part_bytes, given_format, **options)]
        key = next(key for key in ("tokens", "input_ids", "ids") if key in COLUMNS[name])
        as_ids = [
            np.frombuffer(s[key], "<i8") if isinstance(s[key], bytes) else np.array(s[key]) for s in samples(name)
        ]
        assert tokens(items) == [ids.tolist() for ids in as_ids]


@pytest.mark.parametrize("name", COLUMNS)
def test_files_that_the_library_wrote(read_all: Callable[..., Any], name: str) -> None:
    check(read_all, FILES / name, name)
    if name != "mds_rows":
        assert all("index.json" not in file.name for file in list_inputs([str(FILES / name)], source=None))


@pytest.mark.parametrize("name", COLUMNS)
def test_files_that_the_library_writes_now(read_all: Callable[..., Any], tmp_path: Path, name: str) -> None:
    writer = pytest.importorskip("streaming.base.format.mds.writer", reason="mosaicml-streaming is not installed")
    with writer.MDSWriter(columns=COLUMNS[name], out=str(tmp_path / name), **SETTINGS[name]) as opened:
        for sample in samples(name):
            opened.write(sample)
    check(read_all, tmp_path / name, name)
    for path in (FILES / name).glob("*.mds"):
        assert (tmp_path / name / path.name).read_bytes() == path.read_bytes()


def shard(
    path: Path, columns: dict[str, str], rows: Sequence[Sequence[bytes]], sizes: Sequence[int | None] | None = None
) -> Path:
    """A shard of columns without a fixed size, of the bytes given."""
    sizes = sizes or [None] * len(columns)
    head = {
        "version": 2,
        "format": "mds",
        "column_names": list(columns),
        "column_encodings": list(columns.values()),
        "column_sizes": list(sizes),
    }
    config = json.dumps(head).encode()
    variable = [number for number, size in enumerate(sizes) if size is None]
    data = [np.array([len(row[number]) for number in variable], "<u4").tobytes() + b"".join(row) for row in rows]
    places = np.cumsum([8 + 4 * len(rows) + len(config), *map(len, data)]).astype("<u4")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(np.uint32(len(rows)).tobytes() + places.tobytes() + config + b"".join(data))
    return path


def ids_of(*values: int) -> bytes:
    return np.array(values, "<u2").tobytes()


def test_which_column_holds_the_ids(tmp_path: Path, read_all: Callable[..., Any]) -> None:
    row = [ids_of(1, 2), ids_of(3)]
    encoding = "ndarray:uint16"
    shape = b"\x04"  # one dimension, of one byte

    def one(columns: dict[str, str], **options: Any) -> Any:
        rows = [[shape + bytes([len(data) // 2]) + data for data in row]]
        return tokens(read_all(shard(tmp_path / "a.mds", columns, rows), format="mds", **options))

    assert one({"other": "str", "mine": encoding}) == [[3]]
    assert one({"mine": encoding, "tokens": encoding}) == [[3]]
    assert one({"mine": encoding, "tokens": encoding}, tokens_key="mine") == [[1, 2]]
    for columns, options, message in (
        (
            {"input_ids": encoding, "tokens": encoding},
            {},
            "tokens, input_ids could each hold the ids: name the field with --tokens-key",
        ),
        ({"a": encoding, "b": encoding}, {}, "a, b could each hold the ids"),
        ({"a": "str", "b": "json"}, {}, r"none of a \(str\), b \(json\) is known to hold ids"),
        ({"a": encoding, "b": encoding}, {"tokens_key": "c"}, "has no field 'c' but a .ndarray:uint16., b"),
        ({"a": "pkl", "b": encoding}, {"tokens_key": "a"}, "column 'a' is pickled, and reading it could run any code"),
        ({"a": "jpeg", "b": encoding}, {"tokens_key": "a"}, "column 'a' is of jpeg, which holds no ids"),
    ):
        with pytest.raises(DataError, match=message):
            one(columns, **options)


def test_what_cannot_be_told_is_asked_for(tmp_path: Path, read_all: Callable[..., Any]) -> None:
    with pytest.raises(
        DataError, match=r"its samples all hold equally many ids: say with --format mds_rows .* or with --format mds"
    ):
        read_all(FILES / "mds_rows")
    (row,) = {
        len(ids)
        for ids in tokens(read_all(FILES / "mds_rows" / "shard.00000.mds", format="mds_rows", sequence_length=8))
    }
    assert row == 9
    wrong = read_all(FILES / "mds_rows" / "shard.00000.mds", format="mds_rows", sequence_length=4)
    assert all("holds 9 token ids, not 4 + 1" in item.reason for item in wrong)
    both = shard(tmp_path / "a.mds", {"text": "str", "tokens": "ndarray:uint16"}, [[b"x", b"\x04\x01" + ids_of(1)]])
    with pytest.raises(DataError, match="holds text and ids: say which with --format mds_text or --format mds"):
        read_all(both)
    assert texts(read_all(both, format="mds_text")) == [("x", "a.mds")]


def test_shards_that_are_missing_compressed_twice_or_not_readable(tmp_path: Path, read_all: Callable[..., Any]) -> None:
    folder = shutil.copytree(FILES / "mds_zstd", tmp_path / "in")
    (folder / "shard.00001.mds.zstd").unlink()
    with pytest.raises(DataError, match=r"index\.json: names the shard shard\.00001\.mds, which is not there"):
        read_all(folder)
    folder = shutil.copytree(FILES / "mds_uint16", tmp_path / "twice")
    (folder / "shard.00002.mds.zstd").write_bytes(b"a copy")
    with pytest.raises(DataError, match=r"shard\.00002\.mds\.zstd: is there uncompressed too; remove one of the two"):
        read_all(folder)
    (folder / "shard.00002.mds.zstd").unlink()
    check(read_all, folder, "mds_uint16")
    (folder / "shard.00009.mds.br").write_bytes(b"x")
    with pytest.raises(DataError, match=r"mds\.br: .*; decompress it"):
        read_all(folder)
    index = tmp_path / "escape" / "index.json"
    index.parent.mkdir()
    index.write_text(
        json.dumps({"version": 2, "shards": [{"format": "mds", "raw_data": {"basename": "../../etc/passwd"}}]})
    )
    with pytest.raises(DataError, match=r"index\.json: is no index of MDS shards: .* is not a path within the folder"):
        read_all(index.parent)


@pytest.mark.parametrize(
    ("encoding", "data", "reason"),
    [
        ("ndarray:uint16", b"\x04\x02" + ids_of(1), "an array of 1 dimensions, the first of 2, in 4 bytes"),
        ("ndarray:uint16", b"\x08\x01\x01" + ids_of(1), "an array of 2 dimensions"),
        ("ndarray:uint16", b"", "an array that ends before its shape"),
        ("ndarray:uint16:1,2", ids_of(1, 2), "an array of 2 dimensions"),
        ("ndarray:int32:3", b"12345678", "the first of 3, in 8 bytes"),
        ("ndarray", b"\x22\x04\x01" + bytes(4), "an array of float32"),
        ("ndarray", b"\xff\x04\x01" + bytes(4), "an array of float32, not of integers"),
        ("ndarray:int8", b"\x04\x01\xff", "holds ids -1"),
        ("bytes", b"123", "3 bytes, which are no int64 ids; give another --tokens-dtype"),
        ("json", b"[1, 2.0]", "not a list of token ids"),
        ("json", b"[1", "is not JSON"),
    ],
)
def test_values_that_are_no_ids_fail_their_sample(
    tmp_path: Path, read_all: Callable[..., Any], encoding: str, data: bytes, reason: str
) -> None:
    good = {"bytes": bytes(8), "json": b"[0]"}.get(encoding)
    rows = [[data]] if good is None else [[data], [good]]
    failed, *rest = read_all(shard(tmp_path / "a.mds", {"ids": encoding}, rows), format="mds", tokens_key="ids")
    assert isinstance(failed, Failure)
    assert reason in failed.reason
    assert tokens(rest) == ([] if good is None else [[0]])


def test_a_sample_too_long_and_one_whose_columns_do_not_fit(
    tmp_path: Path, read_all: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_table, "_MAX_COLUMN_BYTES", 8)
    rows = [[b"\x04\x01" + ids_of(1)], [b"\x04\x09" + ids_of(*range(9))], [b"\x04\x01" + ids_of(2)]]
    path = shard(tmp_path / "a.mds", {"ids": "ndarray:uint16"}, rows)
    first, long, last = read_all(path, format="mds")
    assert tokens([first, last]) == [[1], [2]]
    assert "has more than 8 bytes in one column; split it" in long.reason
    data = bytearray(path.read_bytes())
    data[-8] += 1  # the size of the last sample's column
    path.write_bytes(data)
    assert "has 4 bytes of columns that say they have 5" in read_all(path, format="mds")[2].reason


def test_an_address_of_another_file_system(read_all: Callable[..., Any]) -> None:
    root = f"memory://{uuid.uuid4().hex}/in"
    system, base = fsspec.core.url_to_fs(root)
    for path in (FILES / "mds_uint16").iterdir():
        system.pipe_file(f"{base}/{path.name}", path.read_bytes())
    for part_bytes in (1 << 40, 100):
        assert tokens(read_all(root, part_bytes)) == [ids.tolist() for ids in DOCUMENTS]
    system.rm_file(f"{base}/shard.00003.mds")
    with pytest.raises(DataError, match=r"names the shard shard\.00003\.mds, which is not there"):
        read_all(root)


def test_options_of_the_command_and_of_a_recipe(tmp_path: Path, encoder: TextEncoder) -> None:
    rows = [[ids.astype("<u2").tobytes()] for ids in DOCUMENTS]
    shard(tmp_path / "in" / "a.mds", {"mine": "bytes"}, rows)
    (tmp_path / "in" / "tokenizer.json").write_bytes(encoder.data)
    (tmp_path / "r.yaml").write_text(
        "name: r\ndescription: ids\ntokenizer: tokenizer.json\ntokens_key: mine\ntokens_dtype: "
        "uint16\nsequence_length: 8\norder: as_read\n"
        "datasets:\n  - name: recipe\n    inputs:\n      - {addresses: [a.mds], format: mds, source: s}\n"
    )
    common = ["--output", str(tmp_path / "out"), "--workers", "1"]
    options = [
        "--format",
        "mds",
        "--tokens-key",
        "mine",
        "--tokens-dtype",
        "uint16",
        "--tokenizer",
        str(tmp_path / "in" / "tokenizer.json"),
    ]
    lengths = ["--sequence-length", "8", "--order", "as_read", "--heldout-fraction", "0"]
    for arguments in (
        [str(tmp_path / "in" / "a.mds"), "--name", "command", *options, *lengths],
        [str(tmp_path / "r.yaml"), "--inputs", str(tmp_path / "in")],
    ):
        done = CliRunner().invoke(main, ["prep", *arguments, *common])
        assert done.exit_code == 0, done.output
    stream = np.concatenate([np.append(ids, encoder.eos_id) for ids in DOCUMENTS])
    for name in ("command", "recipe"):
        shards = ShardSet(tmp_path / "out" / name, read_dataset_manifest(tmp_path / "out" / name), "train")
        ids, _ = shards.rows(np.arange(shards.num_rows))
        assert shards.num_rows == (len(stream) - 1) // 8
        assert all(np.array_equal(row, stream[place * 8 : place * 8 + 9]) for place, row in enumerate(ids))


@settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(
        [
            "mds_uint16/shard.00000.mds",
            "mds_any/shard.00001.mds",
            "mds_zstd/shard.00001.mds.zstd",
            "mds_text/shard.00000.mds",
        ]
    ),
    st.booleans(),
    st.integers(0, 600),
    st.binary(max_size=9),
    st.booleans(),
)
def test_any_damage_is_documents_failures_or_one_error(
    tmp_path: Path, check_damaged: Callable[..., None], name: str, index: bool, place: int, data: bytes, cut: bool
) -> None:
    folder = tmp_path / uuid.uuid4().hex
    folder.mkdir()
    path = folder / Path(name).name
    shutil.copy(FILES / name, path)
    if index:
        shutil.copy((FILES / name).parent / "index.json", folder)
    damaged = folder / "index.json" if index else path
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:place] + data + (b"" if cut else whole[place + len(data) :]))
    check_damaged(folder if index else path, 100)
