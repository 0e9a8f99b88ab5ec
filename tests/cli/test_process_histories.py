"""Random histories of runs of one, two and four processes: `weftrain train` as it is started, killed and signalled at any
moment of any process. Each ends with the state, the losses and the record of the run that nothing happened to.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import written_datasets
from launchpad import Launchpad
from process_histories import KINDS, History, Runs


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
PROVED = {"replayable", "fsdp", "copies", "direct", "sharded"}
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
