"""Start and end tokens and those of fill-in-the-middle, by name: found in the tokenizer, control ids in text, taken off
once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from tokenizers import Tokenizer

from weftrain.cli.main import main
from weftrain.core.errors import DataError
from weftrain.core.formats.canonical import canonical_json, sha256_json
from weftrain.core.formats.dataset import read_dataset_manifest
from weftrain.core.formats.dataset_manifest import FimSettings
from weftrain.core.formats.shard_set import ShardSet, open_set
from weftrain.data_prep.fim import exact as fim
from weftrain.data_prep.interchange import export_megatron, whole_documents
from weftrain.data_prep.pipeline import Prepared, prepare
from weftrain.data_prep.readers.listing import list_inputs
from weftrain.data_prep.readers.read_options import ReadOptions
from weftrain.data_prep.stages.settings import Inputs
from weftrain.data_prep.tokens.markers import FimIds, MarkerIds, Markers, marker_ids, recorded_markers
from weftrain.data_prep.tokens.tokenization import TextEncoder, load_encoder, make_encoder

FIRST = 320  # the ids of the test tokenizer's model
BAR, HOLES = "\uff5c", ("begin", "end", "hole")
# name -> (start token, end token, FIM tokens prefix, middle, suffix) as their tokenizer.json files spell them.
FAMILIES = {
    "Llama 3": ("<|begin_of_text|>", "<|end_of_text|>", ()),
    "Gemma": ("<bos>", "<eos>", ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")),
    "CodeLlama": ("<s>", "</s>", ("▁<PRE>", "▁<MID>", "▁<SUF>")),
    "DeepSeek": (
        f"<{BAR}begin▁of▁sentence{BAR}>",
        f"<{BAR}end▁of▁sentence{BAR}>",
        tuple(f"<{BAR}fim▁{name}{BAR}>" for name in HOLES),
    ),
    "Qwen": ("<|endoftext|>", "<|endoftext|>", ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>")),
}


def tokenizer_with(encoder: TextEncoder, names: tuple[str, ...], special: bool = True) -> bytes:
    """The test tokenizer with only these added tokens, from id FIRST on."""
    tree = json.loads(encoder.data)
    unknown = tree["added_tokens"][0]
    tree["added_tokens"] = [
        unknown | {"id": FIRST + number, "content": name, "special": special} for number, name in enumerate(names)
    ]
    for name in ("<s>", "</s>"):
        tree["model"]["vocab"][f"unused {name}"] = tree["model"]["vocab"].pop(name)
    return json.dumps(tree).encode()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("engine", ["auto", "tokenizers"])
def test_the_tokens_of_known_families(encoder: TextEncoder, family: str, engine: str) -> None:
    bos, eos, names = FAMILIES[family]
    unique = tuple(dict.fromkeys((bos, eos, *names)))
    ids = {name: FIRST + number for number, name in enumerate(unique)}
    made = make_encoder(tokenizer_with(encoder, unique, special=False), "t", Markers(eos, bos, names), engine=engine)
    assert (made.markers.bos, made.markers.eos) == (ids[bos], ids[eos])
    if names:
        assert fim.fim_ids(made) == FimIds(
            ids[names[0]], ids[names[1]], ids[names[2]], ids[names[3]] if len(names) > 3 else None
        )
    assert set(ids.values()) <= set(made.control_ids.tolist())
    text = f"the weft {bos}{eos}{''.join(names)} loom"
    (tokens,) = made.encode([text], ["x"])
    assert not set(ids.values()) & set(tokens.tolist())
    assert made.decode(tokens) == text  # a marker's name stays text
    assert made.compact_utf8(np.array([ids[bos], *tokens, ids[eos]])).decode() == text.replace(" ", "")


def test_names_that_are_not_there(encoder: TextEncoder) -> None:
    data = tokenizer_with(encoder, ("<bos>", "<eos>", "<PRE>", "<MID>", "<SUF>"))
    for markers, message in (
        (Markers("<eos>", "<boss>"), r"t: has no token '<boss>' for --bos; its special tokens are <bos>, <"),
        (Markers("<end>"), r"has no token '<end>' for --eos"),
        (Markers(), r"has no token </s> or <\|endoftext\|>.*--eos none --bos TOKEN.*<MID>"),
        (Markers("none"), "--eos none: nothing would tell documents apart"),
        (Markers("<eos>", None, ("<PRE>", "<MID>")), "three or four names with commas"),
        (Markers("<eos>", None, ("<PRE>", "<MID>", "")), "three or four names with commas"),
        (
            Markers("<eos>", None, ("<PRE>", "<MID>", "<SUFF>")),
            "has no token '<SUFF>' for --fim-tokens; its special tokens are <SUF>, ",
        ),
        (Markers("<eos>", None, ("<PRE>", "<MID>", "<PRE>")), "names a token twice"),
        (Markers("<eos>", "<bos>", ("<PRE>", "<MID>", "<bos>")), "or the start or end token"),
    ):
        with pytest.raises(DataError, match=message):
            make_encoder(data, "t", markers)
    with pytest.raises(DataError, match=r"name its own with --fim-tokens .*<PRE>"):
        fim.fim_ids(make_encoder(data, "t", Markers("<eos>")))
    only_bos = make_encoder(data, "t", Markers("none", "<bos>"))
    assert (only_bos.eos_id, only_bos.markers.separator) == (None, FIRST)
    assert [part.tolist() for part in only_bos.around()] == [[FIRST], []]
    assert marker_ids(Tokenizer.from_str(data.decode()), Markers("<eos>", "<eos>"), "t") == MarkerIds(
        FIRST + 1, FIRST + 1
    )


@pytest.mark.parametrize(
    ("ids", "tokens", "own"),
    [
        (MarkerIds(2), [1, 5, 2], [1, 5]),
        (MarkerIds(2, 1), [1, 5, 2], [5]),
        (MarkerIds(2, 1), [1, 1, 5, 2, 2], [1, 5, 2]),  # once, not twice
        (MarkerIds(2, 1), [5], [5]),
        (MarkerIds(2, 1), [1, 2], []),
        (MarkerIds(2, 1), [], []),
        (MarkerIds(None, 1), [1, 5, 1], [5, 1]),
        (MarkerIds(2, 2), [2], []),
        (MarkerIds(2, 2), [2, 2, 7, 2], [2, 7]),
    ],
)
def test_a_documents_own_tokens(ids: MarkerIds, tokens: list[int], own: list[int]) -> None:
    array = np.array(tokens, np.int32)
    assert array[ids.own(array)].tolist() == own


# -- through prepare()

S = 16
ANGLES = ("▁<PRE>", "▁<MID>", "▁<SUF>")


@pytest.fixture
def texts(texts: list[str]) -> list[str]:
    return texts[:40]


@pytest.fixture
def tokenizer(tmp_path: Path, encoder: TextEncoder) -> Path:
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_with(encoder, ("<bos>", "<eos>", *ANGLES)))
    return tmp_path / "tokenizer.json"


def make(tokenizer: Path, path: Path, name: str, **changes: Any) -> Prepared:
    inputs = Inputs(tuple(list_inputs([str(path)], source=None)), "text", "none", ReadOptions())
    given: dict[str, Any] = {
        "sequence_length": S,
        "heldout_fraction": 0.0,
        "rows_per_shard": 10_000,
        "eos": "<eos>",
        "bos": "<bos>",
    }
    prepared = prepare(inputs, tokenizer.parent / "out", name=name, tokenizer=tokenizer, **given | changes)
    assert prepared is not None
    return prepared


def lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def whole(prepared: Prepared) -> list[list[int]]:
    """The documents as they lie in the shards, the last of a stream cut at the end of the rows."""
    return [tokens.tolist() for tokens in whole_documents(*open_set(prepared.folder, "train"))]


AROUND: list[dict[str, Any]] = [{}, {"eos": "none"}, {"bos": None}]


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_documents_stand_between_their_tokens(
    tokenizer: Path, texts: list[str], around: dict[str, Any], packing: str
) -> None:
    prepared = make(
        tokenizer, lines(tokenizer.parent / "t.jsonl", texts), "d", packing=packing, order="as_read", **around
    )
    manifest = prepared.manifest
    bos, eos = ([] if around.get("bos", 1) is None else [FIRST]), ([] if around.get("eos") == "none" else [FIRST + 1])
    assert (manifest.bos_id, manifest.eos_id) == (bos[0] if bos else None, eos[0] if eos else None)
    assert manifest.separator_id == (eos or bos)[0]
    own = load_encoder(tokenizer, Markers("<eos>", "<bos>")).encode(texts, texts)
    wanted = [[*bos, *ids.tolist(), *eos] for ids in own]
    if packing == "concatenate":
        found = whole(prepared)
        assert found[:-1] == wanted[: len(found) - 1]
        assert len(found) >= len(wanted) - 1
        assert manifest.train.tokens + 1 + manifest.train.dropped_tokens == sum(map(len, wanted))
        return
    ids, mask = ShardSet(prepared.folder, manifest, "train").rows(np.arange(manifest.train.n_examples))
    assert mask is not None
    padding = np.concatenate([np.zeros((len(ids), 1), np.bool_), ~mask], axis=1)
    assert set(ids[padding].tolist()) == {manifest.separator_id}
    assert sorted(ids[~padding].tolist()) == sorted(token for document in wanted for token in document)


@pytest.mark.parametrize("around", AROUND)
def test_tokenised_documents_carry_their_tokens_once(tokenizer: Path, texts: list[str], around: dict[str, Any]) -> None:
    first = make(tokenizer, lines(tokenizer.parent / "t.jsonl", texts), "d", order="as_read", **around)
    export_megatron(first.folder, "train", tokenizer.parent / "megatron" / "m")
    again = make(tokenizer, tokenizer.parent / "megatron", "again", order="as_read", **around)
    assert whole(again) == whole(first)


@pytest.mark.parametrize("around", AROUND)
def test_named_fim_tokens_are_used_and_recorded(tokenizer: Path, texts: list[str], around: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"fim": FimSettings(rate=0.9, spm_share=0.5), "fim_tokens": ANGLES, "order": "as_read"}
    prepared = make(tokenizer, lines(tokenizer.parent / "t.jsonl", texts), "d", **settings, **around)
    assert prepared.manifest.fim is not None
    assert prepared.manifest.fim.tokens == ANGLES
    encoder = load_encoder(tokenizer, recorded_markers(prepared.manifest))
    ids = fim.fim_ids(encoder)
    assert tuple(ids) == (FIRST + 2, FIRST + 3, FIRST + 4, None)
    shards = ShardSet(prepared.folder, prepared.manifest, "train")
    records = [record for reader in shards.readers() for record in fim_records(reader)]
    documents = list(whole_documents(prepared.manifest, shards))[:-1]
    assert len(documents) >= len(texts) - 2
    for tokens, record, own in zip(documents, records, encoder.encode(texts, texts), strict=False):
        assert np.array_equal(fim.restore(tokens[encoder.markers.own(tokens)], *record, ids), own)
    assert 0.7 < np.mean([record[0] != fim.PLAIN for record in records]) <= 1


def fim_records(reader: Any) -> list[tuple[int, int, int]]:
    """(mode, a, b) of each document that begins in a shard."""
    table = reader.documents()
    return [(int(mode), int(a), int(b)) for mode, (a, b) in zip(table.fim.mode, table.fim.split, strict=True)]


def test_what_is_refused_before_anything_is_read(tokenizer: Path, texts: list[str]) -> None:
    path, released = lines(tokenizer.parent / "t.jsonl", texts), FimSettings(rate=0.5, spm_share=0.5, mode="released")
    for changes, message in (
        ({"fim": FimSettings(rate=0.5, spm_share=0.5)}, "name its own with --fim-tokens"),
        ({"fim": released, "fim_tokens": ANGLES, "bos": None}, "name one as the fourth of --fim-tokens"),
        ({"fim": released, "fim_tokens": (*ANGLES, "<unk>")}, "give no --bos and no --eos none"),
        ({"fim_tokens": ANGLES[:2]}, "three or four names"),
        ({"eos": "none", "bos": None}, "nothing would tell documents apart"),
    ):
        with pytest.raises(DataError, match=message):
            make(tokenizer, path, "x", **changes)
    inputs = Inputs(tuple(list_inputs([str(path)], source=None)), "text", "none", ReadOptions())
    with pytest.raises(
        DataError, match=r"'<bos>' is no token of the tokenizer that is trained here, which has <unk>, <s>"
    ):
        prepare(inputs, tokenizer.parent / "out", name="x", vocab_size=300, sequence_length=S, bos="<bos>")
    assert not (tokenizer.parent / "out" / ".x.partial").exists()


def test_the_commands_know_them(tokenizer: Path, texts: list[str]) -> None:
    path, out = lines(tokenizer.parent / "t.jsonl", texts), tokenizer.parent / "out"
    around = ["--eos", "none", "--bos", "<bos>", "--fim-tokens", ",".join(ANGLES)]
    options = ["--tokenizer", str(tokenizer), *around, "--heldout-fraction", "0"]
    command = [
        "prep",
        str(path),
        "--name",
        "d",
        "--output",
        str(out),
        "--sequence-length",
        "32",
        "--order",
        "as_read",
        *options,
    ]
    for state in ("is ready", "is up to date"):
        result = CliRunner().invoke(main, command)
        assert state in result.output
    assert read_dataset_manifest(out / "d").preparation["fim_tokens"] == ",".join(ANGLES)
    result = CliRunner().invoke(main, ["data", "head", str(out / "d"), "--rows", "1"])
    assert f"| <bos>{texts[0]}\n" in result.output
    result = CliRunner().invoke(main, ["data", "fim-report", str(out / "d"), "--documents", "30"])
    assert result.exit_code == 0, result.output
    other = CliRunner().invoke(
        main, ["data", "fim-report", str(out / "d"), "--documents", "30", "--fim-tokens", "<eos>,▁<MID>,▁<SUF>"]
    )
    assert other.output == result.output  # whatever the control tokens are called
    other = CliRunner().invoke(main, ["data", "fim-report", str(out / "d"), "--fim-tokens", "<P>,<M>,<S>"])
    assert "has no token '<P>' for --fim-tokens" in other.output
    result = CliRunner().invoke(main, ["data", "stats", str(out / "d")])
    assert f"documents begin with id {FIRST}; held out by rule 2" in result.output
    recipe = tokenizer.parent / "r.yaml"
    recipe.write_text(
        "name: mine\ndescription: d\nsequence_length: 32\ntokenizer: tokenizer.json\neos: none\nbos: <bos>\norder: "
        "as_read\n"
        f"fim_tokens: [{', '.join(ANGLES)}]\ndatasets:\n  - {{name: r, inputs: [{{addresses: [t.jsonl]}}]}}\n"
    )
    result = CliRunner().invoke(main, ["prep", str(recipe), "--inputs", str(tokenizer.parent), "--output", str(out)])
    assert result.exit_code == 0, result.output
    assert read_dataset_manifest(out / "r").train.id == read_dataset_manifest(out / "d").train.id
    with pytest.raises(ValueError, match="documents have neither"):
        type(manifest := read_dataset_manifest(out / "d")).model_validate(manifest.model_dump() | {"bos_id": None})


def test_an_old_manifest_has_no_start_token(tokenizer: Path, texts: list[str]) -> None:
    prepared = make(tokenizer, lines(tokenizer.parent / "t.jsonl", texts), "d", bos=None)
    value = prepared.manifest.model_dump(mode="json")
    new = {"bos", "fim_tokens"}
    old = {key: entry for key, entry in value.items() if key != "bos_id"}
    old["preparation"] = {key: entry for key, entry in value["preparation"].items() if key not in new}
    data = canonical_json(old | {"root": sha256_json(old)}) + b"\n"
    (prepared.folder / "manifest.json").write_bytes(data)
    assert read_dataset_manifest(prepared.folder).bos_id is None
    assert make(tokenizer, tokenizer.parent / "t.jsonl", "d", bos=None).up_to_date
    with pytest.raises(DataError, match="prepared with bos None, not '<bos>'"):
        make(tokenizer, tokenizer.parent / "t.jsonl", "d")
