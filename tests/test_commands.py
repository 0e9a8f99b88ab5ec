"""Every command that README, the pages and the Makefile show is one that exists: what tests/test_docs.py does not run
is parsed here.

A command in a `text` block or in backticks goes through the real click command: its options, its overrides, its recipe
and its backend. The lines of each Makefile target come from `make -n`; those that train run here, with a smaller model
laid over the same lines.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from places import ROOT

from weftrain.analysis.bench import fsdp2_loop
from weftrain.analysis.compare import same_state
from weftrain.analysis.machine.disk import DiskSpeed
from weftrain.cli.main import main
from weftrain.cli.resolve import resolve
from weftrain.core.errors import WeftrainError
from weftrain.core.recipe_file import builtin_recipes
from weftrain.core.run.speed import Peak
from weftrain.kernels.bench.roofline import Rate

PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "backends" / "README.md",
    ROOT / "kernels" / "README.md",
]
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[0].split()
COMMAND = re.compile(r"(time )?(weftrain|make|pytest|python -m weftrain\S*|bash|--against)( |$)")
# What pages write for a value of the reader's. A word of capitals that is not here must be one that the command takes.
STANDS_FOR = {
    "$SLURM_ARRAY_TASK_ID": "0",
    "$SLURM_ARRAY_TASK_COUNT": "2",
    "minimal": "local",
    "RECIPE": "crystal_demo",
    "S": "0",
    "R": "0",
    "F": "f",
    "F.png": "f.png",
}


def shown(page: Path) -> Iterator[tuple[str, bool]]:
    """Commands of a page, and whether each stands whole in a block; one in backticks may be a mention without its
    arguments.
    """
    text = page.read_text()
    for block in re.findall(r"```(?:bash|text)\n(.*?)```", text, re.DOTALL):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            if COMMAND.match(line):
                yield re.split(r" {3,}|  #", line)[0].strip(), True
    for fragment in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        if COMMAND.match(fragment):
            yield " ".join(fragment.split()), False


def click_context(words: list[str], whole: bool) -> click.Context:
    """The command that `words` name, with its parameters parsed. Raises click.UsageError."""
    context = click.Context(main, info_name="weftrain")
    command: click.Command = main
    while isinstance(command, click.Group):
        if not words or words[0].startswith("-"):
            if whole and words not in (["--help"], ["--version"]) and not command.invoke_without_command:
                raise click.UsageError(f"'{command.name}' needs a command")
            return context
        name, words = words[0], words[1:]
        found = command.get_command(context, name)
        if found is None:
            raise click.UsageError(f"'{command.name}' has no command '{name}'")
        command, context = found, click.Context(found, parent=context, info_name=name)
    try:
        return command.make_context(context.info_name, words, parent=context.parent)
    except (click.MissingParameter, click.BadOptionUsage):  # a mention such as `weftrain show --backend`
        if whole:
            raise
        return context


def check(command: str, whole: bool) -> None:
    words = [STANDS_FOR.get(word, word) for word in shlex.split(command.removeprefix("time ").replace("WEFTRAIN/", ""))]
    for end in ("...", ">"):  # a redirection is the shell's
        words = words[: words.index(end)] if end in words else words
    match words:
        case ["weftrain", *rest]:
            context = click_context(rest, whole)
            parameters = context.params
            if isinstance(recipe := parameters.get("recipe"), str) and "overrides" in parameters:
                varied = [
                    f"{item.split('=')[0]}={item.split('=')[1].split(',')[0]}" for item in parameters.get("vary") or ()
                ]
                recipe = recipe if recipe in builtin_recipes() else "crystal_demo"  # a file of the reader's
                many = parameters.get("devices") or context.info_name == "launch"
                backend = parameters.get("backend") or ("cuda" if many else None)  # as these verbs do
                backend = "cerebras" if context.info_name == "lower" else backend
                resolve(recipe, [*parameters["overrides"], *varied], backend)
            if isinstance(against := parameters.get("against"), str):
                check_against(against)
        case ["--against", program]:
            check_against(program)
        case ["--against"]:
            click_context(["bench", "train", "bench_70m", "--against", "python loop.py"], True)
        case ["make", *rest]:
            goals = [word for word in rest if "=" not in word]
            assert goals, command
            assert set(goals) <= set(TARGETS), command
            for variable in (word.split("=")[0] for word in rest if "=" in word):
                assert f"{variable} ?=" in MAKEFILE, command
        case ["pytest", *rest]:
            check_pytest(rest)
        case ["python", "-m", module, *_]:
            assert importlib.util.find_spec(module), command
        case ["bash", script]:
            assert (ROOT / script).is_file(), command
        case _:
            raise AssertionError(f"'{command}': teach this test to check it")


def check_against(program: str) -> None:
    path, *words = shlex.split(program)
    if path == "analysis/bench/fsdp2_loop.py":
        parameters = fsdp2_loop.main.make_context(path, words).params
        resolve(parameters["recipe"], parameters["overrides"])
    else:
        assert program == "python loop.py" or "..." in program, f"'{program}': teach this test to check it"


def check_pytest(words: list[str]) -> None:
    """Files are there, and a marker is one of ours that some test has."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    markers = {line.split(":")[0] for line in settings["markers"]}
    tests = [path.read_text() for path in (ROOT / "tests").rglob("test_*.py")]
    options = iter(words)
    for word in options:
        match word:
            case "-m":
                names = set(re.findall(r"\w+", next(options))) - {"and", "not", "or"}
                assert names <= markers, words
                for name in names:
                    assert any(f"pytest.mark.{name}" in text for text in tests), name
            case "-k" | "--durations" | "--kernel-device" | "--numprocesses" | "--dist":
                next(options)
            case "-rP" | "-s":
                pass
            case "--ignore":
                assert (ROOT / next(options)).exists(), words
            case path:
                assert (ROOT / path).exists(), words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_a_page_is_one_that_exists(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # files of the reader's are not here, nor their buckets
    monkeypatch.setattr(click.Path, "convert", lambda self, value, param, ctx: Path(value))
    monkeypatch.setattr("weftrain.cli.remote.RunPath.convert", lambda self, value, param, ctx: Path(value))
    # none of a page has to run here
    monkeypatch.setattr("weftrain.backends.common.registry.unavailable_reason", lambda backend: None)
    found = list(shown(page))
    assert found
    for command, whole in found:
        try:
            check(command, whole)
        except Exception as error:
            pytest.fail(f"{page.name}: `{command}`: {error}")


@pytest.mark.parametrize(
    "command",
    [
        "weftrain trian crystal_demo",
        "weftrain train crystal_demo --alow data",
        "weftrain train crystal_demo schedule.stepz=4",
        "weftrain train crystal_demo backend.options.devise=cpu",
        "weftrain train crystall_demo.steps=1 --backend cudda",
        "weftrain plan",
        "weftrain bench sweep bench_70m --vary batch.size=1,2",
        'weftrain bench train bench_70m --against "analysis/bench/fsdp2_loop.py bench_70m --rank 2"',
        "make crystalcoder-steps",
        "make train TRAIN_FLAG=x",
        "pytest -m proof",
        "python -m weftrain.analysis.nothing",
        "bash .ci/walk",
    ],
)
def test_a_command_that_is_wrong_is_found(command: str) -> None:
    with pytest.raises((AssertionError, click.UsageError, WeftrainError)):
        check(command, True)


# -- the Makefile
# ----------------------------------------------------------------------------------------------------


def lines_of(target: str, **variables: str | Path) -> list[str]:
    """The commands of a target as make would run them, without the set-up."""
    command = [
        "make",
        "-n",
        "-o",
        ".venv/.installed",
        target,
        *(f"{name}={value}" for name, value in variables.items()),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [
        line.replace(".venv/bin/", "")
        for line in done.stdout.replace("\\\n", " ").splitlines()
        if not line.startswith("make")
    ]


def run_line(line: str) -> None:
    """One command of ours, in this process. A cap on memory is left out: its own test runs it."""
    words = shlex.split(line)
    if words[:3] == ["python", "-m", "weftrain.analysis.machine.memory_cap"]:
        words = words[words.index("--") + 1 :]
    if words[:3] == ["python", "-m", "weftrain.analysis.compare.same_state"]:
        assert same_state.main(words[3:]) == 0
        return
    assert words[0] == "weftrain", line
    result = CliRunner().invoke(main, words[1:])
    assert result.exit_code == 0, f"{line}\n{result.output}"


SMALL = (
    "model.vocab_size=97 model.hidden_size=64 model.num_layers=2 model.num_heads=4 model.intermediate_size=70 "
    "model.rotary_dim=8"
)
SMALL += " model.max_position_embeddings=32 data.sequence_length=16 precision.compute=float32 log.tensorboard=false"


@pytest.fixture
def _known_speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `plan` and `train` measure of this machine for some seconds."""
    monkeypatch.setattr("weftrain.cli.assembly.measured_peak", lambda *_: Peak(1e11, "known in tests"))
    monkeypatch.setattr(
        "weftrain.kernels.bench.roofline.measured_matmul_peak", lambda *_: Rate(1e11, "known in tests", "FLOP")
    )
    monkeypatch.setattr(
        "weftrain.kernels.bench.roofline.measured_bandwidth", lambda *_: Rate(1e10, "known in tests", "B")
    )
    monkeypatch.setattr("weftrain.analysis.machine.disk.measured_disk", lambda *_: DiskSpeed(1e9, 1e9, 1e9))


@pytest.mark.usefixtures("_known_speeds")
@pytest.mark.parametrize(("target", "lines"), [("crystalcoder-step", 2), ("crystalcoder-1b-step", 3)])
def test_make_crystalcoder(target: str, lines: int, tmp_path: Path) -> None:
    small = lines_of(target, CRYSTALCODER_RUNS=tmp_path, CRYSTALCODER_FLAGS=SMALL)
    assert len(small) == lines
    for line in small:
        run_line(line)


@pytest.mark.usefixtures("_known_speeds")
def test_make_crystalcoder_step_plans_what_it_runs() -> None:
    """At full size: the plan is computed, and the run's memory is what it is capped at."""
    plan, train = lines_of("crystalcoder-step")
    run_line(plan)
    shared = [word for word in shlex.split(plan) if "=" in word]
    assert [word for word in shlex.split(train) if "=" in word] == shared
    assert "memory_cap 8192 -- " in train
    assert "backend.options.memory_limit_mib=8192" in shared


@pytest.mark.usefixtures("_known_speeds")
def test_make_train(tmp_path: Path) -> None:
    """With a few texts in place of the embedded corpus, as .ci/run cuts it: through PREP_FLAGS and TRAIN_FLAGS."""
    for source in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:20]:
        (tmp_path / f"{source.stem}.txt").write_bytes(source.read_bytes()[:20_000])
    texts = " ".join(str(path) for path in sorted(tmp_path.glob("*.txt")))
    prep = (
        f"{texts} --name python_stdlib --vocab-size 512 --heldout-fraction 0.2 --sequence-length 32 --output "
        f"{tmp_path}/datasets"
    )
    train = (
        f"--runs {tmp_path}/runs data.root={tmp_path}/datasets data.sequence_length=32 model.num_layers=1 "
        "schedule.steps=2"
    )
    train += " batch.global_batch_size=2 batch.micro_batch_size=2 log.tensorboard=false"
    lines = lines_of("train", PREP_FLAGS=prep, TRAIN_FLAGS=train)
    assert len(lines) == 2
    for line in lines:
        run_line(line)
    (ci,) = re.findall(r"^make train (.*)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    flags = dict(word.split("=", 1) for word in shlex.split(ci))
    for line in lines_of("train", **flags):
        check(line, True)


@pytest.mark.parametrize("target", ["test", "test-gpu", "prove", "soak", "prove-cerebras"])
def test_make_suites(target: str) -> None:
    """Each line selects tests with markers and paths that there are."""
    lines = lines_of(target)
    assert any("pytest" in line for line in lines)
    for line in lines:
        for word in ("TRITON_INTERPRET=1 ", "PYTHONDONTWRITEBYTECODE= ", "OMP_WAIT_POLICY=passive ", "timeout 600 "):
            line = line.replace(word, "")
        check(shlex.join(shlex.split(line.split("||")[0])), True)


def test_make_help_lists_every_target() -> None:
    done = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == list(
        re.findall(r"^([a-z0-9-]+):", MAKEFILE, re.MULTILINE)
    )


def test_make_lint_types_and_clean() -> None:
    """They run elsewhere, or would remove what runs this test: their programs are there, and what they remove is of
    ours alone.
    """
    checkers = {shlex.split(line.split("mypy")[0] + "mypy" if "mypy" in line else line)[0] for line in lines_of("lint")}
    assert checkers == {"ruff"}
    assert all((Path(sys.executable).parent / name).exists() for name in ("ruff", "mypy", "pytest"))
    types = lines_of("types")
    assert all(
        f"-p weftrain.{folder}" in types[-1]
        for folder in ("core", "kernels", "backends", "data_prep", "analysis", "cli")
    )
    (removed,) = lines_of("clean")
    assert shlex.split(removed)[:2] == ["rm", "-rf"]
    assert not {"runs", "datasets", "reports"} & set(shlex.split(removed))


def test_make_gpu_and_matrix() -> None:
    """They need a GPU, or an index: their programs are there and take these words."""
    (gpu,) = lines_of("gpu", GPU_FLAGS="--dry")
    check(gpu, True)
    removed, wheels = lines_of("gpu-wheels")
    assert shlex.split(removed)[:2] == ["rm", "-rf"]
    check(wheels, True)
    (matrix,) = lines_of("matrix")
    assert (ROOT / shlex.split(matrix)[1]).is_file()


def test_every_target_is_covered() -> None:
    """A new target fails here until a test above runs its lines."""
    covered = {
        "crystalcoder-step",
        "crystalcoder-1b-step",
        "train",
        "test",
        "test-gpu",
        "prove",
        "soak",
        "prove-cerebras",
        "help",
    }
    covered |= {"lint", "types", "clean", "docs", "gpu", "gpu-wheels", "matrix"}
    assert covered == set(TARGETS) == set(re.findall(r"^([a-z0-9-]+):", MAKEFILE, re.MULTILINE))
