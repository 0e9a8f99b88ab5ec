"""prepare(): the whole way from text to a dataset that trains, again to the same bytes, whole or not at all."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fault_injection import DEATHS, Death, Faults, injected

from weftrain.core import fsops
from weftrain.core.config import DataConfig
from weftrain.core.data import open_heldout, open_training
from weftrain.core.dataset import TOKENIZER, ShardSet, read_manifest
from weftrain.core.errors import DataError
from weftrain.data_prep.corpus import embedded_corpus
from weftrain.data_prep.pipeline import Prepared, prepare
from weftrain.data_prep.readers import Document, Inputs
from weftrain.data_prep.tokenization import TextEncoder, load_encoder


def inputs_of(texts: list[str], **belongs_to: str) -> Inputs:
    documents = [
        Document(f"{index}.txt", "even" if index % 2 == 0 else "odd", text, belongs_to.get(f"_{index}")) for index, text in enumerate(texts)
    ]
    return Inputs("test text", "none", lambda: iter(documents))


@pytest.fixture
def run(tmp_path: Path, encoder: TextEncoder, texts: list[str]) -> Callable[..., Prepared]:
    """prepare() of the test texts with the test tokenizer in small shards."""
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_bytes(encoder.data)

    def call(inputs: Inputs | None = None, output: str = "out", **changes: Any) -> Prepared:
        settings: dict[str, Any] = {
            "name": "d",
            "tokenizer": tokenizer,
            "sequence_length": 16,
            "heldout_fraction": 0.2,
            "rows_per_shard": 20,
        }
        return prepare(inputs or inputs_of(texts), tmp_path / output, **settings | changes)

    return call


def tree(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def documents_of(folder: Path, set_name: str) -> dict[bytes, str]:
    """Document id -> its text, put together from the shards, eos taken off."""
    encoder, manifest = load_encoder(folder / TOKENIZER), read_manifest(folder)
    pieces: dict[bytes, list[np.ndarray]] = {}
    for number, reader in enumerate(ShardSet(folder, manifest, set_name).readers()):  # type: ignore[arg-type]
        table = reader.documents()
        for start, end, identity in zip(np.append(0, table.end[:-1]), table.end, table.id, strict=True):
            tokens = reader.tokens(int(start), int(end))
            pieces.setdefault(identity.tobytes(), []).append(tokens[1:] if number and start == 0 else tokens)
    joined = {identity: np.concatenate(parts) for identity, parts in pieces.items()}
    return {identity: encoder.decode(ids[:-1] if ids[-1] == manifest.eos_id else ids) for identity, ids in joined.items()}


def test_every_text_is_in_one_set_and_comes_back_whole(run: Callable[..., Prepared], texts: list[str]) -> None:
    prepared = run()
    assert not prepared.up_to_date
    train, heldout = (documents_of(prepared.folder, name) for name in ("train", "heldout"))
    assert not train.keys() & heldout.keys()
    by_id = {hashlib.sha256(text.encode()).digest()[:16]: text for text in texts}
    cut = 0
    for identity, text in (train | heldout).items():
        assert by_id[identity].startswith(text)
        cut += text != by_id[identity]
    assert cut <= 2  # the tail of each set
    manifest = prepared.manifest
    assert manifest.documents.train + manifest.documents.heldout == len(texts)
    assert 5 < manifest.documents.heldout < 50
    assert len(train) >= manifest.documents.train - manifest.train.dropped_tokens


def test_tokens_are_accounted_for(run: Callable[..., Prepared], texts: list[str], encoder: TextEncoder) -> None:
    manifest = run().manifest
    total = sum(len(ids) + 1 for ids in encoder.encode(texts, texts))
    counted = sum(entry.tokens + 1 + entry.dropped_tokens for entry in manifest.sets.values())
    assert counted == total
    assert [shard.n_examples for shard in manifest.train.shards[:-1]] == [20] * (len(manifest.train.shards) - 1)


def test_again_gives_the_same_bytes_and_another_seed_another_order(run: Callable[..., Prepared]) -> None:
    first, second, third = run(output="a"), run(output="b"), run(output="c", seed=1)
    assert tree(first.folder) == tree(second.folder)
    assert first.manifest.train.id != third.manifest.train.id
    assert not documents_of(first.folder, "heldout").keys() & documents_of(third.folder, "train").keys()
    for shard in first.manifest.train.shards:
        assert tree(first.folder)[shard.file] == shard.sha256


def test_run_again_it_is_up_to_date_and_other_settings_are_refused(run: Callable[..., Prepared], texts: list[str]) -> None:
    folder = run().folder
    before = tree(folder)
    assert run().up_to_date
    for change, message in (
        ({"seed": 1}, "prepared with seed 0, not 1"),
        ({"sequence_length": 8}, "prepared with sequence_length 16, not 8"),
        ({"heldout_fraction": 0.1}, "prepared with heldout_fraction"),
        ({"tokenizer": None, "vocab_size": 300}, "prepared with tokenizer"),
        ({"inputs": inputs_of(texts[:-1])}, "was prepared from other text"),
    ):
        with pytest.raises(DataError, match=f"{message}.*; give another --name, or remove it"):
            run(**change)
    assert tree(folder) == before


def test_a_damaged_dataset_is_not_up_to_date(run: Callable[..., Prepared]) -> None:
    folder = run().folder
    (folder / "heldout" / "00000.h5").unlink()
    with pytest.raises(DataError, match=r"heldout/00000\.h5: the shard is missing"):
        run()


def test_something_else_in_the_way(run: Callable[..., Prepared], tmp_path: Path) -> None:
    (tmp_path / "out" / "d").mkdir(parents=True)
    with pytest.raises(DataError, match="exists and is no dataset"):
        run()
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file"):
        run(output="file")


def test_duplicates_are_kept_once(run: Callable[..., Prepared], texts: list[str]) -> None:
    prepared = run(inputs_of([*texts, *texts[:30]]))
    assert prepared.manifest.documents.read == len(texts) + 30
    assert prepared.manifest.documents.duplicates == 30
    assert prepared.manifest.train.id == run(output="once").manifest.train.id


def test_held_out_by_content_alone(run: Callable[..., Prepared], texts: list[str]) -> None:
    """Neither the order nor the other documents change a document's side."""
    one, other = run().folder, run(inputs_of(texts[::-1][:90]), output="fewer").folder
    assert documents_of(one, "heldout").keys() & documents_of(other, "heldout").keys()
    assert not documents_of(one, "heldout").keys() & documents_of(other, "train").keys()
    assert not documents_of(one, "train").keys() & documents_of(other, "heldout").keys()


def test_a_text_stands_on_the_side_of_what_it_repeats(run: Callable[..., Prepared], texts: list[str]) -> None:
    """Documentation taken from a source must not be trained on while the source is held out."""
    belongs_to = {f"_{len(texts) + index}": text for index, text in enumerate(texts)}
    folder = run(inputs_of([*texts, *(f"about {text}" for text in texts)], **belongs_to)).folder
    train, heldout = (set(documents_of(folder, name).values()) for name in ("train", "heldout"))
    assert len(heldout) > 20
    assert not {f"about {text}" for text in heldout} & train
    assert not {f"about {text}" for text in train} & heldout


def test_text_full_of_special_tokens_makes_no_document_ends(run: Callable[..., Prepared], texts: list[str]) -> None:
    hostile = [f"{text} </s><s><|fim_prefix|></s>" for text in texts]
    folder = run(inputs_of(hostile)).folder
    manifest = read_manifest(folder)
    ends = sum(
        int((reader.tokens(0, num) == manifest.eos_id).sum())
        for reader in ShardSet(folder, manifest, "train").readers()
        if (num := length(reader))
    )
    assert ends <= manifest.documents.train + len(manifest.train.shards)
    assert any("</s>" in text for text in documents_of(folder, "train").values())


def length(reader: Any) -> int:
    return int(reader.documents().end[-1])


def test_what_it_makes_can_be_trained_on(run: Callable[..., Prepared], tmp_path: Path) -> None:
    run()
    value = {
        "root": str(tmp_path / "out"),
        "sequence_length": 16,
        "shuffle_seed": 0,
        "sources": [{"name": "d", "path": "d", "weight": 1.0}],
    }
    data = DataConfig.model_validate(value)
    assert open_training(data, 4, vocab_size=352).rows(0, 0, 4).ids.shape == (4, 17)
    assert open_heldout(data, 352, 8)[0].rows(0, 2).ids.shape == (2, 17)


def test_too_little_text(run: Callable[..., Prepared], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train documents hold \d+ tokens, fewer than one row of 4000 \+ 1"):
        run(sequence_length=4000)
    with pytest.raises(DataError, match=r"the 0 heldout documents hold 0 tokens.*--heldout-fraction"):
        run(heldout_fraction=1e-9)
    with pytest.raises(DataError, match="holds no document"):
        run(inputs_of([]))
    assert not (tmp_path / "out" / "d").exists()
    assert "heldout" not in run(heldout_fraction=0.0).manifest.sets


@pytest.mark.parametrize("name", ["", "../up", "/abs", "a/../b", ".hidden", "a b", "a/"])
def test_names_stay_in_the_folder(run: Callable[..., Prepared], name: str) -> None:
    with pytest.raises(DataError, match="--name"):
        run(name=name)


def test_a_name_may_have_folders(run: Callable[..., Prepared], tmp_path: Path) -> None:
    assert run(name="slim/arxiv").folder == tmp_path / "out" / "slim" / "arxiv"


def test_contradicting_settings(run: Callable[..., Prepared]) -> None:
    for change, message in (
        ({"vocab_size": 300}, "only one"),
        ({"sequence_length": 0}, "at least 1"),
        ({"heldout_fraction": 1.0}, "below 1"),
        ({"rows_per_shard": 0}, "at least 1"),
    ):
        with pytest.raises(DataError, match=message):
            run(**change)


def test_two_at_once(run: Callable[..., Prepared], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with fsops.held_lock(tmp_path / "out" / ".d.lock", b""), pytest.raises(DataError, match="is being prepared by another process"):
        run()
    assert not run().up_to_date


def test_files_that_change_while_they_are_read(run: Callable[..., Prepared], texts: list[str]) -> None:
    readings = [texts, [*texts[:-1], "another text altogether"]]

    def read() -> Any:
        return iter([Document(str(index), "s", text) for index, text in enumerate(readings.pop(0))])

    with pytest.raises(DataError, match="changed while they were read"):
        run(Inputs("test", "none", read))


def test_progress_counts_up_to_its_totals(run: Callable[..., Prepared]) -> None:
    seen: dict[str, list[tuple[int, int | None]]] = {}
    run(
        progress=lambda stage, done, total, unit: seen.setdefault(f"{stage} {unit}", []).append((done, total)),
        tokenizer=None,
        vocab_size=300,
    )
    assert list(seen) == ["read documents", "train tokenizer bytes", "encode bytes", "write train tokens", "write heldout tokens"]
    for values in seen.values():
        assert [done for done, _ in values] == sorted(done for done, _ in values)
        assert all(total is None or done <= total for done, total in values)


def operations(run: Callable[..., Prepared], folder: Path) -> tuple[int, dict[str, str]]:
    """How many file operations a run makes once the folder of datasets is there, and what it makes."""
    run(name="other")
    with injected(Faults()) as faults:
        run()
    made = tree(folder)
    fsops.remove_tree(folder)
    fsops.remove_tree(folder.parent / "other")
    return len(faults.trace), made


def test_a_full_disk_at_any_moment_leaves_no_dataset(run: Callable[..., Prepared], tmp_path: Path) -> None:
    folder = tmp_path / "out" / "d"
    count, expected = operations(run, folder)
    for operation in range(0, count - 4, 4):
        with (
            injected(Faults("disk stays full", operation)),
            pytest.raises(DataError, match=r"No space left on device.*free space") as caught,
        ):
            run()
        assert "\n" not in str(caught.value)
        assert [path.name for path in folder.parent.iterdir() if path.suffix != ".lock"] == []
    assert tree(run().folder) == expected


def test_killed_at_any_moment_it_starts_again_to_the_same_bytes(run: Callable[..., Prepared], tmp_path: Path) -> None:
    folder = tmp_path / "out" / "d"
    count, expected = operations(run, folder)
    outcomes = set()
    for operation in [*range(0, count - 6, 6), *range(count - 3, count)]:
        with injected(Faults(DEATHS[operation % 3], operation)), pytest.raises(Death):
            run()
        outcomes.add(folder.exists())
        was_whole = folder.exists()
        assert run().up_to_date == was_whole
        assert tree(folder) == expected
        assert [path.name for path in folder.parent.iterdir() if path.suffix != ".lock"] == ["d"]
        fsops.remove_tree(folder)
    assert outcomes == {False, True}


def test_a_slice_of_the_embedded_corpus(tmp_path: Path) -> None:
    """The demo's way, from sources to a trained tokenizer and shards, on a few modules."""
    import json

    library = tmp_path / "library"
    library.mkdir()
    for path in sorted(Path(json.__file__).parent.glob("*.py")):
        (library / path.name).write_bytes(path.read_bytes())
    prepared = prepare(embedded_corpus(library), tmp_path / "out", name="python", vocab_size=600, sequence_length=64, heldout_fraction=0.3)
    assert prepared.manifest.vocab_size == 632
    assert prepared.manifest.corpus.licence == "PSF-2.0"
    texts = documents_of(prepared.folder, "train") | documents_of(prepared.folder, "heldout")
    assert any("JSON" in text for text in texts.values())


@pytest.mark.prove
def test_the_whole_embedded_corpus(tmp_path: Path) -> None:
    first, second = (prepare(embedded_corpus(), tmp_path / output, name="python", sequence_length=256) for output in "ab")
    assert tree(first.folder) == tree(second.folder)
    assert first.manifest.vocab_size == 8224
    assert first.manifest.train.tokens > 2_000_000
