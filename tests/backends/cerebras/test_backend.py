"""The adapter, as far as no vendor environment is needed: what it refuses and in which words, and when state can be
had.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from weftrain.backends import cerebras
from weftrain.backends.cerebras import CerebrasOptions, check_expressible, environment, worker_job
from weftrain.backends.common.registry import find_backends
from weftrain.cli.main import main
from weftrain.core.backend import Job, Plan
from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError, RecipeError
from weftrain.core.recipe_file import load_recipe

Tiny = Callable[..., Recipe]


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(environment.PYTHON_VARIABLE, raising=False)
    monkeypatch.setattr(environment, "environment_folder", lambda: tmp_path / "cache" / "cerebras")


def test_it_is_listed_with_what_is_missing_and_the_command_that_installs_it() -> None:
    reason = find_backends()["cerebras"].unavailable()
    assert reason is not None
    assert "weftrain backends setup cerebras" in reason
    listed = CliRunner().invoke(main, ["backends"]).output
    assert "cerebras" in listed


@pytest.mark.parametrize("verb", [["lower", "crystal_demo"], ["train", "crystal_demo", "--backend", "cerebras"]])
def test_without_its_environment_a_verb_is_one_line_with_the_remedy(
    verb: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, verb)
    assert done.exit_code == 2
    assert "weftrain backends setup cerebras" in done.output
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "lowered").exists()


@pytest.mark.parametrize(
    ("overrides", "options", "words"),
    [
        (["kernels.pins={attention: triton}"], {}, "kernels.pins 'attention' = 'triton'"),
        (["kernels.pins={'rope@layers.0.*': torch}"], {}, "remove the pin"),
        (["kernels.preferences=[torch]"], {}, "kernels.preferences: .* add 'reference'"),
        (["optimizer.non_finite=skip"], {}, "optimizer.non_finite: .* set it to halt"),
        (["precision.compute=bfloat16"], {"target": "cpu"}, "set precision.compute=float32"),
        (["batch.replicas=2", "batch.micro_batch_size=2"], {"target": "cpu"}, "set batch.replicas=1"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_key(
    overrides: list[str], options: dict[str, str], words: str, tiny_recipe: Tiny
) -> None:
    recipe = tiny_recipe("crystal", *overrides)
    with pytest.raises(BackendError, match=words):
        check_expressible(recipe, CerebrasOptions.model_validate(options))
    with pytest.raises(BackendError, match=words):
        worker_job(recipe, CerebrasOptions.model_validate(options), "validate")


def test_every_shipped_recipe_can_be_expressed() -> None:
    for name in ("amber_7b", "amber_demo", "crystal_demo", *(f"crystalcoder_7b_phase{phase}" for phase in (1, 2, 3))):
        check_expressible(load_recipe(name, (), "cerebras").recipe, CerebrasOptions())


def test_a_pin_on_the_reference_is_fine(tiny_recipe: Tiny) -> None:
    check_expressible(tiny_recipe("crystal", "kernels.pins={attention: reference}"), CerebrasOptions())


def test_activation_checkpointing_is_refused_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(environment, "missing", lambda: None)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["lower", "crystal_demo", "backend.options.activation_checkpointing=full"])
    assert done.exit_code == 2
    assert "torch.utils.checkpoint cannot be traced" in done.output
    assert "backend.options.activation_checkpointing" in done.output


def test_an_unknown_option_names_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "missing", lambda: None)
    done = CliRunner().invoke(main, ["lower", "crystal_demo", "backend.options.precision_levle=2"])
    assert done.exit_code == 2
    assert "precision_level" in done.output


def test_lower_is_for_the_system_and_not_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "missing", lambda: None)
    done = CliRunner().invoke(main, ["lower", "crystal_demo", "backend.options.target=cpu"])
    assert done.exit_code == 2
    assert "leave backend.options.target=cpu out" in done.output


def test_evaluation_on_a_system_is_refused_before_anything_is_started(
    tiny_recipe: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*_: object) -> None:
        raise AssertionError("a worker was started")

    monkeypatch.setattr(cerebras, "WorkerProcess", started)
    with pytest.raises(BackendError, match=r"log\.evaluate_every_steps: .* set it to 0"):
        cerebras.BACKEND.prepare(Job(tiny_recipe(), Plan(0, 4, evaluate_every_steps=2), CerebrasOptions()))


@pytest.mark.parametrize(
    ("plan", "looks"),
    [
        (Plan(0, 10, checkpoint_every_steps=4), [4, 8, 10]),
        (Plan(3, 10, checkpoint_every_steps=4, evaluate_every_steps=5), [4, 5, 8, 10]),
        (Plan(0, 6, checkpoint_at_end=False), [6]),
    ],
)
def test_a_system_runs_to_the_next_step_at_which_somebody_looks(plan: Plan, looks: list[int]) -> None:
    step, found = plan.start_step, []
    while step < plan.last_step:
        step = cerebras._next_look(plan, step)
        found.append(step)
    assert found == looks


def test_the_job_is_the_recipe_and_the_options(tiny_recipe: Tiny, tmp_path: Path) -> None:
    recipe = tiny_recipe("crystal", "batch.replicas=2", "batch.micro_batch_size=2")
    options = CerebrasOptions(
        micro_batch="auto", precision_level=2, management_address="host:1", credentials_path="/tls.crt"
    )
    job = worker_job(recipe, options, "compile")(tmp_path)
    again = type(job).model_validate_json(job.model_dump_json())
    assert again == job
    assert again.recipe.model_dump(exclude={"data"}) == recipe.model_dump(exclude={"data"})
    assert again.recipe.data.root == str(Path(recipe.data.root).resolve())  # wherever the worker is started
    assert (job.mode, job.target, job.micro_batch, job.precision_level) == ("compile", "csx", "auto", 2)
    assert (job.management_address, job.credentials_path, job.vendor_version) == ("host:1", "/tls.crt", "2.10.0")


def test_options_are_strict() -> None:
    for wrong in ({"target": "gpu"}, {"precision_level": 3}, {"execution_strategy": "pipeline"}, {"silence_s": 0}):
        with pytest.raises((RecipeError, ValueError)):
            CerebrasOptions.model_validate(wrong)
