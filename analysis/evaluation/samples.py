"""Texts that a model writes while it trains: `PromptSampler`, an evaluator of `fit` (core/evaluators.py).

The weights are copied one by one into a Decoder on the CPU of this process, in fp32, so every backend that exports its
state can be sampled, and no device needs memory for it. The text is what `weftrain generate` makes of a checkpoint of
the same step, up to the end of a document. Nothing that the run trains with is touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from pathlib import Path

from weftrain.analysis.evaluation.generation import Generator, load_model
from weftrain.analysis.evaluation.tokenizer import open_tokenizer
from weftrain.core.backend import Plan, Run
from weftrain.core.checkpoint import Weights
from weftrain.core.config import Recipe
from weftrain.core.errors import DataError, NonFiniteError
from weftrain.core.evaluators import MetricsRecord
from weftrain.core.formats.dataset import TOKENIZER, read_dataset_manifest
from weftrain.core.formats.tokenizer_file import panics_refused

_KEY = "log.sample_prompts"


class PromptSampler:
    """Continues the prompts of a recipe with the tokenizer of its first dataset; a prompt begins as a document does.

    Raises DataError, before anything is trained, for data without a tokenizer and a prompt that the model has no room
    for.
    """

    def __init__(self, recipe: Recipe) -> None:
        if not recipe.data.sources:
            raise DataError(f"{_KEY}: data.synthetic_rows are random rows without a tokenizer: leave the key out")
        folder = Path(recipe.data.root) / recipe.data.sources[0].path
        file, manifest = folder / TOKENIZER, read_dataset_manifest(folder)
        if not file.exists():
            raise DataError(
                f"{_KEY}: {folder} has no {TOKENIZER}, so no text can be read or written: leave the key out"
            )
        self._tokenizer, _ = open_tokenizer(file, recipe.model.vocab_size, (folder, manifest))
        self._prompts, self._separator = recipe.log.sample_prompts, manifest.separator_id
        self._model, self._new_tokens = recipe.model, recipe.log.sample_tokens
        self._lora = recipe.tuning.lora
        begins = manifest.bos_id is not None
        with panics_refused(str(file)):
            self._ids = [self._tokenizer.encode(text, add_special_tokens=begins).ids for text in self._prompts]
        for text, ids in zip(self._prompts, self._ids, strict=True):
            needed, room = len(ids) + self._new_tokens, self._model.max_position_embeddings
            if not ids:
                raise DataError(f"{_KEY}: the tokenizer makes no token of {text!r:.80}: write another prompt")
            if needed > room:
                raise DataError(
                    f"{_KEY}: {text!r:.80} has {len(ids)} tokens, which with log.sample_tokens={self._new_tokens} need "
                    f"{needed} positions, and the model has {room}: make one of them shorter"
                )

    def is_due(self, plan: Plan, completed: int) -> bool:
        return plan.wants_evaluation(completed)

    def is_due_at_start(self, plan: Plan, scored: Set[str]) -> bool:
        return plan.start_step == 0 and plan.evaluate_at_start

    def measure(self, run: Run, completed: int) -> Iterator[MetricsRecord]:
        """A line for each prompt: `text`, which follows it, or `problem`, why there is none."""
        generator = Generator(load_model(Weights(run.export_state().tensors, self._lora), self._model))
        texts, problem = [""] * len(self._prompts), {}
        try:
            found = generator.generate(self._ids, self._new_tokens, stop_ids=[self._separator])
            texts = list(map(self._continuation, self._ids, found))
        except NonFiniteError as error:  # a run that goes on without such steps need not end here
            problem = {"problem": str(error)}
        for prompt, text in zip(self._prompts, texts, strict=True):
            yield {"kind": "sample", "step": completed, "prompt": prompt, "text": text, **problem}

    def _continuation(self, prompt: list[int], new: list[int]) -> str:
        """Decoded together: a character may take several tokens, and may begin within the prompt."""
        before, text = (self._tokenizer.decode(ids, skip_special_tokens=False) for ids in (prompt, [*prompt, *new]))
        return text.removeprefix(before) if text.startswith(before) else text
