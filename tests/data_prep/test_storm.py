"""Folders of every format, encoding, link and damage that people have.

For every input either its text is found exactly once in the dataset, or the dataset or the command's one message names
it with a reason; and whoever does the tasks, in whichever order and place and however interrupted, the dataset's bytes
are the same.

The dataset is read back by independent_reader.py (h5py, numpy and json alone) and the reference tokenizer.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import hashlib
import io
import json
import lzma
import os
import shutil
import struct
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from click.testing import CliRunner
from fault_injection import DEATHS, Death, Faults, injected
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from independent_reader import documents, json_lines, manifest_of, order_key, tree_hashes
from tokenizers import Tokenizer

from weftrain.cli.main import main
from weftrain.data_prep.pipeline import prepare
from weftrain.data_prep.readers.listing import list_inputs
from weftrain.data_prep.readers.read_options import ReadOptions
from weftrain.data_prep.stages import plan
from weftrain.data_prep.stages.executors import Executor, LocalExecutor, RayExecutor, Stage, run_task
from weftrain.data_prep.stages.plan import PrepPlan
from weftrain.data_prep.stages.settings import Inputs
from weftrain.data_prep.tokens.tokenization import TextEncoder

EOS = "</s>"
MAX_REFUSALS = 12  # files that one folder may hold and a run refuses, one after the other


@dataclass
class Entry:
    """One file of the folder. name: below it. data: its bytes. texts: what it holds, each of which must be found or
    named.

    link_to: where a symbolic link leads that stands there instead, beside the folder.
    """

    name: str
    data: bytes
    texts: list[str] = field(default_factory=list)
    link_to: str | None = None
    may_be_refused: bool = False  # the whole run may end with a message that names it
    is_data: bool = True  # False: a file without text, which only has to be named


def lines_of(texts: list[str], key: str = "text") -> bytes:
    return b"".join(
        json.dumps({key: text, "n": n}, ensure_ascii=n % 2 == 0).encode() + b"\n" for n, text in enumerate(texts)
    )


def zstd(data: bytes) -> bytes:
    return bytes(pytest.importorskip("zstandard").ZstdCompressor().compress(data))


def parquet(texts: list[str]) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as library

    buffer = io.BytesIO()
    library.write_table(pyarrow.table({"n": list(range(len(texts))), "text": texts}), buffer, row_group_size=3)
    return buffer.getvalue()


def arrow(texts: list[str]) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"text": texts})
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


# name within the folder with {n} for a number, how its texts become bytes
WHOLE: dict[str, Callable[[list[str]], bytes]] = {
    "part-{n}.jsonl": lines_of,
    "PART-{n}.JSONL": lines_of,
    "crlf-{n}.jsonl": lambda texts: lines_of(texts).replace(b"\n", b"\r\n"),
    "bom-{n}.jsonl": lambda texts: b"\xef\xbb\xbf" + lines_of(texts),
    "no_newline-{n}.ndjson": lambda texts: lines_of(texts).rstrip(b"\n"),
    "blank-{n}.jsonl": lambda texts: lines_of(texts).replace(b"\n", b"\n\n"),
    "lines-{n}.json": lines_of,
    "no_suffix_{n}": lines_of,
    "array-{n}.json": lambda texts: json.dumps([{"text": text} for text in texts], indent=1).encode(),
    "a/deep/er/{n}.jsonl.gz": lambda texts: gzip.compress(lines_of(texts)),
    "members-{n}.jsonl.gz": lambda texts: b"".join(gzip.compress(lines_of([text])) for text in texts),
    "b/{n}.jsonl.zst": lambda texts: zstd(lines_of(texts)),
    "frames-{n}.jsonl.zst": lambda texts: b"".join(zstd(lines_of([text])) for text in texts),
    "b/{n}.jsonl.bz2": lambda texts: bz2.compress(lines_of(texts)),
    "b/{n}.jsonl.xz": lambda texts: lzma.compress(lines_of(texts)),
    "b/{n}.json.gz": lambda texts: gzip.compress(lines_of(texts)),
    "columns-{n}.parquet": parquet,
    "table-{n}.arrow": arrow,
}
SINGLE: dict[str, Callable[[str], bytes]] = {  # one document a file
    "notes-{n}.txt": str.encode,
    "c/notes-{n}.md": str.encode,
    "c/notes-{n}.txt.gz": lambda text: gzip.compress(text.encode()),
    "c/notes-{n}.txt.xz": lambda text: lzma.compress(text.encode()),
    "readme_{n}": str.encode,
    "módulo-{n}.py": str.encode,
}
# what cannot be read: named in failures.jsonl, in inputs.jsonl, or in the message
DAMAGED: dict[str, Callable[[str], bytes]] = {
    "latin1-{n}.txt": lambda text: "café ".encode("latin-1") + text.encode(),
    "nul-{n}.txt": lambda text: text.encode() + b"\0",
    "cut-{n}.jsonl.gz": lambda text: gzip.compress(lines_of([text] * 3))[:-9],
    "cut-{n}.jsonl.zst": lambda text: zstd(lines_of([text] * 3))[:-3],
    "cut-{n}.jsonl.bz2": lambda text: bz2.compress(lines_of([text] * 3))[:-5],
    "broken-{n}.parquet": lambda text: parquet([text])[:-6],
    "not_json-{n}.jsonl": lambda text: b'{"text": "' + text.encode() + b"\n",
    "other_key-{n}.jsonl": lambda text: lines_of([text], "body"),
    "number-{n}.jsonl": lambda text: b'{"text": 5}\n',
    "download-{n}.jsonl.part": lambda text: lines_of([text]),
}
WITHOUT_TEXT: dict[str, bytes] = {
    "_SUCCESS": b"",
    ".hidden-{n}.jsonl": lines_of(["hidden"]),
    ".git/config-{n}": b"[core]\n",
    "empty-{n}.txt": b"",
    "image-{n}.png": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
    "weights-{n}.bin": bytes(range(256)) * 8,
}

# What links lead to, beside the folder `in`: a file, nothing, and the folder itself, a loop.
LINKED = {"outside.jsonl": ["outside 1", "outside 2"], "missing.jsonl": [], "in": []}
THREADS = ("weft", "warp", "loom", "thread", "café", "織機", "shuttle\n\t", "reed", "heddle", "", "beam")
WORDS = st.lists(st.sampled_from(THREADS), min_size=1, max_size=30)


@st.composite
def folders(draw: st.DrawFn) -> list[Entry]:
    """Entries of different names; most texts come once, some are exact duplicates of others."""
    entries: list[Entry] = []
    count = 0

    def text() -> str:
        nonlocal count
        count += 1
        return f"{count}: " + " ".join(draw(WORDS))

    for n in range(draw(st.integers(3, 9))):
        kind = draw(
            st.sampled_from(("whole", "whole", "whole", "single", "single", "damaged", "without", "link", "copy"))
        )
        if kind == "whole":
            name = draw(st.sampled_from(sorted(WHOLE)))
            texts = [text() for _ in range(draw(st.integers(1, 6)))]
            entries.append(Entry(name.format(n=n), WHOLE[name](texts), texts))
        elif kind == "single":
            name = draw(st.sampled_from(sorted(SINGLE)))
            only = text()
            entries.append(Entry(name.format(n=n), SINGLE[name](only), [only]))
        elif kind == "damaged":
            name = draw(st.sampled_from(sorted(DAMAGED)))
            entries.append(Entry(name.format(n=n), DAMAGED[name](text()), may_be_refused=True, is_data=False))
        elif kind == "without":
            name = draw(st.sampled_from(sorted(WITHOUT_TEXT)))
            entries.append(Entry(name.format(n=n), WITHOUT_TEXT[name], is_data=False))
        elif kind == "link":
            target = draw(st.sampled_from(sorted(LINKED)))
            entries.append(
                Entry(f"link-{n}.jsonl", b"", LINKED[target], target, may_be_refused=True, is_data=bool(LINKED[target]))
            )
        elif entries:
            copied = draw(st.sampled_from(entries))
            if copied.link_to is None and copied.texts:
                entries.append(Entry(f"copy-{n}/{copied.name}", copied.data, copied.texts))
    steady = [text() for _ in range(30)]  # so that every folder makes a row
    return [*{entry.name: entry for entry in entries}.values(), Entry("steady.jsonl", lines_of(steady), steady)]


def build(folder: Path, entries: list[Entry]) -> None:
    (folder.parent / "outside.jsonl").write_bytes(lines_of(LINKED["outside.jsonl"]))
    for entry in entries:
        path = folder / entry.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if entry.link_to is not None:
            os.symlink(os.path.relpath(folder.parent / entry.link_to, path.parent), path)
        else:
            path.write_bytes(entry.data)


def prepared(scratch: Path, name: str, tokenizer: Path, *options: str) -> tuple[int, str]:
    arguments = [
        "prep",
        str(scratch / "in"),
        "--name",
        name,
        "--output",
        str(scratch / "out"),
        "--tokenizer",
        str(tokenizer),
    ]
    fixed = ["--sequence-length", "16", "--heldout-fraction", "0.2", "--max-failures", "1000"]
    result = CliRunner().invoke(main, [*arguments, *fixed, *options])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def check_storm(scratch: Path, entries: list[Entry], tokenizer: Path, workers: int) -> None:
    """Prepare the folder; a file that the run refuses by name is taken away, and the rest must then be in the dataset
    or be named.
    """
    (scratch / "in").mkdir()
    build(scratch / "in", entries)
    present = {entry.name: entry for entry in entries}
    for _ in range(MAX_REFUSALS):
        code, output = prepared(scratch, "d", tokenizer, "--packing", "best_fit", "--workers", str(workers))
        if code == 0:
            break
        assert "Traceback" not in output, output
        refused = [name for name, entry in present.items() if entry.may_be_refused and name in output]
        assert refused, f"the run ends, and names none of the files that it may refuse: {output}"
        for name in refused:
            os.unlink(scratch / "in" / name)
            del present[name]
    else:
        raise AssertionError(f"more than {MAX_REFUSALS} refusals")
    check_found(scratch / "out" / "d", present, tokenizer)


def check_found(folder: Path, entries: dict[str, Entry], tokenizer: Path) -> None:
    reference = Tokenizer.from_file(str(tokenizer))
    reference.encode_special_tokens = True
    end = reference.token_to_id(EOS)
    manifest = manifest_of(folder)
    found: Counter[str] = Counter()
    for set_name in ("train", "heldout"):
        if manifest.get(set_name) is None:
            continue
        for document in documents(folder, set_name):
            assert document.tokens[-1] == end
            assert document.mask.all()
            text = reference.decode(document.tokens[:-1].tolist(), skip_special_tokens=False)
            assert reference.encode(text, add_special_tokens=False).ids == document.tokens[:-1].tolist()
            found[text] += 1
            assert text in entries[document.file.removeprefix("in/")].texts, (document.file, text)
    assert set(found.values()) <= {1}, "a text is in the dataset more than once"
    inputs = json_lines(folder / "inputs.jsonl")
    skipped = {
        entry["name"].removeprefix("in/").rstrip("/"): entry["skipped"] for entry in inputs if entry.get("skipped")
    }
    failed = {entry["place"].rpartition(":")[0].removeprefix("in/") for entry in json_lines(folder / "failures.jsonl")}
    read = {entry["name"].removeprefix("in/") for entry in inputs if not entry.get("skipped")}
    for name, entry in entries.items():
        if entry.is_data:
            missing = [text for text in entry.texts if text not in found]
            assert not missing or name in skipped, f"{name}: lost without a word: {missing}"
        else:
            named = (
                name in skipped
                or name in failed
                or name in read
                or any(name.startswith(f"{folder_}/") for folder_ in skipped)
            )
            assert named, f"{name}: is neither read nor named"


@pytest.fixture(scope="session")
def tokenizer(encoder: TextEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("storm") / "tokenizer.json"
    path.write_bytes(encoder.data)
    return path


def storm(max_examples: int) -> Any:
    """Derandomized and not shrunk: a folder that fails is small enough to be read as it is."""
    checks, phases = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow], [Phase.explicit, Phase.generate]
    return settings(
        max_examples=max_examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=checks,
        phases=phases,
        database=None,
    )


@pytest.mark.prove
@pytest.mark.timeout(900)  # a busy machine takes five minutes
@storm(40)  # `soak` has a long one; each format, and each damage, stands in a test of its own
@given(entries=folders())
def test_nothing_is_lost_in_silence(entries: list[Entry], tokenizer: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        check_storm(Path(scratch), entries, tokenizer, workers=1)


@pytest.mark.soak
@pytest.mark.timeout(900)
@storm(150)
@given(entries=folders())
def test_nothing_is_lost_in_a_long_storm(entries: list[Entry], tokenizer: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        check_storm(Path(scratch), entries, tokenizer, workers=1)


def test_every_damage_is_named(tmp_path: Path, tokenizer: Path) -> None:
    """Each once, and each kind of file without text."""
    entries = [
        Entry(name.format(n=n), of_text(f"only {n} of {name}"), may_be_refused=True, is_data=False)
        for n, (name, of_text) in enumerate(DAMAGED.items())
    ]
    entries += [Entry(name.format(n=n), data, is_data=False) for n, (name, data) in enumerate(WITHOUT_TEXT.items())]
    steady = [f"{n}: weft and warp" for n in range(30)]
    check_storm(tmp_path, [*entries, Entry("steady.jsonl", lines_of(steady), steady)], tokenizer, workers=1)


def test_every_format_is_read_whole(tmp_path: Path, tokenizer: Path) -> None:
    """Each format once, and the order of the shuffle by the rule that the documents state."""
    entries = []
    for n, (name, of_texts) in enumerate(WHOLE.items()):
        texts = [f"{n}-{k}: the weft of {name}" for k in range(5)]
        entries.append(Entry(name.format(n=n), of_texts(texts), texts))
    for n, (name, of_text) in enumerate(SINGLE.items()):
        entries.append(Entry(name.format(n=n), of_text(f"only {n} {name}"), [f"only {n} {name}"]))
    check_storm(tmp_path, entries, tokenizer, workers=1)
    code, output = prepared(tmp_path, "stream", tokenizer, "--workers", "1", "--seed", "3")
    assert code == 0, output
    reference = Tokenizer.from_file(str(tokenizer))
    contents = [
        hashlib.sha256(reference.decode(document.tokens[:-1].tolist(), skip_special_tokens=False).encode()).digest()
        # the last one is cut by the end of the last row
        for document in documents(tmp_path / "out" / "stream", "train")[:-1]
    ]
    keys = [order_key(3, content) for content in contents]
    assert keys == sorted(keys)
    assert len(contents) > 60


@dataclass(frozen=True)
class OutOfOrder:
    """An executor that does the tasks of a stage in an order drawn by `seed`, and some of them as if another process
    had them too.
    """

    seed: int
    leads = True
    alone = True

    def run(self, plan: PrepPlan, stage: Stage, on_done: Callable[[int], None]) -> None:
        pending = stage.pending(plan)
        for index in set(range(stage.count(plan))) - set(pending):
            on_done(index)
        generator = np.random.default_rng(self.seed)
        for index in generator.permutation(pending).tolist():
            run_task(plan.folder, stage.name, plan.by_reference, index)
            if generator.random() < 0.3:
                stage.output(plan, index).unlink()
                run_task(plan.folder, stage.name, plan.by_reference, index)
            on_done(index)

    def wait_until(self, there: Callable[[], bool], what: str) -> None:
        assert there()


ROWS_LENGTH = 16


def write_tokens(folder: Path, vocab_size: int) -> None:
    """Documents of ids as others write them: Megatron, datatrove, OLMo, and MDS and litdata as their libraries wrote
    them.
    """
    generator = np.random.default_rng(7)
    ids = [generator.integers(3, vocab_size, int(length)) for length in generator.integers(1, 40, 30)]
    (folder / "d").mkdir(parents=True, exist_ok=True)
    for name in ("mds_uint16", "mds_zstd", "mds_text", "litdata_tokens", "litdata_tree", "litdata_batch"):
        shutil.copytree(Path(__file__).parent / "readers" / "files" / name, folder / "d" / name)
    (folder / "d" / "a.ds").write_bytes(np.concatenate(ids[:10]).astype("<u2").tobytes())
    (folder / "d" / "a.ds.index").write_bytes(
        np.cumsum([len(document) for document in ids[:10]]).astype("<u8").tobytes()
    )
    np.save(folder / "d" / "ids.npy", np.concatenate([np.append(document, 2) for document in ids[10:20]]).astype("<u2"))
    lengths = np.array([len(document) for document in ids[20:]], "<i4")
    pointers = (np.cumsum(lengths, dtype=np.int64) - lengths) * 2
    (folder / "d" / "m.bin").write_bytes(np.concatenate(ids[20:]).astype("<u2").tobytes())
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, len(lengths), len(lengths) + 1)
    (folder / "d" / "m.idx").write_bytes(
        header
        + lengths.tobytes()
        + pointers.astype("<i8").tobytes()
        + np.arange(len(lengths) + 1, dtype="<i8").tobytes()
    )


def write_everything(folder: Path, vocab_size: int) -> None:
    """Every format whose documents can be in one dataset, some files linked, some skipped."""
    entries = []
    for n, (name, of_texts) in enumerate(WHOLE.items()):
        entries.append(
            Entry(name.format(n=n), of_texts([f"{n}-{k}: the weft of {name}" * (1 + 9 * (k == 3)) for k in range(9)]))
        )
    entries += [
        Entry(name.format(n=n), of_text(f"only {n} {name}")) for n, (name, of_text) in enumerate(SINGLE.items())
    ]
    entries += [Entry(name.format(n=n), data) for n, (name, data) in enumerate(WITHOUT_TEXT.items())]
    build(folder, [*entries, Entry("link.jsonl", b"", link_to="outside.jsonl")])
    write_tokens(folder, vocab_size)


def write_rows(folder: Path, vocab_size: int) -> list[Path]:
    """Rows that stand alone, in every form of them."""
    generator = np.random.default_rng(8)
    ids = generator.integers(3, vocab_size, (40, ROWS_LENGTH + 1))
    (folder / "amber.jsonl").write_text(
        "".join(json.dumps({"token_ids": row.tolist(), "source": "c4"}) + "\n" for row in ids)
    )
    planes = np.stack([ids[:, :-1], np.ones((40, ROWS_LENGTH)), ids[:, 1:]], axis=1).astype("<i4")
    with h5py.File(folder / "rows.h5", "w") as file:
        file["data"] = planes
        file.attrs["n_examples"] = 40
    position, packed = np.arange(ROWS_LENGTH) % 5, np.zeros((40, 5, ROWS_LENGTH), "<i4")
    packed[:, :3], packed[:, 3], packed[:, 4] = (
        planes,
        np.minimum(4, ROWS_LENGTH - 1 - np.arange(ROWS_LENGTH) + position) - position,
        position,
    )
    with h5py.File(folder / "packed.h5", "w") as file:
        file["data"] = packed
    with h5py.File(folder / "corpus.h5", "w") as file:
        file["data"] = np.append(ids[:, :-1].reshape(-1), 5).astype("<u2")
    return [folder / name for name in ("amber.jsonl", "rows.h5", "packed.h5", "corpus.h5")]


@pytest.fixture
def make(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, str]]:
    """prepare() of some inputs into a folder of its own, in many small parts; the hashes of all files of the
    dataset.
    """
    monkeypatch.setattr(plan, "_MEBI", 1000)
    monkeypatch.setattr(plan, "_PIECE_DOCUMENTS", 9)

    def call(output: str, inputs: Path, executor: Executor | None = None) -> dict[str, str]:
        listed = list_inputs([str(inputs)], source=None)
        chosen = Inputs(tuple(listed), "everything", "none", ReadOptions(sequence_length=ROWS_LENGTH))
        prepared = prepare(
            chosen,
            tmp_path / output,
            name="d",
            tokenizer=tokenizer,
            sequence_length=ROWS_LENGTH,
            heldout_fraction=0.2,
            rows_per_shard=60,
            executor=executor,
        )
        assert prepared is not None
        return tree_hashes(prepared.folder)

    return call


def test_tasks_in_any_order_done_twice_and_in_another_place_give_the_same_bytes(
    tmp_path: Path, make: Callable[..., dict[str, str]], encoder: TextEncoder
) -> None:
    (tmp_path / "here" / "in").mkdir(parents=True)
    write_everything(tmp_path / "here" / "in", encoder.vocab_size)
    shutil.copytree(tmp_path / "here", tmp_path / "elsewhere", symlinks=True)
    expected = make("first", tmp_path / "here" / "in")
    assert len([name for name in expected if name.startswith("train/")]) > 3
    assert make("second", tmp_path / "elsewhere" / "in", OutOfOrder(1)) == expected
    for rows in write_rows(tmp_path, encoder.vocab_size):
        assert make(f"{rows.stem}-1", rows) == make(f"{rows.stem}-2", rows, OutOfOrder(2)), rows


@pytest.mark.soak
def test_any_number_of_processes_ray_and_interruptions_give_the_same_bytes(
    tmp_path: Path, make: Callable[..., dict[str, str]], encoder: TextEncoder
) -> None:
    (tmp_path / "in").mkdir()
    write_everything(tmp_path / "in", encoder.vocab_size)
    expected = make("1", tmp_path / "in")
    deaths = 0
    while not (tmp_path / "interrupted" / "d").exists():  # each process does a little more of it
        with injected(Faults(DEATHS[deaths % 3], 60 + 7 * deaths)), contextlib.suppress(Death):
            make("interrupted", tmp_path / "in")
        deaths += 1
    assert deaths > 5
    assert make("interrupted", tmp_path / "in") == expected
    for workers in (2, 3):
        executor = LocalExecutor(workers)
        try:
            assert make(str(workers), tmp_path / "in", executor) == expected
        finally:
            executor.close()
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'weftrain[ray]'")
    assert make("ray", tmp_path / "in", RayExecutor(None, 2)) == expected
