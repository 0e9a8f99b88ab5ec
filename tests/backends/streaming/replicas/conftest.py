"""A recipe whose replicas have different numbers of tokens that bear a loss, and what one process makes of it."""

from __future__ import annotations

import random

import pytest
from click.testing import CliRunner
from replica_runs import BASE, alone

from weftrain.cli.main import main
from weftrain.core.backend import State


@pytest.fixture(scope="module")
def masked_rows(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Rows of one document each, which fills half of it or more: each replica has another number of tokens that bear a
    loss.
    """
    folder, drawn = tmp_path_factory.mktemp("masked"), random.Random(1)
    (folder / "texts").mkdir()
    for number in range(100):
        (folder / "texts" / f"{number}.txt").write_text("".join(drawn.choices("abcdefgh ", k=drawn.randint(11, 17))))
    options = [
        "--name",
        "short",
        "--sequence-length",
        "13",
        "--vocab-size",
        "300",
        "--packing",
        "best_fit",
        "--output",
        str(folder),
    ]
    done = CliRunner().invoke(main, ["prep", str(folder / "texts"), *options])
    assert done.exit_code == 0, done.output
    sources = "data.sources=[{name: short, path: short, weight: 1}]"
    return [
        "data.synthetic_rows=null",
        f"data.root={folder}",
        sources,
        "model.vocab_size=332",
        "objective.normalizer=bearing_tokens",
    ]


@pytest.fixture
def overrides(tiny_overrides: list[str], masked_rows: list[str]) -> list[str]:
    replaced = ("data.synthetic_rows", "data.sources", "model.vocab_size")
    kept = [item for item in tiny_overrides if not item.startswith(replaced)]
    return [*kept, *masked_rows, "model.num_layers=5", *BASE, "backend.options.threads=1"]


@pytest.fixture
def single(overrides: list[str]) -> tuple[State, list[float]]:
    return alone(overrides)
