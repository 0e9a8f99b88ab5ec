"""`weftrain prep --chat-template`: conversations in, rows whose mask is the assistant's, a dataset that trains."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from weftrain.cli.main import main
from weftrain.core.formats.dataset import CHAT_TEMPLATE, open_inputs, read_dataset_manifest
from weftrain.core.formats.shard_set import open_set
from weftrain.data_prep.conversations.template import load_template
from weftrain.data_prep.tokens.tokenization import load_encoder
from weftrain.data_prep.tokens.training import train_encoder

Prep = Callable[..., Result]


def talk(number: int, turns: int = 1) -> dict[str, object]:
    said = [
        {"role": role, "content": f"{role} says {number} {turn}, and the cat sat on the mat"}
        for turn in range(turns)
        for role in ("user", "assistant")
    ]
    return {"messages": said}


@pytest.fixture
def prep(tmp_path: Path) -> Prep:
    """Runs the verb on records of conversations, with a tokenizer that has LLaMA's and CrystalCoder's tokens."""
    (tmp_path / "tokenizer.json").write_bytes(train_encoder([json.dumps(talk(1))] * 3, 300).data)

    def run(records: list[object], *options: str, name: str = "chats", template: str = "chatml") -> Result:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        words = [path, "--name", name, "--output", tmp_path, "--tokenizer", tmp_path / "tokenizer.json"]
        words += ["--chat-template", template, "--sequence-length", 128, "--heldout-fraction", 0, *options]
        return CliRunner().invoke(main, ["prep", *map(str, words)])

    return run


def test_each_conversation_is_whole_in_a_row_and_its_answers_bear_loss(prep: Prep, tmp_path: Path) -> None:
    result = prep([talk(number) for number in range(12)])
    assert result.exit_code == 0, result.output
    assert read_dataset_manifest(tmp_path / "chats").packing == "best_fit"
    assert (tmp_path / "chats" / CHAT_TEMPLATE).read_text() == load_template("chatml").text
    _, shards = open_set(tmp_path / "chats", "train")
    encoder, seen = load_encoder(tmp_path / "chats" / "tokenizer.json"), set()
    for row in range(shards.num_rows):
        ids, mask = shards.rows(np.array([row]))
        assert mask is not None
        for span in shards.document_spans(row):
            if span.file < 0:
                continue
            text = encoder.decode(ids[0, span.first : span.last + 1])
            learnt = encoder.decode(ids[0, 1:][mask[0] & (np.arange(128) >= span.first) & (np.arange(128) < span.last)])
            assert text.startswith("<|im_start|>user\nuser says")
            assert text.endswith("<|im_end|>\n")
            assert learnt == text.split("assistant\n")[1].rstrip("\n")
            seen.add(text)
    assert len(seen) == 12


def test_head_marks_what_bears_loss(prep: Prep, tmp_path: Path) -> None:
    assert prep([talk(1)]).exit_code == 0
    shown = CliRunner().invoke(main, ["data", "head", str(tmp_path / "chats"), "--rows", "1"]).output
    assert "    | <|im_start|>assistant\n" in shown
    assert "    > assistant says 1 0, and the cat sat on the mat<|im_end|>\n" in shown
    assert "    > user" not in shown


def test_forms_and_file_kinds_of_one_conversation_are_duplicates(prep: Prep, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    said = talk(1)["messages"]
    assert isinstance(said, list)
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_text(json.dumps({"messages": said}) + "\n" + json.dumps(talk(2)) + "\n")
    share = [{"from": {"user": "human", "assistant": "gpt"}[one["role"]], "value": one["content"]} for one in said]
    (folder / "b.json").write_text(json.dumps([{"conversations": share}]))
    parquet.write_table(pyarrow.table({"messages": [said], "score": [1.0]}), folder / "c.parquet")
    words = [folder, "--name", "all", "--output", tmp_path, "--tokenizer", tmp_path / "tokenizer.json"]
    words += ["--chat-template", "chatml", "--sequence-length", 128, "--heldout-fraction", 0]
    result = CliRunner().invoke(main, ["prep", *map(str, words)])
    assert result.exit_code == 0, result.output
    manifest = read_dataset_manifest(tmp_path / "all")
    assert (manifest.documents.read, manifest.documents.duplicates, manifest.documents.train) == (4, 2, 2)
    assert len(list(open_inputs(tmp_path / "all", manifest))) == 3


def test_what_is_cut_divided_or_refused_is_counted(prep: Prep, tmp_path: Path) -> None:
    records = [talk(1), talk(2, turns=4), {"messages": [{"role": "user", "content": "a"}]}]
    refused = prep(records)
    assert refused.exit_code == 2
    assert "chats.jsonl:3: has no answer" in refused.output
    cut = prep(records, "--max-failures", "1")
    assert "1 conversation longer than a row, cut at its end" in cut.output
    divided = prep(records, "--max-failures", "1", "--too-long", "split", name="divided")
    assert "1 conversation longer than a row, divided over several" in divided.output
    assert read_dataset_manifest(tmp_path / "divided").documents.read > 2
    dropped = prep(records, "--max-failures", "2", "--too-long", "drop", name="dropped")
    assert dropped.exit_code == 0, dropped.output
    assert read_dataset_manifest(tmp_path / "dropped").documents.failed == 2


def test_again_it_is_up_to_date_grows_and_refuses_other_settings(prep: Prep, tmp_path: Path) -> None:
    records: list[object] = [talk(number) for number in range(6)]
    assert "is ready" in prep(records).output
    assert "is up to date" in prep(records).output
    assert "was prepared with loss 'answers', not 'last'" in prep(records, "--loss", "last").output
    other = prep(records, template="crystalchat")
    assert "was prepared with chat_template" in other.output
    (tmp_path / "more.jsonl").write_text(json.dumps(talk(9)) + "\n" + json.dumps(talk(3)) + "\n")
    words = [tmp_path / "more.jsonl", "--name", "grown", "--output", tmp_path, "--grow", tmp_path / "chats"]
    grown = CliRunner().invoke(main, ["prep", *map(str, words)])
    assert grown.exit_code == 0, grown.output
    assert read_dataset_manifest(tmp_path / "grown").documents.train == 7


def test_a_changed_template_is_noticed(prep: Prep, tmp_path: Path) -> None:
    assert prep([talk(1)]).exit_code == 0
    (tmp_path / "chats" / CHAT_TEMPLATE).write_text("{{ messages }}")
    result = CliRunner().invoke(main, ["data", "verify", str(tmp_path / "chats")])
    assert result.exit_code == 2
    assert f"{CHAT_TEMPLATE}: is not the one that the dataset was made with" in result.output


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--turn-end", "<end>"], "--turn-end <end>: is no control token of the tokenizer"),
        (["--fim-rate", "0.5"], "leave --fim-rate out"),
        (["--normalise", "NFC"], "leave --normalise out"),
        (["--format", "text"], "conversations are read from arrow, json, jsonl, parquet, not from text"),
    ],
)
def test_what_does_not_go_with_conversations_is_refused(prep: Prep, options: list[str], why: str) -> None:
    result = prep([talk(1)], *options)
    assert result.exit_code == 2
    assert why in result.output


def test_a_tokenizer_must_be_named_and_conversations_be_there(prep: Prep, tmp_path: Path) -> None:
    path = tmp_path / "plain.jsonl"
    path.write_text('{"text": "a"}\n')
    words = ["prep", str(path), "--name", "x", "--output", str(tmp_path), "--chat-template", "chatml"]
    result = CliRunner().invoke(main, words)
    assert "name its tokenizer.json with --tokenizer" in result.output
    result = CliRunner().invoke(main, [*words, "--tokenizer", str(tmp_path / "tokenizer.json")])
    assert "plain.jsonl:1: holds 'text', and none of messages, conversations" in result.output


def test_a_recipe_may_name_a_template(prep: Prep, tmp_path: Path) -> None:
    assert prep([talk(number) for number in range(6)]).exit_code == 0
    (tmp_path / "own.jinja").write_text(load_template("chatml").text)
    (tmp_path / "prep.yaml").write_text(
        "name: p\ndescription: d\ntokenizer: tokenizer.json\nchat_template: own.jinja\nsequence_length: 128\n"
        "packing: best_fit\ndatasets:\n- name: by_recipe\n  inputs: [{addresses: [chats.jsonl]}]\n"
    )
    words = ["prep", tmp_path / "prep.yaml", "--inputs", tmp_path, "--output", tmp_path]
    result = CliRunner().invoke(main, list(map(str, words)))
    assert result.exit_code == 0, result.output
    assert read_dataset_manifest(tmp_path / "by_recipe").train.id == read_dataset_manifest(tmp_path / "chats").train.id
