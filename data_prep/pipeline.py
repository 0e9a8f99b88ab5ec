"""prepare() turns inputs into a complete dataset folder; if it fails, nothing stands under the dataset's name.

list -> plan -> tokenize -> survey -> merge (very large inputs only) -> order -> lay out -> write -> manifest -> rename.
The same inputs and settings give the same bytes, whatever the executor, the order of tasks and the interruptions. An
interrupted run keeps its work in `.NAME.partial`: the same command resumes it, a different one starts afresh.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from weftrain.core.errors import DataError, file_problem
from weftrain.core.formats import fsops
from weftrain.core.formats.dataset import TOKENIZER
from weftrain.core.formats.dataset_manifest import DatasetManifest, FimSettings
from weftrain.core.formats.safe_names import path_below
from weftrain.data_prep.choices import Order, Packing
from weftrain.data_prep.conversations.encode import control_names
from weftrain.data_prep.existing import compare_existing
from weftrain.data_prep.fim.exact import check_markers
from weftrain.data_prep.growth import as_parent, check_growth, open_parent
from weftrain.data_prep.readers.registry import READERS
from weftrain.data_prep.stages.executors import STAGES, Executor, LocalExecutor, Stage
from weftrain.data_prep.stages.part_notes import read_note
from weftrain.data_prep.stages.plan import (
    SHARD_TOKENS,
    Parent,
    PrepPlan,
    Progress,
    fallback_reason,
    fell_back,
    is_saved,
    load_plan,
    make_plan,
    no_progress,
    save_plan,
    settled,
)
from weftrain.data_prep.stages.sample import training_texts
from weftrain.data_prep.stages.settings import Conversations, Inputs, Preferences, Settings, check_inputs
from weftrain.data_prep.stages.survey import check_failures, survey
from weftrain.data_prep.stages.write import finish, lay_out
from weftrain.data_prep.tokens.markers import Markers
from weftrain.data_prep.tokens.tokenization import TextEncoder, load_encoder
from weftrain.data_prep.tokens.training import train_encoder

DEFAULT_VOCAB_SIZE = 8192
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9][A-Za-z0-9_.-]*)*")


@dataclass(frozen=True)
class Prepared:
    """A complete dataset folder. up_to_date: it was complete before, and nothing was done.

    fallback: why the reference encoded everything under --engine auto, if it did. notes: differences between what is
    recorded and what was asked for that change no token.
    """

    folder: Path
    manifest: DatasetManifest
    up_to_date: bool
    fallback: str | None = None
    notes: tuple[str, ...] = ()


def prepare(
    inputs: Inputs,
    output: Path,
    *,
    name: str,
    tokenizer: Path | None = None,
    eos: str | None = None,
    bos: str | None = None,
    fim_tokens: tuple[str, ...] = (),
    vocab_size: int | None = None,
    engine: str = "auto",
    sequence_length: int,
    heldout_fraction: float = 0.01,
    rows_per_shard: int | None = None,
    seed: int = 0,
    packing: Packing = "concatenate",
    order: Order = "shuffled",
    epochs: int = 1,
    chunks: int | None = None,
    global_batch_size: int | None = None,
    fim: FimSettings | None = None,
    conversations: Conversations | None = None,
    preferences: Preferences | None = None,
    max_failures: int = 0,
    grow: Path | None = None,
    executor: Executor | None = None,
    only_stage: str | None = None,
    progress: Progress = no_progress,
) -> Prepared | None:
    """Make output/name. Without `tokenizer` one of `vocab_size` ids (8192) and 32 special ids is trained on the text.

    grow: a dataset that the inputs are added to (growth.py). only_stage: do only this stage, and return None unless it
    completes the dataset. The other settings: stages/settings.py. Raises DataError, leaving nothing under the name.
    """
    folder = _folder_of(output, name)
    if sequence_length < 1 or not 0 <= heldout_fraction < 1 or (rows_per_shard is not None and rows_per_shard < 1):
        raise DataError(
            "--sequence-length and --rows-per-shard must be at least 1, --heldout-fraction at least 0 and below 1"
        )
    grown = None if grow is None else open_parent(grow)
    if grow is not None and tokenizer is None and vocab_size is None:
        tokenizer = grow / TOKENIZER
    if conversations is not None or preferences is not None:
        engine = "tokenizers"  # which alone says where in the text each token lies
    given = _given_encoder(tokenizer, vocab_size, Markers(eos, bos, fim_tokens), engine, fim)
    settings = Settings(
        tokenizer="trained" if given is None else given.sha256,
        tokenizer_vocab_size=vocab_size or DEFAULT_VOCAB_SIZE if given is None else None,
        eos=eos,
        bos=bos,
        fim_tokens=fim_tokens,
        sequence_length=sequence_length * (1 if preferences is None else preferences.sides),
        heldout_fraction=heldout_fraction,
        rows_per_shard=rows_per_shard or max(1, SHARD_TOKENS // sequence_length),
        seed=seed,
        packing=packing,
        order=order,
        epochs=epochs,
        chunks=chunks,
        global_batch_size=global_batch_size,
        fim=fim,
        conversations=conversations,
        preferences=preferences,
    )
    for told in (conversations, preferences):
        if told is not None and told.template is not None and given is not None:
            control_names(given, told.turn_end)  # which refuses what the tokenizer cannot do
    plan = _plan(folder, inputs, settings, given, engine, grown, rows_per_shard)
    return _Run(folder, name, given, executor or LocalExecutor(), only_stage, max_failures, progress).locked(plan)


def _folder_of(output: Path, name: str) -> Path:
    """Raises DataError for a name that cannot be a folder's."""
    if not _NAME.fullmatch(name):
        raise DataError(
            f"--name {name!r}: use letters, digits, '_', '.', '-', and '/' for folders within the datasets' folder"
        )
    try:
        return path_below(output, name)
    except ValueError as error:
        raise DataError(f"--name: {error}") from error


def _given_encoder(
    tokenizer: Path | None, vocab_size: int | None, markers: Markers, engine: str, fim: FimSettings | None
) -> TextEncoder | None:
    """The named tokenizer; None: one is trained. Raises DataError where it lacks a token that the dataset needs."""
    if tokenizer is not None and vocab_size is not None:
        raise DataError("--vocab-size is for training a tokenizer, and --tokenizer names one: give only one of them")
    given = None if tokenizer is None else load_encoder(tokenizer, markers, engine=engine)
    check_markers(markers, given, None if fim is None else fim.mode)
    return given


def _plan(
    folder: Path,
    inputs: Inputs,
    settings: Settings,
    given: TextEncoder | None,
    engine: str,
    grown: tuple[DatasetManifest, Parent] | None,
    rows_per_shard: int | None,
) -> PrepPlan:
    """The plan of a dataset, which must continue `grown` where it is given. Raises DataError."""
    if grown is not None:
        settings = as_parent(settings, grown[0], rows_per_shard)
    check_inputs(inputs, settings)
    inputs = with_end_token(inputs, given)
    plan = make_plan(folder.parent / f".{folder.name}.partial", inputs, settings, engine)
    if grown is not None:
        plan = replace(plan, parent=grown[1])
        check_growth(grown[0], plan, folder)
    return plan


def with_end_token(inputs: Inputs, given: TextEncoder | None) -> Inputs:
    """The inputs, with the tokenizer's end token where a stream of ids is split by it. Raises DataError where it has
    none.
    """
    if given is None or not any(READERS[file.format].by_end_token for file in inputs.files):
        return inputs
    if given.eos_id is None:
        raise DataError(
            f"{inputs.description}: holds streams of ids that end tokens tell apart: name their end token with --eos"
        )
    return replace(inputs, options=inputs.options.of_tokenizer(given.vocab_size, given.eos_id))


@dataclass(frozen=True)
class _Run:
    """How the plan of one dataset is carried out. given: the tokenizer that was named; None: one is trained."""

    folder: Path
    name: str
    given: TextEncoder | None
    executor: Executor
    only_stage: str | None
    max_failures: int
    progress: Progress

    def locked(self, plan: PrepPlan) -> Prepared | None:
        """Make the dataset; nobody else does at the same time, unless the executor shares the work."""
        folder = self.folder
        try:
            fsops.make_dirs(folder.parent)
            if not self.executor.alone:
                return self.make(plan)
            with fsops.held_lock(folder.parent / f".{folder.name}.lock", b""):
                return self.make(plan)
        except BlockingIOError:
            raise DataError(
                f"{folder}: is being prepared by another process; wait for it, or give another --name"
            ) from None
        except OSError as error:
            place = f"{error.filename or folder}: {file_problem(error)}"
            raise DataError(
                f"{place}; free space or choose another folder for the datasets; run again and it goes on"
            ) from error

    def make(self, plan: PrepPlan) -> Prepared | None:
        folder, executor = self.folder, self.executor
        if folder.exists():
            manifest, notes = compare_existing(folder, plan, self.max_failures, self.progress)
            fsops.remove_tree(plan.folder)  # left by a run that was killed after the rename
            return Prepared(folder, manifest, up_to_date=True, notes=notes)
        if executor.leads:
            save_plan(plan)
            plan = load_plan(plan.folder)  # its tables are now files
        else:
            executor.wait_until(lambda: is_saved(plan) or folder.exists(), f"{plan.folder}")
        try:
            plan = self._do_stages(plan)
        except DataError:
            if not executor.leads and folder.exists():  # member 0 has finished and tidied up
                return None
            raise
        if self.only_stage not in (None, "finish") or not executor.leads:
            return None
        if missing := STAGES["write"].pending(plan):
            raise DataError(
                f"{plan.folder}: {len(missing)} shards are not written yet, the first is task {missing[0]} of stage "
                "write"
            )
        for place in (plan.dataset, plan.dataset / "train", plan.dataset / "heldout"):
            fsops.remove_leftovers(place)  # of a process that was killed while it wrote a shard
        manifest, fallback = finish(plan, self.name), fallback_reason(plan)
        fsops.rename(plan.dataset, folder)
        fsops.remove_tree(plan.folder)
        return Prepared(folder, manifest, up_to_date=False, fallback=fallback)

    def _do_stages(self, plan: PrepPlan) -> PrepPlan:
        """Do every stage, or the one asked for; start again where a task found that the engines differ. Returns the
        plan that was done.
        """
        while True:
            plan = settled(plan)
            self._do_steps(plan)
            if not fell_back(plan):
                return plan
            if self.only_stage not in (None, "tokenize"):
                raise DataError(
                    f"{fallback_reason(settled(plan))}, which encodes everything from here on: run again from stage "
                    "tokenize on"
                )

    def _do_steps(self, plan: PrepPlan) -> None:
        """Do every stage, or the one asked for, and the single steps between them; stop where a task falls back."""
        # a stage, then the single steps after it: the file of each, and what makes it
        steps: list[tuple[Stage | None, list[tuple[Path, Callable[[], Any]]]]] = [
            (STAGES["sample"] if self.given is None else None, [(plan.tokenizer_file, lambda: self._tokenizer(plan))]),
            (STAGES["tokenize"], [(plan.survey_file, lambda: survey(plan, self.max_failures))]),
            (STAGES["merge"], []),
            (STAGES["order"], [(plan.layout_file, lambda: lay_out(plan))]),
            (STAGES["write"], []),
        ]
        before: list[Callable[[], None]] = []
        for stage, after in steps:
            if stage is not None and self.only_stage not in (None, stage.name):
                before.append(functools.partial(_check_done, plan, stage))
            elif stage is not None:
                for act in before:
                    act()
                before = []
                self.executor.run(plan, stage, _counting(plan, stage, self.progress))
                if fell_back(plan):
                    return
            before += [functools.partial(self._single_step, made, make) for made, make in after]

    def _single_step(self, made: Path, make: Callable[[], Any]) -> None:
        """What one process does between two stages; the others wait for its file."""
        if made.exists():
            return
        if self.executor.leads:
            make()
        else:
            self.executor.wait_until(made.exists, str(made))

    def _tokenizer(self, plan: PrepPlan) -> None:
        """Write the tokenizer's file, trained first where none was given."""
        encoder = self.given
        if encoder is None:
            check_failures(plan, "samples", self.max_failures)
            texts = list(training_texts(plan))
            total = sum(map(len, texts))
            self.progress("train tokenizer", 0, total, "characters")
            encoder = train_encoder(texts, plan.settings.tokenizer_vocab_size or DEFAULT_VOCAB_SIZE)
            self.progress("train tokenizer", total, total, "characters")
        fsops.write_bytes(plan.tokenizer_file, encoder.data)


def _check_done(plan: PrepPlan, stage: Stage) -> None:
    """Raises DataError where a stage before the one that was asked for is not done."""
    if missing := stage.pending(plan):
        raise DataError(
            f"{plan.folder}: {len(missing)} tasks of --stage {stage.name} are not done, the first is task "
            f"{missing[0]}; do it first"
        )


def _counting(plan: PrepPlan, stage: Stage, progress: Progress) -> Callable[[int], None]:
    """Progress of a stage: bytes of input where it reads them, with the documents so far; else tasks."""
    count = stage.count(plan)
    by_bytes = stage.name in ("sample", "tokenize")
    sizes = [part.num_bytes for part in plan.parts] if by_bytes else [1] * count
    total, done, documents = sum(sizes), 0, 0

    def on_done(index: int) -> None:
        nonlocal done, documents
        done += sizes[index]
        if stage.name == "tokenize":
            documents += read_note(plan.part_file(index))["documents"]
            progress(stage.name, done, total, f"bytes, {documents:,} documents")
        else:
            progress(stage.name, done, total, "bytes" if by_bytes else "tasks")

    return on_done
