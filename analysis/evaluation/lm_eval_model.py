"""Checkpoints as a model of the EleutherAI `lm-eval` harness: log-likelihoods, rolling log-likelihoods, generated text.

Tokens are counted, cut and joined as in lm-eval's own Hugging Face model, so that scores are comparable: context and
continuation are encoded together and split at the context's length, and what does not fit is cut from the left. The
last token is never an input, so context and continuation together may hold max_length + 1 tokens. Import this module
only where lm-eval is used: it is the optional dependency `eval`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tokenizers import Tokenizer

from weftrain.analysis.evaluation.continuation import TokenModel, continue_in_pieces
from weftrain.core.errors import DataError

DEFAULT_NEW_TOKENS = 256  # lm-eval's own, for a task that states none
_CALLS_PER_REPORT = 4  # batches between two words of progress

ReportProgress = Callable[[int, int, str], None]  # done, of how many, what
Row = tuple[Sequence[int], Sequence[int]]  # context, continuation


def prefix_id(tokenizer: Tokenizer, eos_id: int) -> int:
    """The token before a text without context: what the tokenizer puts in front (Llama's <s>), else eos_id."""
    added: list[int] = tokenizer.encode("", add_special_tokens=True).ids
    return added[0] if added else eos_id


class CheckpointLM(TemplateLM):
    """lm-eval's view of a checkpoint. max_length: inputs that the model takes. report: progress, in requests."""

    def __init__(
        self,
        model: TokenModel,
        tokenizer: Tokenizer,
        eos_id: int,
        max_length: int,
        *,
        batch_size: int = 16,
        seed: int = 0,
        report: ReportProgress = lambda done, total, what: None,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer  # type: ignore[assignment]
        self.max_length, self.batch_size, self.seed = max_length, batch_size, seed
        # A task that names no length leaves half of a short model to its question.
        self.max_gen_toks = min(DEFAULT_NEW_TOKENS, max_length // 2)
        self._model, self._encoder, self._eos_id, self._report = model, tokenizer, eos_id, report
        self._prefix_id = prefix_id(tokenizer, eos_id)

    @property
    def eot_token_id(self) -> int:
        return self._eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._prefix_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text, with the tokenizer's prefix unless the text spells it; add_special_tokens overrides that."""
        if add_special_tokens is None:
            prefix = self._encoder.id_to_token(self._prefix_id)
            add_special_tokens = prefix is None or not string.startswith(prefix)
        ids: list[int] = self._encoder.encode(string, add_special_tokens=add_special_tokens).ids
        return ids

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """See TemplateLM.loglikelihood."""
        for request in requests:
            if not request.args[1]:
                raise DataError(
                    f"task {request.task_name}, document {request.doc_id}: an answer to be scored is empty; correct "
                    "the task's data"
                )
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """((context, continuation), their ids, ids) each -> (sum of ln p of the continuation, whether it is greedy)."""
        rows = [self._fitted(texts, context, continuation) for texts, context, continuation in requests]
        places: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
        for index, (context, continuation) in enumerate(rows):
            places.setdefault((tuple(context), tuple(continuation)), []).append(index)
        # Longest first, so that what does not fit in memory fails at once; and the like together, so that little is
        # padded.
        different = sorted(places, key=lambda row: -len(row[0]) - len(row[1]))
        results: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
        step = self.batch_size * _CALLS_PER_REPORT
        for first in range(0, len(different), step):
            part = different[first : first + step]
            for row, answer in zip(part, self._model.log_likelihoods(part, self.batch_size), strict=True):
                for index in places[row]:
                    results[index] = answer
            self._report(min(first + step, len(different)), len(different), "log-likelihoods")
        return results

    def _fitted(self, texts: Any, context: Sequence[int], continuation: Sequence[int]) -> Row:
        """A pair cut from the left to max_length inputs. Raises DataError for an empty or too long continuation."""
        if not continuation or len(continuation) > self.max_length:
            shown = repr(texts[1][:60]) if texts else "of a text"
            what = (
                "has no token of its own after its context" if not continuation else f"has {len(continuation)} tokens"
            )
            raise DataError(
                f"an answer {shown} {what}, the model scores 1 to {self.max_length}; correct the task's data, or leave "
                "it out"
            )
        whole = [*context, *continuation][-(self.max_length + 1) :]
        return whole[: -len(continuation)], list(continuation)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """ln p of each whole text, in windows of max_length; each token is predicted once."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            (text,) = request.args
            rolling = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
            )
            for context, continuation in map(make_disjoint_window, rolling):
                windows.append((None, context, continuation))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """The text that follows each context, without stop words. Raises DataError for unknown settings."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        results = [""] * len(requests)
        done = 0
        for settings, members in groups.items():
            contexts = [requests[index].args[0] for index in members]
            for index, text in zip(members, self._generated(contexts, json.loads(settings)), strict=True):
                results[index] = text
            done += len(members)
            self._report(done, len(requests), "generated")
        return results

    def _generated(self, contexts: Sequence[str], settings: dict[str, Any]) -> list[str]:
        chosen: dict[str, Any] = dict(normalize_gen_kwargs(settings, self.max_gen_toks))
        count, until = chosen.pop("max_gen_toks"), chosen.pop("until", None) or []
        temperature = float(chosen.pop("temperature", 0.0))  # 0 where do_sample is false
        chosen.pop("do_sample", None)
        top_k, top_p = chosen.pop("top_k", None), chosen.pop("top_p", None)
        if chosen:
            raise DataError(
                f"generation_kwargs: {', '.join(sorted(chosen))}: not known here; remove them from the task's file"
            )
        if not 0 < count < self.max_length:
            raise DataError(
                f"generation_kwargs: max_gen_toks {count} leaves no room for a question in the model's "
                f"{self.max_length} positions: set it to less than {self.max_length} in the task's file"
            )
        stops = [*([until] if isinstance(until, str) else until), self._encoder.id_to_token(self._eos_id)]
        room = self.max_length - count
        prompts = [self.tok_encode(context)[-room:] or [self.prefix_token_id] for context in contexts]
        if temperature > 0:
            # In one call: what a row draws depends on its number among the prompts.
            given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": self.seed}
            rows = self._model.generate(prompts, count, stop_ids=(self._eos_id,), batch_size=self.batch_size, **given)
        else:
            rows = continue_in_pieces(
                self._model,
                prompts,
                count,
                lambda _, row: any(stop in self._text(row) for stop in stops if stop),
                stop_ids=(self._eos_id,),
                batch_size=self.batch_size,
            )
        return [postprocess_generated_text(self._text(row), stops, None) for row in rows]

    def _text(self, ids: Sequence[int]) -> str:
        return str(self._encoder.decode(list(ids), skip_special_tokens=True))
