"""Honest releases of different settings: `verify` and `replay` raise no false alarm."""

from __future__ import annotations

from pathlib import Path

import pytest
from record_runs import done, trainer, weftrain
from release_cases import verdicts

WITHOUT_CHUNKS = ("data.chunks=null", "checkpoint.every_steps=3")
SETTINGS: dict[str, tuple[tuple[str, ...], ...]] = {
    "few lines": (("log.every_steps=4", "log.evaluate_every_steps=5"),),
    "evaluated before step 0": (("log.evaluate_at_start=true", "log.evaluate_every_steps=3"),),
    "never evaluated": (("log.evaluate_every_steps=0",),),
    "no chunks": (WITHOUT_CHUNKS,),
    "fp32": (("precision.compute=float32",),),
    "replayable": (("precision.numerics=replayable",),),
    "dropout": (("model.dropout=0.1",),),
    "a cosine": (("schedule.learning_rate=[{shape: cosine, steps: 6, start: 0.01, end: 0.001}]",),),
    "z-loss": (("objective.z_loss=1e-4",),),
    "label smoothing": (("objective.label_smoothing=0.1",),),
    "Muon": (("optimizer.name=muon", "optimizer.muon={scale: spectral}"),),
    "no clipping": (("optimizer.clip_norm=null",),),
    "synthetic rows": (("data.sources=[]", "data.synthetic_rows=24", "data.chunks=null", "checkpoint.every_steps=2"),),
    "LoRA": (("tuning.lora={rank: 2, alpha: 4, targets: ['*.ffn.*']}",),),
    "some weights frozen": (("tuning.freeze=['embedding*']",),),
    "rates by rule": (("tuning.learning_rates=[{match: 'layers.1.*', multiplier: 0.5}]",),),
    "rows skipped": ((*WITHOUT_CHUNKS, "data.skip=[{source: words, rows: [2, 9], reason: noise}]"),),
    "longer": (
        (*WITHOUT_CHUNKS, "schedule.steps=4"),
        (*WITHOUT_CHUNKS, "schedule.steps=7", "--allow", "schedule.steps"),
    ),
    "another batch": (
        (*WITHOUT_CHUNKS, "schedule.steps=3"),
        (
            *WITHOUT_CHUNKS,
            "batch.global_batch_size=8",
            "--allow",
            "schedule.steps",
            "--allow",
            "batch.global_batch_size",
        ),
    ),
    "streaming": (("backend.name=streaming", "backend.options={threads: 1}"),),
    "cuda on processors": (("backend.name=cuda", "backend.options={device: cpu, threads: 1}"),),
}


SOAKED = ("never evaluated", "no chunks", "fp32", "dropout", "a cosine", "z-loss", "label smoothing", "no clipping")


@pytest.mark.prove
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.soak) if name in SOAKED else name for name in SETTINGS]
)
def test_no_false_alarm(name: str, made: Path, tmp_path: Path) -> None:
    (tmp_path / "datasets").symlink_to(made / "datasets")
    for overrides in SETTINGS[name]:
        done(trainer(tmp_path)(*overrides))
    target, dtype = tmp_path / "release", "bfloat16" if len(name) % 2 else "float32"
    run = tmp_path / "runs" / "crystal_demo"
    done(weftrain("release", run, "--to", target, "--licence", "MIT", "--weights-dtype", dtype))
    done(weftrain("verify", target))
    found = weftrain("replay", target)
    assert set(verdicts(found)) == {"equal"}, found.output
