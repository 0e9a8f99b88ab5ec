"""Text from a model: greedy or sampled continuations with a KV cache, and log-likelihoods of given continuations.

The model's own modules and kernels do the work; only the attention of one new query to the cached keys is written here.
Prompts of unequal length are padded on the right, where causal attention never sees the padding, and each row continues
at its own position, over its padding. A sampled row depends only on (seed, its number among the prompts): batch size
and other prompts change nothing but a logit's last bits.

Shapes: B sequences, T tokens, S positions in the cache, C hidden size, H heads, H_kv key and value heads, D head
dimension, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from weftrain.core.blocks import Attention, Block
from weftrain.core.errors import CheckpointError, DataError, NonFiniteError
from weftrain.core.model import Decoder, Head, kernel_specs
from weftrain.core.model_config import ModelConfig
from weftrain.core.objectives import NEXT_TOKEN
from weftrain.core.objectives_section import Objective
from weftrain.kernels import select

# Without a backward, fused attention is deterministic; training leaves it out because its backward uses atomics.
PREFERENCES = ("flash_attn", "torch", "sdpa", "triton", "reference")
_LOGITS_AT_ONCE = 1 << 25  # of log_likelihoods: fp32 values, 128 MiB
PAD = 0  # any id would do: causal attention never sees padding on the right


def load_model(
    weights: Mapping[str, Tensor],
    config: ModelConfig,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    objective: Objective = NEXT_TOKEN,
) -> Decoder:
    """A Decoder with these weights (canonical names, e.g. `checkpoint.Weights`), in eval mode without gradients.

    It is built on the meta device and filled tensor by tensor, so a lazy mapping costs the model and one tensor. In
    other dtypes than fp32 the residual stream stays fp32, as in training. objective: whose held-out loss `forward`
    computes. Linear maps are computed whole, also where a run's were in parts (`precision.tensor_parts`). Raises
    CheckpointError for wrong names or shapes.
    """
    residual_dtype = None if dtype == torch.float32 else torch.float32
    selection = select(kernel_specs(config, torch.device(device).type, dtype, residual_dtype), PREFERENCES)
    with torch.device("meta"):
        model = Decoder(config, selection, residual_dtype, objective)
    for parameter in model.parameters():  # not Module.to: the rotary tables stay fp32
        parameter.data = parameter.data.to(dtype)
    model.to_empty(device=device)
    model.place_rotary_tables(device)
    parameters = dict(model.named_parameters())
    for found, wanted, problem in ((parameters, weights, "missing"), (weights, parameters, "unknown to the model")):
        if names := [name for name in found if name not in wanted]:
            raise CheckpointError(
                f"weights: '{names[0]}' and {len(names) - 1} others are {problem}: use their own config"
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            tensor = weights[name]
            if tensor.shape != parameter.shape:
                raise CheckpointError(
                    f"weights: '{name}' is {list(tensor.shape)}, the model's is {list(parameter.shape)}: use their own "
                    "config"
                )
            parameter.copy_(tensor)
    return model.eval().requires_grad_(False)


class Generator:
    """Continues token sequences with a Decoder in eval mode, on its device and in its dtype.

    Its parts, for who has a loop of their own: `new_cache` makes a cache kv [layers, 2, B, S, H_kv, D] of rotated keys
    and of values, `prefill` reads prompts into it, and `decode` one more token of each row.
    """

    def __init__(self, model: Decoder) -> None:
        self.model = model
        self._device = model.embedding.weight.device

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        stop_ids: Collection[int] = (),
        batch_size: int = 64,
        told: Callable[[int, int], None] = lambda row, token: None,
    ) -> list[list[int]]:
        """The new tokens of each prompt, at most `max_new_tokens`; a row ends before the first of `stop_ids`.

        told(prompt's number, token) is called with each new token as it is chosen.

        temperature 0: greedy, the lowest id among equals. Otherwise logits are divided by it, then limited to the top_k
        most likely, then to the fewest with joint probability top_p. The random number of prompt i's t-th new token is
        a function of (seed, i, t). Raises DataError, before anything is computed, for an empty prompt, an id outside
        the vocabulary, too many positions or a setting out of range; NonFiniteError for logits that are not finite.
        """
        for index, prompt in enumerate(prompts):
            self.check(prompt, max_new_tokens, temperature, top_k, top_p, seed, batch_size, what=f"prompt {index}")
        results: list[list[int]] = [[] for _ in prompts]
        stops = frozenset(stop_ids)
        for batch in _batches([len(prompt) for prompt in prompts], batch_size):
            uniforms = _uniforms(seed, batch, max_new_tokens) if temperature > 0 else None
            ended: set[int] = set()
            lengths = [len(prompts[index]) for index in batch]
            kv = self.new_cache(len(batch), max(lengths) + max_new_tokens - 1)  # the last new token is never read
            logits = self.prefill([prompts[index] for index in batch], kv)
            for t in range(max_new_tokens):
                _check_finite(logits, batch, t)
                if uniforms is None:
                    chosen = logits.argmax(-1)
                else:
                    chosen = sample(
                        logits, torch.from_numpy(uniforms[:, t]).to(logits.device), temperature, top_k, top_p
                    )
                for index, token in zip(batch, chosen.tolist(), strict=True):
                    if token in stops:
                        ended.add(index)
                    if index not in ended:
                        results[index].append(token)
                        told(index, token)
                if len(ended) == len(batch) or t == max_new_tokens - 1:
                    break
                logits = self.decode(chosen, [length + t for length in lengths], kv)
        return results

    @torch.inference_mode()
    def log_likelihoods(
        self, rows: Sequence[tuple[Sequence[int], Sequence[int]]], batch_size: int = 16
    ) -> list[tuple[float, bool]]:
        """(context, continuation) -> sum of ln p(token | all before) over the continuation, and whether it is greedy.

        Log-softmax in fp32, summed in fp64. Raises DataError for an empty context or continuation, an id outside the
        vocabulary, or too many positions (the last token takes none); NonFiniteError.
        """
        for index, (context, continuation) in enumerate(rows):
            for part, name in ((context, "context"), (continuation, "continuation")):
                positions = len(context) + len(continuation) - 1
                self._check_ids(
                    f"row {index}, {name}",
                    part,
                    positions,
                    f" with its {'continuation' if part is context else 'context'}",
                )
        results = [(0.0, True)] * len(rows)
        for batch in _batches([len(context) + len(continuation) for context, continuation in rows], batch_size):
            # The last token is predicted, never read.
            hidden = self._hidden(self._padded([[*rows[index][0], *rows[index][1]][:-1] for index in batch]))
            for place, index in enumerate(batch):
                context, continuation = rows[index]
                predicting = hidden[place, len(context) - 1 : len(context) - 1 + len(continuation)]
                results[index] = self._score(predicting, continuation, index)
        return results

    def _score(self, hidden: Tensor, continuation: Sequence[int], row: int) -> tuple[float, bool]:
        """hidden [n, C] of the positions that predict `continuation`'s n tokens."""
        labels = torch.tensor(continuation, device=self._device)
        total, greedy = 0.0, True
        block = max(1, _LOGITS_AT_ONCE // self.model.config.vocab_size)
        for first in range(0, len(continuation), block):
            logits, wanted = self._logits(hidden[first : first + block]), labels[first : first + block]
            _check_finite(logits, [row] * len(logits), first)
            total += float(logits.float().log_softmax(-1).gather(-1, wanted[:, None]).double().sum())
            greedy = greedy and bool((logits.argmax(-1) == wanted).all())
        return total, greedy

    def new_cache(self, rows: int, positions: int) -> Tensor:
        """Keys and values of so many rows, [layers, 2, rows, positions, H_kv, D].

        Zeros: what is masked meets a probability of zero, and zero times what lies in fresh memory may be NaN.
        """
        config = self.model.config
        shape = (config.num_layers, 2, rows, positions, config.num_kv_heads, config.head_dim)
        return torch.zeros(shape, dtype=_blocks(self.model)[0].attention.q_proj.weight.dtype, device=self._device)

    def prefill(self, prompts: Sequence[Sequence[int]], kv: Tensor) -> Tensor:
        """Read B prompts into kv, from its first position on; the logits of the first new token, [B, V]."""
        hidden = self._hidden(self._padded(prompts), kv)
        last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self._device)
        return self._logits(hidden[torch.arange(len(prompts), device=self._device), last])

    def _hidden(self, ids: Tensor, kv: Tensor | None = None) -> Tensor:
        """ids [B, T] from position 0 -> residual stream before the head, [B, T, C]. Fills kv[layer] where given."""
        T = ids.shape[1]
        rotary = self.model.rotary(T)
        x: Tensor = self.model.embedding(ids)
        for layer, block in enumerate(_blocks(self.model)):

            def keeping(q: Tensor, k: Tensor, v: Tensor, layer: int = layer, block: Block = block) -> Tensor:
                assert kv is not None
                kv[layer, 0, :, :T], kv[layer, 1, :, :T] = k, v
                return block.attention.attend(q, k, v)

            x = block(x, rotary[layer], attend=None if kv is None else keeping)
        return x

    def decode(self, tokens: Tensor, positions: Sequence[int], kv: Tensor) -> Tensor:
        """Read one more token of each row, int64 [B], at its position; the logits of the next, [B, V]."""
        at = _Places(torch.tensor(positions, device=self._device), max(positions) + 1, len(set(positions)) == 1)
        rotary = self.model.rotary(at.positions[:, None])
        x = self.model.embedding(tokens.to(self._device)[:, None])  # [B, 1, C]
        for layer, block in enumerate(_blocks(self.model)):
            attend = partial(_attend_to_cache, kv[layer], at, block.attention)
            x = block(x, rotary[layer], attend=attend)
        return self._logits(x[:, 0])

    def _logits(self, hidden: Tensor) -> Tensor:
        return cast(Head, self.model.segments()[-1]).logits(hidden, self.model.tied_weight())

    def _padded(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """int64 [B, T], padded on the right."""
        ids = np.full((len(rows), max(map(len, rows))), PAD, dtype=np.int64)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = row
        return torch.from_numpy(ids).to(self._device)

    def _check_ids(self, what: str, ids: Sequence[int], positions: int, beside: str) -> None:
        config = self.model.config
        if not len(ids):
            raise DataError(f"{what}: is empty; give at least one token (the end-of-text id, for one)")
        low, high = min(ids), max(ids)
        if low < 0 or high >= config.vocab_size:
            wrong = low if low < 0 else high
            raise DataError(
                f"{what}: id {wrong} is outside the model's vocabulary of {config.vocab_size}; use the model's "
                "tokenizer"
            )
        if positions > config.max_position_embeddings:
            raise DataError(
                f"{what}: {len(ids)} tokens{beside} need {positions} positions, the model has "
                f"{config.max_position_embeddings}"
            )

    def check(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        batch_size: int = 1,
        *,
        what: str = "the prompt",
    ) -> None:
        """Raises DataError for settings out of range, or a prompt that cannot be continued by so many tokens."""
        for name, value, good, range_ in (
            ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
            ("temperature", temperature, 0 <= temperature < float("inf"), "0 (greedy) or a positive number"),
            ("top_k", top_k, top_k is None or top_k >= 1, "at least 1"),
            ("top_p", top_p, top_p is None or 0 < top_p <= 1, "above 0 and at most 1"),
            ("seed", seed, 0 <= seed < 2**64, "in 0..2^64 - 1"),
            ("batch_size", batch_size, batch_size >= 1, "at least 1"),
        ):
            if not good:
                raise DataError(f"generation: {name} is {value}; it must be {range_}")
        self._check_ids(what, prompt, len(prompt) + max_new_tokens, f" and {max_new_tokens} new ones")


def sample(
    logits: Tensor, uniform: Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """logits [B, V], uniform fp64 [B] in [0, 1) -> ids int64 [B], by the cumulative probability, largest first."""
    ordered, ids = torch.sort(logits.float(), dim=-1, descending=True, stable=True)
    ordered, ids = ordered[:, :top_k], ids[:, :top_k]
    probabilities = (ordered.double() / temperature).softmax(-1)
    cumulated = probabilities.cumsum(-1)
    if top_p is not None:
        # Kept is whatever begins before top_p is reached: the first always.
        probabilities = probabilities.masked_fill(cumulated - probabilities >= top_p, 0.0)
        cumulated = probabilities.cumsum(-1)
    place = torch.searchsorted(cumulated, (uniform.double() * cumulated[:, -1])[:, None], right=True)
    # A product rounded up to the total itself would point behind the last that may be chosen.
    place = torch.minimum(place, (probabilities > 0).sum(-1, keepdim=True) - 1)
    return ids.gather(-1, place)[:, 0]


def _uniforms(seed: int, batch: Sequence[int], count: int) -> np.ndarray:
    """fp64 [B, count]: row i's t-th is a function of (seed, batch[i], t), from a counter-based generator."""
    return np.stack(
        [np.random.Generator(np.random.Philox(key=np.array([seed, i], dtype=np.uint64))).random(count) for i in batch]
    )


def _batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Row numbers in batches of similar length, longest first, so that what does not fit in memory fails at once."""
    ordered = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [ordered[first : first + batch_size] for first in range(0, len(ordered), batch_size)]


def _blocks(model: Decoder) -> list[Block]:
    return cast(list[Block], list(model.layers))


@dataclass(frozen=True)
class _Places:
    """positions: int64 [B], of the token that each row reads. end: one past the last; even: all are equal."""

    positions: Tensor
    end: int
    even: bool


def _attend_to_cache(kv: Tensor, at: _Places, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [B, 1, H, D] over a layer's cache kv [2, B, S, H_kv, D], after k and v [B, 1, H_kv, D] are written at their
    positions.
    """
    rows, window = torch.arange(len(q), device=q.device), attention.window
    kv[0, rows, at.positions], kv[1, rows, at.positions] = k[:, 0], v[:, 0]
    # Where all rows stand at one position, all that lies between `first` and `end` is seen and no mask is needed.
    first, end = max(0, at.end - window) if at.even and window is not None else 0, at.end
    mask = None
    if not at.even:
        place = torch.arange(end, device=q.device)
        visible = place <= at.positions[:, None]
        mask = visible if window is None else visible & (place > at.positions[:, None] - window)
        mask = mask[:, None, None]  # [B, 1, 1, S]
    keys, values = kv[:, :, first:end].transpose(2, 3)  # [B, H_kv, S, D]
    # The query heads of one key head stand on the axis of queries: all of them see the same keys.
    grouped = q.view(len(q), keys.shape[1], -1, q.shape[-1])  # [B, H_kv, H / H_kv, D]
    mixed = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=attention.scale)
    return mixed.reshape(q.shape)


def _check_finite(logits: Tensor, batch: Sequence[int], t: int) -> None:
    largest = logits.amax(-1)  # NaN wins every comparison here, so one number a row is enough to look at
    finite = torch.isfinite(largest).tolist()
    if not all(finite):
        index = batch[finite.index(False)]
        raise NonFiniteError(
            f"generation: row {index}, token {t}: logits that are not finite: the weights diverged; use an earlier "
            "checkpoint"
        )
