"""A recipe whose replicas have different numbers of tokens that bear a loss, and what one process makes of it."""

from __future__ import annotations

import random

import pytest
from click.testing import CliRunner
from replica_runs import BASE

from weftrain.cli.assembly import open_data
from weftrain.cli.main import main
from weftrain.cli.resolve import backend_options
from weftrain.core.backend import Job, Plan, State
from weftrain.core.recipe_file import load_recipe


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
    """What the local backend makes of the same recipe, in one process."""
    file = load_recipe("crystal_demo", [*overrides, "backend.name=local"])
    backend, options = backend_options(file)
    run = backend.prepare(Job(file.recipe, Plan(0, 6), options))
    source, _ = open_data(file.recipe)
    results = list(run.train(source))
    assert all(0 < result.bearing_tokens < result.tokens for result in results)
    return run.export_state(), [float(result.loss) for result in results]
