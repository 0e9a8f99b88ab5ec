"""One table over all verbs: what is misspelt is answered in one helpful line, before anything is computed."""

from __future__ import annotations

import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from weftrain.cli.main import VERBS, main

# command -> what the answer must hold
ANSWERS = {
    # verbs
    "trian crystal_demo": "did you mean `weftrain train`?",
    "bench trian crystal_demo": "did you mean 'train'?",
    "data stat d": "did you mean 'stats'?",
    "data show d": "there is croissant, export, fetch, fim-report, head, reference, report, stats, verify, where",
    "convert recipe-from-parms p": "did you mean 'recipe-from-params'?",
    "kernels chek": "did you mean 'check'?",
    "backends steup": "did you mean 'setup'?",
    # options
    "train crystal_demo --bakend local": "Did you mean '--backend'?",
    "prep texts.jsonl --nmae x": "'--name'",
    "bench machine --dsk x": "Did you mean '--disk'?",
    "runs --jsno": "Did you mean '--json'?",
    "gpu --olny bits": "'--only'",
    # keys
    "train crystal_demo schedule.stpes=3": "did you mean 'schedule.steps'?",
    "show crystal_demo modle.hidden_size=3": "did you mean 'model'?",
    "lower crystal_demo batch.replics=2": "did you mean 'batch.replicas'?",
    "bench sweep crystal_demo --vary sede=1,2 --to out": "did you mean 'seed'?",
    "bench stream crystal_demo optimizer.lr=1": "schedule.learning_rate",
    # recipes
    "train crystal_dmeo": "did you mean 'crystal_demo'?",
    "train my_recpie.yaml": "did you mean my_recipe.yaml?",
    "show crystal_dmeo": "did you mean 'crystal_demo'?",
    "plan crystal_dmeo": "did you mean 'crystal_demo'?",
    "launch crystal_dmeo --nodes 1": "did you mean 'crystal_demo'?",
    "lower crystal_dmeo": "did you mean 'crystal_demo'?",
    "recipe crystal_dmeo": "did you mean 'crystal_demo'?",
    "bench train crystal_dmeo": "did you mean 'crystal_demo'?",
    "bench stream crystal_dmeo": "did you mean 'crystal_demo'?",
    "bench data crystal_dmeo": "did you mean 'crystal_demo'?",
    "bench sweep crystal_dmeo --vary seed=1,2 --to out": "did you mean 'crystal_demo'?",
    "data where crystal_dmeo --step 1 --row 1": "did you mean 'crystal_demo'?",
    "convert params-from-recipe crystal_dmeo": "did you mean 'crystal_demo'?",
    "prep ambr": "did you mean the recipe 'amber'?",
    # runs, releases, datasets, folders and files
    **dict.fromkeys(
        (
            f"{verb} runs/crystal_deom {more}"
            for verb, more in {
                "eval": "",
                "generate": "--prompt x",
                "chat": "--message x",
                "serve": "",
                "memorize": "",
                "timeline": "",
                "replica": "--wait 0",
                "report": "",
                "track": "--to tensorboard",
                "watch": "--once",
                "log": "",
                "rollback": "--to 3 --reason x",
                "defer": "--chunk 3 --reason x",
                "prune": "--keep-last 2",
                "release": "--to out --licence MIT",
                "verify": "",
                "compare": "",
                "figures": "--output out",
                "convert checkpoint-to-cerebras": "out",
                "convert to-huggingface": "out",
                "convert to-torchtitan": "out",
                "convert to-peft": "out",
                "bench compare": "",
                "bench mlperf": "out.log --org o --platform p",
                "bench submission": "out",
                "bench verify": "",
            }.items()
        ),
        "did you mean runs/crystal_demo?",
    ),
    **dict.fromkeys(
        (
            "sign relaese --key k",
            "publish relaese --to out",
            "replay relaese",
            "resume relaese --as mine",
            "follow relaese --to out",
            "openness relaese",
            "audit relaese",
            "convert from-huggingface relaese crystal_demo",
        ),
        "did you mean release?",
    ),
    **{
        f"data {verb}": "did you mean datasets/stdlib?"
        for verb in ("stats datasets/stdlb", "verify datasets/stdlb", "report dataset/stdlib", "head datasets/stdlb")
    },
    "data croissant datasets/stdlb": "did you mean datasets/stdlib?",
    "data export megatron datasets/stdlb out": "did you mean datasets/stdlib?",
    "data reference datasets/stdlb --of runs/crystal_demo": "did you mean datasets/stdlib?",
    "convert from-peft relaese release crystal_demo --run x": "did you mean release?",
    "safety runs/crystal_demo --sets relaese": "did you mean release?",
    "runs rnus": "did you mean runs?",
    "prep texs.jsonl --name x": "did you mean texts.jsonl?",
    "prep texts.jsonl --name x --tokenizer my_recipe.yml": "did you mean my_recipe.yaml?",
    "eval runs/crystal_demo --code texs.jsonl": "did you mean texts.jsonl?",
    "memorize runs/crystal_demo --sample texs.jsonl": "did you mean texts.jsonl?",
    "compare runs/crystal_demo --loss-on texs.jsonl --to out": "did you mean texts.jsonl?",
    "convert recipe-from-params my_recipe.yml --name x": "did you mean my_recipe.yaml?",
    "convert checkpoint-from-cerebras texs.jsonl crystal_demo --run x": "did you mean texts.jsonl?",
    "kernels compile --diff texs.jsonl": "did you mean texts.jsonl?",
    # backends, kernels, formats and other choices
    "show crystal_demo --backend strming": "did you mean 'streaming'?",
    "plan crystal_demo --backend strming": "did you mean 'streaming'?",
    "bench train crystal_demo --backend locla": "did you mean 'local'?",
    "plan crystal_demo --devices 4xH10": "the names are A100-80GB, A100-40GB, H100",
    "kernels check --op atention": "there is: rms_norm, ",
    "kernels check --source torhc": "there is: ",
    "kernels bench --op atention": "there is: rms_norm, ",
    "kernels compile --target sm_9": "there is: sm_80, sm_86",
    "show crystal_demo kernels.prefrences=[torch]": "did you mean 'kernels.preferences'?",
    "prep texts.jsonl --name x --format jsnl": "there is amber, jsonl, json, parquet",
    "prep texts.jsonl --name x --engine gigatokn": "is not one of 'auto', 'tokenizers', 'gigatoken'",
    "data export cerebas datasets/stdlib out": "is not one of 'cerebras', 'megatron'",
    "backends setup cerebas": "is not 'cerebras'",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("misspelt")
    for name in ("runs/crystal_demo", "release", "datasets/stdlib"):
        (folder / name).mkdir(parents=True)
    (folder / "my_recipe.yaml").write_text("name: mine\n")
    (folder / "texts.jsonl").write_text('{"text": "a"}\n')
    return folder


@pytest.mark.parametrize("command", ANSWERS)
def test_the_answer_helps_in_one_line(command: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    result = CliRunner().invoke(main, shlex.split(command), prog_name="weftrain")
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    told = [line for line in result.output.splitlines() if line and not line.startswith(("Usage: ", "Try ", "  "))]
    assert ANSWERS[command] in "\n".join(told), result.output
    # before it plan names the backend that it chose, and a replica says what it waits for
    assert len(told) <= (2 if command.startswith(("plan ", "replica ")) else 1), result.output
    assert not (place / "out").exists()


def test_the_table_has_every_verb() -> None:
    """A verb that takes no word of the user's has none to misspell."""
    assert not {verb for group in VERBS.values() for verb in group} - {command.split()[0] for command in ANSWERS}
    context = click.Context(main)
    for name in main.list_commands(context):
        command = main.get_command(context, name)
        for below in command.list_commands(context) if isinstance(command, click.Group) else ():
            assert any(one.startswith(f"{name} {below} ") for one in ANSWERS) or (name, below) in NOTHING_TO_MISSPELL


NOTHING_TO_MISSPELL = {("data", "fetch"), ("data", "fim-report"), ("bench", "kernels"), ("kernels", "fetch")}
