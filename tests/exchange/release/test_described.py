"""The descriptions of a release in other programs' forms: those programs read them, and they follow from the rest."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from forgery import write_release
from record_runs import done, weftrain
from release_cases import edited


def claims_of(release: Path) -> dict[str, dict[str, str]]:
    found = json.loads(done(weftrain("verify", release, "--json")))["claims"]
    return {claim["name"]: claim for claim in found}


def test_mlcroissant_validates_and_loads_the_description_of_a_dataset(release: Path) -> None:
    mlcroissant = pytest.importorskip("mlcroissant", reason="pip install 'weftrain[describe]'")
    place = release / "data" / "words"
    dataset = mlcroissant.Dataset(jsonld=str(place / "croissant.json"))
    assert not dataset.metadata.issues.errors
    (source,) = dataset.records("sources")
    assert source == {"sources/name": b"texts", **{f"sources/{key}": value for key, value in _source(place).items()}}
    assert [one["inputs/name"] for one in dataset.records("inputs")][:2] == [b"texts/000.txt", b"texts/001.txt"]
    hashes = {one.content_url: one.sha256 for one in dataset.metadata.distribution}
    released = json.loads((release / "release.json").read_bytes())["files"]
    assert hashes == {
        name.removeprefix("data/words/"): entry["sha256"]
        for name, entry in released.items()
        if name.startswith("data/words/") and not name.endswith(("manifest.json", "croissant.json"))
    }


def _source(place: Path) -> dict[str, int]:
    (line,) = (place / "sources.jsonl").read_text().splitlines()
    return {key: value for key, value in json.loads(line).items() if key != "name"}


def test_spdx_reads_the_bill_of_materials_and_finds_nothing_missing(release: Path) -> None:
    spdx = pytest.importorskip("spdx_python_model", reason="pip install 'weftrain[describe]'").v3_0_1
    objects = spdx.SHACLObjectSet()
    with (release / "bom.spdx3.json").open("rb") as file:
        spdx.JSONLDDeserializer().read(file, objects)
    assert not objects.missing_ids  # every id that one element names is another's
    (model,) = objects.foreach_type("ai_AIPackage")
    assert (model.name, model.software_packageVersion) == ("crystal_demo", "ckpt_003")
    hyperparameters = {one.key: one.value for one in model.ai_hyperparameter}
    assert (hyperparameters["model.hidden_size"], hyperparameters["seed"]) == ("48", "1")
    (data,) = objects.foreach_type("dataset_DatasetPackage")
    released = json.loads((release / "release.json").read_bytes())
    files = {file.name: file for file in objects.foreach_type("software_File")}
    assert {name: file.verifiedUsing[0].hashValue for name, file in files.items()} == {
        f"./{name}": entry["sha256"] for name, entry in released["files"].items() if name != "bom.spdx3.json"
    }
    related: dict[tuple[str, str], list[Any]] = {
        (one.from_.name, one.relationshipType.rpartition("/")[2]): list(one.to)
        for one in objects.foreach_type("Relationship", match_subclass=True)
    }
    assert related["crystal_demo", "trainedOn"] == related["crystal_demo", "testedOn"] == [data]
    assert files["./data/words/train/00000.h5"] in related["words", "contains"]
    assert files["./revisions/ckpt_003/model.safetensors"] in related["crystal_demo", "contains"]
    (licence,) = related["crystal_demo", "hasDeclaredLicense"]
    assert licence.simplelicensing_licenseExpression == "Apache-2.0"
    (licence,) = related["words", "hasDeclaredLicense"]
    assert licence.simplelicensing_licenseExpression == "LicenseRef-data-words"
    (text,) = objects.foreach_type("simplelicensing_SimpleLicensingText")
    assert text.simplelicensing_licenseText == "not stated"
    assert "torch" in {one.name for one in related["crystal_demo", "dependsOn"]}


def test_the_bill_of_a_release_with_a_supplier_conforms_to_the_ai_profile(made: Path, tmp_path: Path) -> None:
    """Written again by the classes that are made of the official model, which refuse what lacks a required property;
    the profile's own requirements are those of AIPackage.md and AI.md of SPDX 3.0.1.
    """
    spdx = pytest.importorskip("spdx_python_model", reason="pip install 'weftrain[describe]'").v3_0_1
    stated = ("--supplier", "Looms & Co", "--download-location", "https://example.org/mine")
    words = ("release", made / "runs" / "crystal_demo", "--to", tmp_path / "release", "--licence", "MIT")
    assert "needs both" in weftrain(*words, *stated[:2]).output
    assert "--supplier, --download-location: " in weftrain(*words, *stated[:3], "no address").output
    done(weftrain(*words, *stated))
    objects, again = spdx.SHACLObjectSet(), io.BytesIO()
    with (tmp_path / "release" / "bom.spdx3.json").open("rb") as file:
        spdx.JSONLDDeserializer().read(file, objects)
    spdx.JSONLDSerializer().write(objects, again)
    (document,) = objects.foreach_type("SpdxDocument")
    assert [one.rpartition("/")[2] for one in document.profileConformance] == [
        *("core", "software", "simpleLicensing", "ai")
    ]
    (model,) = objects.foreach_type("ai_AIPackage")
    assert (model.suppliedBy.name, model.software_downloadLocation) == (stated[1], stated[3])
    assert model.releaseTime is not None
    assert model.software_packageVersion
    assert model.software_primaryPurpose
    licences = [
        one.relationshipType.rpartition("/")[2]
        for one in objects.foreach_type("Relationship", match_subclass=True)
        if one.from_ is model and "License" in one.relationshipType
    ]
    assert sorted(licences) == ["hasConcludedLicense", "hasDeclaredLicense"]
    told = claims_of(tmp_path / "release")["supplier and place of download"]
    assert (told["cover"], told["detail"]) == (
        "not covered",
        "Looms & Co, https://example.org/mine, as whoever made it states",
    )
    edited(tmp_path / "release", supply={"name": "Others", "download_location": stated[3], "time": 0})
    assert "bom.spdx3.json: is not the description that follows" in weftrain("verify", tmp_path / "release").output


def test_a_release_without_descriptions_as_earlier_versions_made_is_whole(release: Path) -> None:
    told = claims_of(release)
    assert {told[name]["cover"] for name in ("descriptions of the datasets", "bill of materials")} == {"derivation"}
    (release / "bom.spdx3.json").unlink()
    (release / "data" / "words" / "croissant.json").unlink()
    write_release(release)
    told = claims_of(release)
    assert {told[name]["cover"] for name in ("descriptions of the datasets", "bill of materials")} == {"not covered"}


def test_the_datasets_are_prepared_again_from_inputs(release: Path, made: Path, tmp_path: Path) -> None:
    told = weftrain("verify", release, "--json", "--inputs", made / "texts").stdout
    claim = next(one for one in json.loads(told)["claims"] if one["name"] == "tokens of the texts")
    assert claim["cover"] == "derivation"
    assert claim["detail"] == "2 shards made again from 60 files, 60 documents: the same bytes"
    texts = Path(shutil.copytree(made / "texts", tmp_path / "texts"))
    (texts / "007.txt").write_text("other words\n")
    sample = ("--sample", 0.5, "--seed", 7)
    told = weftrain("verify", release, "--json", "--inputs", f"words={made / 'texts'}", *sample).stdout
    claim = next(one for one in json.loads(told)["claims"] if one["name"] == "tokens of the texts")
    assert claim["cover"] == "derivation"
    assert "covered for 1 of 2 shards, seed 7 (words/" in claim["detail"]
    for given, words in (
        ((texts,), "texts/007.txt: row 0 of the dataset's is not in it"),
        ((f"words={texts}", "--sample", 1), "row 0): it is not in it: give the files that it was made of"),
    ):
        found = weftrain("verify", release, "--inputs", *given)
        assert found.exit_code == 2
        assert words in found.output
        assert "texts/007.txt: " in found.output
    assert "say of which dataset" not in found.output
    for option in (("--reading", "text_key=x"), ("--sample", 0.5)):
        assert f"{option[0]} has no effect without --inputs" in weftrain("verify", release, *option).output
    assert "give each once, as KEY=VALUE" in weftrain("verify", release, "--inputs", texts, "--reading", "x").output
    assert "2 shards made again from 60 files, 60 documents: the same bytes" in done(
        weftrain("data", "verify", release / "data" / "words", "--inputs", made / "texts")
    )
