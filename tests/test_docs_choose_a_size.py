"""docs/choose-a-size.md: what it quotes is what its commands print, and its table of sizes is recomputed."""

from __future__ import annotations

import re
import shlex

import pytest
from click.testing import CliRunner
from places import ROOT

from weftrain.cli.main import main
from weftrain.core.parameters import parameter_count
from weftrain.core.recipe_file import load_recipe

PAGE = (ROOT / "docs" / "choose-a-size.md").read_text()
ROW = re.compile(r"^\| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \| (.*) \|$", re.MULTILINE)
ROWS = [(*(int(cell.replace(",", "")) for cell in row[:6]), row[6].split(" | ")) for row in ROW.findall(PAGE)]


def output(command: str) -> str:
    done = CliRunner().invoke(main, shlex.split(command)[1:])
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


def test_every_command_runs_and_prints_what_is_quoted() -> None:
    blocks = re.findall(r"```bash\n([^`]*?)```(?:\n\n```text\n(.*?)```)?", PAGE, re.DOTALL)
    assert (len(blocks), sum(bool(quoted) for _, quoted in blocks)) == (6, 4)
    for commands, quoted in blocks:
        printed = "".join(output(command) for command in commands.replace("\\\n", " ").splitlines())
        for line in quoted.splitlines():
            assert " ".join(line.split()) in printed, f"{line}\n{printed}"


@pytest.mark.prove
@pytest.mark.parametrize(
    "row", [pytest.param(row, marks=pytest.mark.soak if row[0] > 128 else (), id=str(row[0])) for row in ROWS]
)
def test_table_of_sizes(row: tuple[int, int, int, int, int, int, list[str]]) -> None:
    width, layers, vocabulary, sequence, batch, parameters, (tokens, steps, *times) = row
    overrides = [
        f"model.hidden_size={width}",
        f"model.num_heads={width // 64}",
        f"model.intermediate_size={width * 8 // 3}",
        f"model.num_layers={layers}",
        f"model.vocab_size={vocabulary}",
        f"model.max_position_embeddings={sequence}",
        f"data.sequence_length={sequence}",
        f"batch.global_batch_size={batch}",
        f"batch.micro_batch_size={min(batch, 8 if width == 2048 else 32)}",
        f"schedule.steps={steps.replace(',', '')}",
    ]
    recipe = load_recipe("crystal_demo", overrides).recipe
    assert parameter_count(recipe.model) == parameters
    assert f"{recipe.tokens_per_step:,}" == tokens
    assert recipe.tokens_per_step * recipe.schedule.steps == pytest.approx(20 * parameters, rel=0.002)
    for device, time in zip(("A100-80GB", "H100"), times, strict=True):
        plan = f"weftrain plan crystal_demo --devices 1x{device} backend.options.compile=true {' '.join(overrides)}"
        assert f"whole run, predicted {time} for" in output(plan)


def test_the_table_was_found() -> None:
    assert len(ROWS) == 6
