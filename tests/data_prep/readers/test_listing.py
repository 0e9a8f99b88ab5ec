"""Which files are read, of folders, patterns and addresses; the format of each; and that every other one is named with
its reason.
"""

from __future__ import annotations

import gzip
import json
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from weftrain.core.errors import DataError
from weftrain.data_prep.inputs import file_systems
from weftrain.data_prep.inputs.patterns import expand_braces
from weftrain.data_prep.readers.documents import Document, Failure
from weftrain.data_prep.readers.json_content import json_content
from weftrain.data_prep.readers.listing import Listed, Wanted, by_reason, counted, find_inputs, list_inputs
from weftrain.data_prep.readers.read_options import ReadOptions
from weftrain.data_prep.readers.shares import read_part, split_parts

LINES = b'{"text": "one"}\n{"text": "two"}\n'
PACKAGE = b'{\n  "name": "loom",\n  "version": "1.0.0"\n}\n'


def tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def find(*addresses: str | Path, **wanted: Any) -> Listed:
    return find_inputs([Wanted(tuple(map(str, addresses)), **wanted)])


def formats(listed: Listed) -> dict[str, str]:
    return {file.name: file.format for file in listed.files}


def skipped(listed: Listed) -> dict[str, str]:
    return {entry.name: entry.reason for entry in listed.skipped}


def texts(listed: Listed) -> list[str | None]:
    items = [
        item for part in split_parts(listed.files, 1 << 40) for item in read_part(listed.files, part, ReadOptions())
    ]
    return [
        item.text if isinstance(item, Document) else item.reason
        for item in items
        if isinstance(item, Document | Failure)
    ]


@pytest.fixture(params=["path", "file://", "memory://"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[dict[str, bytes]], str]]:
    """A folder `in` of the given files on each kind of file system; returns its address."""
    memory = f"memory://{uuid.uuid4().hex}/in"

    def make(files: dict[str, bytes]) -> str:
        if request.param == "memory://":
            system, base = fsspec.core.url_to_fs(memory)
            for name, data in files.items():
                system.pipe_file(f"{base}/{name}", data)
            return memory
        return ("file://" if request.param == "file://" else "") + str(tree(tmp_path / "in", files))

    yield make
    fsspec.filesystem("memory").store.clear()


FOLDER = {
    "a.jsonl": LINES,
    "b/2.txt": b"2",
    "b/10.txt": b"10",
    "c.JSONL": LINES,
    "d.jsonl.GZ": gzip.compress(LINES),
    "notes": b"no suffix",
    "latin1.txt": b"caf\xe9",
    "latin1": b"na\xefve",
    "nul.txt": b"x\0y",
    ".hidden.txt": b"h",
    ".git/config": b"g",
    ".git/objects/1": b"g",
    "b/.cache/x.txt": b"g",
    "_SUCCESS": b"",
    "_committed_17": b"{}",
    "a.jsonl.crc": b"\x01",
    "_temporary/0/x.txt": b"x",
    "empty.txt": b"",
    "image.png": b"\x89PNG\r\n\x1a\n\0\0",
    "program": b"\x7fELF\x02\0\0",
    "paper.pdf": b"%PDF-1.4 few words",
    "all.tar.gz": gzip.compress(b"name\0" * 100),
    "old.zip": b"PK\x03\x04\x14\0",
    "build.tmp": b"left over",
}
READ = {
    "in/a.jsonl": "jsonl",
    "in/b/10.txt": "text",
    "in/b/2.txt": "text",
    "in/c.JSONL": "jsonl",
    "in/d.jsonl.GZ": "jsonl",
    "in/latin1": "text",
    "in/latin1.txt": "text",
    "in/notes": "text",
    "in/nul.txt": "text",
}
SKIPPED = {
    "in/.hidden.txt": "hidden file",
    "in/.git/": "hidden folder",
    "in/b/.cache/": "hidden folder",
    "in/_SUCCESS": "marker file",
    "in/_committed_17": "marker file",
    "in/a.jsonl.crc": "marker file",
    "in/_temporary/": "marker folder",
    "in/empty.txt": "empty file",
    "in/image.png": "binary file",
    "in/program": "binary file",
    "in/paper.pdf": "binary file",
    "in/all.tar.gz": "archive",
    "in/old.zip": "archive",
    "in/build.tmp": "unfinished file",
}


def test_each_file_of_a_folder_is_read_or_named_with_its_reason(place: Callable[[dict[str, bytes]], str]) -> None:
    address = place(FOLDER)
    listed = find(address)
    assert formats(listed) == READ
    assert list(formats(listed)) == sorted(READ)
    assert skipped(listed) == SKIPPED
    assert {file.source for file in listed.files} == {"in"}
    assert counted(listed.skipped) == {
        "archive": 2,
        "binary file": 3,
        "empty file": 1,
        "hidden file": 1,
        "hidden folder": 2,
        "marker file": 3,
        "marker folder": 1,
        "unfinished file": 1,
    }
    assert by_reason(listed.skipped)[:2] == [
        "archive (2): in/all.tar.gz, in/old.zip",
        "binary file (3): in/image.png, in/paper.pdf, in/program",
    ]
    assert texts(listed)[:5] == ["one", "two", "10", "2", "one"]
    failures = [text for text in texts(listed) if "convert the file to UTF-8" in str(text) or "NUL" in str(text)]
    assert len(failures) == 3  # both in Latin-1, and the text with a NUL
    assert list_inputs([address], source=None) == list(listed.files)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("b.jsonl.zst.part", b"x", "looks like an unfinished download"),
        ("b.parquet.crdownload", b"x", "looks like an unfinished download"),
        ("b.txt.tmp", b"", "looks like an unfinished download"),
        ("b.jsonl.lz4", b"\x04\x22\x4d\x18", "in a compression that is not read"),
        ("b.csv.zip", b"PK\x03\x04", "in a compression that is not read"),
    ],
)
def test_what_looks_like_data_and_cannot_be_read_stops(
    place: Callable[[dict[str, bytes]], str], name: str, data: bytes, message: str
) -> None:
    address = place({"a.jsonl": LINES, name: data})
    with pytest.raises(DataError, match=rf"in/{name}: .*{message}.*--suffix"):
        find(address)
    assert skipped(find(address, suffixes=("jsonl",))) == {f"in/{name}": "other suffix"}


def test_the_order_of_the_file_systems_listing_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tree(tmp_path / "in", {name: data for name, data in FOLDER.items() if data})
    (folder / "one").symlink_to(tree(tmp_path / "out", {"x.txt": b"x", "sub/y.txt": b"y"}))
    (folder / "two").symlink_to(tmp_path / "out" / "sub")
    (folder / "z.txt").symlink_to(folder / "b" / "2.txt")
    as_listed = find(folder)
    scan = os.scandir
    for turned in (False, True):

        class Sorted:
            def __init__(self, path: str, turned: bool = turned) -> None:
                with scan(path) as found:
                    self.entries = sorted(found, key=lambda entry: entry.name, reverse=turned)

            def __enter__(self) -> Any:
                return iter(self.entries)

            def __exit__(self, *error: object) -> None:
                pass

        monkeypatch.setattr(file_systems.os, "scandir", Sorted)
        assert find(folder) == as_listed


def test_links_are_followed_and_no_file_is_read_twice(tmp_path: Path) -> None:
    folder = tree(tmp_path / "in", {"a.txt": b"a", "sub/b.txt": b"b"})
    outside = tree(tmp_path / "outside", {"c.jsonl": LINES, "deep/d.txt": b"d"})
    (folder / "0-copy.txt").symlink_to("a.txt")
    (folder / "c.jsonl").symlink_to(outside / "c.jsonl")
    (folder / "more").symlink_to(outside)
    (folder / "again").symlink_to(outside / "deep")
    (folder / "sub" / "loop").symlink_to("..")
    (folder / "up").symlink_to(tmp_path)
    (folder / "self").symlink_to("self")
    (folder / "broken.txt").symlink_to("absent")
    os.link(folder / "a.txt", folder / "hard.txt")
    listed = find(folder)
    assert formats(listed) == {
        "in/a.txt": "text",
        "in/again/d.txt": "text",
        "in/c.jsonl": "jsonl",
        "in/sub/b.txt": "text",
    }
    assert skipped(listed) == {
        "in/0-copy.txt": "read under another name",
        "in/hard.txt": "read under another name",
        "in/more/c.jsonl": "read under another name",
        "in/more/deep/": "read under another name",
        "in/sub/loop/": "link loop",
        "in/up/": "link loop",
        "in/self": "broken link",
        "in/broken.txt": "broken link",
    }
    only_links = tree(tmp_path / "links", {})
    only_links.mkdir()
    (only_links / "a.jsonl").symlink_to(outside / "c.jsonl")
    assert texts(find(only_links)) == ["one", "two"]


def test_a_file_given_twice_is_read_once_and_two_of_one_name_are_refused(tmp_path: Path) -> None:
    folder = tree(tmp_path / "in", {"a.txt": b"a", "sub/a.txt": b"b"})
    listed = find(folder / "a.txt", folder, f"{folder}/*.txt", source="s")
    assert formats(listed) == {"a.txt": "text", "in/sub/a.txt": "text"}
    assert [(entry.name, entry.reason) for entry in listed.skipped] == [
        ("a.txt", "read under another name"),
        ("in/a.txt", "read under another name"),
    ]
    with pytest.raises(DataError, match=r"two inputs are called 'a\.txt'"):
        find(folder / "a.txt", folder / "sub" / "a.txt")
    with pytest.raises(DataError, match=r"two inputs are called 'a\.txt'"):  # of two sections of a recipe as well
        find_inputs([Wanted((str(folder / "a.txt"),)), Wanted((str(folder / "sub" / "a.txt"),), "other")])


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    folder = tree(tmp_path / "in", {"a.txt": b"a"})
    os.mkfifo(folder / "fifo")
    with pytest.raises(DataError, match=r"fifo: is not a regular file.*weftrain prep -"):
        find(folder / "fifo")
    assert skipped(find(folder)) == {"in/fifo": "not a regular file"}
    assert skipped(find(f"{folder}/*")) == {"fifo": "not a regular file"}
    with pytest.raises(DataError, match="standard input can be read once"):
        find("-")


def test_a_file_that_is_read_with_another_is_not_named_itself(tmp_path: Path) -> None:
    folder = tree(tmp_path / "in", {"a.bin": b"x", "a.idx": b"x"})
    with pytest.raises(DataError, match=r"a\.idx: is read with the file that it belongs to; name that one"):
        find(folder / "a.idx")
    with pytest.raises(DataError, match=r"/program: is no text by its first bytes; .*--format"):
        find(tree(tmp_path, {"program": b"\x7fELF\0"}) / "program")


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    folder = tree(tmp_path / "in", {"a.txt": b"a"})
    path = os.fsencode(folder) + b"/\xff\xfe.jsonl"
    Path(os.fsdecode(path)).write_bytes(LINES)
    for address in (folder, os.fsdecode(path), f"{folder}/*.jsonl"):
        with pytest.raises(DataError, match=r"\\xff\\xfe\.jsonl: its name is not UTF-8; rename it") as caught:
            find(address)
        str(caught.value).encode()
    assert skipped(find(folder, suffixes=(".txt",))) == {"in/\\xff\\xfe.jsonl": "other suffix"}
    Path(os.fsdecode(path)).rename(os.fsdecode(os.fsencode(folder) + b"/\xff"))
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff")).write_bytes(b"\0")
    assert skipped(find(folder)) == {"in/\\xff": "binary file"}
    with pytest.raises(DataError, match=r"\\xff: no such file"):
        find(os.fsdecode(b"absent\xff"))


# -- suffixes, patterns, addresses


def test_suffixes_are_endings_of_names_in_any_case_with_or_without_a_dot(
    place: Callable[[dict[str, bytes]], str],
) -> None:
    address = place(
        {
            "a.jsonl.gz": gzip.compress(LINES),
            "b.JSONL.GZ": gzip.compress(LINES),
            "c.gz": gzip.compress(b"c"),
            "d.crc": b"text",
        }
    )
    for suffix in (".jsonl.gz", "jsonl.gz", ".JSONL.gz"):
        listed = find(address, suffixes=(suffix,))
        assert formats(listed) == {"in/a.jsonl.gz": "jsonl", "in/b.JSONL.GZ": "jsonl"}
        assert skipped(listed) == {"in/c.gz": "other suffix", "in/d.crc": "other suffix"}
    assert formats(find(address, suffixes=("crc",))) == {"in/d.crc": "text"}  # asked for, a marker file is read
    with pytest.raises(
        DataError, match=r"holds no file ending in \.go; not read: other suffix \(4\): in/a\.jsonl\.gz, "
    ):
        find(address, suffixes=("go",))
    with pytest.raises(DataError, match=r"--suffix '\.': give an ending"):
        find(address, suffixes=(".",))


FILES = {
    name: name.encode()
    for name in ("a1.txt", "a2.txt", "b1.txt", "B1.txt", "x[1].txt", ".h.txt", "d/a3.txt", "d/e/a4.txt", "d/.f/a5.txt")
}


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a*.txt", ["a1.txt", "a2.txt"]),
        ("?1.txt", ["B1.txt", "a1.txt", "b1.txt"]),
        ("[a-c]1.txt", ["a1.txt", "b1.txt"]),
        ("[!a]1.txt", ["B1.txt", "b1.txt"]),
        ("[^a]1.txt", ["B1.txt", "b1.txt"]),
        ("{a,b}1.txt", ["a1.txt", "b1.txt"]),
        ("a{2..1}.txt", ["a1.txt", "a2.txt"]),
        ("{d,d/e}/a*", ["d/a3.txt", "d/e/a4.txt"]),
        ("**/a?.txt", ["a1.txt", "a2.txt", "d/a3.txt", "d/e/a4.txt"]),
        ("d/**", ["a3.txt", "e/a4.txt"]),
        ("d/**/*4*", ["e/a4.txt"]),
        (".*.txt", [".h.txt"]),
        ("*.txt", ["B1.txt", "a1.txt", "a2.txt", "b1.txt", "x[1].txt"]),
        ("d/*/a?.txt", ["e/a4.txt"]),
        ("d/**/a*", ["a3.txt", "e/a4.txt"]),
        ("d*/", ["d/a3.txt", "d/e/a4.txt"]),
        ("*/e/a4.txt", ["d/e/a4.txt"]),
        ("x[1].txt", ["x[1].txt"]),  # a path that exists is no pattern
    ],
)
def test_patterns_as_the_shell_has_them(
    place: Callable[[dict[str, bytes]], str], pattern: str, names: list[str]
) -> None:
    listed = find(f"{place(FILES)}/{pattern}")
    assert [file.name for file in listed.files] == names
    if not pattern.endswith("/"):
        assert [file.source for file in listed.files] == names
    assert texts(listed) == [next(name for name in FILES if name.endswith(shown)) for shown in names]


@pytest.mark.parametrize(
    ("data", "format", "read"),
    [
        (b'[{"text": "one"},{"text": "two"}]', "json", ["one", "two"]),
        (b'\xef\xbb\xbf[\n {"text": "one"},\n {"text": "two"}\n]\n', "json", ["one", "two"]),
        (b'{\n "text": "one"\n}\n{\n "text": "two"\n}\n', "json", ["one", "two"]),
        (b'["text"]\n{"text": "two"}\n', "jsonl", ["not a JSON object; each line must be one", "two"]),
        (b'{"text": "one"}\n[{"text": "two"}]\n', "jsonl", ["one", "not a JSON object; each line must be one"]),
    ],
)
@pytest.mark.parametrize("name", ["t.jsonl", "T.NDJSON", "t.jsonl.gz"])
def test_an_array_that_is_called_lines_is_read_as_an_array(
    tmp_path: Path, name: str, data: bytes, format: str, read: list[str]
) -> None:
    listed = find(tree(tmp_path / "in", {name: gzip.compress(data) if name.endswith(".gz") else data}))
    assert formats(listed) == {f"in/{name}": format}
    assert texts(listed) == read


MANIFEST = b'{"bos_id":null,"format":"weftrain-dataset","version":3}\n'


def test_datasets_beside_the_texts_are_one_entry_each(place: Callable[[dict[str, bytes]], str]) -> None:
    other = b'{"name":"an extension of a browser"}'
    address = place(
        {
            "a.txt": b"a",
            "datasets/x/manifest.json": MANIFEST,
            "datasets/x/inputs.jsonl": b'{"name":"a.txt"}\n',
            "datasets/x/train/00000.h5": b"\x89HDF\r\n\x1a\n",
            "web/manifest.json": other,
        }
    )
    listed = find(address)
    assert [file.name for file in listed.files] == ["in/a.txt", "in/web/manifest.json"]
    assert skipped(listed) == {"in/datasets/x/": "dataset"}
    for named in (f"{address}/datasets/x", f"{address}/datasets/*"):
        with pytest.raises(
            DataError, match=r"datasets/x: is a dataset that weftrain made; add inputs to it with --grow, or name its"
        ):
            find(named)


def test_a_link_to_a_dataset_is_not_entered(tmp_path: Path) -> None:
    tree(tmp_path / "x", {"manifest.json": MANIFEST, "inputs.jsonl": LINES})
    (tree(tmp_path / "in", {"a.txt": b"a"}) / "link").symlink_to(tmp_path / "x")
    assert skipped(find(tmp_path / "in")) == {"in/link/": "dataset"}


def test_a_pattern_without_a_match(place: Callable[[dict[str, bytes]], str]) -> None:
    address = place(FILES)
    with pytest.raises(DataError, match=r"\*\.go: matches no file"):
        find(f"{address}/*.go")
    with pytest.raises(DataError, match=r"\{a,c\}1\.txt: its alternative .*/c1\.txt matches no file"):
        find(f"{address}/{{a,c}}1.txt")
    with pytest.raises(DataError, match="an input is named '', as a variable of the shell does that is not set"):
        list_inputs([""], source=None)
    with pytest.raises(DataError, match="no such file or folder"):
        find(f"{address}/absent")


def test_braces() -> None:
    assert expand_braces("a{b,c{d,e},}f") == ["abf", "acdf", "acef", "af"]
    assert expand_braces("{a}{b") == ["{a}{b"]
    assert expand_braces("p-{08..11}") == ["p-08", "p-09", "p-10", "p-11"]
    assert expand_braces("{x}{1,2}") == ["{x}1", "{x}2"]
    with pytest.raises(DataError, match="use \\* instead"):
        expand_braces("{0..99999999}")


def test_an_address_of_another_file_system() -> None:
    root = f"memory://{uuid.uuid4().hex}/in"
    system, base = fsspec.core.url_to_fs(root)
    system.pipe_file(f"{base}/b.jsonl", LINES)
    system.pipe_file(f"{base}/a.txt", b"zero")
    listed = find(root)
    assert texts(listed) == ["zero", "one", "two"]
    system.pipe_file(f"{base}/a.txt", b"longer")
    with pytest.raises(DataError, match="changed while it was read"):
        texts(listed)
    with pytest.raises(DataError, match="no such file system"):
        find("nosuch://x")


def test_first_bytes_at_an_address_are_asked_for_together(monkeypatch: pytest.MonkeyPatch) -> None:
    root = f"memory://{uuid.uuid4().hex}/in"
    system, base = fsspec.core.url_to_fs(root)
    files = {f"{number:03d}{suffix}": LINES for number in range(90) for suffix in (".txt", "", ".py", ".json.gz")}
    for name, data in files.items():
        system.pipe_file(f"{base}/{name}", gzip.compress(data) if name.endswith(".gz") else data)
    asked: list[int] = []
    ranges = type(system).cat_ranges

    def cat_ranges(self: Any, paths: list[str], *args: Any, **options: Any) -> Any:
        asked.append(len(paths))
        return ranges(self, paths, *args, **options)

    monkeypatch.setattr(type(system), "cat_ranges", cat_ranges)
    listed = find(root)
    assert sum(asked) == 180  # neither source code nor what is compressed
    assert len(asked) == 2
    assert {name: format for name, format in formats(listed).items() if not name.endswith(".py")} == {
        f"in/{name}": "jsonl" for name in sorted(files) if not name.endswith(".py")
    }


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no input"):
        find()
    with pytest.raises(DataError, match="--format jsnl: there is amber"):
        find(tree(tmp_path, {"a.txt": b"a"}), format="jsnl")
    with pytest.raises(DataError, match=r"nothing to read; not read: empty file \(1\): e\.txt"):
        find(tree(tmp_path, {"e.txt": b""}) / "e.txt")
    with pytest.raises(DataError, match="cannot be listed"):
        find("a\0b")


# -- formats by content


@pytest.mark.parametrize("name", ["t.json", "t.txt", "t", "t.data", "t.json.gz", "t.JSON"])
def test_json_lines_are_told_by_content(tmp_path: Path, name: str) -> None:
    for data in (
        LINES,
        b'\n\n{"text": "one"}\r\n\n{"text": "two"}',
        b"\xef\xbb\xbf" + LINES,
        b'{"text": "one"}',
        b'{"text": "' + b"x" * 70_000 + b'"}\n',
    ):
        path = tree(tmp_path, {name: gzip.compress(data) if name.endswith(".gz") else data}) / name
        assert formats(find(path)) == {name: "jsonl"}
        assert formats(find(tmp_path)) == {f"{tmp_path.name}/{name}": "jsonl"}


def test_token_rows_are_told_by_content(tmp_path: Path) -> None:
    rows = b"".join(json.dumps({"token_ids": [1, 2, 3], "source": "c4"}).encode() + b"\n" for _ in range(3))
    for name, data in (("t.jsonl", rows), ("t.json", rows), ("t.jsonl.gz", gzip.compress(rows))):
        assert formats(find(tree(tmp_path, {name: data}) / name)) == {name: "amber"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (PACKAGE, r"is JSON without a field 'text' but 'name', 'version'; say what it is: --format jsonl.*text"),
        (b'{"a": 1}', "is JSON without a field 'text' but 'a'; say what it is"),
        (b"[1, 2, 3]", "is JSON without a field 'text'; say what it is"),
        (
            b'{"body": "x"}\n{"body": "y"}\n',
            "its JSON objects have no field 'text' but 'body'; name it with --text-key",
        ),
        (b'[{"body": "x"}]', "its JSON objects have no field 'text' but 'body'; name it with --text-key"),
    ],
)
def test_a_json_file_that_is_no_text_is_refused_with_the_remedy(tmp_path: Path, data: bytes, message: str) -> None:
    for name in ("t.json", "t.txt", "t"):
        path = tree(tmp_path, {name: data}) / name
        with pytest.raises(DataError, match=rf"/{name}: {message}"):
            find(path)
        assert formats(find(path, format="text")) == {name: "text"}
        if b"body" in data:
            assert formats(find(path, keys=("body",))) == {name: "json" if data.startswith(b"[") else "jsonl"}


def test_objects_over_several_lines_are_records_where_they_have_a_text(tmp_path: Path) -> None:
    for data in (b'{\n "text": "a"\n}\n{\n "text": "b"\n}\n', b'{"text": "a"}{"text": "b"}', b'[{"text": "a"}]'):
        assert formats(find(tree(tmp_path, {"t": data}) / "t")) == {"t": "json"}


def test_configuration_files_among_sources_are_text_and_named(tmp_path: Path) -> None:
    files = {
        "package.json": PACKAGE,
        "one_line.json": b'{"a": 1}',
        "list.json": b"[1, 2]",
        "a.py": b"print(1)\n",
        "b.py": LINES,
        "c.ipynb": PACKAGE,
    }
    folder = tree(tmp_path / "in", files)
    for wanted in ({}, {"suffixes": (".json", ".py", ".ipynb")}):
        listed = find(folder, **wanted)
        assert formats(listed) == {f"in/{name}": "text" for name in sorted(files)}
        assert listed.json_texts == ("in/list.json", "in/one_line.json", "in/package.json")
    tree(folder, {"records.json": b'[{"body": "x"}]'})
    with pytest.raises(
        DataError, match=r"in/records\.json: its JSON objects have no field 'text' but 'body'; .*--format text"
    ):
        find(folder)
    assert set(formats(find(folder, format="text")).values()) == {"text"}


@pytest.mark.parametrize(
    ("data", "layout"),
    [
        (b"", None),
        (b"plain", None),
        (b"[1] A bibliography\n", None),
        (b"[Verse]\n", None),
        (b"{\\bf a}\n", None),
        (b'{"a": 1}\nthen prose', None),
        (b"[" * 60_000, None),
        (b'{"a": 1}', "line"),
        (b'{"a": NaN, "a": 2}\n{', "lines"),
        (b'[\n  {"a": 1},\n  {"a": 2}\n]', "array"),
        (b'[{"a": 1}', "array"),
        (b"[]", "value"),
        (PACKAGE, "object"),
        (PACKAGE + PACKAGE, "object"),
    ],
)
def test_layouts_of_json(data: bytes, layout: str | None) -> None:
    found = json_content(data, whole=True)
    assert (None if found is None else found.layout) == layout


@pytest.mark.parametrize(
    ("data", "layout"),
    [
        (b'[{"a": "' + b"x" * 9000, "array"),
        (b"[" + b"1234, " * 3000, "value"),
        (b'{\n "a": [\n' + b"  17,\n" * 3000, "object"),
        (b'{"a": "' + b"\\u00e9" * 3000 + b"\\u0", "line"),
        (b'{"a": "' + "é".encode() * 3000 + b"\xc3", "line"),
    ],
)
def test_layouts_of_json_that_goes_on_beyond_the_head(data: bytes, layout: str) -> None:
    found = json_content(data, whole=False)
    assert found is not None
    assert found.layout == layout
    assert found.has_field("text") is False


def test_fields_of_the_first_object() -> None:
    found = json_content(b'{"meta": {"text": "x"}, "a.b": 1}', whole=True)
    assert found is not None
    assert [found.has_field(key) for key in ("meta.text", "a.b", "text", "meta.text.x")] == [True, True, False, False]
