"""A dataset that grows: the parent's shards untouched, the new inputs' documents once, everything numbered on, and
nothing half done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from weftrain.cli.main import main
from weftrain.core.errors import DataError
from weftrain.core.formats import fsops
from weftrain.core.formats.canonical import canonical_json, sha256_json
from weftrain.core.formats.dataset import open_inputs, open_sources, read_dataset_manifest, verify_tables
from weftrain.core.formats.dataset_manifest import FimSettings
from weftrain.core.formats.shard_set import ShardSet, open_set
from weftrain.data_prep import growth
from weftrain.data_prep.heldout import RULE, is_held_out
from weftrain.data_prep.pipeline import Prepared, prepare
from weftrain.data_prep.readers.documents import Document
from weftrain.data_prep.readers.listing import list_inputs
from weftrain.data_prep.readers.read_options import ReadOptions
from weftrain.data_prep.stages import plan
from weftrain.data_prep.stages.executors import LocalExecutor
from weftrain.data_prep.stages.settings import Inputs, Settings
from weftrain.data_prep.tokens.tokenization import TextEncoder

Prepare = Callable[..., Prepared]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few kilobytes are several parts and buckets, and a few documents several files of identities."""
    monkeypatch.setattr(plan, "_MEBI", 1000)
    monkeypatch.setattr(growth, "_BLOCK", 16)


@pytest.fixture
def made(tmp_path: Path, encoder: TextEncoder) -> Prepare:
    """prepare() of texts, in small shards with the test tokenizer; or, with `grow`, added to another."""
    (tmp_path / "tokenizer.json").write_bytes(encoder.data)

    def call(name: str, texts: list[str], grow: str | None = None, licence: str = "MIT", **changes: Any) -> Prepared:
        path = tmp_path / f"{name}.jsonl"
        lines = "".join(
            json.dumps({"text": text, "kind": f"{name[0]}{index % 3}"}) + "\n" for index, text in enumerate(texts)
        )
        if not path.exists() or path.read_text() != lines:
            path.write_text(lines)
        inputs = Inputs(tuple(list_inputs([str(path)], source=None)), name, licence, ReadOptions(source_key="kind"))
        settings = {
            "sequence_length": 16,
            "heldout_fraction": 0.2,
            "rows_per_shard": 20,
            "tokenizer": tmp_path / "tokenizer.json",
        }
        parent = {} if grow is None else {"grow": tmp_path / grow}
        prepared = prepare(inputs, tmp_path, name=name, **settings | parent | changes)
        assert prepared is not None
        return prepared

    return call


def tree(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def documents_of(folder: Path) -> dict[str, list[tuple[bytes, str, str, int, np.ndarray]]]:
    """Of each set every piece of a document: identity, source, file, line, tokens."""
    manifest = read_dataset_manifest(folder)
    sources = [source.name for source in open_sources(folder, manifest)]
    files = [entry.name for entry in open_inputs(folder, manifest)]
    found: dict[str, list[tuple[bytes, str, str, int, np.ndarray]]] = {}
    for set_name in manifest.sets:
        pieces = found.setdefault(set_name, [])
        for reader in ShardSet(folder, manifest, set_name).readers():
            reader.verify()
            table = reader.documents()
            for begin, end, identity, source, file, record in zip(
                [0, *table.end[:-1]], table.end, table.id, table.source, table.file, table.record, strict=True
            ):
                if file >= 0:
                    pieces.append(
                        (
                            identity.tobytes(),
                            sources[source],
                            files[file],
                            int(record),
                            reader.tokens(int(begin), int(end)),
                        )
                    )
    return found


def numbered(prefix: str, count: int) -> list[str]:
    return [f"{prefix} {n}: " + "the weft is carried across a warp " * (1 + n * 7 % 5) for n in range(count)]


def test_growing_twice(made: Prepare, texts: list[str], encoder: TextEncoder) -> None:
    """The parents' shards are the first, byte by byte; each text is there once; its piece names its own file and line,
    and has its ids.
    """
    one = texts[:60]
    two = [*numbered("two", 50), *texts[40:70]]  # 20 of them in the parent
    three = [*numbered("three", 40), *two[45:60], texts[3]]
    first, second, third = made("one", one), made("two", two, "one", "MIT"), made("three", three, "two", "CC0-1.0")
    for grown, parent in ((second, first), (third, second)):
        before, after = tree(parent.folder), tree(grown.folder)
        assert all(
            after[name] == digest for name, digest in before.items() if name.endswith(".h5") or name == "tokenizer.json"
        )
        assert len(after) > len(before)
        assert grown.manifest.parents[-1].root == json.loads((parent.folder / "manifest.json").read_text())["root"]
        assert grown.manifest.parents[-1].train.id == parent.manifest.train.id != grown.manifest.train.id
        verify_tables(grown.folder, grown.manifest)
    assert [one.name for one in third.manifest.parents] == ["one", "two"]
    assert (third.manifest.corpus.licence, third.manifest.corpus.description) == ("MIT; CC0-1.0", "one; two; three")
    unique = dict.fromkeys([*one, *two, *three])
    counts = third.manifest.documents
    assert (counts.read, counts.duplicates) == (len(one) + len(two) + len(three), 20 + 5 + 10 + 1)
    assert counts.train + counts.heldout == len(unique)
    by_id = {hashlib.sha256(text.encode()).digest()[:16]: text for text in unique}
    lines = {"one.jsonl": one, "two.jsonl": two, "three.jsonl": three}
    found = documents_of(third.folder)
    identities = {name: {piece[0] for piece in pieces} for name, pieces in found.items()}
    assert not identities["train"] & identities["heldout"]
    assert len(by_id.keys() - identities["train"] - identities["heldout"]) <= 6  # the tails of two sets, thrice
    for identity, source, file, record, tokens in found["train"] + found["heldout"]:
        assert lines[file][record] == by_id[identity]
        assert source == f"{file[0]}{record % 3}"
        (ids,) = encoder.encode([by_id[identity]], [""])
        # a shard's end may cut it
        assert tokens.astype("<i4").tobytes() in np.append(ids, encoder.eos_id).astype("<i4").tobytes()
    sources = list(open_sources(third.folder, third.manifest))
    # "two" and "three" share theirs
    assert [source.name for source in sources] == [f"{name}{n}" for name in "ot" for n in range(3)]
    assert sum(source.documents for source in sources) == counts.train
    assert sum(source.tokens for source in sources) == sum(
        entry.tokens + 1 + entry.dropped_tokens for entry in (first.manifest.train,)
    ) + sum(
        (grown.manifest.train.tokens - parent.manifest.train.tokens)
        + 1
        + (grown.manifest.train.dropped_tokens - parent.manifest.train.dropped_tokens)
        for grown, parent in ((second, first), (third, second))
    )
    again = made("three", three, "two", "CC0-1.0")
    assert again.up_to_date


def test_interrupted_anywhere_the_parent_stays_and_the_same_bytes_come(
    made: Prepare, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run after the other stops at a full disk, each some file operations later than the last; and without hard
    links.
    """
    parent = made("one", texts[:40])
    before = tree(parent.folder)
    expected = tree(made("two", texts[30:80], "one").folder)
    fsops.remove_tree(tmp_path / "two")
    left, runs = 0, 0

    def fail(name: str, path: Path, action: Callable[[], Any]) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return action()

    monkeypatch.setattr(fsops, "_perform", fail)
    monkeypatch.setattr(
        os, "link", lambda *paths: (_ for _ in ()).throw(OSError(errno.EXDEV, "no link across file systems"))
    )
    while not (tmp_path / "two").exists():
        left, runs = 59 * runs, runs + 1
        assert runs < 60
        with contextlib.suppress(DataError):
            made("two", texts[30:80], "one")
        assert tree(parent.folder) == before
    assert runs > 4
    assert tree(tmp_path / "two") == expected
    assert (tmp_path / "two" / "train" / "00000.h5").stat().st_nlink == 1


@pytest.mark.prove
def test_the_same_bytes_by_several_processes(made: Prepare, texts: list[str], tmp_path: Path) -> None:
    made("one", texts[:60])
    alone = tree(made("two", texts[40:], "one").folder)
    fsops.remove_tree(tmp_path / "two")
    assert tree(made("two", texts[40:], "one", executor=LocalExecutor(3)).folder) == alone


@pytest.mark.parametrize(
    "settings",
    [
        {"packing": "best_fit"},
        {"fim": FimSettings(rate=0.5, spm_share=0.5, mode="context")},
        {"fim": FimSettings(rate=0.5, spm_share=0.5, mode="released")},
        {"order": "as_read"},
    ],
)
def test_other_kinds_of_datasets_grow(made: Prepare, texts: list[str], settings: dict[str, Any]) -> None:
    """What is as read keeps its duplicates; all others drop the parent's."""
    parent = made("one", texts[:40], **settings)
    grown = made("two", texts[30:80], "one", **settings)
    duplicates = 0 if settings.get("order") == "as_read" else 10
    assert grown.manifest.documents.duplicates == duplicates
    assert grown.manifest.documents.train + grown.manifest.documents.heldout == 90 - duplicates
    assert grown.manifest.train.shards[: len(parent.manifest.train.shards)] == parent.manifest.train.shards
    assert documents_of(grown.folder).keys() == {"train", "heldout"}


def test_few_documents_leave_the_held_out_set_as_it_is(made: Prepare, texts: list[str]) -> None:
    """Held-out documents that fill no row are dropped tokens, where the parent has some; training documents that fill
    none are an error.
    """
    parent = made("one", texts[:60])
    short = [f"few {n}" for n in range(100)]
    heldout = [
        text
        for text in short
        if is_held_out(Document(0, 0, "", text), hashlib.sha256(text.encode()).digest(), RULE, 0.2)
    ]
    grown = made("two", [heldout[0], *(text for text in short if text not in heldout)], "one")
    assert grown.manifest.train.n_examples > parent.manifest.train.n_examples
    before, after = parent.manifest.heldout, grown.manifest.heldout
    assert before is not None
    assert after is not None
    assert (after.id, after.documents) == (before.id, before.documents + 1)
    assert after.dropped_tokens > before.dropped_tokens
    with pytest.raises(
        DataError,
        match=r"the 0 train documents that the dataset which grows does not hold yet hold 0 tokens, fewer than one row",
    ):
        made("three", texts[:60], "one")


def test_what_the_parent_could_not_read_stays_listed(tmp_path: Path, encoder: TextEncoder) -> None:
    """And does not count against the budget of the new inputs."""
    (tmp_path / "tokenizer.json").write_bytes(encoder.data)
    settings = {
        "sequence_length": 16,
        "heldout_fraction": 0.0,
        "tokenizer": tmp_path / "tokenizer.json",
        "max_failures": 1,
    }
    for name, parent in (("one", {}), ("two", {"grow": tmp_path / "one"})):
        lines = [json.dumps({"text": text}) for text in numbered(name, 5)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join([*lines, "{}"]) + "\n")
        inputs = Inputs(tuple(list_inputs([str(tmp_path / f"{name}.jsonl")], source=None)), name)
        assert prepare(inputs, tmp_path, name=name, **settings | parent) is not None
        again = prepare(inputs, tmp_path, name=name, **settings | parent)
        assert again is not None
        assert (again.up_to_date, again.manifest.documents.failed) == (True, 1 if name == "one" else 2)
    failures = [json.loads(line) for line in (tmp_path / "two" / "failures.jsonl").read_text().splitlines()]
    assert [failure["place"] for failure in failures] == ["one.jsonl:6", "two.jsonl:6"]
    with pytest.raises(DataError, match=r"1 documents could not be read .* --max-failures allows 0"):
        prepare(inputs, tmp_path, name="two", **settings | {"grow": tmp_path / "one", "max_failures": 0})


def test_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Prepare, texts: list[str]) -> None:
    """Against a set, over blocks of 16 identities, many of which share their first eight bytes, also across blocks."""
    made("one", texts[:60])
    _, parent = growth.open_parent(tmp_path / "one")
    inputs = Inputs(tuple(list_inputs([str(tmp_path / "one.jsonl")], source=None)), "x")
    settings = Settings("x", None, None, 16, 0.2, 20, 0)
    work = dataclasses.replace(plan.make_plan(tmp_path / "work", inputs, settings, "auto"), parent=parent)
    rng = np.random.default_rng(0)
    stored = rng.integers(0, 256, (300, 16)).astype(np.uint8)
    stored[:, 0] = np.arange(300) * 255 // 300
    stored[100:160, :8] = stored[100, :8]
    monkeypatch.setattr(
        growth,
        "_identities",
        lambda folder, found: iter([growth._numbers(stored[:170]), growth._numbers(stored[170:])]),
    )
    growth.index_documents(work)
    content = np.concatenate([stored[rng.integers(0, 300, 200)], rng.integers(0, 256, (200, 16)).astype(np.uint8)])
    content[300:350, :8] = stored[100, :8]
    content = np.concatenate([content, np.zeros_like(content)], axis=1)
    known = {one.tobytes() for one in stored}
    assert growth.is_known(work, content).tolist() == [one[:16].tobytes() in known for one in content]
    assert growth.is_known(work, content[:0]).tolist() == []


def weftrain(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.prove
def test_a_dataset_of_format_2_grows_by_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its settings, tokenizer and rule of the held-out side are taken; what contradicts them is refused with what to
    leave out.
    """
    with tarfile.open(Path(__file__).parent / "format_2.tar.gz") as kept:
        kept.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({"text": f"the river {n} sings under the stone and over", "kind": "song"}) for n in range(40)]
    Path("c.jsonl").write_text("\n".join([*rows, *Path("a.jsonl").read_text().splitlines()]) + "\n")
    arguments = ["prep", "c.jsonl", "--source-key", "kind", "--grow", "old", "--output", ".", "--workers", "1"]
    grown = weftrain(*arguments, "--name", "grown", "--licence", "MIT")
    assert "licence CC0-1.0; MIT" in grown.output
    manifest = read_dataset_manifest(Path("grown"))
    assert (manifest.heldout_rule, manifest.documents.duplicates, manifest.version) == (1, 1 + 24, 3)
    assert "grew     from old, dataset id f0194621ebe868f9: " in grown.output
    assert "grew from    old: its 32 training rows are the first" in weftrain("data", "stats", "grown").output
    assert "the lists of 3 inputs and of 3 sources agree" in weftrain("data", "verify", "grown").output
    assert "source song, document" in weftrain("data", "head", "grown", "--from", manifest.train.n_examples - 1).output
    assert (
        weftrain("data", "head", "grown", "--rows", "32").output
        == weftrain("data", "head", "old", "--rows", "32").output
    )
    assert "is up to date" in weftrain(*arguments, "--name", "grown", "--licence", "MIT").output
    for more, problem in (
        (
            ["--name", "grown", "--licence", "CC-BY-4.0"],
            "is recorded with licence 'CC0-1.0; MIT', not 'CC0-1.0; CC-BY-4.0'",
        ),
        (
            ["--name", "x", "--sequence-length", "64"],
            "was prepared with sequence_length 32, not 64: leave --sequence-length out",
        ),
        (["--name", "x", "--packing", "concatenate"], "leave --packing out"),
        (["--name", "x", "--vocab-size", "300"], "leave --tokenizer and --vocab-size out"),
        (["--name", "x", "--normalise", "NFC"], "leave --normalise out"),
        (["--name", "x", "--epochs", "2"], "leave --epochs out"),
        (["--name", "old"], "stays as it is, and the grown dataset gets a folder of its own"),
    ):
        refused = weftrain(*arguments, *more)
        assert (refused.exit_code, problem in refused.output) == (2, True), refused.output
    for folder, problem in (
        ("none", "holds no dataset; name the folder of one"),
        ("s3://b/d", "with `weftrain data fetch`, and name"),
    ):
        assert problem in weftrain("prep", "c.jsonl", "--name", "x", "--grow", folder).output
    assert "name the files, not a recipe" in weftrain("prep", "amber", "--grow", "old").output


def test_numbers_and_names_of_another_dataset_are_found(made: Prepare, texts: list[str], tmp_path: Path) -> None:
    """A shard of format 2 says its sources' names itself, and every shard counts inputs."""
    prepared = made("one", texts[:60])
    shards = ShardSet(prepared.folder, prepared.manifest, "train")
    shards.manifest = prepared.manifest.model_copy(
        update={"corpus": prepared.manifest.corpus.model_copy(update={"files": 0})}
    )
    with pytest.raises(DataError, match=r"train/00000.h5: doc_file: names file 1 of 0"):
        shards.verify()
    with tarfile.open(Path(__file__).parent / "format_2.tar.gz") as kept:
        kept.extractall(tmp_path, filter="data")
    _, old = open_set(tmp_path / "old", "train")
    old.verify()
    value = json.loads((tmp_path / "old" / "manifest.json").read_text())
    value["sources"][0]["name"] = "poetry"
    del value["root"]
    (tmp_path / "old" / "manifest.json").write_bytes(canonical_json(value | {"root": sha256_json(value)}) + b"\n")
    with pytest.raises(DataError, match=r"sources: are not the first that the dataset lists"):
        open_set(tmp_path / "old", "train")[1].verify()


def test_what_cannot_grow(made: Prepare, texts: list[str], tmp_path: Path) -> None:
    made("one", texts[:60])
    grown = made("two", texts[40:], "one")
    with pytest.raises(DataError, match=r"grew from 'one', manifest .*, and --grow is not given"):
        made("two", texts[40:])
    with pytest.raises(DataError, match=r"was not grown from another, and --grow names .*two"):
        made("one", texts[:60], "two")
    made("other", texts[:50])
    with pytest.raises(DataError, match=r"grew from 'one', manifest .*, and --grow names .*other"):
        made("two", texts[40:], "other")
    with pytest.raises(DataError, match=r"was prepared from 1 files, and these are 2"):
        inputs = Inputs(
            tuple(list_inputs([str(tmp_path / name) for name in ("one.jsonl", "two.jsonl")], source=None)), "x"
        )
        options = {"sequence_length": 16, "heldout_fraction": 0.2, "grow": tmp_path / "one"}
        prepare(dataclasses.replace(inputs, options=ReadOptions(source_key="kind")), tmp_path, name="two", **options)
    assert grown.manifest.parents
    for name, settings, what in (("epochs", {"epochs": 2}, "2 epochs"), ("chunks", {"chunks": 2}, "2 chunks")):
        made(name, texts[:60], **settings)
        with pytest.raises(
            DataError, match=f"was prepared in {what}, which rows at the end would break: prepare the new inputs as"
        ):
            made("three", texts[40:], name, **settings)
    rows = [json.dumps({"token_ids": list(range(5, 22))}) for _ in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    packed = Inputs(tuple(list_inputs([str(tmp_path / "rows.jsonl")], source=None, format="amber")), "rows")
    packed = dataclasses.replace(packed, options=ReadOptions(sequence_length=16))
    with pytest.raises(
        DataError, match=r"holds documents to be packed, and the new inputs are rows that are packed already"
    ):
        prepare(packed, tmp_path, name="four", sequence_length=16, heldout_fraction=0.2, grow=tmp_path / "one")
