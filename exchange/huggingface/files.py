"""The files beside a model's weights in a Hugging Face folder: tokenizer, end token, and CrystalCoder's modelling code.

A folder without tokenizer_config.json loads with no end token, and one whose config.json names none gets Llama's
default, id 2, whatever that is in this vocabulary. So both are written wherever a tokenizer is known, and null where
none is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weftrain.core.errors import CheckpointError, DataError
from weftrain.core.formats.canonical import canonical_json, parse_json
from weftrain.core.formats.plain_file import read_plain
from weftrain.core.formats.tokenizer_file import tokenizer_from
from weftrain.core.model_config import ModelConfig
from weftrain.exchange.huggingface.config import layout_of

MODELING = "modeling_crystalcoder.py"
AUTO_MAP = {
    "AutoConfig": "modeling_crystalcoder.CrystalCoderConfig",
    "AutoModelForCausalLM": "modeling_crystalcoder.CrystalCoderLMHeadModel",
}
# SHA-256 of every version of the modelling code that was ever put into a folder. `verify` lets a release bring no other
# code.
KNOWN_MODELING = frozenset({"c528b82777aa170171a8be0a13e4c93a73c939d51e2c778bc5492ed0218d797d"})
_BOS = "<s>"


def modeling_files(config: ModelConfig) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Files and config.json keys by which transformers finds the model's code: none for a family that it knows."""
    if layout_of(config) != "crystalcoder":
        return {}, {}
    return {MODELING: Path(__file__).with_name(MODELING).read_bytes()}, {"auto_map": AUTO_MAP}


def tokenizer_files(
    data: bytes, eos_id: int, bos_id: int | None, config: ModelConfig, where: str
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """tokenizer.json with what lets AutoTokenizer and generate() use it, and config.json's keys. Raises DataError.

    eos_id: at which a text ends. bos_id: with which the dataset's documents begin; where it is None, `<s>` is named if
    there is one. where: begins an error's text.
    """
    tokenizer = tokenizer_from(data, where)
    vocabulary: Mapping[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    if (largest := max(vocabulary.values(), default=-1)) >= config.vocab_size:
        raise DataError(
            f"{where}: has ids up to {largest}, the model's vocab_size is {config.vocab_size}: name its own tokenizer"
        )
    end = tokenizer.id_to_token(eos_id)
    if end is None:
        raise DataError(f"{where}: has no id {eos_id}, which ends documents: name the dataset's own tokenizer")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "model_max_length": config.max_position_embeddings,
    }
    begin = vocabulary.get(_BOS) if bos_id is None else bos_id
    settings |= {"clean_up_tokenization_spaces": False} | (
        {} if begin is None else {"bos_token": tokenizer.id_to_token(begin)}
    )
    ids = {"eos_token_id": eos_id, "bos_token_id": begin}
    files = {"tokenizer.json": data, "tokenizer_config.json": _json(settings), "generation_config.json": _json(ids)}
    return files, ids


def _json(value: Any) -> bytes:
    canonical_json(value)  # refuses what is no JSON
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def is_known_modeling(path: Path) -> bool:
    """Whether a file is a version of the modelling code that weftrain puts into folders. Raises OSError."""
    return path.name == MODELING and hashlib.sha256(read_plain(path, "card")).hexdigest() in KNOWN_MODELING


def check_no_other_code(folder: Path, names: set[str], config: ModelConfig) -> None:
    """Check that a downloaded model's folder brings no code but ours, and names none elsewhere. names: its files.

    transformers runs the files that `auto_map` names, from this folder or from another repository. Raises
    CheckpointError.
    """
    wanted = modeling_files(config)[1].get("auto_map")
    for name in sorted(names):
        if name.endswith(".py") and not is_known_modeling(folder / name):
            raise CheckpointError(
                f"{folder / name}: is code, and no modelling code that weftrain wrote: do not load this folder"
            )
        if name.endswith(".json") and name != "tokenizer.json" and not name.endswith(".index.json"):
            found = parse_json(read_plain(folder / name, "record"))
            allowed = (None, wanted if name == "config.json" else None)
            if not isinstance(found, dict) or found.get("auto_map") not in allowed:
                raise CheckpointError(
                    f"{folder / name}: auto_map names other code than weftrain's: do not load this folder"
                )
