"""Each command in the README and in docs/ is run, in the order of its page, as a reader would; only the length of a run
is cut.

A block marked `bash` is run; `text` blocks are output, or commands for machines and files that a test does not have.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from pages import commands, needs_vendor
from places import ROOT

from weftrain.analysis import coordinate_check
from weftrain.backends.cerebras import environment
from weftrain.cli.main import VERBS, main
from weftrain.core.run.speed import Peak

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SEVEN_BILLION = re.compile(r"\b(amber_7b|crystalcoder_7b_phase\d)\b")


# Pages whose commands train for some seconds each.
LONG = (
    "weight-streaming.md",
    "analyse-checkpoints.md",
    "keep-a-record.md",
    "examine-a-release.md",
    "figures.md",
    "objectives.md",
)
# What other tests follow: test_add_pages.py with files and changes, test_docs_choose_a_size.py with what is printed,
# test_paths.py as printed and from an installed package.
ELSEWHERE = ("add-a-", "add-an-op", "choose-a-size", "benchmark", "train-on-a-cluster")


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.name, marks=[pytest.mark.prove] if page.name in LONG else [])
        for page in PAGES
        if not page.name.startswith(ELSEWHERE)
    ],
)
def test_commands(page: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(environment.PYTHON_VARIABLE, str(tmp_path / "not there"))  # whoever reads may not have it
    run_page(page, tmp_path, corpus, monkeypatch, vendor=False)


@pytest.mark.cerebras
def test_commands_with_the_vendors_environment(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """from-laptop-to-wafer.md, the other page with such commands, is run by tests/test_paths.py."""
    if reason := environment.missing():
        pytest.skip(f"the cerebras backend cannot run here: {reason}")
    run_page(ROOT / "docs" / "backend-cerebras.md", tmp_path, corpus, monkeypatch, vendor=True)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """my_texts/, more_texts/, my_chats.jsonl, my_preferences.jsonl, and datasets/ with texts in place of the embedded corpus, whose own preparation has tests
    of its own.
    """
    folder = tmp_path_factory.mktemp("corpus")
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    for name, chosen in (("my_texts", sources[:40]), ("more_texts", sources[40:44])):
        (folder / name).mkdir()
        for source in chosen:
            (folder / name / f"{source.stem}.txt").write_bytes(source.read_bytes()[:6_000])
    said = ({"prompt": f"What is {number} + 1?", "completion": f"{number + 1}, of course."} for number in range(200))
    (folder / "my_chats.jsonl").write_text("".join(json.dumps(one) + "\n" for one in said))
    preferred = (
        {"prompt": f"{number} + 1?", "chosen": f"{number + 1}.", "rejected": "Who knows?"} for number in range(99)
    )
    (folder / "my_preferences.jsonl").write_text("".join(json.dumps(one) + "\n" for one in preferred))
    arguments = [
        "--name",
        "python_stdlib",
        "--vocab-size",
        "512",
        "--heldout-fraction",
        "0.2",
        "--sequence-length",
        "32",
        "--workers",
        "1",
    ]
    arguments += ["--output", str(folder / "datasets")]
    made = CliRunner().invoke(main, ["prep", str(folder / "my_texts"), *arguments])
    assert made.exit_code == 0, made.output
    return folder


def run_page(page: Path, folder: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, vendor: bool) -> None:
    monkeypatch.chdir(folder)
    # A run measures the machine's matrix-multiply peak twice, a second each: no command of these pages is about that.
    monkeypatch.setattr("weftrain.cli.assembly.measured_peak", lambda device, dtype: Peak(1e11, "known in tests"))
    shutil.copytree(corpus, folder, dirs_exist_ok=True)
    # models are too small for more, and two threads wait for each other where the machine is busy
    torch.set_num_threads(1)
    for command in commands(page):
        words = shlex.split(command)
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command
            continue
        if words[:3] == ["python", "-m", "weftrain.analysis.coordinate_check"]:
            monkeypatch.setattr(
                coordinate_check, "coordinate_check", partial(coordinate_check.coordinate_check, widths=(32, 64))
            )
            coordinate_check.main(words[3:])
            continue
        if words[:2] == ["python", "-m"]:
            subprocess.run([sys.executable, *words[1:]], check=True, capture_output=True, timeout=200)
            continue
        assert words[0] == "weftrain", f"{page.name}: '{command}': mark the block `text`, or teach this test to run it"
        if words[1:3] == ["backends", "setup"]:
            continue  # gigabytes: `make prove-cerebras` runs it
        result = run(words[1:])
        if not vendor and needs_vendor(command):
            assert result.exit_code == 2, command
            assert environment.PYTHON_VARIABLE in result.output, result.output
        elif words[1] == "train" and SEVEN_BILLION.search(command):
            assert result.exit_code == 2, command  # there is no such corpus here: that, and nothing else, must be wrong
            assert "no dataset" in result.output or "missing" in result.output, result.output
        else:
            assert result.exit_code == 0, f"{command}\n{result.output}"


def run(words: list[str]) -> Result:
    """A run of a demo is cut to one layer, short rows and, where the page does not say how many, 12 steps."""
    if words[0] == "train" and words[1].endswith("_demo") and "python_stdlib" not in words and "--run" not in words:
        words = [
            *words,
            "data.sequence_length=32",
            "model.num_layers=1",
            "batch.global_batch_size=2",
            "batch.micro_batch_size=2",
        ]
        if not any(word.startswith("schedule.steps=") for word in words):
            words.append("schedule.steps=12")
    if words[0] == "prep" and "--workers" not in words:
        words = [*words, "--workers", "1"]  # the processes have tests of their own
    return CliRunner().invoke(main, words)


def test_readme_names_every_verb_recipe_backend_and_page() -> None:
    from weftrain.backends.common.registry import find_backends
    from weftrain.core.parameters import parameter_count
    from weftrain.core.recipe_file import builtin_recipes, load_recipe

    text = (ROOT / "README.md").read_text()
    assert "@@" not in text
    pages = "".join(page.read_text() for page in PAGES)
    for name in (name for verbs in VERBS.values() for name in verbs):
        assert f"weftrain {name}" in pages, f"no page shows weftrain {name}"
    for name in builtin_recipes():
        (row,) = (line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
        recipe = load_recipe(name).recipe
        for figure in (parameter_count(recipe.model), recipe.tokens_per_step, recipe.schedule.steps):
            assert f" {figure:,} " in row, (name, figure)
    for name in find_backends():
        assert f"| [`{name}`](docs/backend-{name}.md) |" in text
    for page in PAGES[1:]:
        assert f"docs/{page.name}" in text
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / link).exists(), link


NAMED = re.compile(r"`((?:[\w*-]+/)*[\w*]+\.py)(?::([\w.]+))?`")


def test_every_file_and_function_that_a_page_names_exists() -> None:
    """`path.py` and `path.py:function` or `path.py:Class.method`, from the root or beside the page; a bare name
    anywhere.
    """
    ours = [path for folder in ROOT.glob("[a-z]*/") for path in folder.rglob("*.py")]
    for page in [*PAGES, *ROOT.glob("[a-z]*/README.md")]:
        text = page.read_text()
        made = re.findall(r"^```\w+ (\S+)$", text, re.MULTILINE)  # files that the page has its reader write
        prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
        for path, function in NAMED.findall(prose):
            found = [*ROOT.glob(path), *page.parent.glob(path)]
            found = found or [one for one in ours if one.name == path]
            assert found or path in made, f"{page.relative_to(ROOT)}: there is no {path}"
            assert not function or any(defines(one, function) for one in found), (
                f"{page.relative_to(ROOT)}: {path} defines no {function}"
            )


def defines(path: Path, name: str) -> bool:
    body: list[ast.stmt] = ast.parse(path.read_text()).body
    for part in name.split("."):
        one = next(
            (node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == part), None
        )
        if one is None:
            return False
        body = one.body
    return True


def test_the_picture_of_the_architecture_is_drawn_from_the_imports() -> None:
    spec = importlib.util.spec_from_file_location("draw_architecture", ROOT / "docs" / "draw_architecture.py")
    assert spec is not None
    assert spec.loader is not None
    drawing = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = drawing  # where dataclasses look for it
    spec.loader.exec_module(drawing)
    size = re.compile(r">([\d,]+) lines<")
    now, then = drawing.draw(), drawing.TARGET.read_text()
    redraw = "docs/architecture.svg is out of date: make docs"
    assert size.sub("", now) == size.sub("", then), redraw
    for count, drawn in zip(size.findall(now), size.findall(then), strict=True):
        count, drawn = (int(text.replace(",", "")) for text in (count, drawn))
        assert abs(count - drawn) <= max(300, count / 3), f"{redraw} ({drawn} lines, now {count})"
