"""Random histories of runs of one, two and four processes: `weftrain train` as it is started, killed and signalled at any
moment of any process. Each ends with the state, the losses and the record of the run that nothing happened to.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import written_datasets
from histories import Told
from launchpad import Launchpad
from process_histories import KINDS, History, Life, Runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    root = tmp_path_factory.mktemp("process_histories")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(written_datasets, "VOCAB", 600)
        written_datasets.make_dataset(root / "data" / "a", [40])
        written_datasets.make_dataset(root / "data" / "b", [30], first_id=330)
    with Launchpad() as launchpad:
        yield Runs(launchpad, root / "data", root / "memory")


def lived(seed: int, runs: Runs, folder: Path, kind: str = "") -> History:
    history = History(seed, runs, folder, kind)
    try:
        history.lived()
        history.check()
    except BaseException as error:
        error.add_note(
            f"seed {seed}: {history.kind}, {history.plan or 'no changes'}, {history.own}\n" + "\n".join(history.told)
        )
        raise
    return history


# Each takes half a minute and more: one of each way to share a run is among the proofs, the others are soaks.
PROVED = {"replayable", "fsdp", "direct", "sharded"}
OF_EACH_KIND = [
    pytest.param(kind, marks=pytest.mark.prove if kind in PROVED else pytest.mark.soak) for kind in sorted(KINDS)
]


@pytest.mark.parametrize("kind", OF_EACH_KIND)
def test_histories_of_each_kind(kind: str, runs: Runs, tmp_path: Path) -> None:
    lived(11, runs, tmp_path, kind)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_many_more_histories_of_processes(runs: Runs, tmp_path: Path) -> None:
    first = int(os.environ.get("WEFTRAIN_FIRST_SEED", random.SystemRandom().randrange(1 << 30)))
    count = int(os.environ.get("WEFTRAIN_SEEDS", "100"))
    print(f"seeds from {first} on: WEFTRAIN_FIRST_SEED={first} draws them again")
    for seed in range(first, first + count):
        lived(seed, runs, tmp_path / "run")
        shutil.rmtree(tmp_path / "run")


@pytest.mark.prove
@pytest.mark.parametrize(("rank", "grace_s"), [(0, 0.0), (1, 0.0), (1, 60.0)])
def test_a_signal_at_any_rank_saves_what_fits_into_the_grace_period(
    rank: int, grace_s: float, runs: Runs, tmp_path: Path
) -> None:
    """`--grace`: with time for a save the ranks end with the step that was just made; without, with the last save."""
    rate = "schedule.learning_rate=[{shape: constant, steps: 4000, start: 0.01}]"
    words = [*runs.words("fsdp", "", 2), "schedule.steps=4000", rate, "checkpoint.every_steps=10"]
    run, life = (
        tmp_path / "runs" / "run",
        Life(2, ((rank, signal.SIGTERM, 500),), grace=grace_s),
    )  # after the first save
    codes, output = runs.live(run, words, life, "fsdp")
    told, stopped = Told(run), 128 + signal.SIGTERM
    done, saved = max(step for _, step in told.measured), told.checkpoints[-1]["step"]
    # torchrun ends all ranks when one has ended: one that has nothing left to do then ends by its signal
    assert set(codes) <= {stopped, -signal.SIGTERM}, output
    assert "stopped after step" in output
    assert 10 <= saved <= done < 4000
    if grace_s:
        assert saved == done, output
    else:
        assert saved % 10 == 0, output
        assert saved == done or "not saved: that takes" in output
    assert not (grace_s and "not saved" in output)
    assert told.present()[-1] == saved
