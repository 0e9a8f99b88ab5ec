"""Shapes recorded from a run are a suite of their own: the same calls, with values that are drawn anew."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from invented_runs import Tiny

from weftrain.analysis.bench.recorded_shapes import record_shapes
from weftrain.analysis.bench.train import BenchError, bench_source
from weftrain.backends.common.registry import get_backend
from weftrain.core.backend import Job, Plan
from weftrain.kernels import OPS, KernelError, Spec
from weftrain.kernels.bench import measure, suites
from weftrain.kernels.bench.measure import bench
from weftrain.kernels.bench.roofline import Machine, Rate
from weftrain.kernels.bench.suites import recorded_cases, recording
from weftrain.kernels.registry import select

RATE = Rate(1e15, "by hand", "")
KNOWN = Machine(RATE, RATE, RATE, RATE, 4096, "by hand", "cpu")


def recorded(recipe: Any, path: Path, name: str = "local") -> list[dict[str, Any]]:
    backend = get_backend(name)
    job = Job(recipe, Plan(0, 4), backend.options(), folder=path.parent)
    record_shapes(backend, job, bench_source(recipe), path)
    return list(json.loads(path.read_text())["calls"])


def test_the_calls_of_a_step_are_recorded_and_measured(
    tiny_recipe: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "peak_bytes", lambda call, device: call())  # torch's profiler takes a second to begin
    recipe = tiny_recipe("amber", "kernels.preferences=[reference]")
    calls = recorded(recipe, tmp_path / "shapes.json")
    attention = next(call for call in calls if call["op"] == "attention")
    micro, tokens, heads = recipe.batch.micro_batch_size, recipe.data.sequence_length, recipe.model.num_heads
    assert attention["arguments"]["q"]["shape"] == [micro, tokens, heads, recipe.model.hidden_size // heads]
    assert attention["count"] == recipe.model.num_layers * recipe.batch.accumulation_steps
    cases = recorded_cases((tmp_path / "shapes.json").read_text(), "shapes.json")
    assert [(case.op.name, case.count) for case in cases] == [(call["op"], call["count"]) for call in calls]
    report = bench(None, ["reference"], "shapes.json", repeats=1, machine=KNOWN, recorded=cases)
    assert report.honest, report.refused
    assert {one.example for one in report.measurements} == {case.example for case in cases}
    assert {one.op for one in report.measurements} == {call["op"] for call in calls}
    assert {item.reason for item in report.skipped} <= {"shapes.json has no call of this op"}


def test_a_backend_without_kernels_records_nothing(tiny_recipe: Tiny, tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="the null backend calls no kernel in this process"):
        recorded(tiny_recipe("amber"), tmp_path / "shapes.json", "null")


@pytest.mark.parametrize("name", OPS)
def test_every_example_comes_back_from_its_record(name: str) -> None:
    """With the same shapes, dtypes, strides, statics and document boundaries, for every op."""
    op = OPS[name]
    for example in {op.small[0], op.smallest, op.small[-1]}:
        arguments = op.examples[example]("cpu", torch.bfloat16)
        with recording() as found:
            spec = Spec(name, "here", "cpu", torch.bfloat16, {**op.attributes, **op.attributes_of(arguments)})
            function = select([spec], ["reference"]).function(name, "here")
        function(**arguments)
        (case,) = recorded_cases(found.to_json({}), "record")
        assert (case.op.name, case.dtype, case.count) == (name, torch.bfloat16, 1)
        again = case.build("cpu")
        assert again.keys() == arguments.keys()
        for key, value in arguments.items():
            several = value if isinstance(value, list) else [value]
            for one, other in zip(several, again[key] if isinstance(value, list) else [again[key]], strict=True):
                if not isinstance(one, torch.Tensor):
                    assert one == other
                    continue
                assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride()), key
                if key == "document_start":
                    assert torch.equal(one, other)
                if key == "labels":
                    assert int(other.max()) <= int(one.max())
                if key == "exp_avg_sqs":
                    assert bool((other >= 0).all())
        function(**again)


def test_a_stride_is_kept_and_large_tensors_repeat() -> None:
    x = torch.randn(4, 6, 8).transpose(0, 1)
    about = suites._described("x", x)
    again = suites._drawn("x", about, torch.Generator(), "cpu")
    assert (again.shape, again.stride()) == (x.shape, x.stride())
    some = suites._tiled((3, 5), torch.Generator().manual_seed(0), most=4)
    assert torch.equal(some.flatten()[4:8], some.flatten()[:4])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema_version": 7}, "schema_version 7, and this program reads 1"),
        ({"calls": [{"op": "rms"}]}, "call 1 is of the op 'rms'"),
        ({"calls": [{"op": "rms_norm"}]}, "is not a suite that `weftrain bench train --record-shapes` wrote"),
        ({"calls": 3}, "is not a suite"),
        ({"calls": None}, "is not a suite"),
        (
            {"calls": [{"op": "rms_norm", "arguments": {"x": {"shape": [-1], "dtype": "float32"}}}]},
            "the shape \\[-1\\]",
        ),
        ({"calls": [{"op": "rms_norm", "arguments": {"x": {"shape": [2**39, 9], "dtype": "bool"}}}]}, "the shape"),
        ({"calls": [{"op": "rms_norm", "arguments": {"x": {"shape": [2], "dtype": "load"}}}]}, "no dtype 'load'"),
    ],
)
def test_another_file_is_refused(change: dict[str, Any], words: str) -> None:
    document = {"schema_version": 1, "calls": []} | change
    with pytest.raises(KernelError, match=words):
        recorded_cases(json.dumps(document), "f.json")
    with pytest.raises(KernelError, match="is not a suite"):
        recorded_cases("{", "f.json")


def test_a_compiled_run_is_recorded_eagerly(tiny_recipe: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    backend, recipe = get_backend("local"), tiny_recipe("amber", "kernels.preferences=[reference]")
    job = Job(recipe, Plan(0, 4), backend.options.model_validate({"compile": True}), folder=tmp_path)
    record_shapes(backend, dataclasses.replace(job), bench_source(recipe), tmp_path / "s.json")
    assert json.loads((tmp_path / "s.json").read_text())["calls"]
