"""What copying a run to a store makes its training wait: `python -m weftrain.analysis.bench.remote_save FOLDER`.

A model whose state is 1 GB is trained on this machine's processors by the cuda backend, which saves in the background;
in turns into FOLDER alone, and also to moto's S3 server in a process of its own. The server stands for another machine
but runs on this one, so it has a lower priority (--server-nice). For each run: how long the training waited for a save
(the time between two steps at a save above that at other steps), by how much the steps under a save or an upload were
slower than those before the first save, and the processor seconds. `python -m pip install 'moto[s3]' flask flask-cors`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weftrain.core.formats import fsops
from weftrain.core.run.metrics import METRICS, read_metrics

_WARM = 3  # steps before those that are measured
_MODEL = ("model.vocab_size=44800", "backend.options={device: cpu}", "backend.name=cuda")  # 83.8 M x 12 bytes


@dataclass(frozen=True)
class Waits:
    """Of one run. waited_s: for each save. slowed_s: all steps from the first save on. cpu_s: of the process."""

    waited_s: tuple[float, ...]
    slowed_s: float
    cpu_s: float

    @property
    def all_s(self) -> float:
        return sum(self.waited_s) + self.slowed_s


def waits(records: Sequence[dict[str, Any]], every: int, cpu_s: float) -> Waits:
    """records: the effective records of a run that logged each step and saved each `every` steps."""
    steps = [record for record in records if record["kind"] == "step"]
    between = {
        before["step"]: after["time"] - before["time"] - after["step_ms"] / 1e3
        for before, after in itertools.pairwise(steps)
    }
    quiet = [record["step_ms"] / 1e3 for record in steps if _WARM < record["step"] <= every]
    usual_s, usual_gap_s = (
        statistics.median(quiet),
        statistics.median(gap for step, gap in between.items() if step % every),
    )
    slowed = sum(record["step_ms"] / 1e3 - usual_s for record in steps if record["step"] > every)
    return Waits(tuple(gap - usual_gap_s for step, gap in between.items() if not step % every), max(0.0, slowed), cpu_s)


def train(folder: Path, runs: str, steps: int, every: int) -> Waits:
    """Train one run in a process of its own, whose local files are in `folder`."""
    given = ["--runs", runs, *(["--staging", str(folder)] if "://" in runs else [])]
    keys = [
        f"schedule.steps={steps}",
        f"schedule.learning_rate=[{{shape: constant, steps: {steps}, start: 3e-4}}]",
        f"checkpoint.every_steps={every}",
        "log.every_steps=1",
        "log.tensorboard=false",
    ]
    command = [sys.executable, "-m", "weftrain.cli", "train", "bench_70m", *_MODEL, *keys, *given]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}: ended with status {status}: run it by itself to see why")
    (metrics,) = folder.glob(f"*/{METRICS}")
    return waits(read_metrics(metrics.parent), every, used.ru_utime + used.ru_stime)


@contextmanager
def server(nice: int) -> Iterator[str]:
    """moto's S3 server in a process of its own, in the environment of those that are started from here; a bucket."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    os.environ |= {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "bench",
        "AWS_SECRET_ACCESS_KEY": "bench-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    command = ["nice", "-n", str(nice), sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(urllib.request.Request(f"{endpoint}/bench", method="PUT")).close()
                break
            except OSError:
                time.sleep(0.2)
        else:
            raise SystemExit("the server does not answer: pip install 'moto[s3]' flask flask-cors")
        yield "s3://bench"
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--every", type=int, default=40, help="steps between two saves")
    parser.add_argument("--server-nice", type=int, default=10)
    given = parser.parse_args()
    found: dict[str, list[Waits]] = {"local": [], "mirrored": []}
    steps = given.every * (given.saves + 1) - 1  # the last save's time is seen as well; the one at the end is not
    with server(given.server_nice) as bucket:
        for number in range(given.rounds):
            for arm in sorted(found, reverse=number % 2 == 1):
                with tempfile.TemporaryDirectory(dir=given.folder, prefix="weftrain-remote-save-") as temporary:
                    runs = f"{bucket}/{number}" if arm == "mirrored" else temporary
                    one = train(Path(temporary), runs, steps, given.every)
                    fsops.remove_tree(Path(temporary))
                    Path(temporary).mkdir()
                found[arm].append(one)
                waited = ", ".join(f"{wait:.2f}" for wait in one.waited_s)
                print(
                    f"{arm:9} waited {waited} s; steps {one.slowed_s:.2f} s slower; {one.cpu_s:.1f} CPU s", flush=True
                )
            reset = urllib.request.Request(f"{os.environ['AWS_ENDPOINT_URL']}/moto-api/reset", method="POST")
            urllib.request.urlopen(reset).close()
            urllib.request.urlopen(
                urllib.request.Request(f"{os.environ['AWS_ENDPOINT_URL']}/bench", method="PUT")
            ).close()
    medians = {
        arm: {
            "waited_s": statistics.median(wait for one in ones for wait in one.waited_s),
            "waited_and_slowed_s": statistics.median(one.all_s for one in ones),
            "cpu_s": statistics.median(one.cpu_s for one in ones),
        }
        for arm, ones in found.items()
    }
    ratios = {
        key: round(medians["mirrored"][key] / medians["local"][key], 3)
        for key in medians["local"]
        if medians["local"][key]
    }
    print(json.dumps({"medians": medians, "mirrored / local": ratios}, indent=2))


if __name__ == "__main__":
    main()
