"""`weftrain plan --simulate`: the printed step, its assumptions and picture, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

Run = Callable[..., Result]
EIGHT = ["plan", "amber_7b", "--devices", "8xH100", "batch.replicas=8", "batch.micro_batch_size=5", "--simulate"]


def test_a_step_with_what_it_assumes(weftrain: Run, tmp_path: Path) -> None:
    for suffix in ("html", "json"):
        file = tmp_path / f"step.{suffix}"
        result = weftrain(*EIGHT, "--timeline", str(file))
        assert result.exit_code == 0, result.output
        assert "58% of 989.4 TFLOP/s" in result.output
        assert "85% of 50.00 GB/s a device between nodes" in result.output
        assert str(file) in result.output
    assert "A step of amber_7b on 8 devices, simulated" in (tmp_path / "step.html").read_text()
    assert json.loads((tmp_path / "step.json").read_text())["traceEvents"]
    shares = [float(share) for share in re.findall(r"[0-9] s, ([0-9.]+)%", result.output)]
    assert sum(shares) == pytest.approx(100, abs=0.5)


def test_experts_on_ranks_of_their_own(weftrain: Run) -> None:
    batch = ["batch.replicas=16", "batch.global_batch_size=64", "batch.micro_batch_size=4"]
    asked = ["plan", "olmoe_1b_7b", "--devices", "16xH100", "--backend", "cuda", *batch, "--simulate"]
    result = weftrain(*asked, "backend.options.expert_parallel=8")
    assert result.exit_code == 0, result.output
    assert "waits for expert ranks" in result.output
    assert "link of expert ranks busy" in result.output
    assert len(re.findall(r"^ +optimizer +[0-9]", result.output, re.M)) == 3  # planned, simulated, and its memory


def test_as_json(weftrain: Run) -> None:
    result = weftrain(*EIGHT, "--json")
    found = json.loads(result.output)["simulated"]
    assert (found["devices"], found["micro_batches"]) == (8, 56)
    assert sum(found["stages_s"][0].values()) == pytest.approx(found["step_s"])
    assert found["assumptions"]
    assert "simulated" not in json.loads(weftrain(*EIGHT[:-1], "--json").output)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*EIGHT[:-1], "--timeline", "x.html"], "--timeline has no effect without --simulate"),
        ([*EIGHT, "--timeline", "x.png"], "name a file that ends in .html or, for Perfetto, in .json"),
        (["plan", "bench_70m", "--devices", "1xH100", "--backend", "local", "--simulate"], "add --backend cuda"),
        ([*EIGHT, "backend.options.cpu_offload=true"], "cpu_offload is not simulated"),
    ],
)
def test_what_is_refused(weftrain: Run, arguments: list[str], message: str) -> None:
    result = weftrain(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
