"""Makes what tests/test_earlier_files.py reads: one of everything that weftrain writes to disk, as small as possible.

    python tests/earlier_files/make.py tests/earlier_files/NAME

writes NAME/files.tar.xz and NAME/expected.json; NAME gives the versions of the formats inside. The committed pair is
never made again, because it stands for the files that users have. When a format gets a new version, make a second pair
beside it. Everything is written by the command line in this process, in an empty folder, with relative paths and an
invented host name, so nothing tells where it was made.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import random
import shutil
import socket
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from weftrain.cli.main import main
from weftrain.core import checkpoint
from weftrain.core.data import training_source
from weftrain.core.formats.dataset import read_dataset_manifest
from weftrain.core.recipe_file import load_recipe
from weftrain.core.run.speed import Peak

WORDS = [
    "the",
    "weft",
    "is",
    "carried",
    "across",
    "a",
    "warp",
    "by",
    "hand",
    "and",
    "the",
    "loom",
    "keeps",
    "every",
    "thread",
]
PREP = """\
name: two
description: prose of two sources, and code for fill-in-the-middle
licence: CC0-1.0
tokenizer: tokenizer.json
sequence_length: 16
heldout_fraction: 0.1
source_key: kind
rows_per_shard: 48
datasets:
  - {name: prose, inputs: [{addresses: [prose.jsonl]}]}
  - {name: code, fim: {rate: 0.5, spm_share: 0.5}, inputs: [{addresses: [code], source: code, suffixes: [.py]}]}
"""
COMMON = [
    "model.num_layers=2",
    "model.hidden_size=4",
    "model.num_heads=2",
    "model.intermediate_size=10",
    "model.max_position_embeddings=16",
    "data.sequence_length=16",
    "batch.global_batch_size=4",
    "batch.micro_batch_size=2",
    "precision.compute=float32",
    "kernels.preferences=[torch, reference]",  # what every CPU has
    "log.tensorboard=false",
    "log.evaluate_rows=4",
    "checkpoint.every_steps=0",
]
CRYSTAL = [
    *COMMON,
    "model.vocab_size=332",
    "model.rotary_dim=2",
    "model.mup.base_hidden_size=2",
    "data.root=datasets",
    "data.sources=[{name: prose, path: prose, weight: 0.7}, {name: code, path: code, weight: 0.3, fim: {rate: 0.5, spm_share: 0.5}}]",
    "schedule.learning_rate=[{shape: linear, steps: 2, start: 0, end: 0.01}, {shape: constant, steps: 1000, start: 0.01}]",
    "log.evaluate_every_steps=2",
]
AMBER = [
    *COMMON,
    "model.num_layers=1",
    "model.vocab_size=24",
    "model.rotary_dim=2",
    "data.sources=[]",
    "data.synthetic_rows=8",
    "log.evaluate_every_steps=0",
]
STORED = [
    "backend.options.tile_elements=1024",
    "backend.options.threads=1",
    "checkpoint.at_end=false",
    "schedule.steps=1",
]


def command(*arguments: object) -> str:
    words = [str(argument) for argument in arguments]
    sys.argv[:] = ["weftrain", *words]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, f"{' '.join(words)}: {result.output}"
    return result.stdout


def write_texts() -> None:
    generator = random.Random(5)
    kinds = ("verse", "letter")
    lines = [
        {"text": " ".join(generator.choices(WORDS, k=generator.randint(4, 40))), "kind": kinds[n % 2]}
        for n in range(60)
    ]
    Path("texts/code").mkdir(parents=True)
    Path("texts/prose.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for number in range(30):
        name = generator.choice(WORDS)
        Path(f"texts/code/{number:02d}.py").write_text(
            f"def {name}_{number}(x):\n    return x + {number}\n" * generator.randint(1, 4)
        )
    Path("prep.yaml").write_text(PREP)


def write_datasets() -> None:
    write_texts()
    command(
        "prep",
        "texts/prose.jsonl",
        "texts/code",
        "--output",
        "first",
        "--name",
        "all",
        "--vocab-size",
        "300",
        "--sequence-length",
        "16",
    )
    shutil.copy("first/all/tokenizer.json", "texts/tokenizer.json")
    shutil.rmtree("first")
    command("prep", "prep.yaml", "--inputs", "texts", "--output", "datasets", "--workers", "1")


def write_runs() -> None:
    """Four runs, of which mapped and direct hold their only step in the store that their backend keeps.

    crystal was extended, rolled back, trained again and evaluated. amber is there for its Hugging Face export, which is
    a Llama's.
    """
    crystal = ["train", "crystal_demo", *CRYSTAL, "--run", "crystal", "backend.options.threads=1"]
    command(*crystal, "schedule.steps=2", "data.chunks=1")
    longer = [*crystal, "schedule.steps=4", "data.chunks=2"]
    command(*longer, "--allow", "schedule.steps", "--allow", "data.chunks")
    command("rollback", "runs/crystal", "--to", "2", "--reason", "the loss of step 3 looked odd")
    command(*longer)
    command("eval", "runs/crystal", "--watch", "--until-step", "4", "--every-seconds", "0.1")
    streaming = ["--backend", "streaming", *STORED]
    command("train", "crystal_demo", *CRYSTAL, *streaming, "--run", "mapped", "backend.options.tier=mapped")
    command("train", "amber_demo", *AMBER, *streaming, "--run", "direct", "backend.options.tier=direct")
    command("train", "amber_demo", *AMBER, "--run", "amber", "schedule.steps=2", "backend.options.threads=1")


def write_releases_and_exports(keys: Path) -> str:
    """The public key that signed the release."""
    public = command("sign", "--new-key", "--key", keys / "key.pem").split()[-1]
    command("release", "runs/crystal", "--to", "release", "--licence", "Apache-2.0", "--sign", keys / "key.pem")
    for run in ("crystal", "amber"):
        command("convert", "to-huggingface", f"runs/{run}", f"huggingface/{run}", "--dtype", "float32")
    Path("modelzoo").mkdir()
    command("convert", "checkpoint-to-cerebras", "runs/crystal", "modelzoo/step_4.mdl")
    Path("modelzoo/params.yaml").write_text(
        command("convert", "params-from-recipe", "runs/crystal/recipe.yaml", "data.chunks=null")
    )
    command("bench", "train", "amber_demo", *AMBER, "--steps", "8", "--report", "bench", "--threads", "1")
    for path in Path("bench").iterdir():
        if path.name != "report.json":  # nothing reads the pages
            path.unlink()
    return public


def state_sha256(folder: Path) -> str:
    """Of a checkpoint's tensors in the order of their names: name, dtype, shape, bytes."""
    state, _ = checkpoint.load(folder)
    digest = hashlib.sha256()
    for name in sorted(state.tensors):
        tensor = state.tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def rows_sha256(recipe: str, steps: int) -> str:
    """Of the token ids that training reads in its first steps."""
    source = training_source(load_recipe(recipe).recipe)
    digest = hashlib.sha256()
    for step in range(steps):
        digest.update(source.rows(step, 0, source.global_batch_size).ids.tobytes())
    return digest.hexdigest()


def losses(run: Path) -> list[float]:
    """Of the steps on the run's own line, the first step first."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {record["step"]: record["loss"] for record in records if record["kind"] == "step"}
    return [found[step] for step in sorted(found)]


def longer_by_two_steps(run: str) -> list[float]:
    """Losses of all steps of a copy of the run that is trained two steps longer, in four chunks where there are two."""
    shutil.copytree("runs", "longer")
    steps = len(losses(Path("runs", run))) + 2
    more = [f"schedule.steps={steps}", "--allow", "schedule.steps"]
    more += ["data.chunks=3", "--allow", "data.chunks"] if run == "crystal" else []
    command("train", f"longer/{run}/recipe.yaml", "--runs", "longer", "--run", run, *more)
    found = losses(Path("longer", run))
    shutil.rmtree("longer")
    return found


def expected(public: str) -> dict[str, Any]:
    manifests = {name: read_dataset_manifest(Path("datasets", name)) for name in ("prose", "code")}
    checkpoints = sorted(Path().glob("runs/*/checkpoints/step_*"))
    return {
        "dataset_ids": {name: {"train": one.train.id, "heldout": one.heldout.id} for name, one in manifests.items()},
        "rows_sha256_8_steps": rows_sha256("runs/crystal/recipe.yaml", 8),
        "checkpoints": {
            str(path): {"root": checkpoint.verify(path)["root"], "state_sha256": state_sha256(path)}
            for path in checkpoints
        },
        "losses_two_steps_longer": {run: longer_by_two_steps(run) for run in ("crystal", "mapped", "direct")},
        "release": {"root": json.loads(Path("release/release.json").read_bytes())["root"], "signed_by": public},
    }


def packed(folder: Path) -> bytes:
    """The folder as a .tar.xz of files in the order of their names, without owners and times."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:xz", preset=9) as archive:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            entry = archive.gettarinfo(path, path.relative_to(folder).as_posix())
            entry.uid = entry.gid = entry.mtime = 0
            entry.uname = entry.gname = ""
            with path.open("rb") as file:
                archive.addfile(entry, file)
    return out.getvalue()


def make(target: Path) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        work, keys = Path(folder, "made"), Path(folder, "keys")
        work.mkdir()
        keys.mkdir()
        patch.chdir(work)
        patch.setattr(socket, "gethostname", lambda: "loom")
        patch.setattr(platform, "node", lambda: "loom")
        patch.setattr(platform, "platform", lambda: "Linux")
        patch.setattr("weftrain.cli.assembly.measured_peak", lambda device, dtype: Peak(1e11, "invented"))
        patch.setattr("weftrain.backends.streaming.store.file.boot_id", lambda: "")
        write_datasets()
        write_runs()
        public = write_releases_and_exports(keys)
        for lock in [*work.rglob("lock"), *work.rglob(".*.lock")]:  # they name a process
            lock.unlink()
        data = packed(work)
        (target / "expected.json").write_text(json.dumps(expected(public), indent=1) + "\n")
        (target / "files.tar.xz").write_bytes(data)
    print(f"{target}: {len(data):,} bytes")


if __name__ == "__main__":
    destination = Path(sys.argv[1]).absolute()
    destination.mkdir(parents=True, exist_ok=True)
    make(destination)
