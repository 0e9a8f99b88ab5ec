"""Memorization: a model that knows its rows scores 1, one that does not scores chance; files are exact, resumable, and
small in memory.
"""

from __future__ import annotations

import gc
import itertools
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from memorization_cases import PARAMETERS, ROOTS, K, L, chunk_of, random_generator, result_of
from places import SHARED

from weftrain.analysis.evaluation.generation import Generator
from weftrain.analysis.memorization import scores as memorization
from weftrain.analysis.memorization.scores import Chunk, LazyCheckpoint, MemorizationResult, Parameters
from weftrain.core.config import Recipe
from weftrain.core.data import TokenSource
from weftrain.core.errors import DataError
from weftrain.core.formats import fsops
from weftrain.core.model_config import ModelConfig
from weftrain.core.order.synthetic import synthetic_source
from weftrain.core.order.timeline import ChunkOrder, Timeline
from weftrain.core.run.run_source import whole_run

RELEASED = SHARED / "data" / "amber" / "memorization_sample.jsonl"


@pytest.fixture
def trained(config: ModelConfig, rows: np.ndarray) -> Generator:
    """A model that was shown 8 rows until it knew them."""
    model = random_generator(config, 0).model.train().requires_grad_(True)
    ids = torch.from_numpy(rows[:8])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        optimizer.zero_grad()
        model(ids[:, :-1], ids[:, 1:]).div(ids[:, 1:].numel()).backward()
        optimizer.step()
    return Generator(model.eval().requires_grad_(False))


def test_known_rows_score_one_and_others_about_chance(trained: Generator, rows: np.ndarray, tmp_path: Path) -> None:
    chunks = [
        chunk_of(rows[:8], "known", first_step=0, stop_step=5),
        chunk_of(rows[8:], "new", first_step=5, stop_step=9),
    ]
    known, new = memorization.measure(tmp_path, [LazyCheckpoint(5, ROOTS[0], lambda: trained)], chunks, PARAMETERS)
    assert (known.mean_score, known.extractible_percent, known.relation) == (1.0, 100.0, "just seen")
    assert known.matches == (L,) * 8
    assert new.mean_score < 0.2
    assert (new.extractible_percent, new.relation) == (0.0, "unseen")


def test_matches_are_counted_place_by_place(rows: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a decoder whose answers are known: all right, all shifted by one, every second one wrong."""
    given = rows[:3].copy()
    given[0, K:] = np.arange(len(given[0]) - K)
    given[1, K:] = np.arange(len(given[0]) - K)
    answers = [
        list(range(L)),
        list(range(1, L + 1)),
        [int(t) if i % 2 else int(t) + 1 for i, t in enumerate(given[2, K : K + L])],
    ]
    asked: list[Any] = []

    class Fake:
        def generate(self, prompts: Any, max_new_tokens: int, batch_size: int) -> Any:
            asked.append((prompts, max_new_tokens))
            return answers

    assert memorization.count_matches(Fake(), given, PARAMETERS) == [L, 0, L // 2]  # type: ignore[arg-type]
    assert asked == [(given[:, :K].tolist(), L)]


def test_percentages_are_of_a_hundred_and_scores_of_one() -> None:
    assert memorization.figures([L, L, 0, L // 2], L) == (0.625, 50.0)
    result = result_of(1, [L, L, 0, L // 2])
    assert result.scores.tolist() == [1, 1, 0, 0.5]
    assert result.extractible.tolist() == [True, True, False, False]


def test_rows_too_short_are_refused(config: ModelConfig, rows: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"rows have 13 tokens, k \+ l = 14"):
        memorization.count_matches(random_generator(config, 0), rows[:, :13], PARAMETERS)


def test_the_sample_is_a_function_of_seed_chunk_and_dataset() -> None:
    def chosen(samples: int = 50, seed: int = 0, name: str = "c", dataset_id: str = "d", rows: int = 1000) -> list[int]:
        chunk = Chunk(name, "training", dataset_id, rows, lambda numbers: numbers)
        return chunk.sample(Parameters(prompt_tokens=1, continuation_tokens=1, samples=samples, seed=seed)).tolist()  # type: ignore[no-any-return]

    one = chosen()
    assert one == chosen() == sorted(set(one))
    assert len(one) == 50
    assert len({tuple(found) for found in (one, chosen(seed=1), chosen(name="e"), chosen(dataset_id="e"))}) == 4
    assert set(one) < set(chosen(samples=60))
    assert chosen(samples=60, rows=7) == list(range(7))
    assert len(chosen(rows=10**15)) == 50


def test_chunks_are_the_spans_between_checkpoints_where_the_recipe_has_none() -> None:
    source = synthetic_source(97, 16, 40, 4, 0)
    chunks = memorization.training_chunks(whole_run(source, Timeline(4)), 10, [4, 6, 0])
    assert [(c.name, c.first_step, c.stop_step, c.num_rows, c.number) for c in chunks] == [
        ("steps_00000000_00000004", 0, 4, 16, 0),
        ("steps_00000004_00000006", 4, 6, 8, 16),
        ("steps_00000006_00000010", 6, 10, 16, 24),
    ]
    for chunk in chunks:
        numbers = np.arange(chunk.num_rows)
        assert (chunk.read(numbers) == source.ids[numbers + chunk.number]).all()


def test_chunks_of_the_recipe_stand_where_its_order_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three chunks of two steps, chunk 0 deferred to the end."""
    source = TokenSource(16, "d" * 64, (), None, Timeline(4, chunks=ChunkOrder(3, 8, (1, 2, 0))))  # type: ignore[arg-type]
    chunks = memorization.training_chunks(whole_run(source, source.timeline), 6, [3])
    found = [(c.name, c.first_step, c.stop_step) for c in chunks]
    assert found == [("chunk_00001", 0, 2), ("chunk_00002", 2, 4), ("chunk_00000", 4, 6)]
    assert [source.chunk_of(c.first_step or 0) for c in chunks] == [1, 2, 0]
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(
        TokenSource, "locate", lambda self, step, row: asked.append((step, row)) or type("L", (), {"epoch": step % 2})
    )
    assert chunks[1].repeated is not None
    assert chunks[1].repeated(np.array([0, 3, 4, 7])) == 2
    assert asked == [(2, 0), (2, 3), (3, 0), (3, 3)]


def test_what_a_checkpoint_has_seen() -> None:
    found = [memorization.relation(step, "training", 4, 8) for step in (0, 4, 5, 7, 8, 9)]
    assert found == ["unseen", "unseen", "partly seen", "partly seen", "just seen", "earlier"]
    assert memorization.relation(9, "heldout", None, None) == "unseen"
    assert memorization.relation(9, "sample", None, None) == "unknown"


def test_a_heldout_set_is_a_chunk_and_its_name_a_file_of_its_own() -> None:
    class Held:
        name, num_rows, dataset_id, sequence_length = "../a b", 3, "h", 4

        def rows(self, first: int, count: int) -> Any:
            return type("Batch", (), {"ids": np.full((count, 5), first)})

    chunk = memorization.heldout_chunk(Held())  # type: ignore[arg-type]
    assert "/" not in chunk.name
    assert chunk.read(np.array([0, 2]))[:, 0].tolist() == [0, 2]
    Held.name = "../a_b"
    assert memorization.heldout_chunk(Held()).name != chunk.name  # type: ignore[arg-type]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_stopped_measurement_goes_on_and_gives_the_same_files(
    measuring: Callable[..., list[MemorizationResult]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measuring(tmp_path / "whole")
    expected = files_of(tmp_path / "whole")
    assert len(expected) == 6
    assert "k6_l8_samples8_seed0/step_00000004/chunk_0.json" in expected

    write, count = fsops.write_bytes, itertools.count(1)

    def dies(path: Path, data: bytes) -> None:
        if next(count) % 3 == 0:
            raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(fsops, "write_bytes", dies)
    interruptions, results = 0, []
    while not results:
        try:
            results = measuring(tmp_path / "part")
        except KeyboardInterrupt:
            interruptions += 1
    assert interruptions == 2
    assert results == whole
    assert files_of(tmp_path / "part") == expected


def test_what_is_there_is_not_measured_again_unless_it_is_of_other_inputs(
    measuring: Callable[..., list[MemorizationResult]],
    rows: np.ndarray,
    tmp_path: Path,
    config: ModelConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = measuring(tmp_path)
    before = files_of(tmp_path)
    counted: list[int] = []
    count_matches = memorization.count_matches
    monkeypatch.setattr(memorization, "count_matches", lambda *given: counted.append(1) or count_matches(*given))
    lines: list[str] = []
    no_loading = [
        LazyCheckpoint(step, root, lambda: pytest.fail("loaded")) for step, root in ((4, ROOTS[0]), (8, ROOTS[1]))
    ]
    assert measuring(tmp_path, snapshots=no_loading, report=lines.append) == first
    assert (counted, lines) == ([], [])

    damaged = memorization.result_path(tmp_path, PARAMETERS, 4, "chunk_4")
    good = damaged.read_bytes()
    other_score = json.loads(good) | {"matches": [8, 8, 8, 8]}
    for bad in (good[:-20], b"[]", json.dumps(other_score).encode()):
        damaged.write_bytes(bad)
        assert measuring(tmp_path, report=lines.append) == first
        assert f"{damaged}: damaged, measured anew" in lines.pop()
    assert (len(counted), files_of(tmp_path)) == (3, before)

    changed = chunk_of(rows[:4] + 1 - 2 * (rows[:4] == 96), "chunk_0", first_step=0, stop_step=4)
    snapshot = LazyCheckpoint(4, ROOTS[1], lambda: random_generator(config, 4))
    measuring(tmp_path, chunks=[changed], snapshots=[snapshot], report=lines.append)
    assert lines[0].endswith("of another root and rows_sha256, measured anew")
    assert json.loads(memorization.result_path(tmp_path, PARAMETERS, 4, "chunk_0").read_bytes())["root"] == ROOTS[1]


def test_a_file_says_what_was_measured_on_what(
    measuring: Callable[..., list[MemorizationResult]], tmp_path: Path
) -> None:
    results = measuring(tmp_path)
    stored = json.loads(memorization.result_path(tmp_path, PARAMETERS, 8, "chunk_4").read_bytes())
    assert (stored["root"], stored["dataset_id"], stored["first_step"], stored["stop_step"]) == (
        ROOTS[1],
        "d" * 64,
        4,
        8,
    )
    assert stored["sample_numbers"] == [40, 41, 42, 43]
    assert stored["parameters"] == {"prompt_tokens": K, "continuation_tokens": L, "samples": 8, "seed": 0}
    assert set(stored["software"]) == {"weftrain", "torch"}
    assert MemorizationResult.model_validate(stored) == results[4]


def test_one_model_is_alive_at_a_time(config: ModelConfig, rows: np.ndarray, tmp_path: Path) -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    loads = 0

    def load() -> Generator:
        nonlocal loads
        gc.collect()
        assert not list(alive)
        loads += 1
        generator = random_generator(config, loads)
        alive.add(generator.model)
        return generator

    chunks = [chunk_of(rows[:4], "a"), chunk_of(rows[4:8], "b")]
    results = memorization.measure(
        tmp_path, [LazyCheckpoint(step, ROOTS[0], load) for step in range(5)], chunks, PARAMETERS
    )
    assert (len(results), loads) == (10, 5)
    gc.collect()
    assert not list(alive)


def line_of(**changes: Any) -> str:
    return json.dumps({"source": "s", "prompt": [1, 2], "continuation": [3, 4], **changes}) + "\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (line_of() + line_of(prompt=[1, -2]), r":2: key 'prompt\.1'"),
        (line_of() + line_of(prompt=[1, True]), r":2: key 'prompt\.1'"),
        (line_of() + line_of(prompt=[1, 2.0]), r":2: key 'prompt\.1'"),
        (line_of() + line_of(prompt=[1]), r":2: has 1 \+ 2 tokens, line 1 has 2 \+ 2"),
        (line_of(continuation=[]), r":1: key 'continuation'"),
        (line_of(scores=1), r":1: key 'scores'"),
        (line_of() + line_of() + "{\n", r":3: "),
        (line_of() + "\n" + line_of(), r":2: "),
        (line_of()[:-2] + ',"source":"t"}\n', r":1: key 'source' appears twice"),
        ("[1]\n", r":1: "),
        ("", "holds no rows"),
    ],
)
def test_a_released_sample_is_read_strictly(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "sample.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        memorization.read_released(path)


def test_a_long_line_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memorization, "MAX_LINE_BYTES", 80)
    path = tmp_path / "sample.jsonl"
    path.write_text(line_of() + line_of(source="s" * 80))
    with pytest.raises(DataError, match=r":2: is longer than 80 bytes"):
        memorization.read_released(path)


def test_a_released_sample_says_what_k_and_l_it_has(tmp_path: Path) -> None:
    path = tmp_path / "sample.jsonl"
    path.write_text(line_of())
    with pytest.raises(DataError, match="--k 2 --l 2"):
        memorization.sample_chunk(path, PARAMETERS)
    chunk = memorization.sample_chunk(path, Parameters(prompt_tokens=2, continuation_tokens=2))
    assert (chunk.name, chunk.kind, chunk.read(np.array([0])).tolist()) == ("sample_sample", "sample", [[1, 2, 3, 4]])


@pytest.fixture
def released() -> Path:
    if not RELEASED.is_file():
        pytest.skip(f"{RELEASED} is not there: the released sample is no part of the project")
    return RELEASED


def test_the_released_amber_sample_scores_chance_with_a_random_model(
    released: Path, tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    config = tiny_recipe(
        "amber", "model.vocab_size=32000", "model.max_position_embeddings=64", "model.num_layers=1"
    ).model
    rows = memorization.read_released(released)
    assert len(rows) == 1000
    assert {(len(row.prompt), len(row.continuation)) for row in rows} == {(32, 32)}
    parameters = Parameters(samples=40)
    chunk = memorization.sample_chunk(released, parameters)
    (result,) = memorization.measure(
        tmp_path, [LazyCheckpoint(1, ROOTS[0], lambda: random_generator(config, 0))], [chunk], parameters
    )
    assert len(result.matches) == 40
    assert result.mean_score < 0.02
    assert result.extractible_percent == 0
