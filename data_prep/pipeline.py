"""prepare(): inputs in, a complete dataset folder out, or nothing under its name.

list -> plan -> tokenize -> survey -> merge (of very much data) -> order -> lay out -> write -> manifest -> rename. Same
inputs and settings give the same bytes, whoever does the tasks, in whichever order, however often it is interrupted. An
interrupted run leaves its work in `.NAME.partial`, on purpose; the same command goes on from there, another one starts
anew.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from weftrain.core.errors import DataError
from weftrain.core.formats import fsops
from weftrain.core.formats.dataset import TOKENIZER
from weftrain.core.formats.dataset_manifest import DatasetManifest, Fim
from weftrain.core.formats.safe_names import path_below
from weftrain.data_prep.existing import compare_existing
from weftrain.data_prep.fim.exact import check_markers
from weftrain.data_prep.growth import as_parent, check_growth, open_parent
from weftrain.data_prep.readers.registry import READERS
from weftrain.data_prep.stages.executors import STAGES, Executor, LocalExecutor, Stage
from weftrain.data_prep.stages.part_notes import read_note
from weftrain.data_prep.stages.plan import (
    SHARD_TOKENS,
    Inputs,
    Order,
    Packing,
    Plan,
    Progress,
    Settings,
    check_inputs,
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
from weftrain.data_prep.stages.survey import check_failures, survey
from weftrain.data_prep.stages.write import finish, lay_out
from weftrain.data_prep.tokens.markers import Markers
from weftrain.data_prep.tokens.tokenization import TextEncoder, load_encoder, train_encoder

DEFAULT_VOCAB_SIZE = 8192
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9][A-Za-z0-9_.-]*)*")


@dataclass(frozen=True)
class Prepared:
    """A dataset folder that is complete. up_to_date: it was before, and nothing was done.

    fallback: what made the reference encode everything under --engine auto, if anything did. notes: what is recorded
    otherwise than was asked for, and changes no token.
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
    fim: Fim | None = None,
    max_failures: int = 0,
    grow: Path | None = None,
    executor: Executor | None = None,
    only_stage: str | None = None,
    progress: Progress = no_progress,
) -> Prepared | None:
    """Make output/name. Without `tokenizer` one of `vocab_size` ids (8192) and 32 special ids more is trained on the
    text.

    eos: the tokenizer's end-of-document token, else `</s>` or `<|endoftext|>`; 'none': none. bos: a token before each
    document. fim_tokens: names of prefix, middle, suffix and perhaps pad, else `<|fim_prefix|>` and so on.
    rows_per_shard: else 64 MiB of tokens. max_failures: how many documents may be unreadable. grow: a dataset that the
    inputs are added to; the settings must be its own (growth.py). only_stage: do that stage and stop, with None where
    the dataset is not complete then. Raises DataError; nothing is then left under the dataset's name.
    """
    executor = executor or LocalExecutor()
    folder = _folder_of(output, name)
    if tokenizer is not None and vocab_size is not None:
        raise DataError("--vocab-size is for training a tokenizer, and --tokenizer names one: give only one of them")
    if sequence_length < 1 or not 0 <= heldout_fraction < 1 or (rows_per_shard is not None and rows_per_shard < 1):
        raise DataError(
            "--sequence-length and --rows-per-shard must be at least 1, --heldout-fraction at least 0 and below 1"
        )
    before, parent = (None, None) if grow is None else open_parent(grow)
    if grow is not None and tokenizer is None and vocab_size is None:
        tokenizer = grow / TOKENIZER
    markers = Markers(eos, bos, fim_tokens)
    given = None if tokenizer is None else load_encoder(tokenizer, markers, engine=engine)
    check_markers(markers, given, None if fim is None else fim.mode)
    settings = Settings(
        tokenizer="trained" if given is None else given.sha256,
        tokenizer_vocab_size=vocab_size or DEFAULT_VOCAB_SIZE if given is None else None,
        eos=eos,
        bos=bos,
        fim_tokens=fim_tokens,
        sequence_length=sequence_length,
        heldout_fraction=heldout_fraction,
        rows_per_shard=rows_per_shard or max(1, SHARD_TOKENS // sequence_length),
        seed=seed,
        packing=packing,
        order=order,
        epochs=epochs,
        chunks=chunks,
        global_batch_size=global_batch_size,
        fim=fim,
    )
    if before is not None:
        settings = as_parent(settings, before, rows_per_shard)
    check_inputs(inputs, settings)
    inputs = _of_tokenizer(inputs, given)
    plan = replace(make_plan(folder.parent / f".{folder.name}.partial", inputs, settings, engine), parent=parent)
    if before is not None:
        check_growth(before, plan, folder)
    try:
        fsops.make_dirs(folder.parent)
        if not executor.alone:
            return _prepare(folder, plan, given, name, executor, only_stage, max_failures, progress)
        with fsops.held_lock(folder.parent / f".{folder.name}.lock", b""):
            return _prepare(folder, plan, given, name, executor, only_stage, max_failures, progress)
    except BlockingIOError:
        raise DataError(
            f"{folder}: is being prepared by another process; wait for it, or give another --name"
        ) from None
    except OSError as error:
        place = f"{error.filename or folder}: {error.strerror or error}"
        raise DataError(
            f"{place}; free space or choose another folder for the datasets; run again and it goes on"
        ) from error


def _folder_of(output: Path, name: str) -> Path:
    """Raises DataError for a name that is no folder's."""
    if not _NAME.fullmatch(name):
        raise DataError(
            f"--name {name!r}: use letters, digits, '_', '.', '-', and '/' for folders within the datasets' folder"
        )
    try:
        return path_below(output, name)
    except ValueError as error:
        raise DataError(f"--name: {error}") from error


def _of_tokenizer(inputs: Inputs, given: TextEncoder | None) -> Inputs:
    """The inputs, with what streams of ids need of the tokenizer that they are of. Raises DataError where it has no end
    token.
    """
    if given is None or not any(READERS[file.format].by_end_token for file in inputs.files):
        return inputs
    if given.eos_id is None:
        raise DataError(
            f"{inputs.description}: holds streams of ids that end tokens tell apart: name their end token with --eos"
        )
    return replace(inputs, options=inputs.options.of_tokenizer(given.vocab_size, given.eos_id))


def _prepare(
    folder: Path,
    plan: Plan,
    given: TextEncoder | None,
    name: str,
    executor: Executor,
    only_stage: str | None,
    max_failures: int,
    progress: Progress,
) -> Prepared | None:
    if folder.exists():
        manifest, notes = compare_existing(folder, plan, max_failures, progress)
        fsops.remove_tree(plan.folder)  # what a run left that was killed after the rename
        return Prepared(folder, manifest, up_to_date=True, notes=notes)
    if executor.leads:
        save_plan(plan)
        plan = load_plan(plan.folder)  # whose tables are files
    else:
        executor.wait_until(lambda: is_saved(plan) or folder.exists(), f"{plan.folder}")
    try:
        plan = _do_stages(plan, given, executor, only_stage, max_failures, progress)
    except DataError:
        if not executor.leads and folder.exists():  # member 0 was faster and has tidied up
            return None
        raise
    if only_stage not in (None, "finish") or not executor.leads:
        return None
    missing = STAGES["write"].pending(plan)
    if missing:
        raise DataError(
            f"{plan.folder}: {len(missing)} shards are not written yet, the first is task {missing[0]} of stage write"
        )
    for place in (plan.dataset, plan.dataset / "train", plan.dataset / "heldout"):
        fsops.remove_leftovers(place)  # of a process that was killed while it wrote a shard
    manifest, fallback = finish(plan, name), fallback_reason(plan)
    fsops.rename(plan.dataset, folder)
    fsops.remove_tree(plan.folder)
    return Prepared(folder, manifest, up_to_date=False, fallback=fallback)


def _do_stages(
    plan: Plan,
    given: TextEncoder | None,
    executor: Executor,
    only_stage: str | None,
    max_failures: int,
    progress: Progress,
) -> Plan:
    """Every stage, or the one asked for; from the first one anew where a task found that the engines differ. Returns
    the plan done.
    """
    while True:
        plan = settled(plan)
        _do_steps(plan, given, executor, only_stage, max_failures, progress)
        if not fell_back(plan):
            return plan
        if only_stage not in (None, "tokenize"):
            raise DataError(
                f"{fallback_reason(settled(plan))}, which encodes everything from here on: run again from stage "
                "tokenize on"
            )


def _do_steps(
    plan: Plan,
    given: TextEncoder | None,
    executor: Executor,
    only_stage: str | None,
    max_failures: int,
    progress: Progress,
) -> None:
    """Every stage, or the one asked for, and what stands between it and the one before; up to a task that falls
    back.
    """
    # a stage, and what comes after it: its file, what makes it
    steps: list[tuple[Stage | None, list[tuple[Path, Callable[[], Any]]]]] = [
        (
            STAGES["sample"] if given is None else None,
            [(plan.tokenizer_file, lambda: _make_tokenizer(plan, given, max_failures, progress))],
        ),
        (STAGES["tokenize"], [(plan.survey_file, lambda: survey(plan, max_failures))]),
        (STAGES["merge"], []),
        (STAGES["order"], [(plan.layout_file, lambda: lay_out(plan))]),
        (STAGES["write"], []),
    ]
    before: list[Callable[[], None]] = []
    for stage, after in steps:
        if stage is not None and only_stage not in (None, stage.name):
            before.append(functools.partial(_check_done, plan, stage))
        elif stage is not None:
            for act in before:
                act()
            before = []
            executor.run(plan, stage, _counting(plan, stage, progress))
            if fell_back(plan):
                return
        before += [functools.partial(_between, executor, made, make) for made, make in after]


def _check_done(plan: Plan, stage: Stage) -> None:
    """Raises DataError where an earlier stage than the one that was asked for is not done."""
    if missing := stage.pending(plan):
        raise DataError(
            f"{plan.folder}: {len(missing)} tasks of --stage {stage.name} are not done, the first is task "
            f"{missing[0]}; do it first"
        )


def _between(executor: Executor, made: Path, make: Callable[[], Any]) -> None:
    """What one process does between two stages; the others wait for its file."""
    if made.exists():
        return
    if executor.leads:
        make()
    else:
        executor.wait_until(made.exists, str(made))


def _make_tokenizer(plan: Plan, given: TextEncoder | None, max_failures: int, progress: Progress) -> None:
    if given is None:
        check_failures(plan, "samples", max_failures)
        texts = list(training_texts(plan))
        total = sum(map(len, texts))
        progress("train tokenizer", 0, total, "characters")
        given = train_encoder(texts, plan.settings.tokenizer_vocab_size or DEFAULT_VOCAB_SIZE)
        progress("train tokenizer", total, total, "characters")
    fsops.write_bytes(plan.tokenizer_file, given.data)


def _counting(plan: Plan, stage: Stage, progress: Progress) -> Callable[[int], None]:
    """Progress of a stage: megabytes of input where it reads them, with the documents so far; else tasks."""
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
