"""`weftrain train` as a user meets it: start, complete, resume, refuse, stop by signal, survive kills."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from made_texts import sentences
from record_runs import done, weftrain

from weftrain.analysis.compare.series import read_run
from weftrain.core import checkpoint
from weftrain.core.backend import State
from weftrain.core.formats.checkpoint_manifest import read_checkpoint_manifest
from weftrain.core.run.metrics import read_metrics

Train = Callable[..., Result]
Start = Callable[..., subprocess.Popen[str]]


def final_state(folder: Path) -> tuple[State, str]:
    newest = checkpoint.newest(folder / "checkpoints", print)
    assert newest is not None
    state, manifest = checkpoint.load(newest)
    return state, manifest["root"]


def same_bits(a: State, b: State) -> bool:
    assert a.tensors.keys() == b.tensors.keys()
    same = all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)
    return same and (a.step, a.optimizer_updates) == (b.step, b.optimizer_updates)


def test_a_run_from_start_to_complete_to_continued(train_tiny: Train, tmp_path: Path) -> None:
    result = train_tiny("schedule.steps=4", "checkpoint.every_steps=2")
    assert result.exit_code == 0, result.output
    arithmetic = "4 x 1 x 1 = 4 sequences x 13 = 52 tokens a step"
    for wanted in (arithmetic, "kernels", "loss  ", " -> ", "tokens/s, MFU", "tensorboard --logdir", "weftrain eval"):
        assert wanted in result.output
    folder = tmp_path / "runs" / "crystal_demo"
    steps = [record for record in read_metrics(folder) if record["kind"] == "step"]
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    assert [record["tokens"] for record in steps] == [52, 104, 156, 208]
    assert set(steps[0]["learning_rate"]) == {"embeddings", "decoder_matrices", "norms_and_biases"}
    for key in (
        "loss",
        "grad_norm",
        "tokens_per_second",
        "step_ms",
        "data_wait_ms",
        "memory_bytes",
        "model_flops_utilization",
    ):
        assert steps[-1][key] > 0, key
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step_00000002", "step_00000004"]

    again = train_tiny("schedule.steps=4", "checkpoint.every_steps=2")
    assert again.exit_code == 0
    assert "is complete: 4 of 4 steps" in again.output
    assert "schedule.steps=8" in again.output
    assert "--allow schedule.steps    (continue to step 8)" in again.output
    assert len([record for record in read_metrics(folder) if record["kind"] == "step"]) == 4

    refused = train_tiny("schedule.steps=6", "checkpoint.every_steps=3")
    assert refused.exit_code == 2
    for wanted in ("schedule.steps: 4 -> 6", "checkpoint.every_steps: 2 -> 3", "--allow schedule.steps"):
        assert wanted in refused.output
    refused = train_tiny("schedule.steps=6", "checkpoint.every_steps=3", "--allow", "schedule.steps")
    assert refused.exit_code == 2
    (folder / "recipe.json").unlink()  # the checkpoint knows the recipe too
    assert "schedule.steps: 4 -> 6" in train_tiny("schedule.steps=6", "checkpoint.every_steps=2").output
    continued = train_tiny("schedule.steps=6", "checkpoint.every_steps=2", "--allow", "schedule.steps")
    assert continued.exit_code == 0, continued.output
    straight = train_tiny("schedule.steps=6", "checkpoint.every_steps=2", "--run", "straight")
    assert straight.exit_code == 0, straight.output
    assert same_bits(final_state(folder)[0], final_state(tmp_path / "runs" / "straight")[0])


def test_tokens_are_counted_as_they_were_read(train_tiny: Train, tmp_path: Path) -> None:
    """4 steps of 4 x 13 tokens and 4 of 4 x 6: metrics, manifest and comparison agree, though the recipe knows the
    second number alone.
    """
    assert train_tiny("--backend", "null", "schedule.steps=4").exit_code == 0
    shorter = ("data.sequence_length=6", "schedule.steps=8")
    keys = ("data", "data.sequence_length", "schedule.steps")
    result = train_tiny("--backend", "null", *shorter, *(part for key in keys for part in ("--allow", key)))
    assert result.exit_code == 0, result.output
    folder = tmp_path / "runs" / "crystal_demo"
    wanted = [52, 104, 156, 208, 232, 256, 280, 304]
    assert [record["tokens"] for record in read_metrics(folder) if record["kind"] == "step"] == wanted
    assert "in 8 steps, 304 tokens" in result.output
    series = read_run(folder, "run")
    assert series.points[-1].tokens == 304
    for step in (4, 8):
        assert read_checkpoint_manifest(folder / "checkpoints" / f"step_{step:08d}")["tokens"] == wanted[step - 1]


def test_too_many_skipped_steps_stop_the_run(train_tiny: Train, tmp_path: Path) -> None:
    """From the second step on nothing is finite: 4 of 40 steps may be skipped, and the fifth saves and stops the
    run.
    """
    diverging = [
        "optimizer.non_finite=skip",
        "precision.compute=float32",
        "backend.options.threads=1",
        "schedule.steps=40",
        "schedule.learning_rate=[{shape: constant, steps: 90, start: 1e30}]",
    ]
    stopped = train_tiny(*diverging, "checkpoint.every_steps=0")
    assert stopped.exit_code == 3, stopped.output
    assert (
        "step 5: 5 of 40 steps were skipped, and optimizer.max_skip_share is 0.1: the state after 6 completed steps"
        in stopped.output
    )
    folder = tmp_path / "runs" / "crystal_demo"
    state, _ = final_state(folder)
    assert (state.step, state.optimizer_updates) == (6, 1)
    allowed = ["optimizer.max_skip_share=1.0", "optimizer.max_consecutive_skips=99", "schedule.steps=10"]
    flags = [
        part
        for key in ("optimizer.max_skip_share", "optimizer.max_consecutive_skips", "schedule.steps")
        for part in ("--allow", key)
    ]
    ended = train_tiny(*diverging, "checkpoint.every_steps=0", *allowed, *flags)
    assert ended.exit_code == 0, ended.output
    assert "skipped      9 of these steps: 1 updates" in ended.output


def test_a_damaged_checkpoint_is_passed_over_loudly(train_tiny: Train, tmp_path: Path) -> None:
    assert train_tiny("schedule.steps=4", "checkpoint.every_steps=2").exit_code == 0
    folder = tmp_path / "runs" / "crystal_demo"
    wanted = final_state(folder)
    (victim,) = (folder / "checkpoints" / "step_00000004").glob("*.safetensors")
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    result = train_tiny("schedule.steps=4", "checkpoint.every_steps=2")
    assert result.exit_code == 0
    assert "warning: passed over a damaged checkpoint" in result.output
    assert victim.name in result.output
    assert "resumed after step 2" in result.output
    found = final_state(folder)
    assert same_bits(found[0], wanted[0])
    assert list((folder / "checkpoints").glob("step_00000004.damaged-*"))  # nothing is lost


def test_start_from_another_run(train_tiny: Train, tmp_path: Path) -> None:
    missing = train_tiny("schedule.steps=2", "--run", "second", "start_from.run=first", "start_from.state=weights")
    assert missing.exit_code == 2
    assert "train 'first' first" in missing.output
    assert train_tiny("schedule.steps=3", "--run", "first").exit_code == 0
    first, root = final_state(tmp_path / "runs" / "first")
    for state, updates in (("weights", 2), ("all", 5)):
        result = train_tiny("schedule.steps=2", "--run", state, "start_from.run=first", f"start_from.state={state}")
        assert result.exit_code == 0, result.output
        found, _ = final_state(tmp_path / "runs" / state)
        assert (found.step, found.optimizer_updates) == (2, updates)
        newest = checkpoint.newest(tmp_path / "runs" / state / "checkpoints", print)
        assert newest is not None
        assert checkpoint.verify(newest)["parent"] == root
        # step 0 has learning rate 0: a run of one step from these weights would keep them, so they moved by one update
        # only
        name = "weights/embedding.weight"
        assert 0 < (found.tensors[name] - first.tensors[name]).abs().max() < 0.01


def test_another_backend(train_tiny: Train, tmp_path: Path) -> None:
    """The null backend reads every row and computes nothing; its checkpoint counts the steps."""
    result = train_tiny("schedule.steps=3", "--backend", "null", "--run", "null")
    assert result.exit_code == 0, result.output
    assert "backend      null on cpu" in result.output
    assert "MFU unknown" in result.output
    assert final_state(tmp_path / "runs" / "null")[0].optimizer_updates == 3
    assert train_tiny("schedule.steps=3", "--backend", "nul").exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["backend.name=locale"], "did you mean 'local'"),
        (["backend.options.devise=cpu"], "unknown key 'devise'; did you mean 'device'?"),
        (["backend.options.threads=-1"], "greater than or equal to 0"),
        (["batch.replicas=2", "batch.micro_batch_size=2"], "set batch.replicas=1"),
        (["kernels.pins.rope=nobody"], "kernels.pins 'rope' names the unknown source 'nobody'"),
        (["--run", "../elsewhere"], "is a path"),
        (["data.synthetic_rows=null"], "give exactly one of 'sources' and 'synthetic_rows'"),
    ],
)
def test_what_is_wrong_is_said_before_step_0(
    train_tiny: Train, tmp_path: Path, arguments: list[str], expected: str
) -> None:
    result = train_tiny("schedule.steps=1", *arguments)
    assert result.exit_code == 2
    assert expected in result.output
    assert not list((tmp_path / "runs").glob("**/metrics.jsonl"))


def test_a_device_that_is_not_there(train_tiny: Train) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    result = train_tiny("schedule.steps=1", "backend.options.device=cuda")
    assert result.exit_code == 2
    assert "backend.options.device is cuda, and" in result.output


def test_non_finite_loss_halts_with_its_samples(train_tiny: Train, tmp_path: Path) -> None:
    """A learning rate that blows the weights up: the run stops, says where, and the last checkpoint is whole."""
    blow_up = "schedule.learning_rate=[{shape: constant, steps: 100, start: 1e38}]"
    result = train_tiny("schedule.steps=9", blow_up, "checkpoint.every_steps=1", "optimizer.clip_norm=null")
    assert result.exit_code == 3
    assert "the step did not happen" in result.output
    assert "samples: synthetic:" in result.output
    assert final_state(tmp_path / "runs" / "crystal_demo")[0].step >= 1


def test_read_only_folder(train_tiny: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").write_text("a file stands in the way")
    result = train_tiny("schedule.steps=1")
    assert result.exit_code == 2
    assert "runs" in result.output
    assert "Traceback" not in result.output


def wait_for_steps(folder: Path, steps: int, process: subprocess.Popen[str]) -> None:
    while process.poll() is None:
        metrics = folder / "metrics.jsonl"
        if metrics.exists() and metrics.read_text().count('"kind": "step"') >= steps:
            return
        time.sleep(0.02)


def wait_for_checkpoints(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    while process.poll() is None and len(list((folder / "checkpoints").glob("step_*"))) < count:
        time.sleep(0.02)


def test_sigterm_saves_and_exits_143_and_a_second_run_is_refused(
    tiny_process: Start, train_tiny: Train, tmp_path: Path
) -> None:
    folder = tmp_path / "runs" / "crystal_demo"
    process = tiny_process("schedule.steps=5000", "checkpoint.every_steps=0")
    wait_for_steps(folder, 3, process)
    second = train_tiny("schedule.steps=5000", "checkpoint.every_steps=0")
    assert second.exit_code == 2
    assert f"is in use by process {process.pid} on " in second.output
    process.send_signal(signal.SIGUSR2)
    wait_for_checkpoints(folder, 1, process)
    (folder / "save-now").touch()
    wait_for_checkpoints(folder, 2, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 143, output
    assert not (folder / "save-now").exists()
    state, _ = final_state(folder)
    assert 3 <= state.step < 5000
    assert f"stopped after step {state.step} and saved" in output
    total = state.step + 2
    resumed = train_tiny(f"schedule.steps={total}", "checkpoint.every_steps=0", "--allow", "schedule.steps")
    assert resumed.exit_code == 0, resumed.output
    assert train_tiny(f"schedule.steps={total}", "checkpoint.every_steps=0", "--run", "straight").exit_code == 0
    assert same_bits(final_state(folder)[0], final_state(tmp_path / "runs" / "straight")[0])


def kill_until_done(start: Start, folder: Path, arguments: list[str], kills: int, seed: int) -> int:
    """Start, kill at a random moment once `kills` are not yet reached, start again, to the end. How many were
    killed.
    """
    rng, killed = random.Random(seed), 0
    for _ in range(10 * kills):
        before = (
            (folder / "metrics.jsonl").read_text().count('"kind": "step"') if (folder / "metrics.jsonl").exists() else 0
        )
        process = start(*arguments)
        if killed < kills:
            wait_for_steps(folder, before + 1, process)
            time.sleep(rng.uniform(0, 0.15))
            process.kill()
            output, _ = process.communicate(timeout=60)
            killed += process.returncode == -signal.SIGKILL
            continue
        output, _ = process.communicate(timeout=250)
        assert process.returncode == 0, output
        return killed
    raise AssertionError("the run never ended")


@pytest.mark.prove
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kills", [2, pytest.param(6, marks=pytest.mark.soak)])
def test_killed_at_random_moments_ends_with_the_same_bits(kills: int, tiny_process: Start, tmp_path: Path) -> None:
    """SIGKILL wherever it falls (a checkpoint is saved each step, so half of the time in a save): the bits of an
    uninterrupted process. tests/cli/test_process_histories.py kills far more often, between file operations.
    """
    arguments = [f"schedule.steps={30 * kills}", "checkpoint.every_steps=1", "precision.compute=bfloat16"]
    folder = tmp_path / "runs" / "crystal_demo"
    assert kill_until_done(tiny_process, folder, arguments, kills, seed=1) == kills
    straight = tiny_process(*arguments[:1], "checkpoint.every_steps=0", *arguments[2:], "--run", "straight")
    output, _ = straight.communicate(timeout=250)
    assert straight.returncode == 0, output
    assert same_bits(final_state(folder)[0], final_state(tmp_path / "runs" / "straight")[0])
    resumes = [record for record in read_metrics(folder) if record["kind"] == "resume"]
    assert len(resumes) == kills
    interrupted = [record["loss"] for record in read_metrics(folder) if record["kind"] == "step"]
    assert interrupted == [
        record["loss"] for record in read_metrics(tmp_path / "runs" / "straight") if record["kind"] == "step"
    ]


def test_a_disk_that_fills_up_loses_nothing(train_tiny: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC from some write on: one line, exit code 2, the checkpoints so far whole; with room again the run ends as
    if nothing was.
    """
    from weftrain.core.formats import fsops

    perform, writes = fsops._perform, 0

    def full_after(name: str, path: Path, action: Callable[[], object]) -> object:
        nonlocal writes
        writes += name == "write" and "step_00000004" in str(path)
        if writes > 1 and name == "write":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return perform(name, path, action)

    with monkeypatch.context() as patch:
        patch.setattr(fsops, "_perform", full_after)
        result = train_tiny("schedule.steps=6", "checkpoint.every_steps=2")
    assert result.exit_code == 2
    assert "disk is full" in result.output
    assert "Traceback" not in result.output
    folder = tmp_path / "runs" / "crystal_demo"
    assert final_state(folder)[0].step == 2
    assert train_tiny("schedule.steps=6", "checkpoint.every_steps=2").exit_code == 0
    assert train_tiny("schedule.steps=6", "checkpoint.every_steps=2", "--run", "straight").exit_code == 0
    assert same_bits(final_state(folder)[0], final_state(tmp_path / "runs" / "straight")[0])


def test_a_later_start_keeps_the_peak_of_the_first(
    train_tiny: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train_tiny("schedule.steps=2").exit_code == 0

    def measured_again(device: object, dtype: object) -> None:
        raise AssertionError("the machine has not changed")

    monkeypatch.setattr("weftrain.cli.assembly.measured_peak", measured_again)
    result = train_tiny("schedule.steps=3", "--allow", "schedule.steps")
    assert result.exit_code == 0, result.output
    records = read_metrics(tmp_path / "runs" / "crystal_demo")
    peaks = [(record["peak_flops"], record["peak_origin"]) for record in records if record["kind"] == "start"]
    assert peaks == [(1e11, "known in tests")] * 2
    assert "of the measured 100 GFLOP/s" in result.output


def test_a_run_ends_at_its_target_and_stays_ended(train_tiny: Train, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(sentences(40)):
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
    options = ["--name", "text", "--vocab-size", "300", "--sequence-length", "13"]
    done(weftrain("prep", tmp_path / "texts", "--output", tmp_path, *options))
    data = [f"data.root={tmp_path}", "data.synthetic_rows=null", "data.sources=[{name: text, path: text, weight: 1}]"]
    data += ["model.vocab_size=512", "schedule.steps=6", "log.evaluate_every_steps=2"]
    ended = train_tiny(*data, "log.stop_at_loss=1000")
    assert ended.exit_code == 0, ended.output
    assert "to continue: log.stop_at_loss=null, or a lower loss" in ended.output
    (run,) = {path.parent for path in tmp_path.rglob("metrics.jsonl")}
    assert [one["step"] for one in read_metrics(run) if one["kind"] in ("evaluation", "end")] == [2, 2]
    assert final_state(run)[0].step == 2
    again = train_tiny(*data, "log.stop_at_loss=1000")
    assert "is complete: 2 of 6 steps, where it reached log.stop_at_loss 1000" in again.output
    further = train_tiny(*data, "log.stop_at_loss=null", "--allow", "log.stop_at_loss")
    assert further.exit_code == 0, further.output
    assert final_state(run)[0].step == 6
