"""prepare(): the whole way from text to a dataset that trains; the same bytes whoever does it and however it is
interrupted.
"""

from __future__ import annotations

import hashlib
import json
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fault_injection import DEATHS, Death, Faults, injected
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from weftrain.core.data import open_training
from weftrain.core.errors import DataError
from weftrain.core.formats import fsops
from weftrain.core.formats.dataset import TOKENIZER, open_inputs, open_sources, read_dataset_manifest, source_name
from weftrain.core.formats.dataset_manifest import FimSettings
from weftrain.core.formats.shard_set import ShardSet
from weftrain.core.order.data_section import DataConfig
from weftrain.core.order.source_sets import open_heldout
from weftrain.data_prep.fim import exact as fim
from weftrain.data_prep.pipeline import Prepared, prepare
from weftrain.data_prep.readers.corpus import embedded_inputs
from weftrain.data_prep.readers.listing import list_inputs
from weftrain.data_prep.readers.read_options import ReadOptions
from weftrain.data_prep.stages import plan, survey
from weftrain.data_prep.stages.executors import LocalExecutor, TaskExecutor
from weftrain.data_prep.stages.settings import Inputs, Settings
from weftrain.data_prep.stages.survey import arrangement
from weftrain.data_prep.tokens import engines, tokenization
from weftrain.data_prep.tokens.tokenization import TextEncoder, load_encoder

Run = Callable[..., Prepared]


CONTEXT = FimSettings(rate=0.5, spm_share=0.5, mode="context")


def write_lines(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"text": text, "kind": "even" if index % 2 == 0 else "odd"} for index, text in enumerate(texts)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if not path.exists() or path.read_text() != lines:  # its time is part of what is listed
        path.write_text(lines)
    return path


def inputs_of(*paths: Path, options: ReadOptions | None = None, **listing: Any) -> Inputs:
    files = list_inputs([str(path) for path in paths], source=None, **listing)
    return Inputs(tuple(files), "test text", "none", options or ReadOptions(source_key="kind"))


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few kilobytes are several parts and buckets here."""
    monkeypatch.setattr(plan, "_MEBI", 300)


@pytest.fixture
def run(tmp_path: Path, encoder: TextEncoder, texts: list[str]) -> Run:
    """prepare() of the test texts with the test tokenizer in small shards."""
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_bytes(encoder.data)

    def call(inputs: Inputs | list[str] | None = None, output: str = "out", **changes: Any) -> Prepared:
        if not isinstance(inputs, Inputs):
            inputs = inputs_of(write_lines(tmp_path / "texts.jsonl", texts if inputs is None else inputs))
        settings: dict[str, Any] = {
            "name": "d",
            "tokenizer": tokenizer,
            "sequence_length": 16,
            "heldout_fraction": 0.2,
            "rows_per_shard": 20,
        }
        prepared = prepare(inputs, tmp_path / output, **settings | changes)
        assert prepared is not None
        return prepared

    return call


def tree(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def pieces_of(folder: Path, set_name: str) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
    """Each document of each shard: tokens (a token that the shard before holds too taken off), and what the tables say
    of it.
    """
    manifest = read_dataset_manifest(folder)
    sources = open_sources(folder, manifest)
    shared = manifest.row_stride == manifest.sequence_length
    first = 0
    sections = {int(end) for end in np.cumsum(manifest.sets[set_name].epochs)[:-1]}  # type: ignore[index]
    for reader in ShardSet(folder, manifest, set_name).readers():  # type: ignore[arg-type]
        table = reader.documents()
        for index, (start, end) in enumerate(zip(np.append(0, table.end[:-1]), table.end, strict=True)):
            tokens = reader.tokens(int(start), int(end))
            if shared and start == 0 and first > 0 and first not in sections:
                tokens = tokens[1:]
            about = {
                "id": table.id[index].tobytes(),
                "source": source_name(sources, int(table.source[index])),
                "file": int(table.file[index]),
                "record": int(table.record[index]),
                "section": sum(first >= end for end in sections),
                "fim": None if table.fim is None else (int(table.fim.mode[index]), *map(int, table.fim.split[index])),
            }
            yield tokens, about
        first += reader.num_rows


def joined(folder: Path, set_name: str) -> dict[tuple[int, bytes], tuple[np.ndarray, dict[str, Any]]]:
    """(epoch, document id) -> its tokens, put together from the shards, and what the tables say."""
    pieces: dict[tuple[int, bytes], list[np.ndarray]] = {}
    about: dict[tuple[int, bytes], dict[str, Any]] = {}
    for tokens, found in pieces_of(folder, set_name):
        key = (found["section"], found["id"])
        pieces.setdefault(key, []).append(tokens)
        about[key] = found
    return {key: (np.concatenate(parts), about[key]) for key, parts in pieces.items()}


def documents_of(folder: Path, set_name: str) -> dict[bytes, str]:
    """Document id -> its text, eos taken off."""
    encoder, manifest = load_encoder(folder / TOKENIZER), read_dataset_manifest(folder)
    return {
        key[1]: encoder.decode(ids[:-1] if ids[-1] == manifest.eos_id else ids)
        for key, (ids, _) in joined(folder, set_name).items()
        if len(ids)
    }


def test_every_text_is_in_one_set_and_comes_back_whole(run: Run, texts: list[str]) -> None:
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


def test_tokens_are_accounted_for(run: Run, texts: list[str], encoder: TextEncoder) -> None:
    prepared = run()
    manifest = prepared.manifest
    total = sum(len(ids) + 1 for ids in encoder.encode(texts, texts))
    counted = sum(entry.tokens + 1 + entry.dropped_tokens for entry in manifest.sets.values())
    assert counted == total
    assert [shard.n_examples for shard in manifest.train.shards[:-1]] == [20] * (len(manifest.train.shards) - 1)
    sources = list(open_sources(prepared.folder, manifest))
    assert sum(source.documents for source in sources) == manifest.documents.train
    assert sum(source.tokens for source in sources) == manifest.train.tokens + 1 + manifest.train.dropped_tokens


def test_each_document_names_the_line_that_it_came_from(run: Run, texts: list[str], tmp_path: Path) -> None:
    """Across parts: a share in the middle of a file does not know its line numbers."""
    paths = [
        write_lines(tmp_path / "in" / name, part) for name, part in (("b.jsonl", texts[50:]), ("a.jsonl", texts[:50]))
    ]
    prepared = run(inputs_of(tmp_path / "in"))
    assert (
        len(list(plan.make_plan(tmp_path, inputs_of(*paths), Settings("x", None, None, 16, 0.2, 20, 0), "auto").parts))
        > 4
    )
    names = [entry.name for entry in open_inputs(prepared.folder, prepared.manifest)]
    assert names == ["in/a.jsonl", "in/b.jsonl"]
    lines = {name: (tmp_path / name).read_text().splitlines() for name in names}
    seen = 0
    for set_name in prepared.manifest.sets:
        for _, about in pieces_of(prepared.folder, set_name):
            row = json.loads(lines[names[about["file"]]][about["record"]])
            assert hashlib.sha256(row["text"].encode()).digest()[:16] == about["id"]
            assert row["kind"] == about["source"]
            seen += 1
    assert seen >= len(texts) - 5


def test_again_gives_the_same_bytes_and_another_seed_another_order(run: Run) -> None:
    first, second, third = run(output="a"), run(output="b"), run(output="c", seed=1)
    assert tree(first.folder) == tree(second.folder)
    assert first.manifest.train.id != third.manifest.train.id
    assert not documents_of(first.folder, "heldout").keys() & documents_of(third.folder, "train").keys()
    for shard in first.manifest.train.shards:
        assert tree(first.folder)[shard.file] == shard.sha256


def test_any_number_of_processes_gives_the_same_bytes(run: Run) -> None:
    alone = run(output="a", packing="best_fit")
    several = run(output="b", packing="best_fit", executor=LocalExecutor(3))
    assert tree(alone.folder) == tree(several.folder)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"packing": "best_fit", "fim": FimSettings(rate=0.5, spm_share=0.5), "epochs": 2},
        {"fim": CONTEXT},
        {"order": "as_read"},
    ],
)
def test_small_pieces_and_their_merging_give_the_same_bytes(
    run: Run, texts: list[str], monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """A part that is written in several pieces, and pieces that are merged before buckets are gathered, as very much
    data is.
    """
    lines = [*texts, *texts[20:60], *[texts[3]] * 30]
    expected = run(lines, output="a", **settings)
    monkeypatch.setattr(plan, "_PIECE_DOCUMENTS", 2)
    monkeypatch.setattr(plan, "_FILE_OPENS", 20)
    arranged = []
    monkeypatch.setattr(
        survey, "arrangement", lambda *given, **named: arranged.append(arrangement(*given, **named)) or arranged[-1]
    )
    made = run(lines, output="b", **settings)
    trees = [tree(prepared.folder) for prepared in (made, expected)]
    for files in trees:
        del files["manifest.json"]  # how many documents were encoded twice depends on the pieces
    assert trees[0] == trees[1]
    for name in ("train", "heldout", "documents", "sources_sha256"):
        assert getattr(made.manifest, name) == getattr(expected.manifest, name)
    assert arranged[0]["runs"] == 0 if "order" in settings else arranged[0]["runs"] > 5


def test_members_of_an_array_give_the_same_bytes(
    run: Run, tmp_path: Path, encoder: TextEncoder, texts: list[str]
) -> None:
    """Three members at once, as threads here: each does its share, waits for the others, and one finishes."""
    alone = run(output="a")
    inputs, results, errors = inputs_of(tmp_path / "texts.jsonl"), [], []
    settings: dict[str, Any] = {"name": "d", "tokenizer": tmp_path / "tokenizer.json", "sequence_length": 16}
    settings |= {"heldout_fraction": 0.2, "rows_per_shard": 20}
    (tmp_path / "b").mkdir()

    def member(index: int) -> None:
        try:
            results.append(prepare(inputs, tmp_path / "b", **settings, executor=TaskExecutor(index, 3, patience_s=30)))
        except BaseException:
            errors.append(traceback.format_exc())

    # The leader makes the plan; the others may come at any time after it, and a member that comes when all is done
    # finds the dataset.
    threads = [threading.Thread(target=member, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, chr(10).join(errors)
    assert tree(tmp_path / "b" / "d") == tree(alone.folder)
    assert sum(result is not None for result in results) >= 1


def test_stage_by_stage_gives_the_same_bytes(run: Run, tmp_path: Path) -> None:
    alone = run(output="a", tokenizer=None, vocab_size=300)
    inputs = inputs_of(tmp_path / "texts.jsonl")
    settings: dict[str, Any] = {
        "name": "d",
        "vocab_size": 300,
        "sequence_length": 16,
        "heldout_fraction": 0.2,
        "rows_per_shard": 20,
    }
    for stage in ("sample", "tokenize", "merge", "order", "write"):
        for index in (0, 1):
            executor = TaskExecutor(index, 2, patience_s=0)
            made = None
            try:
                made = prepare(inputs, tmp_path / "b", **settings, executor=executor, only_stage=stage)
            except DataError as error:
                assert "start these again" in str(error)  # noqa: PT017 - member 0 has no patience for member 1
            assert made is None
    finished = prepare(inputs, tmp_path / "b", **settings, executor=TaskExecutor(0, 2), only_stage="finish")
    assert finished is not None
    assert tree(finished.folder) == tree(alone.folder)


def test_a_member_says_who_is_missing(run: Run, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"stage tokenize: waited 0 s for \d+ tasks of members \[1\]: start these again"
    ):
        run(executor=TaskExecutor(0, 2, patience_s=0))
    with pytest.raises(DataError, match="--index 2 --of 2"):
        TaskExecutor(2, 2)


def test_run_again_it_is_up_to_date_and_other_settings_are_refused(run: Run, texts: list[str]) -> None:
    folder = run().folder
    before = tree(folder)
    assert run().up_to_date
    for change, message in (
        ({"seed": 1}, "prepared with seed 0, not 1"),
        ({"sequence_length": 8}, "prepared with sequence_length 16, not 8"),
        ({"heldout_fraction": 0.1}, "prepared with heldout_fraction"),
        ({"tokenizer": None, "vocab_size": 300}, "prepared with tokenizer"),
        ({"fim": FimSettings(rate=0.5, spm_share=0.5)}, "prepared with fim_rate None, not 0.5"),
        ({"packing": "best_fit"}, "prepared with packing 'concatenate'"),
        ({"inputs": texts[:-1]}, "was prepared from other text"),
        ({"inputs": [texts[0].upper(), *texts[1:]]}, "was prepared from other text"),
    ):
        with pytest.raises(DataError, match=f"{message}.*; give another --name, or remove it"):
            run(**change)
    assert tree(folder) == before


def test_a_damaged_dataset_is_not_up_to_date(run: Run) -> None:
    folder = run().folder
    (folder / "heldout" / "00000.h5").unlink()
    with pytest.raises(DataError, match=r"heldout/00000\.h5: the shard is missing"):
        run()


def test_something_else_in_the_way(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out" / "d").mkdir(parents=True)
    with pytest.raises(DataError, match="exists and is no dataset"):
        run()
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file"):
        run(output="file")


def test_duplicates_are_kept_once_and_named_by_their_first_place(run: Run, texts: list[str]) -> None:
    prepared = run([*texts, *texts[:30]])
    assert prepared.manifest.documents.read == len(texts) + 30
    assert prepared.manifest.documents.duplicates == 30
    records = {about["record"] for _, about in pieces_of(prepared.folder, "train")}
    assert max(records) < len(texts)
    assert prepared.manifest.train.id == run(output="once").manifest.train.id


def test_as_read_keeps_the_order_and_the_duplicates(run: Run, texts: list[str]) -> None:
    prepared = run([*texts, *texts[:30]], order="as_read", heldout_fraction=0.0)
    assert prepared.manifest.documents.duplicates == 0
    records = [about["record"] for _, about in pieces_of(prepared.folder, "train")]
    assert records == sorted(records)
    assert records[-1] >= len(texts) + 28


def test_held_out_by_content_alone(run: Run, texts: list[str]) -> None:
    """Neither the order nor the other documents change a document's side."""
    one, other = run().folder, run(texts[::-1][:90], output="fewer").folder
    assert documents_of(one, "heldout").keys() & documents_of(other, "heldout").keys()
    assert not documents_of(one, "heldout").keys() & documents_of(other, "train").keys()
    assert not documents_of(one, "train").keys() & documents_of(other, "heldout").keys()


def test_text_full_of_special_tokens_makes_no_document_ends(run: Run, texts: list[str]) -> None:
    folder = run([f"{text} </s><s><|fim_prefix|></s>" for text in texts]).folder
    manifest = read_dataset_manifest(folder)
    ends = sum(int((tokens == manifest.eos_id).sum()) for tokens, _ in pieces_of(folder, "train"))
    assert ends <= manifest.documents.train
    assert any("</s>" in text for text in documents_of(folder, "train").values())


def test_best_fit_rows_hold_every_token_and_mask_the_padding(run: Run, texts: list[str]) -> None:
    prepared = run(packing="best_fit", sequence_length=40)
    manifest = prepared.manifest
    assert manifest.row_stride == 41
    assert manifest.packing == "best_fit"
    assert manifest.train.dropped_tokens == 0
    train, padding = joined(prepared.folder, "train"), bytes(16)
    assert (
        sum(len(tokens) for (_, identity), (tokens, _) in train.items() if identity == padding)
        == manifest.train.padding_tokens
        > 0
    )
    everything = documents_of(prepared.folder, "train") | documents_of(prepared.folder, "heldout")
    by_id = {hashlib.sha256(text.encode()).digest()[:16]: text for text in texts}
    assert everything.keys() - {padding} == by_id.keys()
    # pieces of a long document lie in different rows
    long = {identity for identity, text in by_id.items() if len(text) > 100}
    assert all(everything[identity] == text for identity, text in by_id.items() if identity not in long)
    for reader in ShardSet(prepared.folder, manifest, "train").readers():
        table, mask = reader.documents(), reader.plane("loss_mask", np.arange(reader.num_rows))
        assert mask is not None
        is_padding = np.repeat(table.id.any(axis=1) == 0, np.diff(np.append(0, table.end))).reshape(-1, 41)
        assert np.array_equal(mask, ~is_padding[:, 1:])


def test_fim_is_recorded_and_every_document_comes_back(run: Run, texts: list[str], encoder: TextEncoder) -> None:
    prepared = run(fim=FimSettings(rate=0.9, spm_share=0.5), epochs=2)
    manifest = prepared.manifest
    assert len(manifest.train.epochs) == 2
    assert sum(manifest.train.epochs) == manifest.train.n_examples
    ids, by_id = fim.fim_ids(encoder), {hashlib.sha256(text.encode()).digest()[:16]: text for text in texts}
    modes: dict[int, dict[bytes, tuple[int, ...]]] = {0: {}, 1: {}}
    whole = 0
    for (epoch, identity), (tokens, about) in joined(prepared.folder, "train").items():
        modes[epoch][identity] = about["fim"]
        if tokens[-1] == manifest.eos_id:  # not the tail, which is cut
            assert encoder.decode(fim.restore(tokens[:-1], *about["fim"], ids)) == by_id[identity]
            whole += 1
    assert whole >= 2 * manifest.documents.train - 2
    transformed = [mode for mode, *_ in modes[0].values()]
    assert 0.7 < np.mean([mode != fim.PLAIN for mode in transformed]) <= 1
    assert {fim.PSM, fim.SPM} <= set(transformed)
    assert modes[0] != modes[1]
    assert tree(prepared.folder) == tree(
        run(output="again", fim=FimSettings(rate=0.9, spm_share=0.5), epochs=2, executor=LocalExecutor(2)).folder
    )


def test_released_fim_is_the_same_on_any_number_of_processes(run: Run) -> None:
    settings: dict[str, Any] = {"fim": FimSettings(rate=0.9, spm_share=0.5, mode="released"), "sequence_length": 48}
    one, two = run(output="a", **settings), run(output="b", **settings, executor=LocalExecutor(2))
    assert tree(one.folder) == tree(two.folder)
    assert one.manifest.row_stride == 49
    assert one.manifest.fim is not None
    assert one.manifest.fim.mode == "released"


def test_chunks_are_equal_whole_steps_and_shards_end_with_them(run: Run) -> None:
    manifest = run(chunks=5, global_batch_size=4, rows_per_shard=7).manifest
    assert manifest.chunks is not None
    assert manifest.chunks.count == 5
    assert manifest.chunks.rows % 4 == 0
    assert manifest.train.n_examples == 5 * manifest.chunks.rows
    ends = np.cumsum([shard.n_examples for shard in manifest.train.shards])
    assert {manifest.chunks.rows * chunk for chunk in range(1, 6)} <= set(ends.tolist())
    whole = run(output="whole").manifest
    assert manifest.train.tokens + manifest.train.dropped_tokens == whole.train.tokens + whole.train.dropped_tokens
    with pytest.raises(DataError, match=r"rows are too few for 5 chunks of 400"):
        run(output="none", chunks=5, global_batch_size=400)


def test_a_held_out_document_is_in_no_chunk(run: Run) -> None:
    folder = run(chunks=5).folder
    assert not documents_of(folder, "heldout").keys() & documents_of(folder, "train").keys()


def test_rows_that_are_packed_already_stay_as_they_are(run: Run, tmp_path: Path) -> None:
    """Amber's released form: 17 ids a line here, no end token added, none shared."""
    rows = np.random.default_rng(0).integers(0, 320, (50, 17))
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"token_ids": row.tolist(), "source": "c4"}) + "\n" for row in rows))
    inputs = inputs_of(path, format="amber", options=ReadOptions(sequence_length=16))
    prepared = run(inputs, heldout_fraction=0.0, order="as_read")
    manifest = prepared.manifest
    assert (manifest.row_stride, manifest.packing, manifest.train.dropped_tokens) == (17, "rows", 0)
    ids, mask = ShardSet(prepared.folder, manifest, "train").rows(np.arange(50))
    assert np.array_equal(ids, rows)
    assert mask is None
    with pytest.raises(DataError, match="is tokenised already: name its tokenizer"):
        run(inputs, output="x", tokenizer=None)
    with pytest.raises(DataError, match="packed already take no"):
        run(inputs, output="x", packing="best_fit")
    with pytest.raises(DataError, match="go with nothing else"):
        run(Inputs((*inputs.files, *inputs_of(write_lines(tmp_path / "t.jsonl", ["a"])).files), "mixed"), output="x")


def test_ids_beyond_the_vocabulary_are_named_by_line(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [[1] * 17, [999] * 17]
    path.write_text("".join(json.dumps({"token_ids": row, "source": "c4"}) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"rows\.jsonl:2: token ids 999\.\.999 do not fit"):
        run(inputs_of(path, format="amber", options=ReadOptions(sequence_length=16)))


def test_a_document_that_fails_stops_the_run_unless_the_budget_allows_it(
    run: Run, texts: list[str], tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "texts.jsonl", texts)
    lines = path.read_text().splitlines()
    lines[70], lines[90] = "{broken", '{"text": 3}'
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(
        DataError, match=r"texts\.jsonl:71: .*; .*texts\.jsonl:91: .*; 2 documents failed, --max-failures allows 1"
    ) as caught:
        run(inputs_of(path), max_failures=1)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "d").exists()
    prepared = run(inputs_of(path), max_failures=2)
    assert prepared.manifest.documents.failed == 2
    listed = [json.loads(line) for line in (prepared.folder / "failures.jsonl").read_text().splitlines()]
    assert [entry["place"] for entry in listed] == ["texts.jsonl:71", "texts.jsonl:91"]


def test_a_document_that_cannot_be_encoded_counts_as_a_failure_and_unknown_text_is_counted(
    run: Run, tmp_path: Path
) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2, "<unk>": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken("</s>", special=True), AddedToken("<unk>", special=True)])
    path = tmp_path / "words.json"
    path.write_text(tokenizer.to_str())
    texts = ["a b " * (number + 9) for number in range(9)]
    texts[4], texts[6] = "b \u65e5 a", "a </s> b"
    with pytest.raises(
        DataError, match=r"texts\.jsonl:7: the tokenizer turns ordinary text into control id 2 at token 1"
    ):
        run(texts, tokenizer=path, heldout_fraction=0)
    prepared = run(texts, tokenizer=path, heldout_fraction=0, max_failures=1)
    assert (prepared.manifest.documents.failed, prepared.manifest.documents.train) == (1, 8)
    assert prepared.manifest.tokenization.unknown_tokens == 1


@pytest.fixture
def engines_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    encode = engines.Gigatoken.encode

    def wrong(self: Any, texts: Any) -> Any:
        return [
            ids + 1 if text.startswith(("50", "90")) else ids
            for ids, text in zip(encode(self, texts), texts, strict=True)
        ]

    monkeypatch.setattr(engines.Gigatoken, "encode", wrong)
    monkeypatch.setattr(tokenization, "_CHECKED", 256)
    tokenization.encoder_for.cache_clear()


@pytest.mark.usefixtures("engines_that_differ")
@pytest.mark.parametrize("members", [1, 3])
def test_where_the_engines_differ_the_reference_encodes_everything(run: Run, tmp_path: Path, members: int) -> None:
    pytest.importorskip("gigatoken")
    by_reference = run(output="a", engine="tokenizers")
    with pytest.raises(
        DataError,
        match=r"texts\.jsonl:\d+: gigatoken .* and the reference differ from token 0; use --engine tokenizers",
    ):
        run(output="b", engine="gigatoken")
    results: list[Prepared | None] = []

    def member(index: int) -> None:
        results.append(run_member(run, index, members))

    threads = [threading.Thread(target=member, args=(index,)) for index in range(members)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (prepared,) = [result for result in results if result is not None and not result.up_to_date]
    assert "and the reference differ from token 0" in (prepared.fallback or "")
    told = prepared.manifest.tokenization
    assert (told.engine, told.reason, told.checked_documents) == ("tokenizers", tokenization.DIFFERED, 0)
    ours, theirs = tree(prepared.folder), tree(by_reference.folder)
    assert [name for name in theirs if ours.get(name) != theirs[name]] == ["manifest.json"]  # which says why
    assert run(output="auto").up_to_date


def run_member(run: Run, index: int, members: int) -> Prepared | None:
    """prepare() as one member of an array; None where another one finished it."""
    try:
        return run(output="auto", executor=TaskExecutor(index, members, patience_s=60) if members > 1 else None)
    except AssertionError:
        return None


def test_what_it_makes_can_be_trained_on(run: Run, tmp_path: Path) -> None:
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


def test_too_little_text(run: Run, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train documents hold \d+ tokens, fewer than one row of 4000 \+ 1"):
        run(sequence_length=4000)
    with pytest.raises(DataError, match=r"the 0 heldout documents hold 0 tokens.*--heldout-fraction"):
        run(heldout_fraction=1e-9)
    with pytest.raises(DataError, match="nothing to read; not read: empty file"):
        run([])
    assert not (tmp_path / "out" / "d").exists()
    assert "heldout" not in run(heldout_fraction=0.0).manifest.sets
    assert not (tmp_path / "out" / "d" / "heldout").exists()


@pytest.mark.parametrize("name", ["", "../up", "/abs", "a/../b", ".hidden", "a b", "a/"])
def test_names_stay_in_the_folder(run: Run, name: str) -> None:
    with pytest.raises(DataError, match="--name"):
        run(name=name)


def test_a_name_may_have_folders(run: Run, tmp_path: Path) -> None:
    assert run(name="slim/arxiv").folder == tmp_path / "out" / "slim" / "arxiv"


def test_contradicting_settings(run: Run) -> None:
    for change, message in (
        ({"vocab_size": 300}, "only one"),
        ({"sequence_length": 0}, "at least 1"),
        ({"heldout_fraction": 1.0}, "below 1"),
        ({"rows_per_shard": 0}, "at least 1"),
        ({"chunks": 2, "epochs": 2}, "--chunks and --epochs"),
        ({"global_batch_size": 2}, "--global-batch-size"),
    ):
        with pytest.raises(DataError, match=message):
            run(**change)


def test_two_at_once(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with (
        fsops.held_lock(tmp_path / "out" / ".d.lock", b""),
        pytest.raises(DataError, match="is being prepared by another process"),
    ):
        run()
    assert not run().up_to_date


def test_files_that_change_after_they_were_listed(run: Run, texts: list[str], tmp_path: Path) -> None:
    inputs = inputs_of(write_lines(tmp_path / "texts.jsonl", texts))
    write_lines(tmp_path / "texts.jsonl", [*texts[:-1], "another text altogether"])
    with pytest.raises(DataError, match=r"texts\.jsonl: .*changed"):
        run(inputs)


def test_progress_counts_up_to_its_totals(run: Run) -> None:
    seen: dict[str, list[tuple[int, int | None]]] = {}
    run(
        progress=lambda stage, done, total, unit: seen.setdefault(stage, []).append((done, total)),
        tokenizer=None,
        vocab_size=300,
    )
    assert list(seen) == ["sample", "train tokenizer", "tokenize", "order", "write"]
    for values in seen.values():
        assert [done for done, _ in values] == sorted(done for done, _ in values)
        assert all(total is not None and done <= total for done, total in values)
        assert values[-1][0] == values[-1][1]


@pytest.fixture
def few_parts_of_many_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage has several tasks, and every part several pieces, which are merged."""
    monkeypatch.setattr(plan, "_MEBI", 1500)
    monkeypatch.setattr(plan, "_PIECE_DOCUMENTS", 16)
    monkeypatch.setattr(plan, "_FILE_OPENS", 8)


def operations(run: Run, folder: Path, kinds: tuple[str, ...]) -> tuple[int, dict[str, str]]:
    """How many file operations a run makes up to the last of these kinds, once the folder of datasets is there, and
    what it makes.
    """
    run(name="other")
    with injected(Faults()) as faults:
        run()
    renamed = {path.name for name, path in faults.trace if name == "rename"}
    assert {"00000-00001.table", "00002-00001.table", "00000.json"} <= renamed  # a part's second piece
    made = tree(folder)
    fsops.remove_tree(folder)
    fsops.remove_tree(folder.parent / "other")
    last = max(index for index, (name, _) in enumerate(faults.trace) if name in kinds)
    return last + 1, made


@pytest.mark.usefixtures("few_parts_of_many_pieces")
def test_a_full_disk_at_any_moment_leaves_no_dataset_and_the_next_run_goes_on(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "out" / "d"
    count, expected = operations(run, folder, ("create", "write", "make_dir", "sync_file"))
    for operation in range(0, count, 17):
        fsops.remove_tree(folder.parent / ".d.partial")  # else there is less and less left to do
        with (
            injected(Faults("disk stays full", operation)),
            pytest.raises(DataError, match=r"No space left on device.*(free space|make room)") as caught,
        ):
            run()
        assert "\n" not in str(caught.value)
        assert not folder.exists()
        assert {path.name for path in folder.parent.iterdir()} <= {".d.lock", ".d.partial", ".other.lock"}
    assert tree(run().folder) == expected


@pytest.mark.prove
@pytest.mark.usefixtures("few_parts_of_many_pieces")
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "out" / "d"
    count, expected = operations(run, folder, ("rename",))
    outcomes = set()
    for operation in [*range(0, count - 6, 19), *range(count - 2, count + 2)]:
        with injected(Faults(DEATHS[operation % 3], operation)), pytest.raises(Death):
            run()
        outcomes.add(folder.exists())
        was_whole = folder.exists()
        assert run().up_to_date == was_whole
        assert tree(folder) == expected
        assert [path.name for path in folder.parent.iterdir() if path.suffix != ".lock"] == ["d"]
        fsops.remove_tree(folder)
    assert outcomes == {False, True}


def test_what_is_done_is_not_done_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from weftrain.data_prep.stages import executors

    done: list[str] = []
    for name, stage in list(executors.STAGES.items()):

        def counted(plan: Any, index: int, stage: Any = stage) -> None:
            if len(done) == 9:
                raise KeyboardInterrupt
            stage.do(plan, index)
            done.append(f"{stage.name} {index}")

        monkeypatch.setitem(executors.STAGES, name, executors.Stage(name, stage.count, counted, stage.output))
    with pytest.raises(KeyboardInterrupt):
        run()
    first = list(done)
    done[:] = []
    with pytest.raises(KeyboardInterrupt):
        run()
    assert not set(first) & set(done)


def test_processes_that_are_kept_do_not_keep_a_plan_that_was_replaced(run: Run, tmp_path: Path) -> None:
    expected = tree(run(output="clean", seed=7).folder)
    executor = LocalExecutor(2)
    run(executor=executor)
    fsops.remove_tree(tmp_path / "out" / "d")
    assert tree(run(executor=executor, seed=7).folder) == expected
    executor.close()
    # What is left would close its pipe under Python's exit handler, which then prints "Exception ignored in ... Bad
    # file descriptor".
    assert [thread for thread in threading.enumerate() if type(thread).__name__ == "_ExecutorManagerThread"] == []


def test_other_settings_do_not_go_on_from_anothers_work(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = tree(run(output="clean", seed=7).folder)
    with injected(Faults(DEATHS[0], 40)), pytest.raises(Death):
        run()
    assert (tmp_path / "out" / ".d.partial").exists()
    assert tree(run(seed=7).folder) == expected


def test_a_slice_of_the_embedded_corpus(tmp_path: Path) -> None:
    """The demo's way, from sources to a trained tokenizer and shards, on a few modules."""
    library = tmp_path / "library"
    library.mkdir()
    for path in sorted(Path(json.__file__).parent.glob("*.py")):
        (library / path.name).write_bytes(path.read_bytes())
    files, description, licence = embedded_inputs(library)
    inputs = Inputs(tuple(files), description, licence)
    prepared = prepare(
        inputs, tmp_path / "out", name="python", vocab_size=600, sequence_length=64, heldout_fraction=0.75
    )
    assert prepared is not None
    assert prepared.manifest.vocab_size == 632
    assert prepared.manifest.corpus.licence == "PSF-2.0"
    train, heldout = (documents_of(prepared.folder, name) for name in ("train", "heldout"))
    assert any("JSON" in text for text in (train | heldout).values())


def test_documentation_stands_on_the_side_of_its_source(tmp_path: Path, texts: list[str]) -> None:
    """What is taken from a source must not be trained on while the source is held out."""
    library = tmp_path / "library"
    library.mkdir()
    for number, text in enumerate(texts[:80]):
        (library / f"m{number}.py").write_text(f'"""{(text + " ") * 12}"""\n')
    files, description, licence = embedded_inputs(library)
    inputs = Inputs(tuple(files), description, licence)
    prepared = prepare(
        inputs, tmp_path / "out", name="python", vocab_size=300, sequence_length=16, heldout_fraction=0.3
    )
    assert prepared is not None
    assert prepared.manifest.documents.heldout > 20
    sides: dict[int, dict[int, str]] = {}
    for set_name in ("train", "heldout"):
        for _, about in pieces_of(prepared.folder, set_name):
            sides.setdefault(about["file"], {})[about["record"]] = set_name
    assert sum(len(records) == 2 for records in sides.values()) > 40
    assert all(len(set(records.values())) == 1 for records in sides.values())


@pytest.mark.prove
@pytest.mark.parametrize("numbers", [(2,), pytest.param((1, 2), marks=pytest.mark.soak)])
def test_the_whole_embedded_corpus(numbers: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """numbers: of processes, which all make the same bytes; of less text the quick tests show it."""
    monkeypatch.setattr(plan, "_MEBI", 1 << 20)
    trees = []
    for workers in numbers:
        files, description, licence = embedded_inputs()
        inputs, output = Inputs(tuple(files), description, licence), tmp_path / str(workers)
        made = prepare(inputs, output, name="python", sequence_length=256, executor=LocalExecutor(workers))
        assert made is not None
        assert made.manifest.vocab_size == 8224
        assert made.manifest.train.tokens > 2_000_000
        trees.append(tree(made.folder))
    assert all(one == trees[0] for one in trees)
