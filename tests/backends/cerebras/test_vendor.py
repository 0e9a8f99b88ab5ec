"""What only the vendor's package can answer: does a recipe lower, and to the graph that was reviewed; is it said well
what does not lower; does the vendor's CPU backend train what ours trains.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from weftrain.backends.cerebras import CerebrasOptions, CerebrasRun, worker_job
from weftrain.backends.cerebras.lowered.lowering import Lowered, LoweringError, lower
from weftrain.backends.cerebras.process import ROOT, NoClusterError
from weftrain.backends.common.registry import get_backend
from weftrain.cli.main import main
from weftrain.core.backend import Job, Plan, Run, State
from weftrain.core.config import Recipe
from weftrain.core.data import training_source
from weftrain.core.errors import BackendError, NonFiniteError
from weftrain.core.order.batch import Batch
from weftrain.core.recipe_file import load_recipe

pytestmark = [pytest.mark.cerebras, pytest.mark.usefixtures("vendor")]
GOLDEN = Path(__file__).with_name("golden")
RECIPES = (
    "crystal_demo",
    "amber_demo",
    "crystalcoder_7b_phase1",
    "crystalcoder_7b_phase2",
    "crystalcoder_7b_phase3",
    "amber_7b",
    "llama31_8b",
    "qwen3_8b",
)
Tiny = Callable[..., Recipe]


def lowered(recipe: Recipe, output: Path, root: Path = ROOT) -> Lowered:
    return lower(worker_job(recipe, CerebrasOptions(), "validate"), output, 300, root=root)


# A minute each: in CI the third of CrystalCoder's phases, which adds to the others, stands for all.
LONG = ("crystalcoder_7b_phase1", "crystalcoder_7b_phase2")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.soak) if name in LONG else name for name in RECIPES]
)
def test_each_recipe_lowers_at_full_size_to_the_graph_that_was_reviewed(
    name: str, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    report = lowered(load_recipe(name).recipe, tmp_path / "out").report
    print(f"{name}: {report.seconds:.1f} s in the front end, {report.peak_bytes / 2**30:.2f} GiB")
    assert report.peak_bytes < 1.5e9
    golden = GOLDEN / f"{name}.json"
    if pytestconfig.getoption("--update-golden"):
        golden.write_text(json.dumps(report.golden(), indent=1) + "\n")
    assert report.golden() == json.loads(golden.read_text()), (
        f"what a wafer would run has changed; if meant: pytest --update-golden, {golden}"
    )


def test_the_same_recipe_lowers_to_the_same_bytes(tmp_path: Path, tiny_recipe: Tiny) -> None:
    first, second = (lowered(tiny_recipe(), tmp_path / name) for name in ("one", "two"))
    assert first.report.structure == second.report.structure
    cirh = [one.folder / "executors" / "000001" / "cirh.mlir" for one in (first, second)]
    assert cirh[0].read_bytes() == cirh[1].read_bytes()


SWIGLU = "    return F.silu(gate) * up"
MASK = "    hidden = position[None, :] > position[:, None]  # [query, key]"
# name -> (line of kernels/reference.py, what stands there instead, words of the message)
PLANTED = {
    "advanced indexing": (
        SWIGLU,
        "    return (F.silu(gate) * up)[torch.arange(gate.shape[0])]",
        "aten::index of module layers.0.ffn.fwd",
    ),
    "nonzero": (
        SWIGLU,
        "    return F.silu(gate) * up + torch.nonzero(gate[0, 0]).sum()",
        "compute with a mask instead",
    ),
    "a value": (
        SWIGLU,
        "    return F.silu(gate) * up * (1 + gate.sum().item())",
        "asks for a value while the step is traced",
    ),
    "a condition": (
        SWIGLU,
        "    return F.silu(gate) * up if gate.sum() > 0 else up",
        "asks for a value while the step is traced",
    ),
    "complex numbers": (
        SWIGLU,
        "    return torch.view_as_real(torch.view_as_complex(gate.float().unflatten(-1, (-1, 2))) * 1j).flatten(-2) * "
        "up",
        "complex numbers do not lower",
    ),
    "checkpointing": (
        SWIGLU,
        "    import torch.utils.checkpoint\n    return torch.utils.checkpoint.checkpoint(F.mish, gate, "
        "use_reentrant=False) * up",
        "leave recomputation to the backend",
    ),
    "boolean triu": (
        MASK,
        "    hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)",
        "compare positions (arange) instead",
    ),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_what_does_not_lower_is_named_with_our_line_and_the_remedy(
    planted: str, tmp_path: Path, tiny_recipe: Tiny
) -> None:
    line, instead, words = PLANTED[planted]
    source = tmp_path / "source"
    for folder in ("core", "kernels", "backends"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    reference = source / "kernels" / "reference.py"
    text = reference.read_text()
    assert text.count(line) == 1
    reference.write_text(text.replace(line, instead))
    with pytest.raises(LoweringError) as error:
        lowered(tiny_recipe(), tmp_path / "out", source)
    assert words in str(error.value)
    number = next(
        index for index, row in enumerate(reference.read_text().splitlines(), 1) if row == instead.splitlines()[-1]
    )
    assert f"kernels/reference.py:{number} in " in str(error.value)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.failed" / "vendor.log").is_file()


def test_compile_and_train_go_as_far_as_one_gets_without_a_cluster(tmp_path: Path, tiny_recipe: Tiny) -> None:
    recipe = tiny_recipe("crystal", "backend.name=cerebras")
    with pytest.raises(NoClusterError, match="set backend"):
        lower(worker_job(recipe, CerebrasOptions(), "compile"), tmp_path / "out", 300)
    assert (tmp_path / "out.failed" / "executors" / "000001" / "cirh.mlir").stat().st_size  # the front end was through
    run = prepare(recipe, tmp_path, steps=2)
    with pytest.raises(NoClusterError, match="`weftrain lower` needs none"):
        next(run.train(training_source(recipe)))
    run.close()


# -- the vendor's CPU backend: the same training script
# --------------------------------------------------------------------------------


def prepare(recipe: Recipe, folder: Path, steps: int, **options: object) -> CerebrasRun:
    backend = get_backend("cerebras")
    run = backend.prepare(Job(recipe, Plan(0, steps), CerebrasOptions.model_validate(options), folder=folder))
    assert isinstance(run, CerebrasRun)
    return run


def local(recipe: Recipe, steps: int) -> Run:
    backend = get_backend("local")
    return backend.prepare(Job(recipe, Plan(0, steps), backend.options.model_validate({})))


def furthest(a: State, b: State) -> float:
    """Largest difference of any tensor, relative to that tensor's norm."""
    assert a.tensors.keys() == b.tensors.keys()
    return max(
        float((a.tensors[name] - b.tensors[name]).norm() / b.tensors[name].norm().clamp_min(1e-12))
        for name in b.tensors
    )


@pytest.mark.parametrize("family", ["crystal", "amber"])
def test_the_cpu_backend_trains_what_local_trains(family: str, tmp_path: Path, tiny_recipe: Tiny) -> None:
    """Both placements of epsilon, muP's multiplier, decay, clip and the schedule, through the vendor's optimizer and
    loader.
    """
    recipe = tiny_recipe(family, "optimizer.eps=1e-4", "optimizer.clip_norm=1.0")
    source, run, other = training_source(recipe), prepare(recipe, tmp_path, 6, target="cpu"), local(recipe, 6)
    for theirs, ours in zip(run.train(source), other.train(source), strict=True):
        assert (theirs.step, theirs.tokens, theirs.learning_rates) == (ours.step, ours.tokens, ours.learning_rates)
        # measured: equal in most steps, 1e-7 otherwise
        assert float(theirs.loss) == pytest.approx(float(ours.loss), rel=1e-6)
        assert float(theirs.grad_norm) == pytest.approx(float(ours.grad_norm), rel=1e-5)
    found, wanted = run.export_state(), other.export_state()
    assert (found.step, found.optimizer_updates) == (wanted.step, wanted.optimizer_updates) == (6, 6)
    # Without the key's bias, whose gradient is rounding noise (tests/conformance).
    kept = {name: tensor for name, tensor in wanted.tensors.items() if not name.endswith("k_proj.bias")}
    assert furthest(State(6, 6, {name: found.tensors[name] for name in kept}), State(6, 6, kept)) < 2e-4
    run.close()


def test_state_goes_in_and_out_and_the_run_goes_on_with_the_same_bits(tmp_path: Path, tiny_recipe: Tiny) -> None:
    recipe = tiny_recipe()
    source = training_source(recipe)
    whole = prepare(recipe, tmp_path / "whole", 6, target="cpu")
    losses = [float(result.loss) for result in whole.train(source)]
    first = prepare(recipe, tmp_path / "first", 3, target="cpu")
    assert [float(result.loss) for result in first.train(source)] == losses[:3]
    second = prepare(recipe, tmp_path / "second", 6, target="cpu")
    state = first.export_state()
    second.import_state(state)
    assert [float(result.loss) for result in second.train(source)] == losses[3:]
    a, b = second.export_state(), whole.export_state()
    assert all(torch.equal(a.tensors[name], b.tensors[name]) for name in b.tensors)
    for run in (whole, first, second):
        run.close()


def test_held_out_loss_is_locals(tmp_path: Path, tiny_recipe: Tiny) -> None:
    recipe = tiny_recipe()
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(0, 97, (6, 14)), rng.random((6, 13)) > 0.2

    class HeldOut:
        name, sequence_length, num_rows, dataset_id = "held", 13, 6, "none"

        def rows(self, first: int, count: int) -> Batch:
            return Batch(ids[first : first + count], mask[first : first + count])

    run = prepare(recipe, tmp_path, 1, target="cpu")
    found, wanted = run.evaluate(HeldOut()), local(recipe, 1).evaluate(HeldOut())
    assert found.tokens == wanted.tokens == mask.sum()
    assert found.loss == pytest.approx(wanted.loss, rel=1e-6)
    run.close()


def test_a_loss_that_is_not_finite_stops_the_run_before_the_update(tmp_path: Path, tiny_recipe: Tiny) -> None:
    recipe = tiny_recipe()
    run = prepare(recipe, tmp_path, 2, target="cpu")
    state = run.export_state()
    tensors = {name: tensor.clone() for name, tensor in state.tensors.items()}
    tensors["weights/final_norm.weight"][0] = float("nan")
    run.import_state(State(0, 0, tensors))
    with pytest.raises(
        NonFiniteError, match=r"step 0: the loss is nan; the step did not happen; its samples: synthetic:0, "
    ):
        next(run.train(training_source(recipe)))
    run.close()


def test_other_data_than_the_recipes_is_refused(tmp_path: Path, tiny_recipe: Tiny) -> None:
    recipe = tiny_recipe()
    run = prepare(recipe, tmp_path, 1, target="cpu")
    with pytest.raises(BackendError, match="the worker reads the recipe's data"):
        next(run.train(training_source(tiny_recipe("crystal", "data.shuffle_seed=9"))))
    run.close()


def test_the_command_line_trains_and_resumes_on_prepared_shards(tmp_path: Path) -> None:
    """The vendor's loader reads our shards in the order of every other backend: the losses are local's."""
    text = tmp_path / "text"
    text.mkdir()
    for index in range(12):
        (text / f"{index}.txt").write_text(" ".join(f"{index * word % 97} weft" for word in range(400)))
    prep = [
        "prep",
        str(text),
        "--name",
        "weft",
        "--sequence-length",
        "32",
        "--vocab-size",
        "300",
        "--heldout-fraction",
        "0.2",
    ]
    made = CliRunner().invoke(main, [*prep, "--output", str(tmp_path / "datasets")])
    assert made.exit_code == 0, made.output
    small = [
        "data.sources=[{name: weft, path: weft, weight: 1.0}]",
        f"data.root={tmp_path / 'datasets'}",
        "data.sequence_length=32",
    ]
    small += [
        "model.num_layers=2",
        "model.hidden_size=64",
        "model.intermediate_size=96",
        "model.num_heads=2",
        "model.rotary_dim=8",
    ]
    small += [
        "batch.global_batch_size=4",
        "batch.micro_batch_size=4",
        "precision.compute=float32",
        "log.tensorboard=false",
    ]
    small += ["checkpoint.every_steps=2", "log.evaluate_every_steps=2", "log.evaluate_rows=4"]
    losses = {}
    for backend, options in (("cerebras", ["backend.options.target=cpu"]), ("local", [])):
        command = ["train", "crystal_demo", "--backend", backend, "--runs", str(tmp_path / backend), *small, *options]
        for steps in ("2", "4"):  # the second goes on from the first's checkpoint
            done = CliRunner().invoke(main, [*command, f"schedule.steps={steps}", "--allow", "schedule.steps"])
            assert done.exit_code == 0, done.output
        lines = [
            json.loads(line)
            for line in (tmp_path / backend / "crystal_demo" / "metrics.jsonl").read_text().splitlines()
        ]
        losses[backend] = [line["loss"] for line in lines if "loss" in line]
    assert losses["cerebras"] == pytest.approx(losses["local"], rel=1e-6)
