"""Fifty ways to forge a release consistently, with every hash made again: `verify` refuses what does not follow from the
rest, `replay` finds what was not trained so, and what neither covers is in the table as such.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from forgery import Tensors, forge
from record_runs import done, weftrain
from release_cases import verdicts

Records = list[dict[str, Any]]
Forgery = Mapping[str, Any]


def lines(change: Callable[[dict[str, Any]], Any], kind: str = "step", step: int = 3) -> Forgery:
    """Another line of the log; it is left out where `change` gives False."""

    def edit(records: Records) -> Records:
        return [one for one in records if (one["kind"], one.get("step")) != (kind, step) or change(one) is not False]

    return {"metrics": edit}


def every(kind: str, change: Callable[[dict[str, Any]], Any]) -> Forgery:
    return {"metrics": lambda records: [one for one in records if one["kind"] != kind or change(one) is not False]}


def told(**changes: Any) -> Forgery:
    """Other counts in every manifest."""
    return {"manifest": lambda manifest: manifest.update({key: manifest[key] + by for key, by in changes.items()})}


def beside(name: str, change: Callable[[bytes], bytes]) -> Forgery:
    def edit(folder: Path) -> None:
        path = folder / name
        path.write_bytes(change(path.read_bytes() if path.exists() else b""))

    return {"files": edit}


def training_rows_as_held_out(folder: Path) -> None:
    """The held-out set is the training set, under the name and with the hashes of a held-out set."""
    place = folder / "data" / "words"
    manifest = json.loads((place / "manifest.json").read_bytes())
    shutil.rmtree(place / "heldout")
    shutil.copytree(place / "train", place / "heldout")
    shards = [shard | {"file": shard["file"].replace("train/", "heldout/")} for shard in manifest["train"]["shards"]]
    manifest["heldout"] = manifest["train"] | {"shards": shards}
    from weftrain.core.formats.canonical import canonical_json, sha256_json

    manifest.pop("root")
    manifest["root"] = sha256_json(manifest)
    (place / "manifest.json").write_bytes(canonical_json(manifest) + b"\n")


def skipped(record: dict[str, Any]) -> None:
    record["skipped"] = True


def half(record: dict[str, Any]) -> None:
    better(record, 0.5)


def better(record: dict[str, Any], share: float = 0.95) -> None:
    """A smaller loss, with the perplexity that goes with it."""
    record["loss"] *= share
    if "perplexity" in record:
        record["perplexity"] = math.exp(record["loss"])


SEEN_BY_VERIFY: dict[str, tuple[Forgery, str]] = {
    "a line of the log removed": (lines(lambda one: False), "lacks the line of step 3"),
    "all lines of steps removed": (every("step", lambda one: False), "lacks the line of step 1"),
    "a held-out loss removed": (lines(lambda one: False, "evaluation", 4), "lacks the loss of held-out set 'words'"),
    "all held-out losses removed": (every("evaluation", lambda one: False), "lacks the loss of held-out set"),
    "another learning rate in a line": (
        lines(lambda one: one["learning_rate"].update(dict.fromkeys(one["learning_rate"], 1e-3))),
        "step 3: the learning rate of embeddings is 0.001, and the recipe's schedule gives",
    ),
    "no learning rate in a line": (lines(lambda one: one.update(learning_rate={})), "learning rates are not of the"),
    "more tokens in a line": (lines(lambda one: one.update(tokens=one["tokens"] + 1)), "step 3: tokens is 157"),
    "another perplexity": (
        every("evaluation", lambda one: one.update(perplexity=2.0)),
        "the perplexity of words is 2, and its loss gives",
    ),
    "a step that was not skipped": (lines(skipped), "step 3 is skipped there, and the ledger says otherwise"),
    "more tokens of a checkpoint": (told(tokens=10), "step_00000002: its tokens is not 104"),
    "another position of a checkpoint": (told(position=1), "step_00000002: its position is not 8"),
    "more updates than steps": (told(optimizer_updates=1), "step_00000002: its optimizer_updates is not 2"),
    "other kernels than the fingerprint's": (
        {"manifest": lambda manifest: manifest.update(kernels={})},
        "its kernels is not that of its fingerprint",
    ),
    "recipe.yaml": (beside("recipe.yaml", lambda data: data.replace(b"seed: ", b"seed: 1")), "recipe.yaml: is not the"),
    "environment.json": (beside("environment.json", lambda data: b'{"threads":64}\n'), "environment of no start"),
    "another config of a revision": (
        beside(
            "revisions/ckpt_001/config.json", lambda data: data.replace(b'"vocab_size": 512', b'"vocab_size": 512.0')
        ),
        "ckpt_001/config.json: is not what follows",
    ),
    "another end token": (
        beside("revisions/ckpt_002/generation_config.json", lambda data: b'{"bos_token_id": 1, "eos_token_id": 2}\n'),
        "ckpt_002/generation_config.json: is not what follows",
    ),
    "another tokenizer of a revision": (
        beside("revisions/ckpt_003/tokenizer.json", lambda data: data.replace(b'"added_tokens"', b'"added_tokens" ')),
        "ckpt_003/tokenizer.json: is not what follows",
    ),
    "a pickle in a revision": (beside("revisions/ckpt_001/pytorch_model.bin", lambda data: b"\x80"), "is none of the"),
    "Python in a revision": (beside("revisions/ckpt_001/model.py", lambda data: b"1"), "model.py: is code"),
    "weights that no index names": (
        beside("revisions/ckpt_001/model-00001-of-00002.safetensors", lambda data: b"\x02" + bytes(7) + b"{}"),
        "is none of the files that a revision has",
    ),
    "a card with another loss": (
        beside("README.md", lambda data: re.sub(rb"loss \d", b"loss 0", data)),
        "README.md: is not the card that follows from the record",
    ),
    "a revision's card": (
        beside("revisions/ckpt_001/README.md", lambda data: data + b"The best.\n"),
        "ckpt_001/README.md: is not the card",
    ),
    "another description of a dataset": (
        beside("data/words/croissant.json", lambda data: data.replace(b"in rows", b"in good rows")),
        "data/words/croissant.json: is not the description that follows from the dataset's manifest",
    ),
    "a description of what is no dataset": (
        beside("data/words/train/croissant.json", lambda data: b"{}"),
        "is none of the files of a dataset",
    ),
    "another bill of materials": (
        beside("bom.spdx3.json", lambda data: data.replace(b'"ai_typeOfModel":["', b'"ai_typeOfModel":["a better ')),
        "bom.spdx3.json: is not the description that follows from the rest of the release",
    ),
    "another name": ({"of_release": lambda release: release.update(name="amber")}, "name is 'amber'"),
    "another licence of the data": (
        {"of_release": lambda release: release["licences"].update(data={"words": "MIT"})},
        "the licence of 'words' is 'MIT', and its dataset states",
    ),
    "a source that is not there": (
        {"of_release": lambda release: release["licences"]["data"].update(wikipedia="CC-BY-4.0")},
        "the licence of 'wikipedia' is 'CC-BY-4.0', and its dataset states none",
    ),
    "training rows as held-out set": ({"files": training_rows_as_held_out}, "held-out rows are rows of the training"),
    "a checkpoint left out": ({"drop_step": 4}, "no checkpoint at the end of chunk 1"),
}


@pytest.mark.prove
@pytest.mark.parametrize("name", SEEN_BY_VERIFY)
def test_what_does_not_follow_from_the_rest_is_refused(name: str, release: Path) -> None:
    forgery, words = SEEN_BY_VERIFY[name]
    forge(release, **forgery)
    result = weftrain("verify", release)
    assert words in result.output, result.output
    assert result.exit_code == 2
    assert len(result.output.strip().splitlines()) == 1


def one_ulp(step: int, tensors: Tensors) -> None:
    if step == 4:
        tensors["weights/layers.1.ffn.up_proj.weight"].view(torch.int32)[3, 5] += 1


def a_moment(step: int, tensors: Tensors) -> None:
    if step == 4:
        tensors["exp_avg_sq/embedding.weight"] *= 1.5


def changed(key: str, value: Any) -> Forgery:
    """A key of the recipe, everywhere."""

    def edit(recipe: dict[str, Any]) -> None:
        *path, last = key.split(".")
        for name in path:
            recipe = recipe[name]
        recipe[last] = value

    return {"recipe": edit}


def a_rate() -> Forgery:
    """Another schedule, with the rates of every line made to fit."""

    def edit(recipe: dict[str, Any]) -> None:
        recipe["schedule"]["learning_rate"][0]["end"] *= 1.001

    def rates(record: dict[str, Any]) -> None:
        record["learning_rate"] = {name: rate * 1.001 for name, rate in record["learning_rate"].items()}

    return {"recipe": edit, **every("step", rates)}


def other_machine(**more: Any) -> Forgery:
    """The fingerprint claims a machine that nobody else has, so that results need not be bitwise equal."""
    return {"manifest": lambda manifest: manifest["fingerprint"].update(device="another processor"), **more}


def nudged(share: float) -> Callable[[int, Tensors], None]:
    """Every weight of every checkpoint moved by a share of itself."""

    def edit(step: int, tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            if name.startswith("weights/"):
                tensor.mul_(1 + share * step)

    return edit


def smaller(kind: str) -> Callable[[int, Tensors], None]:
    def edit(step: int, tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            if name.startswith(f"{kind}/"):
                tensor.mul_(0.8)

    return edit


SEEN_BY_REPLAY: dict[str, Forgery] = {
    "one weight by 1 ulp": {"tensors": one_ulp},
    "a moment": {"tensors": a_moment},
    "a loss": lines(half),
    "a gradient norm": lines(lambda one: one.update(grad_norm=one["grad_norm"] * 0.999)),
    "a held-out loss": every("evaluation", half),
    "fewer tokens behind a loss": lines(lambda one: one.update(bearing_tokens=one["bearing_tokens"] - 1)),
    "fewer held-out rows": every("evaluation", lambda one: one.update(rows=3)),
    "the schedule": a_rate(),
    "the seed": changed("seed", 99),
    "no clipping": changed("optimizer.clip_norm", None),
    "weight decay": changed("optimizer.weight_decay", 0.0),
    "beta2": changed("optimizer.beta2", 0.999),
    "another order": changed("data.shuffle_seed", 5),
    "rows left out": changed(
        "data.skip", [{"reason": "x", "chunk": None, "action": None, "source": "words", "rows": [0, 200]}]
    ),
    "another machine, other weights": other_machine(tensors=nudged(1e-3)),
    "another version of the code, other weights": {
        "manifest": lambda manifest: manifest["fingerprint"].update(code="0" * 64),
        "tensors": nudged(1e-5),
    },
    "an older record, other weights": {
        "manifest": lambda manifest: [manifest["fingerprint"].pop(key) for key in ("processor", "code", "threads")],
        "tensors": nudged(1e-5),
    },
    "another machine, smaller moments": other_machine(tensors=smaller("exp_avg")),
    "another machine, smaller second moments": other_machine(tensors=smaller("exp_avg_sq")),
    "another machine, a better loss": other_machine(**lines(better)),
    "another machine, a better held-out loss": other_machine(**every("evaluation", better)),
}


@pytest.mark.prove
@pytest.mark.parametrize("name", SEEN_BY_REPLAY)
def test_what_was_not_trained_so_is_found(name: str, release: Path) -> None:
    forge(release, **SEEN_BY_REPLAY[name])
    done(weftrain("verify", release))
    result = weftrain("replay", release)
    assert "different" in verdicts(result), result.output
    assert result.exit_code == 3


def test_a_link_is_judged_from_where_the_one_before_was_replayed_to(release: Path) -> None:
    """What is allowed of each link must not add up to as much as anybody likes."""
    forge(release, **other_machine(tensors=nudged(1e-5)))
    result = weftrain("replay", release, "--tolerance", "0.05")
    assert verdicts(result) == ["tolerance"] * 3, result.output
    assert "link 3: trained in one piece with the 2 links before it" in result.output


def test_a_tolerance_excuses_nothing_that_computes_nothing(release: Path) -> None:
    forge(release, **SEEN_BY_REPLAY["another version of the code, other weights"])
    result = weftrain("replay", release, "--link", "2", "--tolerance", "0.5")
    assert verdicts(result) == ["different"], result.output
    assert "--tolerance is not used: nothing of the fingerprint differs that computes" in result.output


def test_what_is_not_covered_is_said(release: Path) -> None:
    output = done(weftrain("verify", release))
    uncovered = [line.strip().split("  ")[0] for line in output.splitlines() if " not covered " in line]
    assert uncovered == [
        "who made it",
        "tokens of the texts",
        "licence of the weights",
        "version, times and speeds",
        "weights and moments of the checkpoints",
        "losses, gradient norms, skipped steps",
        "losses on held-out sets",
    ]
    output = done(weftrain("replay", release))
    uncovered = [line.strip().split("  ")[0] for line in output.splitlines() if " not covered " in line]
    assert uncovered == [
        "who made it",
        "tokens of the texts",
        "licence of the weights",
        "version, times and speeds",
    ]
    assert re.search(r"losses on held-out sets +replay +3 of 3 links: 3 lines", output), output


@pytest.fixture(scope="module")
def scored(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release with scores: held-out losses and memorization of its last checkpoint."""
    run = Path(shutil.copytree(made / "runs" / "crystal_demo", tmp_path_factory.mktemp("scored") / "crystal_demo"))
    done(weftrain("eval", run, "--watch", "--until-step", "2", "--every-seconds", "0.1", "--device", "cpu"))
    words = ("--samples", "3", "--k", "4", "--l", "4", "--no-plots", "--checkpoints", "6")
    done(weftrain("memorize", run, *words))
    done(weftrain("release", run, "--to", run.parent / "release", "--licence", "MIT"))
    return run.parent / "release"


def lower_loss(folder: Path) -> None:
    from weftrain.core.formats.canonical import parse_json, sealed

    (path,) = (folder / "analyses" / "evaluations").glob("*.json")
    record = {key: one for key, one in parse_json(path.read_bytes()).items() if key != "root"}
    record["value"] *= 0.5
    record["metrics"]["loss"]["value"] = record["value"]
    path.write_bytes(sealed(record))


def less_memorized(folder: Path) -> None:
    from weftrain.core.formats.canonical import canonical_json, parse_json

    path = next((folder / "analyses" / "memorization").glob("*/*/*.json"))
    record = parse_json(path.read_bytes())
    record["matches"] = [4 - one for one in record["matches"]]
    record["mean_score"] = sum(record["matches"]) / 12
    record["extractible_percent"] = 100 * sum(one == 4 for one in record["matches"]) / 3
    path.write_bytes(canonical_json(record) + b"\n")


def test_scores_are_measured_again_and_a_task_without_its_documents_is_not_covered(
    scored: Path, tmp_path: Path
) -> None:
    told = done(weftrain("replay", scored, "--link", "1", "--scores", "1"))
    assert re.search(r"scores, evaluations, memorization +replay +(\d+) of \1 measured again", told), told


@pytest.mark.parametrize(
    ("edit", "words"), [(lower_loss, "loss is "), (less_memorized, "% extractible, and measured again")]
)
def test_a_forged_score_passes_verify_and_is_found_when_it_is_measured_again(
    edit: Callable[[Path], None], words: str, scored: Path, tmp_path: Path
) -> None:
    target = Path(shutil.copytree(scored, tmp_path / "forged"))
    edit(target)  # the card is made again with what it says
    forge(target)
    done(weftrain("verify", target))
    found = weftrain("replay", target, "--link", "1", "--scores", "1")
    assert found.exit_code == 3, found.output
    assert words in found.output
