"""Who does the tasks: processes of this machine, one member of a job array, or a Ray cluster. The result is the same
bytes.

An executor decides nothing. Which tasks there are is in the plan, each has one output file, and what is
there already is not done again; so a task that two do, or that one does twice, is harmless.
"""

from __future__ import annotations

import concurrent.futures
import functools
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from weftrain.core.errors import DataError
from weftrain.core.formats.child_process import end_with
from weftrain.data_prep.stages.order import merge_run, order_bucket
from weftrain.data_prep.stages.plan import Plan, fall_back, fell_back, load_plan
from weftrain.data_prep.stages.sample import sample_part
from weftrain.data_prep.stages.survey import load_json
from weftrain.data_prep.stages.tokenize import tokenize_part
from weftrain.data_prep.stages.write import write_one_shard
from weftrain.data_prep.tokens.tokenization import EnginesDifferError

OnDone = Callable[[int], None]
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Stage:
    """Tasks 0..count(plan)-1 that do not wait for each other. output: the file that says that a task is done."""

    name: str
    count: Callable[[Plan], int]
    do: Callable[[Plan, int], None]
    output: Callable[[Plan, int], Path]

    def pending(self, plan: Plan) -> list[int]:
        return [index for index in range(self.count(plan)) if not self.output(plan, index).exists()]


STAGES = {
    stage.name: stage
    for stage in (
        Stage("sample", lambda plan: len(plan.parts), sample_part, Plan.sample_file),
        Stage("tokenize", lambda plan: len(plan.parts), tokenize_part, Plan.part_file),
        Stage("merge", lambda plan: load_json(plan.survey_file)["runs"], merge_run, Plan.run_file),
        Stage("order", lambda plan: load_json(plan.survey_file)["buckets"], order_bucket, Plan.bucket_file),
        Stage("write", lambda plan: len(load_json(plan.layout_file)["shards"]), write_one_shard, Plan.shard_record),
    )
}


def run_task(folder: Path, stage: str, by_reference: bool, index: int) -> int:
    """One task of the plan in `folder`, in any process; returns its index. Raises DataError, OSError.

    by_reference: of the plan that the task was taken from. Where the engines have differed since, nothing is done: see
    plan.fall_back.
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
    """leads: does what is between stages too (one process in all). alone: no other process takes part, so a lock can
    say so.
    """

    @property
    def leads(self) -> bool: ...

    @property
    def alone(self) -> bool: ...

    def run(self, plan: Plan, stage: Stage, on_done: OnDone) -> None:
        """Return when every task of the stage is done, whoever did it, or when one fell back (plan.fell_back).
        on_done(index) for each as it becomes known.
        """

    def wait_until(self, there: Callable[[], bool], what: str) -> None:
        """Return when what the leading process makes is there."""


class LocalExecutor:
    """`workers` processes of this machine, kept from stage to stage; 1: this process itself."""

    leads = True
    alone = True

    def __init__(self, workers: int = 1) -> None:
        self.workers = workers
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None

    def close(self) -> None:
        """Let the processes go.

        Waits for the pool's own thread: at the interpreter's end it would close its pipe while Python's exit handler
        writes to it, which prints "Exception ignored in ... Bad file descriptor".
        """
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def run(self, plan: Plan, stage: Stage, on_done: OnDone) -> None:
        pending = stage.pending(plan)
        on_done = _unless_fell_back(plan, on_done)
        _report_done(plan, stage, pending, on_done)
        if min(self.workers, len(pending)) <= 1:
            for index in pending:
                on_done(run_task(plan.folder, stage.name, plan.by_reference, index))
            return
        if self._pool is None:
            context = multiprocessing.get_context("spawn")  # a fork would share the tokenizers' threads and locks
            self._pool = concurrent.futures.ProcessPoolExecutor(
                self.workers, mp_context=context, initializer=_begin_worker, initargs=(os.getpid(),)
            )
        futures = [self._pool.submit(run_task, plan.folder, stage.name, plan.by_reference, index) for index in pending]
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


def _begin_worker(parent: int) -> None:
    """In a worker, before anything is loaded: the tokenizers' thread pool knows no other setting, and each core has its
    process.
    """
    end_with(parent)
    os.environ["RAYON_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


@dataclass(frozen=True)
class TaskExecutor:
    """Member `index` of `of` that share the work folder, as the members of a SLURM array do: every `of`-th task is its
    own.

    Between stages it waits for the others; patience_s without anything new, and it says what is missing. Raises
    DataError.
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

    def run(self, plan: Plan, stage: Stage, on_done: OnDone) -> None:
        pending = stage.pending(plan)
        on_done = _unless_fell_back(plan, on_done)
        _report_done(plan, stage, pending, on_done)
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
    """A Ray cluster whose nodes see the work folder under the same path. address: None starts one of `workers` here."""

    address: str | None = None
    workers: int | None = None
    leads = True
    alone = True

    def run(self, plan: Plan, stage: Stage, on_done: OnDone) -> None:
        from weftrain.data_prep.stages.ray_executor import run_on_ray

        pending = stage.pending(plan)
        on_done = _unless_fell_back(plan, on_done)
        _report_done(plan, stage, pending, on_done)
        task = functools.partial(run_task, plan.folder, stage.name, plan.by_reference)
        run_on_ray(task, pending, address=self.address, workers=self.workers, on_done=on_done)

    def wait_until(self, there: Callable[[], bool], what: str) -> None:
        pass


def _unless_fell_back(plan: Plan, on_done: OnDone) -> OnDone:
    """on_done for tasks that have an output: once a task fell back, those left of the stage return without one."""

    def report(index: int) -> None:
        if not fell_back(plan):
            on_done(index)

    return report


def _report_done(plan: Plan, stage: Stage, pending: Sequence[int], on_done: OnDone) -> None:
    """What an earlier run did counts as done."""
    left = set(pending)
    for index in range(stage.count(plan)):
        if index not in left:
            on_done(index)
