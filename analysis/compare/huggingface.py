"""A series of Hugging Face checkpoints (Pythia's, a release's revisions): a folder with one sub-folder a revision.

The step is the number in a sub-folder's name (`step1000`, `ckpt_001`); the caller gives the tokens of a step, for
Pythia 2,097,152 = 1024 x 2048 (arXiv 2304.01373). A weight that a file lacks is an error here, while transformers only
warns and draws it at random. No pickle is opened, no code of a model is run and nothing is fetched: a folder that needs
any of it is refused before a model is built. The families that weftrain converts (Llama, OLMo, Pythia and others) are
computed by weftrain's decoder, for which transformers need not be installed, and the rest by transformers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from weftrain.analysis.compare.series import Series, SeriesPoint
from weftrain.analysis.evaluation.generation import load_model
from weftrain.core.checkpoint import Weights
from weftrain.core.errors import CheckpointError, DataError, NonFiniteError, RecipeError, file_problem, one_line
from weftrain.core.formats import fsops
from weftrain.core.formats.canonical import parse_json, sha256_json
from weftrain.core.formats.tensor_file import open_regular, read_header
from weftrain.core.model import Decoder
from weftrain.core.model_config import ModelConfig
from weftrain.exchange.audit.duplicates import repeated, told
from weftrain.exchange.huggingface.files import AUTO_MAP, MODELING, is_known_modeling
from weftrain.exchange.huggingface.folder import (
    CONFIG,
    INDEX,
    MAX_CONFIG_BYTES,
    SINGLE,
    HuggingFaceWeights,
    read_config,
    read_index,
    state_tensors,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENIZER = "tokenizer.json"
MISSING = "transformers is not installed, which reads a Hugging Face series: pip install transformers"
_NUMBERED = re.compile(r"[A-Za-z]{0,40}[_-]?([0-9]{1,12})")
_STEP = re.compile(r"(?i:step|ckpt|checkpoint)[_-]?[0-9]{1,12}")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_LOGITS_AT_ONCE = 1 << 27  # fp32 values: 512 MiB


def is_series(folder: Path) -> bool:
    """Whether a folder holds at least one revision: a sub-folder with a number in its name and a config.json in it."""
    return any((path / CONFIG).exists() for path in _numbered(folder).values())


def _numbered(folder: Path) -> dict[str, Path]:
    """Name -> sub-folder whose name is a word and a number."""
    if not folder.is_dir():
        return {}
    return {path.name: path for path in sorted(folder.iterdir()) if _NUMBERED.fullmatch(path.name) and path.is_dir()}


def step_of(name: str) -> int:
    """The step in a revision's name. Raises ValueError."""
    if (match := _NUMBERED.fullmatch(name)) is None:
        raise ValueError(f"'{name}' is not a word and a number")
    return int(match[1])


def is_model(folder: Path) -> bool:
    """Whether a folder holds one model of Hugging Face: a config.json, and no checkpoint of weftrain's."""
    return (folder / CONFIG).exists() and not (folder / "manifest.json").exists()


def check_no_overrides(folder: Path, overrides: Sequence[str]) -> None:
    """Raises RecipeError for an override: a model of Hugging Face has no recipe."""
    if overrides:
        raise RecipeError(f"{folder}: a Hugging Face model has no recipe for '{overrides[0][:80]}': leave it out")


def revisions_of(folder: Path) -> dict[int, Path]:
    """Step -> revision's folder, of one model or of a series; a model whose name says no step is at 0. Empty for any
    other folder. Raises CheckpointError for two of one step.
    """
    if is_model(folder):
        name = folder.absolute().name
        return {step_of(name) if _STEP.fullmatch(name) else 0: folder}
    return _by_step(folder) if is_series(folder) else {}


def _by_step(folder: Path) -> dict[int, Path]:
    found: dict[int, Path] = {}
    for path in _numbered(folder).values():
        step = step_of(path.name)
        if step in found:
            raise CheckpointError(
                f"{folder}: {found[step].name} and {path.name} are both step {step}: move one of them away"
            )
        found[step] = path
    return dict(sorted(found.items()))


def read_huggingface(folder: Path, name: str, tokens_per_step: int | None) -> Series:
    """The series of a folder of revisions, each checked without reading weights; its points have no values yet.

    Raises DataError without tokens_per_step or transformers, CheckpointError naming the file that is refused.
    """
    if tokens_per_step is None:
        raise DataError(f"{folder}: how many tokens is a step? Give --tokens-per-step N (Pythia: 2097152)")
    revisions = _by_step(folder)
    configs = {step: check_revision(path) for step, path in revisions.items()}
    first = configs[min(configs)]
    for step, config in configs.items():
        for key in ("model_type", "vocab_size"):
            if config.get(key) != first.get(key):
                raise CheckpointError(
                    f"{revisions[step] / CONFIG}: '{key}' is {config.get(key)!r}, the first revision's "
                    f"{first.get(key)!r}: not one series"
                )
    try:
        groups = repeated({path.name: [path / file for file in weight_files(path)] for path in revisions.values()})
    except OSError as error:
        raise CheckpointError(f"{error.filename}: {file_problem(error)}: take another copy of the folder") from error
    if groups:
        raise CheckpointError(
            f"{folder}: several steps have the same weights: {told(groups)}: fetch them again, or move one away"
        )
    tokenizer = revisions[min(revisions)] / TOKENIZER
    return Series(
        name=name,
        kind="huggingface",
        folder=folder,
        points=tuple(SeriesPoint(step, step * tokens_per_step, revisions[step].name, {}) for step in sorted(revisions)),
        tokens_words=f"step x {tokens_per_step:,}",
        places={step: path.relative_to(folder) for step, path in revisions.items()},
        vocab_size=first["vocab_size"],
        positions=positions_of(first),
        tokenizer_sha256=fsops.sha256_file(tokenizer) if tokenizer.is_file() else None,
    )


def positions_of(config: dict[str, Any]) -> int | None:
    """The number of positions that a config.json says, under either of its names."""
    found = (config.get(key) for key in ("max_position_embeddings", "n_positions"))
    return next((value for value in found if type(value) is int and value > 0), None)


def check_revision(path: Path) -> dict[str, Any]:
    """Read config.json; require a known architecture and whole safetensors. Raises CheckpointError."""
    try:
        with open_regular(path / CONFIG) as file:
            config = parse_json(file.read(MAX_CONFIG_BYTES + 1))
        if not isinstance(config, dict):
            raise ValueError("is not a JSON object")
    except (OSError, ValueError) as error:
        raise _refused(
            path, CONFIG, error, "name a folder whose sub-folders are models, downloaded with --local-dir"
        ) from error
    own, model_type = _own_config(path, config) is not None, config.get("model_type")
    if "auto_map" in config and not own:
        what = "'auto_map' asks for code of the model's own, which is never run here"
        raise _refused(path, CONFIG, what, "take a revision without it")
    if "quantization_config" in config:
        what = "'quantization_config': quantized weights are another model"
        raise _refused(path, CONFIG, what, "take the unquantized revision")
    if (path / "adapter_config.json").exists():
        what = "is an adapter for weights that lie elsewhere"
        raise _refused(path, "adapter_config.json", what, "merge it into them first")
    if not own and (not isinstance(model_type, str) or model_type not in _architectures()):
        import transformers

        version, shown = transformers.__version__, str(model_type)[:60]
        what = f"model_type {shown!r} is no causal language model that transformers {version} knows"
        raise _refused(path, CONFIG, what, "upgrade transformers, or leave this series out")
    if type(config.get("vocab_size")) is not int or config["vocab_size"] < 1:
        raise _refused(path, CONFIG, "has no vocab_size", "take another copy of the folder")
    _check_weights(path)
    return config


def _own_config(path: Path, config: dict[str, Any]) -> ModelConfig | None:
    """The model as weftrain's decoder computes it; None where it does not. `auto_map` may name weftrain's own
    CrystalCoder code, without which it is computed here.
    """
    try:
        if "auto_map" in config and not (config["auto_map"] == AUTO_MAP and is_known_modeling(path / MODELING)):
            return None
    except OSError as error:
        raise _refused(path, MODELING, file_problem(error), "take another copy of the folder") from error
    try:
        return read_config(path)
    except RecipeError:
        return None


def _architectures() -> Any:
    try:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    except ImportError as error:
        raise DataError(f"{MISSING} ({error})") from error
    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def _check_weights(path: Path) -> None:
    for name in weight_files(path):
        try:
            with open_regular(path / name) as file:
                read_header(file, foreign=True)
        except (OSError, ValueError) as error:
            raise _refused(path, name, error, "download it again, with --local-dir") from error


def weight_files(path: Path) -> list[str]:
    """Names of a revision's safetensors files. Raises CheckpointError where there are none; pickles are refused."""
    if (path / SINGLE).exists():
        return [SINGLE]
    if (path / INDEX).exists():
        return sorted(read_index(path, INDEX, ".safetensors"))
    pickled = sorted(one.name for one in path.iterdir() if one.suffix in _PICKLED)
    if pickled:
        raise _refused(
            path, pickled[0], "is pickled, which is never loaded here", f"download the revision's {SINGLE} instead"
        )
    raise _refused(path, SINGLE, "is missing", "download the revision again")


def _refused(path: Path, name: str, what: object, remedy: str) -> CheckpointError:
    return CheckpointError(f"{path / name}: {what}: {remedy}")


def revision_root(path: Path) -> str:
    """The key of a revision's measurements: a hash over config.json and every weight file, read to the end."""
    return sha256_json({name: fsops.sha256_file(path / name) for name in (CONFIG, *weight_files(path))})


# Computing


class TransformersModel:
    """A transformers model in fp32 with what perplexity and memorization need: summed loss and greedy continuation.

    Called as a Decoder is: ids int64 [B, T], labels int64 [B, T] (-100: no loss), document_start None.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval().requires_grad_(False)
        self.embedding = self.model.get_input_embeddings()

    @torch.inference_mode()
    def __call__(self, ids: Tensor, labels: Tensor, document_start: Tensor | None) -> Tensor:
        """The sum of the losses of all labels, fp64 []. Padding on the right is never seen by causal attention."""
        if document_start is not None:
            raise DataError(
                "a transformers model does not attend within documents: take a set whose attention crosses them"
            )
        total = torch.zeros((), dtype=torch.float64, device=ids.device)
        at_once = max(1, _LOGITS_AT_ONCE // (ids.shape[1] * self.embedding.weight.shape[0]))
        for part, wanted in zip(ids.split(at_once), labels.split(at_once), strict=True):
            logits = self.model(input_ids=part, use_cache=False).logits.float()  # [B, T, V]
            total += F.cross_entropy(
                logits.flatten(0, 1), wanted.flatten(), ignore_index=-100, reduction="sum"
            ).double()
        return total

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, batch_size: int = 64
    ) -> list[list[int]]:
        """Greedy continuations of prompts of one length, lowest id first. Raises DataError, NonFiniteError."""
        ids = torch.from_numpy(np.asarray(prompts, dtype=np.int64)).to(self.embedding.weight.device)
        if ids.dim() != 2 or not ids.numel() or int(ids.min()) < 0 or int(ids.max()) >= self.embedding.weight.shape[0]:
            raise DataError(
                f"prompts must be of one length, of ids below the vocabulary of {self.embedding.weight.shape[0]}"
            )
        return [row for part in ids.split(batch_size) for row in self._continued(part, max_new_tokens)]

    def _continued(self, ids: Tensor, max_new_tokens: int) -> list[list[int]]:
        """ids [B, T] -> B rows of new tokens, with transformers' own KV cache."""
        chosen: list[Tensor] = []
        cache = None
        for _ in range(max_new_tokens):
            step = self.model(input_ids=ids, past_key_values=cache, use_cache=True)
            logits, cache = step.logits[:, -1], step.past_key_values
            if not torch.isfinite(logits.amax(-1)).all():
                raise NonFiniteError("logits that are not finite: the revision's weights diverged; leave it out")
            chosen.append(logits.argmax(-1))
            ids = chosen[-1][:, None]
        rows: list[list[int]] = torch.stack(chosen, dim=1).tolist()
        return rows


def load_own(path: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Decoder:
    """A revision's model as weftrain's decoder, straight from the folder.

    Raises RecipeError, naming the key, for a model that the decoder does not compute; CheckpointError.
    """
    model = read_config(path)
    weights = HuggingFaceWeights(path)
    try:
        return load_model(Weights(state_tensors(weights, model)), model, device, dtype)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: weights do not fit {CONFIG}: {error}") from error


def load_revision(path: Path, device: str = "cpu") -> TransformersModel | Decoder:
    """A revision's model in fp32 on `device`: weftrain's decoder where it computes this architecture.

    Raises CheckpointError for what check_revision refuses or weights that do not fit.
    """
    if _own_config(path, check_revision(path)) is not None:
        return load_own(path, device)
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        # Eager attention by name: a config may name another, and newer versions fetch some from the hub.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(path),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            attn_implementation="eager",
            output_loading_info=True,
        )
    except Exception as error:  # whatever a config's values do in the library's own code
        why = one_line(error, 200)
        raise _refused(
            path, CONFIG, f"transformers cannot build it: {type(error).__name__}: {why}", "take another copy"
        ) from error
    model, told = loaded
    for kind in ("missing_keys", "mismatched_keys"):
        if found := sorted(map(str, told.get(kind, ()))):
            raise CheckpointError(
                f"{path}: weights do not fit {CONFIG}: {len(found)} {kind.replace('_', ' ')}, '{found[0][:120]}': take "
                "another copy"
            )
    return TransformersModel(model.to(device=device, dtype=torch.float32))
