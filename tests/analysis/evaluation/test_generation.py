"""Generation: what the cache gives is what the model gives without one; batches, stops, sampling and refusals."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from families import FAMILIES as OPEN_FAMILIES
from families import their_model
from model_cases import large_weights
from torch import Tensor

from weftrain.analysis.evaluation import generation
from weftrain.analysis.evaluation.generation import Generator, load_model, sample
from weftrain.core.config import Recipe
from weftrain.core.errors import CheckpointError, DataError, NonFiniteError
from weftrain.core.model_config import ModelConfig
from weftrain.core.mup import resolve_scales
from weftrain.core.parameters import Role, parameter_specs

FAMILIES = ("amber", "crystal")


@pytest.fixture(autouse=True)
def _one_thread(_two_threads: None) -> None:
    torch.set_num_threads(1)  # so small a model gains nothing from a second


def weights_of(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """0.35 x normal, norm weights around 1: so large that a wrong position or scale moves logits by tenths."""
    generator = torch.Generator().manual_seed(seed)
    specs = parameter_specs(config)
    return {
        spec.name: (spec.role is Role.NORM_WEIGHT) + 0.35 * torch.randn(spec.shape, generator=generator)
        for spec in specs
    }


@pytest.fixture
def config(request: pytest.FixtureRequest, tiny_recipe: Callable[..., Recipe]) -> ModelConfig:
    return tiny_recipe(getattr(request, "param", "crystal"), "model.max_position_embeddings=40").model


@pytest.fixture
def generator(config: ModelConfig) -> Generator:
    return Generator(load_model(weights_of(config), config))


both_models = pytest.mark.parametrize("config", FAMILIES, indirect=True)


def prompts_of(lengths: tuple[int, ...], vocab_size: int = 97) -> list[list[int]]:
    return [torch.randint(vocab_size, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in lengths]


RAGGED = prompts_of((3, 11, 1, 7, 20, 7))


def exact_logits(config: ModelConfig, weights: dict[str, Tensor], ids: list[int]) -> Tensor:
    """The whole model written out in float64, without a kernel or a module: ids [T] -> [T, V]."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    T, H, D, R = len(ids), config.num_heads, config.head_dim, config.rotary_dim

    def norm(x: Tensor, name: str) -> Tensor:
        if config.norm == "rms_norm":
            return x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * w[f"{name}.weight"]
        return torch.nn.functional.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], config.norm_eps)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + (w[f"{name}.bias"] if config.linear_bias else 0)

    angle = torch.outer(torch.arange(T).double(), config.rope_theta ** (-torch.arange(0, R, 2).double() / R))[:, None]

    def turn(x: Tensor) -> Tensor:
        x = x.clone()
        first, second = (
            (slice(0, R, 2), slice(1, R, 2)) if config.rotary_interleaved else (slice(0, R // 2), slice(R // 2, R))
        )
        a, b = x[..., first].clone(), x[..., second].clone()
        x[..., first], x[..., second] = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
        return x

    scales = resolve_scales(config)
    x = w["embedding.weight"][ids] * scales.embedding_scale
    for layer in range(config.num_layers):
        name = f"layers.{layer}"
        h = norm(x, f"{name}.attention_norm")
        q, k, v = (linear(h, f"{name}.attention.{part}_proj").view(T, H, D) for part in "qkv")
        scale = 1 / D if config.attention_scale == "inverse_head_dim" else 1 / math.sqrt(D)
        scores = torch.einsum("thd,shd->hts", turn(q), turn(k)) * scale + torch.full((T, T), -math.inf).double().triu(1)
        x = x + linear(torch.einsum("hts,shd->thd", scores.softmax(-1), v).reshape(T, -1), f"{name}.attention.o_proj")
        h = norm(x, f"{name}.ffn_norm")
        gate = torch.nn.functional.silu(linear(h, f"{name}.ffn.gate_proj"))
        x = x + linear(gate * linear(h, f"{name}.ffn.up_proj"), f"{name}.ffn.down_proj")
    head = w["embedding.weight"] if config.tie_embeddings else w["head.weight"]
    return norm(x, "final_norm") @ head.T * scales.logits_scale


@both_models
def test_greedy_is_argmax_of_the_uncached_model_token_by_token(generator: Generator) -> None:
    for prompt, found in zip(RAGGED, generator.generate(RAGGED, 15), strict=True):
        ids = list(prompt)
        for _ in range(15):
            ids.append(int(generator.model.logits(torch.tensor([ids]))[0, -1].argmax()))
        assert found == ids[len(prompt) :]


@both_models
def test_cached_logits_are_as_exact_as_uncached_ones(
    generator: Generator, config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both against float64: the cache may cost rounding, and no more than the model's own."""
    seen: list[Tensor] = []
    monkeypatch.setattr(generation, "_check_finite", lambda logits, batch, t: seen.append(logits))
    prompts = RAGGED[:3]
    found = generator.generate(prompts, 12)
    order = sorted(range(3), key=lambda index: -len(prompts[index]))  # the longest first, within the one batch
    for place, index in enumerate(order):
        ids, start = [*prompts[index], *found[index]][:-1], len(prompts[index]) - 1
        cached = torch.stack([logits[place] for logits in seen]).double()
        exact = exact_logits(config, weights_of(config), ids)[start:]
        plain = generator.model.logits(torch.tensor([ids]))[0, start:].double()
        assert (plain - exact).abs().max() < 1e-4 * exact.abs().max()  # the reference is the model
        assert (cached - exact).abs().max() < 2 * (plain - exact).abs().max() + 1e-6 * exact.abs().max()


@both_models
def test_a_batch_gives_what_one_by_one_gives(generator: Generator) -> None:
    alone = [generator.generate([prompt], 9)[0] for prompt in RAGGED]
    assert generator.generate(RAGGED, 9) == alone
    assert generator.generate(RAGGED, 9, batch_size=2) == alone
    assert generator.generate(RAGGED[::-1], 9, batch_size=3) == alone[::-1]
    assert generator.generate([], 9) == []


@pytest.mark.parametrize("name", OPEN_FAMILIES)
def test_every_open_family_continues_as_its_whole_rows_say(name: str) -> None:
    """Prompts within and beyond the windows: uneven, where the rows mask one another's padding, and all alike."""
    config = OPEN_FAMILIES[name].ours
    generator = Generator(load_model(large_weights(config), config))
    uneven, even = prompts_of((3, 11, 1, 30)), prompts_of((12, 12))
    for prompts in (uneven, even):
        for prompt, found in zip(prompts, generator.generate(prompts, 20), strict=True):
            assert len(found) == 20
            ids = torch.tensor([[*prompt, *found[:-1]]])
            assert found == generator.model.logits(ids)[0, len(prompt) - 1 :].argmax(-1).tolist()


@pytest.mark.parametrize("name", OPEN_FAMILIES)
def test_every_open_family_continues_as_transformers_does(name: str) -> None:
    pytest.importorskip("transformers")
    family = OPEN_FAMILIES[name]
    weights, prompts = large_weights(family.ours), prompts_of((5, 26))
    theirs = their_model(family, weights)
    theirs.generation_config.eos_token_id = None  # some of their defaults end a row at id 2
    found = Generator(load_model(weights, family.ours)).generate(prompts, 20)
    for prompt, continuation in zip(prompts, found, strict=True):
        row = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0].tolist()
        assert continuation == row[len(prompt) :]


def test_the_cache_holds_key_heads_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers x (keys and values) x rows x positions x key heads x head dimension, in the weights' dtype."""
    config = OPEN_FAMILIES["qwen3"].ours
    caches = []

    def kept(generator: Generator, rows: int, positions: int) -> Tensor:
        caches.append(new_cache(generator, rows, positions))
        return caches[-1]

    new_cache = Generator.new_cache
    monkeypatch.setattr(Generator, "new_cache", kept)
    for dtype, item in ((torch.float32, 4), (torch.bfloat16, 2)):
        Generator(load_model(large_weights(config), config, dtype=dtype)).generate(prompts_of((3, 7, 1)), 5)
        assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 2, 32)
        assert caches[-1].untyped_storage().nbytes() == 3 * 2 * 3 * (7 + 5 - 1) * 2 * 32 * item


def test_a_row_ends_before_a_stop_id_and_others_go_on(generator: Generator) -> None:
    free = generator.generate(RAGGED, 12)
    stop = free[1][4]
    expected = [row[: row.index(stop)] if stop in row else row for row in free]
    assert generator.generate(RAGGED, 12, stop_ids=[stop]) == expected
    assert {len(row) for row in expected} != {12}
    first = {row[0] for row in free}
    assert generator.generate(RAGGED, 12, stop_ids=first) == [[]] * len(RAGGED)


def test_sampling_is_a_function_of_seed_and_place_and_not_of_the_batch(generator: Generator) -> None:
    settings = {"temperature": 1.5, "top_k": 20, "seed": 3}
    whole = generator.generate(RAGGED, 10, **settings)  # type: ignore[arg-type]
    assert generator.generate(RAGGED, 10, batch_size=1, **settings) == whole  # type: ignore[arg-type]
    assert generator.generate(RAGGED[:4], 6, **settings) == [row[:6] for row in whole[:4]]  # type: ignore[arg-type]
    assert generator.generate(RAGGED, 10, **{**settings, "seed": 4}) != whole  # type: ignore[arg-type]
    same_prompt = generator.generate([RAGGED[0]] * 2, 10, **settings)  # type: ignore[arg-type]
    assert same_prompt[0] != same_prompt[1]
    assert generator.generate(RAGGED, 10, temperature=1.0, top_k=1) == generator.generate(RAGGED, 10)
    assert generator.generate(RAGGED, 10, temperature=1e-30) == generator.generate(RAGGED, 10)


def counted(top_k: int | None, top_p: float | None, temperature: float = 1.0) -> Tensor:
    """Shares of 200,000 draws from probabilities 0.4, 0.1, 0.3, 0.2."""
    n = 200_000
    logits = torch.tensor([0.4, 0.1, 0.3, 0.2]).log().expand(n, 4)
    uniform = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return sample(logits, uniform, temperature, top_k, top_p).bincount(minlength=4) / n


@pytest.mark.parametrize(
    ("top_k", "top_p", "temperature", "weights"),
    [
        (None, None, 1.0, (0.4, 0.1, 0.3, 0.2)),
        (None, None, 0.5, (0.16, 0.01, 0.09, 0.04)),
        (2, None, 1.0, (0.4, 0, 0.3, 0)),
        (99, None, 1.0, (0.4, 0.1, 0.3, 0.2)),
        (None, 0.65, 1.0, (0.4, 0, 0.3, 0)),  # 0.4 is short of it, 0.4 + 0.3 is not
        (None, 0.75, 1.0, (0.4, 0, 0.3, 0.2)),
        (None, 0.01, 1.0, (1, 0, 0, 0)),
        (None, 1.0, 1.0, (0.4, 0.1, 0.3, 0.2)),
        (3, 0.75, 1.0, (0.4, 0, 0.3, 0)),  # top_p of what top_k left: 0.7 / 0.9
    ],
)
def test_draws_have_the_probabilities_that_were_asked_for(
    top_k: int | None, top_p: float | None, temperature: float, weights: tuple[float, ...]
) -> None:
    wanted = torch.tensor(weights) / sum(weights)
    found = counted(top_k, top_p, temperature)
    assert (found - wanted).abs().max() < 5 * math.sqrt(0.25 / 200_000)  # five standard deviations
    assert not found[wanted == 0].any()


def test_the_ends_of_the_unit_interval_draw_a_token_that_may_be_drawn() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -math.inf]]).expand(2, 4)
    uniform = torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64)
    assert sample(logits, uniform, 1.0).tolist() == [2, 0]
    assert sample(logits, uniform, 1.0, 2).tolist() == [2, 1]


@both_models
def test_log_likelihoods_are_those_of_the_whole_row(
    generator: Generator, config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    greedy = generator.generate(RAGGED, 6)
    rows = [*zip(RAGGED, greedy, strict=True), *zip(RAGGED, prompts_of((5, 2, 9, 1, 8, 3)), strict=True)]
    for batch_size, at_once in ((1, 1 << 25), (5, 1 << 25), (5, 2 * 97)):
        monkeypatch.setattr(generation, "_LOGITS_AT_ONCE", at_once)
        for (context, continuation), (found, is_greedy) in zip(
            rows, generator.log_likelihoods(rows, batch_size), strict=True
        ):
            ids = [*context, *continuation]
            exact = exact_logits(config, weights_of(config), ids[:-1])[len(context) - 1 :]
            expected = exact.log_softmax(-1).gather(-1, torch.tensor(continuation)[:, None]).sum().item()
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)
            assert is_greedy == (exact.argmax(-1).tolist() == continuation)
    assert [is_greedy for _, is_greedy in generator.log_likelihoods(rows)][: len(RAGGED)] == [True] * len(RAGGED)


def test_positions_reach_to_the_last_and_not_beyond(generator: Generator) -> None:
    assert len(generator.generate([[1] * 30], 10)[0]) == 10
    with pytest.raises(DataError, match=r"prompt 1: 31 tokens and 10 new ones need 41 positions, the model has 40"):
        generator.generate([[1], [1] * 31], 10)
    assert len(generator.log_likelihoods([([1] * 30, [2] * 11)])) == 1  # the last token is not read
    with pytest.raises(DataError, match=r"row 0, context: .* need 41 positions"):
        generator.log_likelihoods([([1] * 30, [2] * 12)])


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([[1], []], {}, r"prompt 1: is empty"),
        ([[1, 97]], {}, r"prompt 0: id 97 is outside the model's vocabulary of 97"),
        ([[-1]], {}, r"prompt 0: id -1 is outside"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1]], {"temperature": -1.0}, "temperature is -1.0"),
        ([[1]], {"temperature": math.nan}, "temperature is nan"),
        ([[1]], {"top_k": 0}, "top_k is 0"),
        ([[1]], {"top_p": 0.0}, "top_p is 0.0"),
        ([[1]], {"seed": -1}, "seed is -1"),
        ([[1]], {"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_refused_before_anything_is_computed(
    generator: Generator,
    prompts: list[list[int]],
    settings: dict[str, float],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Generator, "_hidden", lambda *_: pytest.fail("computed"))
    with pytest.raises(DataError, match=message):
        generator.generate(prompts, **{"max_new_tokens": 4, **settings})  # type: ignore[arg-type]


def test_likelihoods_of_nothing_are_refused(generator: Generator) -> None:
    with pytest.raises(DataError, match="row 0, context: is empty"):
        generator.log_likelihoods([([], [1])])
    with pytest.raises(DataError, match="row 0, continuation: is empty"):
        generator.log_likelihoods([([1], [])])


def test_weights_that_diverged_are_said_so(config: ModelConfig) -> None:
    weights = weights_of(config)
    weights["final_norm.weight"][0] = math.nan
    broken = Generator(load_model(weights, config))
    with pytest.raises(NonFiniteError, match="row 0, token 0"):
        broken.generate([[1]], 3)
    with pytest.raises(NonFiniteError, match="row 0"):
        broken.log_likelihoods([([1], [2])])


def test_load_model_reads_each_weight_and_refuses_others(config: ModelConfig) -> None:
    weights = weights_of(config)
    model = load_model(weights, config)
    assert not model.training
    assert all(
        torch.equal(parameter, weights[name]) and not parameter.requires_grad
        for name, parameter in model.named_parameters()
    )
    lower = load_model(weights, config, dtype=torch.bfloat16)
    assert lower.embedding.weight.dtype == torch.bfloat16
    assert lower.get_buffer("cos").dtype == torch.float32
    assert torch.equal(lower.get_buffer("cos"), model.get_buffer("cos"))
    assert all(0 <= token < 97 for token in Generator(lower).generate([[1, 2, 3], [4]], 5)[1])
    missing = {name: tensor for name, tensor in weights.items() if name != "final_norm.weight"}
    with pytest.raises(CheckpointError, match=r"'final_norm.weight' and 0 others are missing"):
        load_model(missing, config)
    with pytest.raises(CheckpointError, match=r"'lm_head' and 0 others are unknown"):
        load_model({**weights, "lm_head": torch.zeros(1)}, config)
    with pytest.raises(CheckpointError, match=r"'final_norm.weight' is \[3\], the model's is \[48\]"):
        load_model({**weights, "final_norm.weight": torch.zeros(3)}, config)
