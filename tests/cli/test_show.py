"""`weftrain show`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
from click.testing import Result


@pytest.mark.parametrize(
    ("recipe", "wanted"),
    [
        (
            "amber_7b",
            [
                "parameters   6,738,415,616",
                "10 x 224 x 1 = 2240 sequences x 2048 = 4,587,520 tokens a step",
                "1,258,448,486,400",
            ],
        ),
        (
            "crystalcoder_7b_phase1",
            [
                "parameters   6,575,278,720",
                "66 x 16 x 2 = 2112 sequences x 2048 = 4,325,376 tokens a step",
                "0.00228125",
                "0.13875",
            ],
        ),
    ],
)
def test_show_7b(weftrain: Callable[..., Result], recipe: str, wanted: list[str]) -> None:
    result = weftrain("show", recipe, "--step", "1000")
    assert result.exit_code == 0
    for text in wanted:
        assert text in result.output


def test_show_learning_rates_at_a_step(weftrain: Callable[..., Result]) -> None:
    output = weftrain("show", "amber_7b", "--step", "1000").output
    (line,) = (line for line in output.splitlines() if line.split()[:1] == ["1,000"])
    assert line.split()[1:] == ["0.00015"] * 3
    rows = output.partition("samples read before step")[2].splitlines()
    assert rows[0].split() == ["762", "1,000", "274,320"]
    counts = [int(row.split()[2].replace(",", "")) for row in rows[1:8]]
    assert sum(counts) == 1000 * 2240
    # FACTS: billions of tokens, 1259.13... of 1259.11 in all
    wanted = [30.00, 28.86, 197.67, 665.01, 291.92, 21.75, 23.90]
    assert all(abs(count - 2240_000 * share / sum(wanted)) < 4096 for count, share in zip(counts, wanted, strict=True))
    assert "chunks       360 x 762 steps = 274,320 steps" in output
    assert weftrain("show", "amber_7b", "--step", "999999999").exit_code == 2


def test_show_needs_no_torch() -> None:
    """No hardware, no allocation: a 7B recipe is shown without importing torch."""
    program = (
        "import sys; from weftrain.cli.main import main; main(['show', 'crystalcoder_7b_phase3'], "
        "standalone_mode=False)"
    )
    program += "; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=60)


def test_show_lists_recipes(weftrain: Callable[..., Result]) -> None:
    output = weftrain("show").output
    for name in ("amber_7b", "crystalcoder_7b_phase1", "crystal_demo", "bench_70m"):
        assert name in output


def test_backends_lists_local_and_null(weftrain: Callable[..., Result]) -> None:
    output = weftrain("backends").output
    assert "local" in output
    assert "null" in output


def test_evaluations_are_listed(weftrain: Callable[..., Result]) -> None:
    more = "evaluations=[{name: mmlu, every_steps: 40, tasks: [mmlu, arc], limit: 9, where: side}]"
    found = weftrain("show", "crystal_demo", more, "checkpoint.every_steps=40")
    assert found.exit_code == 0, found.output
    assert "evaluation   mmlu: mmlu, arc, 9 of each, every 40 steps, by a process on the side" in found.output
