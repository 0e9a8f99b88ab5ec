"""ToxiGen's and BOLD's measures on scripted continuations, and classifiers that break their contract."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safety_stubs import SUBJECT, Scripted, say_nothing, write_rows

from weftrain.analysis.evaluation.records import EvaluationSettings
from weftrain.analysis.safety.classifiers import FolderClassifier, find_classifier, probabilities
from weftrain.analysis.safety.continuations import find_prompts, run_bold, run_toxigen
from weftrain.analysis.safety.texts import TextModel
from weftrain.core.errors import DataError


class Words:
    """Toxic is what has "bad" in it."""

    identity = "words 1"

    def __init__(self) -> None:
        self.seen: list[str] = []

    def probabilities(self, texts: Sequence[str]) -> list[float]:
        self.seen += texts
        return [0.9 if "bad" in text else 0.5 for text in texts]


def model_of(scripted: Scripted) -> TextModel:
    return TextModel(lambda: scripted, scripted.tokenizer, 0, 1024)


def test_toxic_share_judges_the_continuation_alone(tmp_path: Path) -> None:
    folder = tmp_path / "toxigen"
    folder.mkdir()
    (folder / "hate_x_1k.txt").write_text("- bad one\\n- bad two\\n-\n- bad three\\n-\n\n- mild\\n-\n")
    (found,) = find_prompts(folder, "text", "somewhere", needed=True)
    assert found.texts[0] == "- bad one\\n- bad two\\n-"  # as the published files have it
    scripted = Scripted(lambda prompt: " bad words" if "two" in prompt else " good words")
    words = Words()
    record = run_toxigen(
        found, words, SUBJECT, EvaluationSettings(), model_of(scripted), tmp_path / "records", say_nothing
    )
    assert words.seen == [" bad words", " good words", " good words"]
    assert record["value"] == 1 / 3  # 0.5 itself is not above the half
    assert record["metrics"]["mean_probability"]["value"] == pytest.approx(1.9 / 3)
    settings = scripted.settings[0]
    chosen = {key: settings[key] for key in ("max_new_tokens", "temperature", "top_p")}
    assert chosen == {"max_new_tokens": 32, "temperature": 0.1, "top_p": 0.9}
    assert record["inputs"]["classifier"] == "words 1"


def test_sentiment_of_prompt_and_continuation(tmp_path: Path) -> None:
    vader = pytest.importorskip("vaderSentiment.vaderSentiment")
    compound = vader.SentimentIntensityAnalyzer().polarity_scores
    folder = tmp_path / "bold"
    ends = {"The actor ": "was wonderful", "The singer ": "was terrible", "A chair ": "is a thing"}
    rows = [{"prompt": prompt, "group": prompt.split()[0], "subgroup": "s"} for prompt in ends]
    write_rows(folder / "gender_prompt.jsonl", rows)
    write_rows(folder / "race_prompt.jsonl", [{"prompt": "I hate the ", "group": "g"}])
    found = find_prompts(folder, "prompt", "somewhere", needed=True)
    scripted = Scripted(lambda prompt: ends.get(prompt, "weather"))
    record = run_bold(found, SUBJECT, EvaluationSettings(), model_of(scripted), tmp_path / "records", say_nothing)
    own = [compound(prompt + end)["compound"] for prompt, end in ends.items()]
    every = [*own, compound("I hate the weather")["compound"]]
    assert own[0] > 0.05 > own[2] > -0.05 > own[1]
    assert record["value"] == pytest.approx(statistics.fmean(every))
    assert record["metrics"]["negative_share"]["value"] == 2 / 4
    assert record["summary"]["deviation"] == pytest.approx(statistics.pstdev(every))
    gender = record["domains"]["gender"]
    assert gender["mean_compound"] == pytest.approx(statistics.fmean(own))
    assert (gender["negative_share"], gender["neutral_share"], gender["positive_share"]) == (1 / 3, 1 / 3, 1 / 3)
    assert gender["groups"]["The"]["samples"] == 2
    assert scripted.settings[0]["max_new_tokens"] == 20


def _raise(texts: Sequence[str]) -> list[float]:
    raise RuntimeError("out of\nsorts")


@pytest.mark.parametrize(
    ("judge", "said"),
    [
        (_raise, "RuntimeError: out of sorts"),
        (lambda texts: [0.5], "it gave 1 scores for 2 texts"),
        (lambda texts: [0.5, math.nan], "its score of text 2 is nan"),
        (lambda texts: [0.5, 1.5], "its score of text 2 is 1.5"),
        (lambda texts: [0.5, "x"], "ValueError"),
        (lambda texts: None, "TypeError"),
    ],
)
def test_a_classifier_that_breaks_its_contract(judge: Callable[[Sequence[str]], Any], said: str) -> None:
    class Broken:
        identity = "broken 2"

        def probabilities(self, texts: Sequence[str]) -> Any:
            return judge(texts)

    with pytest.raises(DataError) as refused:
        probabilities(Broken(), ["a", "b"])
    assert said in str(refused.value)
    assert "classifier broken 2, texts 1 to 2" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_folder_of_a_sequence_classifier(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    folder = tmp_path / "judge"
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "words"]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(names))
    config = transformers.BertConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=16, num_labels=2, initializer_range=2.0,
    )  # fmt: skip
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    judge = find_classifier(str(folder))
    texts = ["good words", "bad " * 40, "bad"]
    found = probabilities(judge, texts)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for text, ours in zip(texts, found, strict=True):
        ids = tokenizer(text, truncation=True, max_length=16, return_tensors="pt")
        assert ours == pytest.approx(float(model(**ids).logits.softmax(-1)[0, 1]), abs=1e-5)
    assert FolderClassifier(folder).identity == judge.identity

    # Which label is the toxic one must be known; pickled weights are not opened.
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(data | {"id2label": {"0": "red", "1": "blue"}}))
    with pytest.raises(DataError, match="red, blue"):
        find_classifier(str(folder))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(DataError, match="pickled weights are not opened"):
        find_classifier(str(folder))


def test_classifiers_of_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        value = "judges:Judge"

        def __init__(self, name: str, made: Any) -> None:
            self.name, self._made = name, made

        def load(self) -> Any:
            return self._made

    class Nameless:
        identity = ""

    points = [Point("words", Words), Point("nameless", Nameless), Point("broken", lambda: 1 / 0)]
    monkeypatch.setattr(
        "importlib.metadata.entry_points", lambda *, group: points if group == "weftrain.classifiers" else []
    )
    assert find_classifier("words").identity == "words 1"
    for name, said in (("nameless", "identity"), ("broken", "ZeroDivisionError"), ("other", "there are broken")):
        with pytest.raises(DataError, match=said):
            find_classifier(name)
