"""Who carries out the tasks: local processes, one member of a job array, or a Ray cluster; the bytes are the same.

An executor decides nothing: the plan lists the tasks, each has one output file, and existing outputs are kept. A task
that is done twice is therefore harmless.
"""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from weftrain.core.errors import DataError
from weftrain.core.formats.child_process import end_with, on_interrupt
from weftrain.data_prep.stages.order import merge_run, order_bucket
from weftrain.data_prep.stages.plan import PrepPlan, fall_back, fell_back, load_plan
from weftrain.data_prep.stages.sample import sample_part
from weftrain.data_prep.stages.survey import load_json
from weftrain.data_prep.stages.tokenize import tokenize_part
from weftrain.data_prep.stages.write import write_one_shard
from weftrain.data_prep.tokens.tokenization import EnginesDifferError

OnDone = Callable[[int], None]
_POLL_SECONDS = 0.2
_FEW_BYTES = 1 << 20  # of inputs: done before another process has imported what it needs


@dataclass(frozen=True)
class Stage:
    """Independent tasks 0..count(plan)-1. output: the file that marks a task done."""

    name: str
    count: Callable[[PrepPlan], int]
    do: Callable[[PrepPlan, int], None]
    output: Callable[[PrepPlan, int], Path]

    def pending(self, plan: PrepPlan) -> list[int]:
        return [index for index in range(self.count(plan)) if not self.output(plan, index).exists()]


STAGES = {
    stage.name: stage
    for stage in (
        Stage("sample", lambda plan: len(plan.parts), sample_part, PrepPlan.sample_file),
        Stage("tokenize", lambda plan: len(plan.parts), tokenize_part, PrepPlan.part_file),
        Stage("merge", lambda plan: load_json(plan.survey_file)["runs"], merge_run, PrepPlan.run_file),
        Stage("order", lambda plan: load_json(plan.survey_file)["buckets"], order_bucket, PrepPlan.bucket_file),
        Stage("write", lambda plan: len(load_json(plan.layout_file)["shards"]), write_one_shard, PrepPlan.shard_record),
    )
}


def run_task(folder: Path, stage: str, by_reference: bool, index: int) -> int:
    """Do one task of the plan in `folder` and return its index. Raises DataError, OSError. by_reference: as in the plan
    that the task was taken from. If the engines have differed since, nothing is done (plan.fall_back).
    """
    plan, chosen = load_plan(folder), STAGES[stage]
    if plan.by_reference == by_reference and not chosen.output(plan, index).exists():
        try:
            chosen.do(plan, index)
        except EnginesDifferError as error:
            if plan.engine != "auto":
                raise
            fall_back(plan, str(error))
    return index


class Executor(Protocol):
    """leads: also does the single steps between stages (one process does). alone: no other process takes part, so a
    lock is taken.
    """

    @property
    def leads(self) -> bool: ...

    @property
    def alone(self) -> bool: ...

    def run(self, plan: PrepPlan, stage: Stage, on_done: OnDone) -> None:
        """Return when every task of the stage is done, or one fell back. on_done(index) reports each."""

    def wait_until(self, there: Callable[[], bool], what: str) -> None:
        """Return when the leading process has made `what`."""


class LocalExecutor:
    """`workers` local processes, kept from stage to stage; 1: this process itself. sparing: inputs below a megabyte are
    prepared in this process whatever `workers` says.
    """

    leads = True
    alone = True

    def __init__(self, workers: int = 1, *, sparing: bool = False) -> None:
        self.workers, self.sparing = workers, sparing
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None

    def close(self) -> None:
        """End the processes, and wait for the pool's own thread, with which Python's exit handler would race for a
        pipe.
        """
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def run(self, plan: PrepPlan, stage: Stage, on_done: OnDone) -> None:
        pending, on_done = _begin(plan, stage, on_done)
        if min(self.workers, len(pending)) <= 1 or (self.sparing and self._pool is None and _is_small(plan)):
            for index in pending:
                on_done(run_task(plan.folder, stage.name, plan.by_reference, index))
            return
        if self._pool is None:
            context = multiprocessing.get_context("spawn")  # a fork would share the tokenizers' threads and locks
            self._pool = concurrent.futures.ProcessPoolExecutor(
                self.workers, mp_context=context, initializer=_begin_worker, initargs=(os.getpid(),)
            )
        with on_interrupt(signal.SIG_IGN):  # the workers inherit it: this process alone answers Ctrl-C, and ends them
            futures = [
                self._pool.submit(run_task, plan.folder, stage.name, plan.by_reference, index) for index in pending
            ]
        try:
            for future in concurrent.futures.as_completed(futures):
                on_done(future.result())
        except BrokenProcessPool:
            self.close()
            raise DataError(
                f"stage {stage.name}: a worker process died, most likely for want of memory; run again with fewer "
                "--workers: what was done is kept"
            ) from None
        except BaseException:  # an error or a signal: the other workers' results are not needed any more
            for child in multiprocessing.active_children():
                child.kill()
            self.close()
            raise

    def wait_until(self, there: Callable[[], bool], what: str) -> None:
        pass


def _is_small(plan: PrepPlan) -> bool:
    totals = itertools.accumulate(part.num_bytes for part in plan.parts)
    return all(total < _FEW_BYTES for total in totals)


def _begin_worker(parent: int) -> None:
    """In a worker, before anything is loaded: one thread each, because every core has a process of its own."""
    end_with(parent)
    os.environ["RAYON_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


@dataclass(frozen=True)
class TaskExecutor:
    """Member `index` of `of` that share the work folder, as in a SLURM array: every `of`-th task is its own. Between
    stages it waits for the others. After patience_s without progress it raises DataError naming what is missing.
    """

    index: int
    of: int
    patience_s: float = 3600.0
    alone = False

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.of:
            raise DataError(
                f"--index {self.index} --of {self.of}: the index counts from 0 and stays below the number of members"
            )

    @property
    def leads(self) -> bool:
        return self.index == 0

    def run(self, plan: PrepPlan, stage: Stage, on_done: OnDone) -> None:
        pending, on_done = _begin(plan, stage, on_done)
        for index in [index for index in pending if index % self.of == self.index]:
            on_done(run_task(plan.folder, stage.name, plan.by_reference, index))
        left = [index for index in pending if index % self.of != self.index]
        seen = time.monotonic()
        while left:
            done = [index for index in left if stage.output(plan, index).exists()]
            if done:
                seen, left = time.monotonic(), [index for index in left if index not in set(done)]
                for index in done:
                    on_done(index)
            elif fell_back(plan) or not plan.folder.exists():
                return  # another member has found that the engines differ, or has finished it all
            elif time.monotonic() - seen > self.patience_s:
                members = sorted({index % self.of for index in left})
                raise DataError(
                    f"stage {stage.name}: waited {self.patience_s:g} s for {len(left)} tasks of members "
                    f"{members[:8]}: start these again (--index), what was done is kept in {plan.folder}"
                )
            else:
                time.sleep(_POLL_SECONDS)

    def wait_until(self, there: Callable[[], bool], what: str) -> None:
        seen = time.monotonic()
        while not there():
            if time.monotonic() - seen > self.patience_s:
                raise DataError(
                    f"waited {self.patience_s:g} s for {what}, which member 0 makes: start it with the same options"
                )
            time.sleep(_POLL_SECONDS)


@dataclass(frozen=True)
class RayExecutor:
    """A Ray cluster whose nodes see the work folder under the same path. address: None starts `workers` here."""

    address: str | None = None
    workers: int | None = None
    leads = True
    alone = True

    def run(self, plan: PrepPlan, stage: Stage, on_done: OnDone) -> None:
        from weftrain.data_prep.stages.ray_executor import run_on_ray

        pending, on_done = _begin(plan, stage, on_done)
        task = functools.partial(run_task, plan.folder, stage.name, plan.by_reference)
        run_on_ray(task, pending, address=self.address, workers=self.workers, on_done=on_done)

    def wait_until(self, there: Callable[[], bool], what: str) -> None:
        pass


def _begin(plan: PrepPlan, stage: Stage, on_done: OnDone) -> tuple[list[int], OnDone]:
    """The tasks that are left, after those an earlier run did were reported; and how to report the others. Nothing is
    reported once a task fell back, because the rest of the stage then returns without an output.
    """

    def report(index: int) -> None:
        if not fell_back(plan):
            on_done(index)

    pending = stage.pending(plan)
    for index in sorted(set(range(stage.count(plan))).difference(pending)):
        report(index)
    return pending, report
