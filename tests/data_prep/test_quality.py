"""Filters, near-duplicates and decontamination through datatrove: what was planted goes, the rest stays, and says where
it came from.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from weftrain.core.errors import DataError
from weftrain.core.formats.dataset import open_sources
from weftrain.data_prep.pipeline import prepare
from weftrain.data_prep.quality import Decontaminate, LengthFilter, MinHash, Quality
from weftrain.data_prep.readers.listing import list_inputs
from weftrain.data_prep.readers.read_options import ReadOptions
from weftrain.data_prep.stages import plan
from weftrain.data_prep.stages.settings import Inputs
from weftrain.data_prep.tokens.tokenization import TextEncoder

pytest.importorskip("datatrove", reason="datatrove is not installed: pip install 'weftrain[quality]'")

QUIZ = " ".join(f"quiz{number}" for number in range(14))
SENTENCE = "the weft is carried across a warp by hand and the loom keeps every thread in its place"


def write(tmp_path: Path) -> list[str]:
    """20 documents, then: one that nearly is the fourth, one too short, one with the evaluation set's question in
    it.
    """
    rng, words = random.Random(0), SENTENCE.split()
    texts = [" ".join(f"{rng.choice(words)}{rng.randint(0, 9)}" for _ in range(200)) for _ in range(20)]
    texts += [f"{texts[3]} extra", "too short", f"{texts[5][:300]} {QUIZ} {texts[6][300:700]}"]
    folder = tmp_path / "in"
    folder.mkdir(exist_ok=True)
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:12]))
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[12:]))
    (tmp_path / "eval.jsonl").write_text(json.dumps({"text": QUIZ}) + "\n")
    return texts


def filtered(tmp_path: Path, quality: Quality, output: str = "out", workers: int = 1) -> Any:
    from weftrain.data_prep.datatrove_bridge import filter_inputs

    inputs = Inputs(tuple(list_inputs([str(tmp_path / "in")], source="prose")), "text")
    return filter_inputs(inputs, quality, tmp_path / output, workers)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


def test_what_was_planted_goes_and_the_rest_says_where_it_came_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = write(tmp_path)
    monkeypatch.setattr("weftrain.data_prep.datatrove_bridge._PART_BYTES", 9000)  # several tasks
    against = Decontaminate(against=(str(tmp_path / "eval.jsonl"),))
    found = filtered(tmp_path, Quality(length=LengthFilter(min_words=5), minhash=MinHash(), decontaminate=against))
    assert found.dropped == {"length": 1, "decontaminate": 1, "minhash": 1}
    kept = lines(tmp_path / "out")
    assert len(kept) == 20
    assert len(found.inputs.files) > 1
    for line in kept:
        number = line["from_record"] + (12 if line["from_file"] == "in/b.jsonl" else 0)
        assert line["text"] == texts[number]
        assert line["source"] == "prose"
    assert {line["text"] for line in kept} >= {text for number, text in enumerate(texts[:20]) if number != 3}


def test_done_already_it_is_not_done_again_and_other_steps_are(tmp_path: Path) -> None:
    write(tmp_path)
    quality = Quality(length=LengthFilter(max_words=100_000, min_words=5))
    first = filtered(tmp_path, quality)
    path = tmp_path / "out" / "00000.jsonl"
    before = path.stat().st_mtime_ns
    assert filtered(tmp_path, quality).dropped == first.dropped == {"length": 1}
    assert path.stat().st_mtime_ns == before
    assert filtered(tmp_path, Quality(length=LengthFilter(min_words=500))).dropped == {"length": 23}


def test_another_text_key_or_evaluation_set_is_done_again(tmp_path: Path) -> None:
    write(tmp_path)
    quality = Quality(decontaminate=Decontaminate(against=(str(tmp_path / "eval.jsonl"),)))
    assert sum(filtered(tmp_path, quality).dropped.values()) == 1
    (tmp_path / "eval.jsonl").write_text(json.dumps({"text": QUIZ.replace("quiz", "test")}) + "\n")
    assert sum(filtered(tmp_path, quality).dropped.values()) == 0
    written = lines(tmp_path / "in")[:12]
    (tmp_path / "in" / "a.jsonl").write_text("".join(json.dumps({"body": SENTENCE, **line}) + "\n" for line in written))
    from weftrain.data_prep.datatrove_bridge import filter_inputs

    by_text = filtered(tmp_path, Quality(length=LengthFilter(min_words=50)))
    inputs = Inputs(
        tuple(list_inputs([str(tmp_path / "in" / "a.jsonl")], source="prose")),
        "text",
        "none",
        ReadOptions(text_key="body"),
    )
    by_body = filter_inputs(inputs, Quality(length=LengthFilter(min_words=50)), tmp_path / "out", 1)
    inputs = Inputs(inputs.files, "text", "none", ReadOptions())
    again = filter_inputs(inputs, Quality(length=LengthFilter(min_words=50)), tmp_path / "out", 1)
    assert (by_text.dropped, by_body.dropped, again.dropped) == ({"length": 1}, {"length": 12}, {"length": 0})


def test_the_dataset_is_made_of_what_is_left(
    tmp_path: Path, encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_MEBI", 300)
    write(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(encoder.data)
    found = filtered(tmp_path, Quality(length=LengthFilter(min_words=5)))
    assert found.inputs.options == ReadOptions(text_key="text", source_key="source")
    prepared = prepare(
        found.inputs,
        tmp_path / "d",
        name="d",
        tokenizer=tmp_path / "tokenizer.json",
        sequence_length=64,
        heldout_fraction=0.0,
    )
    assert prepared is not None
    assert prepared.manifest.documents.read == 22
    assert [source.name for source in open_sources(prepared.folder, prepared.manifest)] == ["prose"]
    assert '"min_words":5' in str(prepared.manifest.preparation["quality"])


def test_a_document_that_cannot_be_read(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "in" / "b.jsonl").write_text("{broken\n")
    with pytest.raises(DataError, match=r"in/b\.jsonl:1: not JSON"):
        filtered(tmp_path, Quality(length=LengthFilter(min_words=5)))


def test_an_evaluation_set_of_too_few_words(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "eval.jsonl").write_text('{"text": "one two"}\n')
    with pytest.raises(DataError, match="no text of 12 words to decontaminate against"):
        filtered(tmp_path, Quality(decontaminate=Decontaminate(against=(str(tmp_path / "eval.jsonl"),))))
    (tmp_path / "sets").mkdir()
    for name in ("eval.jsonl", "task.json"):
        (tmp_path / "sets" / name).write_text(
            '{"prompt": "a"}' if name == "task.json" else json.dumps({"text": QUIZ}) + "\n"
        )
    (tmp_path / "sets" / "more").write_bytes(b"\0")
    with pytest.raises(
        DataError, match=r"not read: binary file \(1\): sets/more; JSON without a field 'text': sets/task\.json"
    ):
        filtered(tmp_path, Quality(decontaminate=Decontaminate(against=(str(tmp_path / "sets"),))))


@pytest.mark.prove
def test_any_number_of_workers_leaves_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    quality = Quality(length=LengthFilter(min_words=5), minhash=MinHash())
    filtered(tmp_path, quality, "one", 1)
    filtered(tmp_path, quality, "two", 2)
    assert lines(tmp_path / "one") == lines(tmp_path / "two")
