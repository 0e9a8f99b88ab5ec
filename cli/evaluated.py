"""A checkpoint that is evaluated: of a run, or a model of Hugging Face.

Its manifest, which names it, is always read; its weights only when something is to be computed.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from weftrain.analysis.evaluation.records import EvaluationSettings
from weftrain.cli.display import Bar, program
from weftrain.core.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from weftrain.analysis.evaluation.generation import Generator
    from weftrain.analysis.evaluation.lm_eval_model import CheckpointLM
    from weftrain.core.formats.dataset_manifest import DatasetManifest
    from weftrain.core.model import Decoder
    from weftrain.core.model_config import ModelConfig
    from weftrain.core.objectives_section import Objective
    from weftrain.core.order.batch import EvaluationSource


class Evaluated(ABC):
    """What is evaluated: a checkpoint or a revision, named by `root`, whose weights are read on first use."""

    path: Path
    root: str
    step: int
    config: ModelConfig

    @property
    def objective(self) -> Objective:
        """Whose held-out loss is measured: next_token, except of a run's checkpoint."""
        from weftrain.core.objectives import NEXT_TOKEN

        return NEXT_TOKEN

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


class RunCheckpoint(Evaluated):
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

    @property
    def objective(self) -> Objective:
        """See Evaluated.objective."""
        return self.recipe.objective

    @functools.cached_property
    def decoder(self) -> Decoder:
        import torch

        from weftrain.analysis.evaluation.generation import load_model
        from weftrain.core import checkpoint

        state, manifest = checkpoint.load(self.path, verified=self._verified)
        if manifest["root"] != self.root:
            raise CheckpointError(f"{self.path}: another checkpoint has taken its place: start again")
        dtype = getattr(torch, self._settings.precision)
        weights = checkpoint.Weights(state.tensors, self.recipe.tuning.lora)
        return load_model(weights, self.config, self._settings.device, dtype, self.recipe.objective)

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
        data, reference = self.recipe.data, self.recipe.objective.reference
        count = rows or 2**40
        sets = open_heldout(data, self.config.vocab_size, count, reference=reference) if data.sources else []
        if not sets:
            raise DataError(f"{self.path}: its recipe has no held-out set; name --tasks or --code, or prepare one")
        return sets, data.document_attention


class Revision(Evaluated):
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


def lm_of(opened: Evaluated, settings: EvaluationSettings, bar: Bar) -> CheckpointLM:
    """A checkpoint as lm-eval sees it, with its progress on a bar."""
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
