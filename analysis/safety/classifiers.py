"""Classifiers of toxic text: a Hugging Face folder of a sequence classifier, or a package's entry point.

An entry point of the group `weftrain.classifiers` gives a class or function without arguments that makes a
`Classifier`. What a classifier returns is checked: a number in 0..1 for each text.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from weftrain.core.errors import DataError, one_line
from weftrain.core.formats import fsops
from weftrain.core.formats.canonical import sha256_json

ENTRY_POINT_GROUP = "weftrain.classifiers"
TOXIC_ABOVE = 0.5  # of the probability: the larger of two labels
_TEXTS_A_CALL = 32
_TOXIC_LABELS = ("toxic", "hate", "label_1")


class Classifier(Protocol):
    """identity: name and version, or a hash of the weights; scores of two identities are not compared."""

    identity: str

    def probabilities(self, texts: Sequence[str]) -> Sequence[float]:
        """The probability in 0..1 that each text is toxic."""
        ...


def find_classifier(name: str, device: str = "cpu") -> Classifier:
    """The classifier of a folder or of an entry point. Raises DataError."""
    if Path(name).is_dir():
        return FolderClassifier(Path(name), device)
    found = {one.name: one for one in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)}
    if name not in found:
        there = f"there are {', '.join(sorted(found))}" if found else "no installed package has any"
        raise DataError(
            f"classifier '{name}': neither a folder nor an entry point of the group {ENTRY_POINT_GROUP} ({there}): "
            "name a Hugging Face folder of a sequence classifier, tomh/toxigen_hatebert for one"
        )
    try:
        made: Classifier = found[name].load()()
        if not isinstance(made.identity, str) or not made.identity:
            raise TypeError("its identity is no text")
    except Exception as error:
        raise DataError(
            f"classifier '{name}' ({found[name].value}) cannot be made: {type(error).__name__}: {one_line(error)}: "
            "repair or uninstall the package that provides it"
        ) from error
    return made


def probabilities(classifier: Classifier, texts: Sequence[str]) -> list[float]:
    """The probability of each text, checked. Raises DataError for a classifier that fails or breaks its contract."""
    found: list[float] = []
    for first in range(0, len(texts), _TEXTS_A_CALL):
        part = texts[first : first + _TEXTS_A_CALL]
        where = f"classifier {classifier.identity}, texts {first + 1} to {first + len(part)}"
        try:
            values = [float(value) for value in classifier.probabilities(part)]
        except Exception as error:
            raise DataError(
                f"{where}: {type(error).__name__}: {one_line(error)}: repair the classifier or use another"
            ) from error
        if len(values) != len(part):
            raise DataError(f"{where}: it gave {len(values)} scores for {len(part)} texts: repair the classifier")
        for index, value in enumerate(values):
            if not (math.isfinite(value) and 0 <= value <= 1):
                raise DataError(
                    f"{where}: its score of text {first + index + 1} is {value}, no probability: repair the classifier"
                )
        found += values
    return found


class FolderClassifier:
    """A sequence classifier of Hugging Face in safetensors, with its tokenizer. Nothing is fetched, no pickle opened.

    The toxic label is the one named toxic, hate or LABEL_1. Raises DataError.
    """

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        try:
            import transformers
        except ImportError as error:
            raise DataError(f"{folder}: a classifier's folder needs transformers: pip install transformers") from error
        if not list(folder.glob("*.safetensors")):
            raise DataError(
                f"{folder}: holds no .safetensors: pickled weights are not opened; save the classifier once more with "
                "transformers' save_pretrained"
            )
        given: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **given)
            self._model = transformers.AutoModelForSequenceClassification.from_pretrained(
                folder, use_safetensors=True, **given
            )
        except Exception as error:  # whatever a damaged folder raises there
            raise DataError(
                f"{folder}: no sequence classifier with its tokenizer: {type(error).__name__}: {one_line(error)}: save "
                "both into it with save_pretrained"
            ) from error
        self._model = self._model.float().eval().to(device)
        labels = {index: str(label).lower() for index, label in self._model.config.id2label.items()}
        toxic = [index for index, label in labels.items() if label in _TOXIC_LABELS]
        if len(toxic) != 1:
            raise DataError(
                f"{folder}: its labels are {', '.join(labels.values())}, and not one of them is named toxic, hate or "
                "LABEL_1: rename the toxic one in id2label of config.json"
            )
        self._toxic, self._device = int(toxic[0]), device
        files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".txt", ".model"))
        self.identity = f"sha256:{sha256_json([[path.name, fsops.sha256_file(path)] for path in files])}"

    def probabilities(self, texts: Sequence[str]) -> list[float]:
        import torch

        longest = min(int(self._tokenizer.model_max_length), int(self._model.config.max_position_embeddings))
        inputs = self._tokenizer(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        with torch.inference_mode():
            logits = self._model(**inputs.to(self._device)).logits
        found: list[float] = logits.double().softmax(-1)[:, self._toxic].tolist()
        return found
