"""Our model of the harness against lm-eval's own for Hugging Face, on one tiny Llama: the same tokens, the same
numbers.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from weftrain.analysis.evaluation.generation import Generator, load_model
from weftrain.core.config import Recipe
from weftrain.core.errors import DataError
from weftrain.core.initialization import draw
from weftrain.core.parameters import parameter_specs
from weftrain.exchange.huggingface.config import config_to_huggingface
from weftrain.exchange.layouts import export_weights

pytest.importorskip("lm_eval")
TEXT = [
    "the sky is blue , and the sea is blue too",
    "a red rose is red ; grass is green",
    "what is the answer ? it is forty two",
] * 3
MAX_LENGTH = 16


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # the matrices are too small to share


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Byte-level, so that a space belongs to the word after it, and with <s> in front, as Llama's."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=97, special_tokens=["<s>", "</s>"], initial_alphabet=[], show_progress=False
    )
    made.train_from_iterator(TEXT, trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made.decoder = decoders.ByteLevel()
    return made


@pytest.fixture(scope="module")
def requests() -> list[Any]:
    from lm_eval.api.instance import Instance

    pairs = [
        ("the sky is", " blue"),
        ("the sky is", " red"),
        ("the sky is ", "blue"),  # the space moves to the answer
        ("", "the sea"),
        ("<s>the sea", " is"),
        # cut from the left
        ("what is the answer ? it is the sky and the sea and what is the red rose", " green grass"),
        ("a", " red rose is the answer"),
        ("the sky is", " blue"),
    ]
    return [Instance("loglikelihood", {}, pair, index, ("stub", index, 1)) for index, pair in enumerate(pairs)]


@pytest.fixture
def pair(tiny_recipe: Callable[..., Recipe], tokenizer: Tokenizer) -> tuple[Any, Any]:
    """The same weights as our model and as lm-eval's own."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="lm-eval's own model imports it")
    from lm_eval.models.huggingface import HFLM

    from weftrain.analysis.evaluation.lm_eval_model import CheckpointLM

    config = tiny_recipe("amber").model
    # larger than drawn: answers differ clearly
    weights = {spec.name: draw(spec, config, 3) * 4 for spec in parameter_specs(config)}
    ours = CheckpointLM(Generator(load_model(weights, config)), tokenizer, 1, MAX_LENGTH, batch_size=3)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config_to_huggingface(config))).eval()
    theirs.load_state_dict(dict(export_weights(weights, config, "llama")))
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return ours, HFLM(pretrained=theirs, tokenizer=fast, max_length=MAX_LENGTH, batch_size=3, device="cpu")


def test_log_likelihoods_are_lm_evals(pair: tuple[Any, Any], requests: list[Any]) -> None:
    ours, theirs = pair
    found, wanted = ours.loglikelihood(requests), theirs.loglikelihood(requests, disable_tqdm=True)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    # the second way of writing a question and its repetition are the same
    assert len({round(value, 3) for value, _ in found}) == 6


def test_rolling_log_likelihoods_are_lm_evals(pair: tuple[Any, Any]) -> None:
    from lm_eval.api.instance import Instance

    ours, theirs = pair
    long = " ".join(TEXT)
    rolling = [
        Instance("loglikelihood_rolling", {}, (text,), index) for index, text in enumerate(["the sky", long, "a"])
    ]
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(
        theirs.loglikelihood_rolling(rolling, disable_tqdm=True), rel=1e-5
    )
    assert len(ours.tok_encode(long)) > 3 * MAX_LENGTH


def test_generated_text_is_lm_evals(pair: tuple[Any, Any]) -> None:
    from lm_eval.api.instance import Instance

    ours, theirs = pair

    def instances() -> list[Any]:  # lm-eval adds to the lists that it is given
        asked = [("the sky", {"until": ["e"], "max_gen_toks": 8}), (" ".join(TEXT), {"until": [], "max_gen_toks": 8})]
        asked += [("a red", {"until": ["zzz"], "max_gen_toks": 5, "do_sample": False, "temperature": 0.0})]
        return [Instance("generate_until", {}, arguments, index) for index, arguments in enumerate(asked)]

    found = ours.generate_until(instances())
    assert found == theirs.generate_until(instances(), disable_tqdm=True)
    assert any(found)


class Echo:
    """Continues with the number of the token after the last, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []
        self.rows: list[Any] = []

    def generate(self, prompts: Any, max_new_tokens: int, **settings: Any) -> list[list[int]]:
        self.asked += [(len(prompt), max_new_tokens) for prompt in prompts]
        self.settings = settings
        return [[(prompt[-1] + 1 + step) % 90 + 5 for step in range(max_new_tokens)] for prompt in prompts]

    def log_likelihoods(self, rows: Any, batch_size: int = 16) -> list[tuple[float, bool]]:
        self.rows += rows
        return [(-1.0, False)] * len(rows)


@pytest.fixture
def words() -> Tokenizer:
    made = Tokenizer(models.WordLevel({f"w{index}": index for index in range(97)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


def ask(kind: str, *arguments: Any) -> Any:
    from lm_eval.api.instance import Instance

    return Instance(kind, {}, arguments, 0, ("stub", 0, 1))


def test_pieces_end_at_a_stop_word(words: Tokenizer) -> None:
    """A greedy row is continued in pieces of 32, 64, .. and no further than its stop word."""
    from weftrain.analysis.evaluation.lm_eval_model import CheckpointLM

    model = Echo()
    lm = CheckpointLM(model, words, 96, 400)
    settings = {"until": ["w20 "], "max_gen_toks": 100}
    first, second = lm.generate_until([ask("generate_until", text, settings) for text in ("w9 w9", "w70 w30")])
    assert first.split() == ["w15", "w16", "w17", "w18", "w19"]
    assert len(second.split()) > 32
    assert [count for _, count in model.asked] == [32, 32, 64]


def test_left_cut_and_sampling(words: Tokenizer) -> None:
    from weftrain.analysis.evaluation.lm_eval_model import CheckpointLM

    model = Echo()
    lm = CheckpointLM(model, words, 96, 20, seed=9)
    lm.generate_until(
        [ask("generate_until", "w3 " * 30, {"max_gen_toks": 5, "do_sample": True, "temperature": 0.7, "top_p": 0.9})]
    )
    assert model.asked == [(15, 5)]
    assert {key: model.settings[key] for key in ("temperature", "top_p", "seed", "stop_ids")} == {
        "temperature": 0.7,
        "top_p": 0.9,
        "seed": 9,
        "stop_ids": (96,),
    }
    lm.loglikelihood([ask("loglikelihood", "w3 " * 30, " w4 w5"), ask("loglikelihood", "w3", " w4 w5")])
    assert [(len(context), list(continuation)) for context, continuation in model.rows] == [(19, [4, 5]), (1, [4, 5])]


def test_equal_rows_are_computed_once(words: Tokenizer) -> None:
    from weftrain.analysis.evaluation.lm_eval_model import CheckpointLM

    model, told = Echo(), []
    lm = CheckpointLM(model, words, 96, 20, batch_size=1, report=lambda *line: told.append(line))
    lm.loglikelihood([ask("loglikelihood", "w3 w4", f" w{index % 6}") for index in range(12)])
    assert len(model.rows) == 6
    assert told == [(4, 6, "log-likelihoods"), (6, 6, "log-likelihoods")]


@pytest.mark.parametrize(
    ("kind", "arguments", "said"),
    [
        ("loglikelihood", ("w3", ""), "empty"),
        ("loglikelihood", ("w3", " w4" * 21), "21 tokens"),
        ("generate_until", ("w3", {"max_gen_toks": 20}), "leaves no room"),
        ("generate_until", ("w3", {"num_beams": 4}), "num_beams: not known"),
    ],
)
def test_what_is_refused(words: Tokenizer, kind: str, arguments: Any, said: str) -> None:
    from weftrain.analysis.evaluation.lm_eval_model import CheckpointLM

    with pytest.raises(DataError, match=said):
        getattr(CheckpointLM(Echo(), words, 96, 20), kind)([ask(kind, *arguments)])


WITHOUT_LM_EVAL = """
import sys
sys.modules["lm_eval"] = None
from pathlib import Path
import weftrain.cli.evaluate_tasks
from weftrain.analysis.evaluation.tasks import TaskRequest, run_tasks
from weftrain.analysis.evaluation.records import EvaluatedCheckpoint, EvaluationSettings
from weftrain.core.errors import DataError
try:
    run_tasks([TaskRequest("x")], EvaluatedCheckpoint("a", 1), EvaluationSettings(), lambda: None, Path("absent"))
except DataError as error:
    assert "pip install 'weftrain[eval]'" in str(error), error
else:
    raise SystemExit(1)
"""


def test_nothing_else_needs_lm_eval() -> None:
    """It is optional: what can be had without it imports without it, and the rest says what to install."""
    subprocess.run([sys.executable, "-c", WITHOUT_LM_EVAL], check=True, capture_output=True, text=True, timeout=60)
