"""Reading with what a dataset holds: document boundaries, prepared epochs, chunks, skipped rows, and where each sample
comes from.
"""

from __future__ import annotations

import hashlib
import pickle  # what a reader process is handed
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from weftrain.core.data import TokenSource, open_training
from weftrain.core.errors import DataError
from weftrain.core.formats.dataset import VERSION, write_dataset_manifest, write_inputs, write_sources
from weftrain.core.formats.dataset_manifest import DatasetManifest, InputEntry, SourceEntry, merkle_root, shard_file
from weftrain.core.formats.shard_format import Documents, num_tokens, write_shard
from weftrain.core.order import row_plan
from weftrain.core.order.data_section import DataConfig
from weftrain.core.order.source_sets import open_heldout

S, VOCAB = 8, 500


def write(
    folder: Path, rows: list[int], *, epochs: list[int] | None = None, chunks: dict[str, Any] | None = None
) -> None:
    """A set whose row r begins with token r, of documents of 5 tokens; its held-out set is the first shard again."""
    tokenizer = hashlib.sha256(b"{}").hexdigest()
    sets: dict[str, dict[str, Any]] = {}
    for name, counts in (("train", rows), ("heldout", rows[:1])):
        (folder / name).mkdir(parents=True)
        shards, first = [], 0
        for index, count in enumerate(counts):
            length = num_tokens(count, S, S)
            tokens = np.tile(np.arange(300, 300 + S), count + 1)[:length]
            tokens[::S][:count] = first + np.arange(count)
            ends = np.append(np.arange(5, length, 5), length)
            zero = np.zeros(len(ends), np.int32)
            ids = np.repeat(np.arange(len(ends), dtype=np.uint8)[:, None], 16, 1)
            info = write_shard(
                folder / shard_file(name, index),
                tokens,
                Documents(ends, ids, zero, 1, zero, first * S + np.append(0, ends[:-1])),
                sequence_length=S,
                row_stride=S,
                vocab_size=VOCAB,
                tokenizer_sha256=tokenizer,
            )
            shards.append(
                {
                    "file": shard_file(name, index),
                    "num_bytes": info.num_bytes,
                    "sha256": info.sha256,
                    "digest": info.digest,
                }
                | {"n_examples": count}
            )
            first += count
        sets[name] = {
            "id": merkle_root([shard["digest"] for shard in shards]),
            "n_examples": first,
            "tokens": first * S,
            "documents": 1,
        }
        sets[name] |= {"dropped_tokens": 0, "padding_tokens": 0, "shards": shards}
        sets[name]["epochs"] = epochs if name == "train" and epochs else [first]
    (folder / "tokenizer.json").write_bytes(b"{}")
    value = {
        "format": "weftrain-dataset",
        "version": VERSION,
        "name": folder.name,
        "tokenizer_sha256": tokenizer,
        "vocab_size": VOCAB,
        "eos_id": 0,
        "sequence_length": S,
        "row_stride": S,
        "packing": "concatenate",
        "fim": None,
        "corpus": {"sha256": "0" * 64, "description": "", "licence": "", "files": 1, "num_bytes": 1},
        "inputs_sha256": write_inputs(folder, [InputEntry(name="in", num_bytes=1, sha256=("0" * 64,))]).sha256,
        "tokenization": {
            "engine": "tokenizers",
            "engine_version": "0",
            "reference_documents": 1,
            "checked_documents": 0,
        },
        "preparation": {},
        "documents": {"read": 2, "failed": 0, "duplicates": 0, "train": 1, "heldout": 1},
        "num_sources": 1,
        "sources_sha256": write_sources(folder, [SourceEntry(name="text", documents=1, num_bytes=1, tokens=1)]).sha256,
        "chunks": chunks,
        **sets,
    }
    write_dataset_manifest(folder, DatasetManifest.model_validate(value))


def opened(root: Path, *, batch: int = 4, steps: int | None = None, **changes: Any) -> TokenSource:
    value = {
        "root": str(root),
        "sequence_length": S,
        "shuffle_seed": 1,
        "sources": [{"name": "a", "path": "a", "weight": 1.0}],
    }
    return open_training(DataConfig.model_validate(value | changes), batch, vocab_size=VOCAB, steps=steps)


def read(source: TokenSource, samples: int) -> list[int]:
    batch = source.global_batch_size
    return [int(source.rows(n // batch, n % batch, 1).ids[0, 0]) for n in range(samples)]


def test_each_prepared_epoch_is_read_in_its_turn(tmp_path: Path) -> None:
    write(tmp_path / "a", [12, 8], epochs=[9, 11])
    source = opened(tmp_path)
    rows = read(source, 60)
    assert sorted(rows[:9]) == list(range(9))
    assert sorted(rows[9:20]) == list(range(9, 20))
    assert sorted(rows[20:29]) == list(range(9))
    assert rows[20:29] != rows[:9]
    assert [source.locate(n // 4, n % 4).epoch for n in (0, 8, 9, 19, 20, 29)] == [0, 0, 1, 1, 2, 3]


def test_chunk_after_chunk_where_the_dataset_has_chunks(tmp_path: Path) -> None:
    write(tmp_path / "a", [8, 8], chunks={"count": 4, "rows": 4, "global_batch_size": 4})
    source = opened(tmp_path)
    for chunk in range(4):
        batch = source.rows(chunk, 0, 4).ids[:, 0]
        assert sorted(batch.tolist()) == list(range(chunk * 4, chunk * 4 + 4))
        assert source.locate(chunk, 3).chunk == chunk


def test_skipped_rows_never_come_and_names_stay_right(tmp_path: Path) -> None:
    write(tmp_path / "a", [12, 8])
    source = opened(
        tmp_path,
        skip=[{"source": "a", "rows": [3, 6], "reason": "poisoned"}, {"source": "a", "rows": [11, 13], "reason": "x"}],
    )
    rows = read(source, 30)
    assert sorted(rows[:15]) == sorted(rows[15:]) == [row for row in range(20) if row not in (3, 4, 5, 11, 12)]
    for n in range(15):
        where = source.locate(n // 4, n % 4)
        assert where.row_in_set == rows[n]
        assert (where.file, where.row_in_shard) == (
            ("train/00000.h5", rows[n]) if rows[n] < 12 else ("train/00001.h5", rows[n] - 12)
        )
        assert source.sample_names(n // 4, n % 4, 1) == [f"a/{where.file}:{where.row_in_shard}"]
    with pytest.raises(DataError, match=r"rows \[18, 21\] of source 'a' lie beyond its 20 rows"):
        opened(tmp_path, skip=[{"source": "a", "rows": [18, 21], "reason": "x"}])
    with pytest.raises(DataError, match="every row of source 'a' is skipped"):
        opened(tmp_path, skip=[{"source": "a", "rows": [0, 20], "reason": "x"}])


def test_a_deferred_chunk_is_read_last_and_located(tmp_path: Path) -> None:
    write(tmp_path / "a", [16])
    plain = read(opened(tmp_path, chunks=4, steps=4), 16)
    source = opened(tmp_path, chunks=4, steps=4, skip=[{"chunk": 1, "action": "defer", "reason": "spike"}])
    assert read(source, 16) == plain[:4] + plain[8:] + plain[4:8]
    assert [source.chunk_of(step) for step in range(4)] == [0, 2, 3, 1]
    assert source.locate(3, 0).run_chunk == 1


@pytest.mark.parametrize(
    "changes", [{}, {"chunks": 5, "skip": [{"chunk": 1, "action": "defer", "reason": "spike"}]}, {"order": "cerebras"}]
)
def test_rows_are_those_that_locate_names_across_plans_and_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """`rows` computes where a thousand samples lie at once; `locate` computes it for one."""
    monkeypatch.setattr(row_plan, "MIN_ROWS", 7)  # plans end within batches, and batches within plans
    monkeypatch.setattr(row_plan, "MAX_ROWS", 7)
    for name, rows in (("a", [12, 8]), ("b", [9]), ("c", [5, 1, 3])):
        write(tmp_path / name, rows)
    sources = [{"name": name, "path": name, "weight": weight} for name, weight in (("a", 0.5), ("b", 0.3), ("c", 0.2))]
    skip = [{"source": "a", "rows": [3, 6], "reason": "x"}] if changes.get("order") is None else []
    source = opened(
        tmp_path, batch=10, steps=10, **{"sources": sources} | changes | {"skip": [*skip, *changes.get("skip", [])]}
    )
    unread = pickle.dumps(source)
    for copy in (source, pickle.loads(unread)):
        for step in range(10):
            ids = np.concatenate([copy.rows(step, first, count).ids for first, count in ((0, 3), (3, 0), (3, 7))])
            assert ids[:, 0].tolist() == [copy.locate(step, row).row_in_set for row in range(10)]
    assert len(pickle.dumps(source)) < len(unread) + 2000  # no plan, reader or mapping goes with it


def test_the_model_zoos_order_reads_each_source_as_it_lies(tmp_path: Path) -> None:
    write(tmp_path / "a", [6])
    write(tmp_path / "b", [5])
    sources = [{"name": name, "path": name, "weight": 0.5} for name in "ab"]
    source = opened(tmp_path, order="cerebras", sources=sources)
    rows = read(source, 12)
    names = [source.locate(n // 4, n % 4).source for n in range(12)]
    assert [row for row, name in zip(rows, names, strict=True) if name == "a"] == list(range(6))
    assert [row for row, name in zip(rows, names, strict=True) if name == "b"] == [0, 1, 2, 3, 4, 0]
    assert source.counts(3) == {"a": 6, "b": 6}


def test_shares_in_epochs_follow_the_rows(tmp_path: Path) -> None:
    write(tmp_path / "a", [10])
    write(tmp_path / "b", [30])
    sources = [{"name": "a", "path": "a", "epochs": 2.0}, {"name": "b", "path": "b", "epochs": 1.0}]
    assert opened(tmp_path, batch=4096, sources=sources).counts(1) == {"a": 1638, "b": 2458}  # 20 : 30 of a block


def test_document_boundaries_come_with_the_rows(tmp_path: Path) -> None:
    write(tmp_path / "a", [12, 8])
    write(tmp_path / "b", [9])
    sources = [{"name": name, "path": name, "weight": 0.5} for name in "ab"]
    source = opened(tmp_path, document_attention=True, sources=sources)
    batch = source.rows(0, 0, 4)
    assert batch.document_start is not None
    for row in range(4):
        first = source.locate(0, row).row_in_shard * S
        # each has 5 tokens; the last of a shard may have more
        documents = [(first + position) // 5 for position in range(S)]
        assert batch.document_start[row].tolist() == [documents.index(document) for document in documents]
    assert opened(tmp_path, sources=sources).rows(0, 0, 4).document_start is None
    held = open_heldout(DataConfig.model_validate({**_config(tmp_path), "document_attention": True}), VOCAB, 3)
    assert held[0].rows(0, 2).document_start is not None


def _config(root: Path) -> dict[str, Any]:
    return {
        "root": str(root),
        "sequence_length": S,
        "shuffle_seed": 1,
        "sources": [{"name": "a", "path": "a", "weight": 1.0}],
    }


def test_a_model_sees_each_document_by_itself(tmp_path: Path) -> None:
    """The logits of a packed row with its boundaries are those of each document run alone, from its own position on."""
    from weftrain.core.initialization import draw
    from weftrain.core.model import Decoder, kernel_specs
    from weftrain.core.parameters import parameter_specs
    from weftrain.core.recipe_file import load_recipe
    from weftrain.kernels import select

    changes = (
        "model.num_layers=2",
        "model.hidden_size=32",
        "model.num_heads=2",
        "model.intermediate_size=48",
        "model.rotary_dim=16",
    )
    config = load_recipe("amber_demo", [*changes, f"model.vocab_size={VOCAB}"]).recipe.model
    model = Decoder(config, select(kernel_specs(config, "cpu", torch.float64, documents=True), ["reference"])).double()
    with torch.no_grad():
        for (_, parameter), spec in zip(model.named_parameters(), parameter_specs(config), strict=True):
            parameter.copy_(draw(spec, config, 3) * 20)
    write(tmp_path / "a", [12])
    batch = opened(tmp_path, document_attention=True).rows(0, 0, 4)
    assert batch.document_start is not None
    ids = torch.from_numpy(batch.ids[:, :-1])
    together = model.logits(ids, torch.from_numpy(batch.document_start))
    crossing = model.logits(ids)
    for row in range(4):
        starts = batch.document_start[row]
        for start in np.unique(starts).tolist():
            inside = np.flatnonzero(starts == start)
            padded = ids[row : row + 1].clone()
            padded[:, :start] = 7  # what lies before must not matter; rotary positions stay those of the row
            alone = model.logits(padded, torch.from_numpy(starts[None]))
            torch.testing.assert_close(together[row, inside], alone[0, inside])
    assert not torch.allclose(together, crossing)
