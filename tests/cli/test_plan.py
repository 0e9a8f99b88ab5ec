"""`weftrain plan` and the one way to read a command line: what it computes is what `train` would run, and what does not
fit is refused.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from weftrain.backends.cuda.degrees import Degrees
from weftrain.backends.cuda.needs import needs
from weftrain.backends.cuda.options import CudaOptions
from weftrain.cli import plan as plan_module
from weftrain.cli.resolve import kept_options, resolve, resolve_recorded
from weftrain.core.recipe_file import load_recipe

Run = Callable[..., Result]
EIGHT = ["batch.replicas=8", "--devices", "8xH100"]


def test_plan_and_train_have_the_same_options(weftrain: Run) -> None:
    """Amber recomputes every layer by its recipe; on another backend too, for every verb, so its memory is the one that
    was planned.
    """
    recipe, backend, options = resolve("amber_7b", ["batch.replicas=8"], "cuda")
    assert (backend.name, recipe.backend.options) == ("cuda", {"activation_checkpointing": "full"})
    assert isinstance(options, CudaOptions)
    wanted = needs(recipe, options, Degrees(1, 8, 1, 1), "cuda").total_memory_bytes / 2**30
    for flags in ([], ["--backend", "cuda"]):
        result = weftrain("plan", "amber_7b", *EIGHT, *flags)
        assert result.exit_code == 0, result.output
        assert f"{wanted:,.2f} GiB" in result.output
        assert "cuda: activation_checkpointing=full" in result.output
    assert (
        f"= {wanted:,.2f} GiB a device" in weftrain("show", "amber_7b", "batch.replicas=8", "--backend", "cuda").output
    )


@pytest.mark.parametrize("verb", ["show", "plan", "train_command", "bench", "lower"])
def test_no_verb_reads_a_command_line_by_itself(verb: str) -> None:
    tree = ast.parse(Path(plan_module.__file__).with_name(f"{verb}.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    own = [call for call in calls if call.func.id == "load_recipe" and len(call.args) > 1]  # type: ignore[attr-defined]
    assert not own
    assert any(call.func.id in ("resolve", "resolve_recipe") for call in calls)  # type: ignore[attr-defined]


def test_what_another_backend_keeps() -> None:
    both = ("compile", "activation_checkpointing")
    assert (kept_options("local", "cuda"), kept_options("cuda", "local")) == (both, both)
    assert kept_options("local", "streaming") == ("compile",)
    assert kept_options("local", "null") == kept_options("local", "local") == kept_options("gone", "local") == ()
    assert resolve("bench_70m", [], "streaming").recipe.backend.options == {"compile": True}
    assert resolve("bench_70m", ["backend.options.compile=false"], "cuda").recipe.backend.options == {"compile": False}
    assert resolve("bench_70m", ["backend.options.huge_pages=false"]).recipe.backend.options == {
        "compile": True,
        "huge_pages": False,
    }
    recorded = load_recipe("bench_70m").recipe.model_dump(mode="json")
    assert resolve_recorded(recorded, "x", (), "cuda").recipe.backend.options == {"compile": True}


def test_one_device_is_one(weftrain: Run) -> None:
    """It was taken for unknown: the step of 224 devices, 7,417 % MFU of one."""
    for spelling in ("H100", "1xH100", "h100", "1XH100"):
        result = weftrain("plan", "amber_7b", "--devices", spelling)
        assert result.exit_code == 2
        assert "batch.replicas is 224: set batch.replicas=1" in result.output
        result = weftrain("plan", "amber_7b", "--devices", spelling, "batch.replicas=1")
        assert result.exit_code == 2
        assert re.search(r"fits +NO: 1\d\d.\d\d GiB of 74.51 GiB", result.output), result.output
        shares = [float(share) for share in re.findall(r"([0-9.,]+)%", result.output.replace(",", ""))]
        assert shares
        assert max(shares) < 100


@pytest.mark.parametrize(
    "devices", ["0xH100", "00xH100", "-1xH100", "8xH101", "8x", "x", "8xH100x", " H100", "1e3xH100", "9999999xH100"]
)
def test_devices_that_are_none(weftrain: Run, devices: str) -> None:
    result = weftrain("plan", "amber_7b", "--devices", devices)
    assert result.exit_code == 2
    assert "the names are A100-80GB, A100-40GB, H100" in result.output


def test_what_does_not_fit_is_refused_with_settings_that_do(weftrain: Run) -> None:
    command = ["amber_7b", "batch.replicas=8", "backend.options.activation_checkpointing=none"]
    result = weftrain("plan", *command, "--devices", "8xH100")
    assert result.exit_code == 2
    remedies = result.output.rpartition("what would fit: ")[2].strip().split("; ")
    settings = [remedy for remedy in remedies if remedy.startswith(("batch.", "backend."))]
    assert len(settings) >= 3
    assert settings[0].startswith("batch.micro_batch_size=")
    assert "the streaming backend" in remedies
    for remedy in settings:
        overrides, on, more = remedy.partition(" on ")
        count = more.split()[0] if on else "8"
        tried = weftrain("plan", *command, *overrides.split(), "--devices", f"{count}xH100")
        assert (tried.exit_code, remedy) == (0, remedy), tried.output


def test_memory_of_this_machine(weftrain: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streaming: held against the limit that the run itself would be, before anything is measured."""
    command = ["plan", "bench_70m", "--backend", "streaming", "backend.options.memory_limit_mib=600"]
    monkeypatch.setattr("weftrain.kernels.bench.roofline.measured_matmul_peak", lambda *_: pytest.fail("measured"))
    assert weftrain(*command, "--devices", "8xH100").exit_code == 2
    found = resolve("bench_70m", command[4:], "streaming")
    from weftrain.core.prediction import Speeds

    prediction = found.backend.predict(found.recipe, found.options, Speeds(1e12, 1e10, 1e9))
    assert prediction is not None
    assert (prediction.fits, prediction.capacity_bytes) == (False, 600 << 20)
    assert "backend.options.tier=direct" in prediction.remedies[0]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--devices", "8xH100", "--link", "3"], "--link has no effect with --devices"),
        (["--devices", "8xH100", "--disk", "."], "--disk has no effect with --devices"),
        (["--per-node", "4"], "--per-node has no effect without --devices"),
        (["--network", "nan", "--devices", "8xH100"], "'nan' is no number of GB/s"),
        (["--network", "0", "--devices", "8xH100"], "'0' is no number of GB/s"),
        (["--devices", "8xH100", "--backend", "streaming"], "for one device by name"),
        (["--devices", "8xH100", "--backend", "local"], "computes on one device: give --devices 1xNAME"),
        (["--devices", "16xCS-2", "batch.replicas=16"], "CS-2: no step can be predicted"),
    ],
)
def test_what_is_asked_wrongly(weftrain: Run, flags: list[str], words: str) -> None:
    result = weftrain("plan", "amber_7b", *flags)
    assert (result.exit_code, words in result.output) == (2, True), result.output


def test_failures_give_interval_goodput_spares_and_storage(weftrain: Run) -> None:
    flags = ["--devices", "3200xH100", "--mtbf", "4320", "--stall", "20", "--restart", "15", "--repair", "48"]
    told = json.loads(weftrain("plan", "k2_v2_70b", *flags, "--json").stdout)
    failures = told["failures"]
    assert (failures["nodes"], failures["mtbf_s"]) == (400, 10.8 * 3600)
    assert failures["interval_steps"] * told["step_s"] == pytest.approx(failures["daly_interval_s"], rel=0.01)
    assert 0.9 < failures["recipe_goodput"] < failures["goodput"] < 1
    assert failures["spare_nodes"] == 10
    printed = weftrain("plan", "k2_v2_70b", *flags).stdout
    assert "with the recipe's saves" in printed
    shorter = json.loads(weftrain("plan", "k2_v2_70b", *flags, "--restart", "5", "--json").stdout)
    assert shorter["failures"]["goodput"] > failures["goodput"] + 0.01


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--restart", "3"], "--restart has no effect without --mtbf"),
        (["--mtbf", "0"], "'0' is no number of hours above 0"),
        (["--mtbf", "nan"], "'nan' is no number of hours above 0"),
    ],
)
def test_failures_that_cannot_be_are_refused(weftrain: Run, flags: list[str], words: str) -> None:
    result = weftrain("plan", "amber_7b", *flags)
    assert result.exit_code == 2
    assert words in " ".join(result.output.split())
