"""Inputs and datasets in an object store: a local S3 server, the same bytes as from a folder, and one line for whatever
goes wrong.
"""

from __future__ import annotations

import gzip
import io
import json
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from click.testing import CliRunner
from independent_reader import tree_hashes

from weftrain.cli.main import main
from weftrain.core.errors import DataError
from weftrain.data_prep.readers.documents import FileRead
from weftrain.data_prep.readers.listing import list_inputs
from weftrain.data_prep.readers.read_options import ReadOptions
from weftrain.data_prep.readers.shares import read_part, split_parts
from weftrain.data_prep.tokens.tokenization import TextEncoder

pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'weftrain[s3]'")
moto_server = pytest.importorskip(
    "moto.server", reason="moto is not installed: pip install 'moto[s3]' flask flask-cors"
)

Weftrain = Callable[..., tuple[int, str]]
LINES = b"".join(json.dumps({"text": f"{n}: the weft {n * n} and the warp"}).encode() + b"\n" for n in range(120))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An S3 server of this process, on the loopback interface."""
    started = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    started.start()
    host, port = started.get_host_and_port()
    for name, value in {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
    yield started
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    started.stop()


@pytest.fixture
def bucket(server: Any) -> Any:
    """A bucket `shelf` with a folder `in` of several formats; the file system."""
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install 'weftrain[data]'")
    from pyarrow import parquet

    column = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": [f"{n}: a column" for n in range(60)]}), column, row_group_size=20)
    system = fsspec.filesystem("s3")
    system.mkdir("shelf")
    files = {
        "a.jsonl": LINES,
        "b/c.jsonl.gz": gzip.compress(LINES.replace(b"weft", b"loom"), mtime=0),
        "b/_SUCCESS": b"",
    }
    files |= {
        "p.parquet": column.getvalue(),
        "n.txt": "a plain text, café".encode(),
        ".hidden": b"x",
        "image.png": b"\x89PNG\r\n\x1a\n\0",
    }
    system.pipe({f"shelf/in/{name}": data for name, data in files.items()})
    return system


@pytest.fixture
def weftrain(tmp_path: Path, encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> Weftrain:
    """A command; its exit code and output. What was raised and is no exit is raised again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "tokenizer.json").write_bytes(encoder.data)

    def call(*arguments: str | Path) -> tuple[int, str]:
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.output

    return call


@pytest.fixture
def prep(weftrain: Weftrain, tmp_path: Path) -> Weftrain:
    settings = [
        "--name",
        "d",
        "--tokenizer",
        str(tmp_path / "tokenizer.json"),
        "--sequence-length",
        "16",
        "--workers",
        "1",
    ]
    return lambda *arguments: weftrain("prep", *arguments, *settings, "--heldout-fraction", "0.1")


def test_from_a_bucket_to_a_bucket_and_back(bucket: Any, prep: Weftrain, weftrain: Weftrain, tmp_path: Path) -> None:
    code, output = prep("s3://shelf/in", "--output", "s3://shelf/datasets")
    assert code == 0, output
    assert "copied   to s3://shelf/datasets/d" in output
    bucket.get("shelf/in", str(tmp_path / "in"), recursive=True)
    assert prep(tmp_path / "in", "--output", tmp_path / "out")[0] == 0
    assert weftrain("data", "fetch", "s3://shelf/datasets/d", tmp_path / "back")[0] == 0
    assert tree_hashes(tmp_path / "back") == tree_hashes(tmp_path / "out" / "d")
    inputs = (tmp_path / "back" / "inputs.jsonl").read_text()
    for name in ("in/b/_SUCCESS", "in/.hidden", "in/image.png"):
        assert name in inputs
    assert "is up to date" in prep("s3://shelf/in", "--output", "s3://shelf/datasets")[1]


def test_patterns(bucket: Any, prep: Weftrain, tmp_path: Path) -> None:
    code, output = prep("s3://shelf/in/{a,b/c}.jsonl*", "--output", tmp_path / "out")
    assert code == 0, output
    assert "read     2 files" in output


def test_an_object_that_changes_between_listing_and_reading_is_told(bucket: Any) -> None:
    files = list_inputs(["s3://shelf/in/a.jsonl"], source=None)
    (part,) = split_parts(files, 1 << 30)
    assert isinstance(list(read_part(files, part, ReadOptions()))[-1], FileRead)
    bucket.pipe("shelf/in/a.jsonl", LINES + LINES)
    with pytest.raises(DataError, match=r"s3://shelf/in/a\.jsonl: changed while it was read"):
        list(read_part(files, part, ReadOptions()))


def test_what_goes_wrong_is_one_line(
    server: Any, bucket: Any, prep: Weftrain, weftrain: Weftrain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = ("--output", tmp_path / "out")
    assert prep("s3://shelf/in/a.jsonl", *out)[0] == 0
    wrong = {
        "s3://shelf/absent": "no such file or folder",
        "s3://absent/in": "no such file or folder",
        "s3://shelf/in/*.csv": "matches no file",
    }
    for address, message in wrong.items():
        code, output = prep(address, "--output", tmp_path / "other")
        assert code == 2
        assert f"weftrain: {address}: {message}" in output
        assert output.count("\n") == 1
    server.stop()
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    commands: list[Callable[[], tuple[int, str]]] = [
        lambda: prep("s3://shelf/in", "--output", tmp_path / "other"),
        lambda: weftrain("data", "fetch", "s3://shelf/datasets/d", tmp_path / "back"),
        lambda: prep("s3://shelf/in/a.jsonl", "--output", tmp_path / "other"),
    ]
    for command in commands:
        code, output = command()
        assert code == 2
        assert "Could not connect" in output
        assert output.count("\n") == 1, output
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    code, output = prep("s3://shelf/in", "--output", tmp_path / "other")
    assert code == 2
    assert "credentials" in output
