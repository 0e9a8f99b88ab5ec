"""The probe of `weftrain audit --probe`: the loss of each revision on one small fixed text, against its neighbours'.

A loss sees what norms and hashes do not: weights of another run, a permuted or swapped tensor, a dtype that was read
wrongly. The ids are the text's bytes, modulo the vocabulary: the same for every revision of a series whatever its
tokenizer is, and the loss on them changes as smoothly as any other. Only models that the decoder computes have one.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from weftrain.analysis.compare.huggingface import load_own
from weftrain.analysis.evaluation.follow import fetch
from weftrain.analysis.evaluation.generation import load_model
from weftrain.analysis.evaluation.heldout import RaggedRows, held_out_loss
from weftrain.core import checkpoint
from weftrain.core.formats.checkpoint_manifest import MANIFEST
from weftrain.core.model import Decoder
from weftrain.core.recipe_file import recorded_recipe
from weftrain.exchange.audit.series import Revision, Series

NAME = "the probe"  # what the loss is of, in findings
TEXT = """The weft is the thread that is carried across the warp. Whoever reads a checkpoint wants to know three things:
whether it is the step that its name says, whether it was trained on from the one before, and whether it computes what
its config says. def mean(values): return sum(values) / len(values)  # 3 + 4 = 7, and 12 * 12 = 144.
"""
ROW = 48  # ids, or what the model takes


def probe_rows(vocab_size: int, positions: int) -> RaggedRows:
    """The text as rows of ids, for a model of so many ids and positions."""
    ids = [byte % vocab_size for byte in TEXT.encode()]
    length = min(ROW, positions + 1)
    rows = [ids[first : first + length] for first in range(0, len(ids) - 1, length)]
    return RaggedRows(NAME, [row for row in rows if len(row) > 1])


def prober(series: Series, device: str = "cpu") -> Callable[[Revision], dict[str, float]]:
    """Gives the probe loss of a revision in nats, in fp32, by what it is of. Its weights are fetched where they are not
    on this machine, and removed afterwards.

    The function raises CheckpointError, RecipeError for a model that is not computed here, RemoteError.
    """

    def probe(revision: Revision) -> dict[str, float]:
        with contextlib.ExitStack() as stack:
            folder = series.folder_of(revision)
            if folder is None:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="weftrain-probe-"))) / "revision"
                fetch(series, revision, folder)
            model = _loaded(folder, device)
            rows = probe_rows(model.config.vocab_size, model.config.max_position_embeddings)
            return {NAME: held_out_loss(model, rows, 8).loss}

    return probe


def _loaded(folder: Path, device: str) -> Decoder:
    if not (folder / MANIFEST).exists():
        return load_own(folder, device)
    state, manifest = checkpoint.load(folder)
    recipe = recorded_recipe(manifest["recipe"], f"{folder}/{MANIFEST}: recipe").recipe
    return load_model(checkpoint.Weights(state.tensors, recipe.tuning.lora), recipe.model, device, torch.float32)
