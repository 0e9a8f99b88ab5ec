"""Scores of `weftrain eval` that are kept as records: lm-eval tasks, generated programs, and --watch.

A checkpoint's manifest, which names it, is always read; its weights only if a record is missing.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from weftrain.analysis.evaluation.records import EvaluatedCheckpoint, EvaluationRecord, EvaluationSettings
from weftrain.analysis.evaluation.tasks import PRESETS, TaskRequest
from weftrain.cli.display import Bar, Console, program
from weftrain.core.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from weftrain.analysis.evaluation.generation import Generator
    from weftrain.analysis.evaluation.lm_eval_model import CheckpointLM
    from weftrain.core.config import Recipe
    from weftrain.core.formats.dataset_manifest import DatasetManifest
    from weftrain.core.model import Decoder
    from weftrain.core.model_config import ModelConfig
    from weftrain.core.order.batch import EvaluationSource


def evaluate_records(run: Path, overrides: Sequence[str], options: dict[str, Any]) -> None:
    """Run the verb. options: the command's, already checked. Raises WeftrainError."""
    from weftrain.analysis.compare.huggingface import check_no_overrides, revisions_of
    from weftrain.analysis.evaluation.watcher import watch
    from weftrain.cli.assembly import newest_or_named

    console = Console(stderr=options["as_json"])
    settings = _settings(options)
    console.print(f"on {settings.device} in {settings.precision}, {settings.batch_size} sequences at once")

    def say(line: str) -> None:
        console.print(line)

    from weftrain.cli.evaluate_side import SideEvaluations

    side = SideEvaluations(run, settings, say)
    follows = options["watch"] and not any(options[name] for name in ("tasks", "preset", "code", "loss_on"))
    recipes: list[Recipe] = []  # of the checkpoints that had evaluations on the side, the newest last

    def evaluate(path: Path, verified: bool = False) -> None:
        opened = RunCheckpoint(path, overrides, settings, options["tokenizer"], verified)
        if follows and side.of(opened.recipe):
            recipes.append(opened.recipe)
            with Bar(console, f"step {opened.step}", 1) as bar:
                records = side.records(opened, lambda settings: _lm(opened, settings, bar))
        else:
            records = _records(opened, settings, options, console)
        _show(records, opened, options["as_json"], console)

    if options["watch"]:
        if not (run / "checkpoints").is_dir():
            raise CheckpointError(
                f"{run}: no run folder, it has no 'checkpoints'; start the run first, or leave --watch out"
            )
        steps = watch(run, evaluate, every_seconds=options["every_seconds"], until_step=options["until_step"], say=say)
        say(f"watched to the end: {len(steps)} checkpoints")
        if recipes:
            side.enter(recipes[-1])
        return
    if revisions := revisions_of(run):
        check_no_overrides(run, overrides)
        for step, folder in revisions.items():
            revision = _Revision(folder, step, settings, options["tokenizer"])
            _show(_records(revision, settings, options, console), revision, options["as_json"], console)
        return
    path = newest_or_named(run, say)
    evaluate(path, verified=path != run)


def _settings(options: dict[str, Any]) -> EvaluationSettings:
    import torch

    device = options["device"]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return EvaluationSettings(
        options["batch_size"], options["seed"], options["limit"], options["precision"], device, options["include"]
    )


class _Evaluated(ABC):
    """What is evaluated: a checkpoint or a revision, named by `root`, whose weights are read on first use."""

    path: Path
    root: str
    step: int
    config: ModelConfig

    @functools.cached_property
    @abstractmethod
    def decoder(self) -> Decoder:
        """The model, verified. Raises CheckpointError, RecipeError."""

    @functools.cached_property
    @abstractmethod
    def tokenizer_file(self) -> tuple[Path, tuple[Path, DatasetManifest] | None]:
        """Which file the tokenizer is read from, and the dataset that must agree with it: its folder and manifest."""

    @abstractmethod
    def heldout(self, loss_on: Sequence[Path], rows: int | None) -> tuple[Sequence[EvaluationSource], bool]:
        """The held-out sets, and whether attention stays within their documents. Raises DataError."""

    @functools.cached_property
    def generator(self) -> Generator:
        from weftrain.analysis.evaluation.generation import Generator

        return Generator(self.decoder)

    @functools.cached_property
    def tokenizer(self) -> tuple[Tokenizer, str, int]:
        """The tokenizer, its SHA-256, and the id that ends a text."""
        from weftrain.analysis.evaluation.tokenizer import end_of_text_id, open_tokenizer

        path, dataset = self.tokenizer_file
        tokenizer, sha256 = open_tokenizer(path, self.config.vocab_size, dataset)
        return tokenizer, sha256, end_of_text_id(tokenizer, path, None if dataset is None else dataset[1])


class RunCheckpoint(_Evaluated):
    """A checkpoint of a run. Raises CheckpointError, DataError, RecipeError."""

    def __init__(
        self, path: Path, overrides: Sequence[str], settings: EvaluationSettings, tokenizer: Path | None, verified: bool
    ) -> None:
        from weftrain.cli.assembly import recipe_of_checkpoint
        from weftrain.core.formats.checkpoint_manifest import read_checkpoint_manifest

        try:
            manifest = read_checkpoint_manifest(path)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path}: manifest.json: {error}: name a run folder or a checkpoint's folder"
            ) from error
        self.path, self._settings, self._verified, self._given_tokenizer = path, settings, verified, tokenizer
        self.root, self.step = manifest["root"], manifest["step"]
        self.recipe = recipe_of_checkpoint(path, manifest, overrides).recipe
        self.config = self.recipe.model

    @functools.cached_property
    def decoder(self) -> Decoder:
        import torch

        from weftrain.analysis.evaluation.generation import load_model
        from weftrain.core import checkpoint

        state, manifest = checkpoint.load(self.path, verified=self._verified)
        if manifest["root"] != self.root:
            raise CheckpointError(f"{self.path}: another checkpoint has taken its place: start again")
        dtype = getattr(torch, self._settings.precision)
        return load_model(
            checkpoint.Weights(state.tensors, self.recipe.tuning.lora), self.config, self._settings.device, dtype
        )

    @functools.cached_property
    def tokenizer_file(self) -> tuple[Path, tuple[Path, DatasetManifest] | None]:
        from weftrain.core.formats.dataset import TOKENIZER, read_dataset_manifest

        data = self.recipe.data
        folder = Path(data.root) / data.sources[0].path if data.sources else None
        dataset = None if folder is None or not folder.is_dir() else (folder, read_dataset_manifest(folder))
        path = self._given_tokenizer or (None if dataset is None else dataset[0] / TOKENIZER)
        if path is None:
            where = "the recipe names no dataset" if folder is None else f"{folder} is not there"
            raise DataError(
                f"{self.path}: no tokenizer: {where}; name the model's tokenizer.json with --tokenizer, or set "
                "data.root="
            )
        return path, dataset

    def heldout(self, loss_on: Sequence[Path], rows: int | None) -> tuple[Sequence[EvaluationSource], bool]:
        from weftrain.core.order.source_sets import open_heldout

        if loss_on:
            raise DataError(
                f"{self.path}: --loss-on is for Hugging Face models; leave it out for the run's own held-out sets, or "
                f"use '{program()} compare' to measure both on the same rows"
            )
        data = self.recipe.data
        sets = open_heldout(data, self.config.vocab_size, rows or 2**40) if data.sources else []
        if not sets:
            raise DataError(f"{self.path}: its recipe has no held-out set; name --tasks or --code, or prepare one")
        return sets, data.document_attention


class _Revision(_Evaluated):
    """A model of Hugging Face, computed by weftrain's decoder. Raises CheckpointError, RecipeError."""

    def __init__(self, path: Path, step: int, settings: EvaluationSettings, tokenizer: Path | None) -> None:
        from weftrain.analysis.compare.huggingface import check_revision, revision_root
        from weftrain.exchange.huggingface.folder import read_config

        check_revision(path)
        self.path, self.step, self.config = path, step, read_config(path)
        self.root = revision_root(path)
        self._settings, self._given_tokenizer = settings, tokenizer

    @functools.cached_property
    def decoder(self) -> Decoder:
        import torch

        from weftrain.analysis.compare.huggingface import load_own

        return load_own(self.path, self._settings.device, getattr(torch, self._settings.precision))

    @functools.cached_property
    def tokenizer_file(self) -> tuple[Path, None]:
        from weftrain.core.formats.dataset import TOKENIZER

        return self._given_tokenizer or self.path / TOKENIZER, None

    def heldout(self, loss_on: Sequence[Path], rows: int | None) -> tuple[Sequence[EvaluationSource], bool]:
        from weftrain.analysis.compare.measure import open_held, why_not_model

        sets = [open_held(path, rows) for path in loss_on]
        for path, held in zip(loss_on, sets, strict=True):
            if (why := why_not_model(self.path, self.config, held)) is not None:
                raise DataError(f"{path}: cannot be measured with {self.path}: {why}")
        return [held.source for held in sets], False


def _requests(options: dict[str, Any]) -> list[TaskRequest]:
    named = [name.strip() for name in (options["tasks"] or "").split(",") if name.strip()]
    return [
        *(PRESETS[options["preset"]] if options["preset"] else ()),
        *(TaskRequest(name, options["shots"]) for name in named),
    ]


def _lm(opened: _Evaluated, settings: EvaluationSettings, bar: Bar) -> CheckpointLM:
    from weftrain.analysis.evaluation.lm_eval_model import CheckpointLM

    tokenizer, _, eos_id = opened.tokenizer
    return CheckpointLM(
        opened.generator,
        tokenizer,
        eos_id,
        opened.config.max_position_embeddings,
        batch_size=settings.batch_size,
        seed=settings.seed,
        report=lambda done, total, what: bar.update(done, what, total=total),
    )


def _records(
    opened: _Evaluated, settings: EvaluationSettings, options: dict[str, Any], console: Console
) -> list[EvaluationRecord]:
    """Every requested score of one checkpoint: read from its record, or computed and recorded."""
    from weftrain.analysis.evaluation.heldout import attend_within_documents, run_heldout
    from weftrain.analysis.evaluation.records import records_folder
    from weftrain.analysis.evaluation.tasks import run_tasks
    from weftrain.core.formats.tokenizer_file import panics_refused

    folder, requests = records_folder(opened.path), _requests(options)
    records: list[EvaluationRecord] = []
    with Bar(console, f"step {opened.step}", 1) as bar:
        if requests:
            subject = EvaluatedCheckpoint(opened.root, opened.step, opened.tokenizer[1])
            with panics_refused(str(opened.tokenizer_file[0])):
                model = functools.partial(_lm, opened, settings, bar)
                records += run_tasks(requests, subject, settings, model, folder, bar.say)
        if options["code"]:
            with panics_refused(str(opened.tokenizer_file[0])):
                records.append(_code(opened, settings, options, folder, bar))
        if options["loss_on"] or not (requests or options["code"]):
            sets, within_documents = opened.heldout(options["loss_on"], options["rows"])

            def decoder() -> Decoder:
                if within_documents:
                    attend_within_documents(opened.decoder)
                return opened.decoder

            records += run_heldout(
                sets, EvaluatedCheckpoint(opened.root, opened.step), settings, decoder, folder, bar.say
            )
    return records


def _code(
    opened: _Evaluated, settings: EvaluationSettings, options: dict[str, Any], folder: Path, bar: Bar
) -> EvaluationRecord:
    from weftrain.analysis.evaluation.code import CodeSettings, run_code

    try:
        ks = tuple(int(k) for k in options["ks"].split(","))
    except ValueError:
        raise DataError(f"--k {options['ks']}: whole numbers with commas between them, e.g. --k 1,10") from None
    code = CodeSettings(options["samples"], ks, options["temperature"], options["top_p"], options["max_new_tokens"])
    tokenizer, sha256, eos_id = opened.tokenizer
    return run_code(
        options["code"],
        code,
        EvaluatedCheckpoint(opened.root, opened.step, sha256),
        settings,
        tokenizer,
        eos_id,
        opened.config.max_position_embeddings,
        lambda: opened.generator,
        folder,
        bar.say,
        lambda done, total: bar.update(done, "programs tested", total=total),
    )


def _show(records: Sequence[EvaluationRecord], opened: _Evaluated, as_json: bool, console: Console) -> None:
    from weftrain.core.formats.canonical import canonical_json

    if as_json:
        for record in records:
            click.echo(canonical_json(record).decode())
        return
    title = f"{opened.path} (step {opened.step})"
    table = Table("task", "shots", "metric", "score", "± error", "of", title=title, title_justify="left", box=None)
    published = sorted({name for record in records for name in record.get("published_percent", {})})
    for name in published:
        table.add_column(f"{name}, published")
    for record in records:
        percent, error = record["value_percent"], record["stderr_percent"]
        score = f"{percent:.2f} %" if percent is not None else _shown(record["value"])
        deviation = (
            f"{error:.2f}" if error is not None else ("" if record["stderr"] is None else f"{record['stderr']:.4g}")
        )
        count = f"{record['samples']:,}" + (
            f" of {record.get('samples_available', 'more'):,}" if record.get("partial") else ""
        )
        others = [_shown(record.get("published_percent", {}).get(name, "")) for name in published]
        table.add_row(record["task"], str(record["shots"]), record["metric"], score, deviation, count, *others)
    console.print(table)


def _shown(value: Any) -> str:
    return f"{value:.4f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
