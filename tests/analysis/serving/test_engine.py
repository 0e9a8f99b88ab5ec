"""Requests that share a cache get what each would get alone, whenever they come and go."""

from __future__ import annotations

import queue
import random
import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from weftrain.analysis.evaluation.generation import Generator, load_model
from weftrain.analysis.serving.engine import Ask, BusyError, Ended, Engine, Ticket
from weftrain.core.config import Recipe
from weftrain.core.errors import DataError
from weftrain.core.model import Decoder
from weftrain.core.parameters import Role, parameter_specs

WAIT_S = 60


@pytest.fixture(scope="module")
def _alone() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model(tiny_recipe: Callable[..., Recipe], _alone: None) -> Decoder:
    config = tiny_recipe("amber", "model.max_position_embeddings=64").model
    generator = torch.Generator().manual_seed(0)
    weights = {
        spec.name: (spec.role is Role.NORM_WEIGHT) + 0.35 * torch.randn(spec.shape, generator=generator)
        for spec in parameter_specs(config)
    }
    return load_model(weights, config)


class Heard:
    """What the engine tells of one request."""

    def __init__(self) -> None:
        self._queue: queue.Queue[int | Ended] = queue.Queue()

    def __call__(self, what: int | Ended) -> None:
        self._queue.put(what)

    def all(self) -> tuple[list[int], Ended]:
        tokens = []
        while not isinstance(what := self._queue.get(timeout=WAIT_S), Ended):
            tokens.append(what)
        return tokens, what

    def first(self) -> int | Ended:
        return self._queue.get(timeout=WAIT_S)


def asks(count: int, seed: int = 0) -> list[Ask]:
    drawn = random.Random(seed)
    return [
        Ask(
            [drawn.randrange(97) for _ in range(drawn.randrange(1, 30))],
            drawn.randrange(1, 30),
            drawn.choice([0.0, 0.0, 0.8, 1.3]),
            drawn.choice([None, 5]),
            drawn.choice([None, 0.9]),
            drawn.randrange(1000),
            stop_ids=frozenset(drawn.sample(range(97), drawn.choice([0, 3, 20]))),
        )
        for _ in range(count)
    ]


def alone(model: Decoder, ask: Ask) -> list[int]:
    [row] = Generator(model).generate(
        [ask.prompt],
        ask.most,
        temperature=ask.temperature,
        top_k=ask.top_k if ask.temperature else None,
        top_p=ask.top_p if ask.temperature else None,
        seed=ask.seed,
        stop_ids=ask.stop_ids,
    )
    return row


@pytest.mark.parametrize("rows", [1, 3, 32])
def test_each_gets_what_it_would_get_alone(model: Decoder, rows: int) -> None:
    wanted = asks(40)
    with Engine(model, rows, positions=64) as engine:
        heard = [Heard() for _ in wanted]
        for ask, one in zip(wanted, heard, strict=True):
            engine.submit(ask, one)
        for ask, one in zip(wanted, heard, strict=True):
            tokens, how = one.all()
            assert tokens == alone(model, ask)
            assert how.why == ("length" if len(tokens) == ask.most else "stop")


def test_from_many_threads_with_some_that_leave(model: Decoder) -> None:
    wanted = asks(60, seed=1)
    results: dict[int, tuple[list[int], Ended]] = {}
    with Engine(model, rows=4, positions=64) as engine:

        def one_client(first: int) -> None:
            for number in range(first, len(wanted), 6):
                heard = Heard()
                ticket = engine.submit(wanted[number], heard)
                if number % 5 == 0:
                    ticket.cancel()
                results[number] = heard.all()

        threads = [threading.Thread(target=one_client, args=(first,)) for first in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
    assert len(results) == 60
    for number, (tokens, how) in results.items():
        expected = alone(model, wanted[number])
        if how.why == "cancelled":
            assert number % 5 == 0
            assert tokens == expected[: len(tokens)]
        else:
            assert tokens == expected


def test_one_whose_owner_fails_is_logged_and_does_not_disturb_the_others(
    model: Decoder, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(what: int | Ended) -> None:
        raise RuntimeError("gone")

    [first, second] = (Ask([3, 4], 10), Ask([5, 6, 7], 10))
    with Engine(model, rows=2, positions=64) as engine:
        heard = Heard()
        engine.submit(first, fails)
        engine.submit(second, heard)
        assert heard.all()[0] == alone(model, second)
    assert "RuntimeError: gone" in caplog.text


def test_a_row_that_is_not_finite_ends_alone_and_leaves_nothing_behind(
    model: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache is poisoned under one request; the one that takes its row afterwards is as if nothing had been."""
    engine = Engine(model, rows=1, positions=64)
    read = Generator.decode

    def poisoned(self: Generator, tokens: torch.Tensor, positions: list[int], kv: torch.Tensor) -> torch.Tensor:
        kv[:, :, :, :40] = torch.nan
        monkeypatch.setattr(Generator, "decode", read)
        return read(self, tokens, positions, kv)

    monkeypatch.setattr(Generator, "decode", poisoned)
    with engine:
        heard, after = Heard(), Heard()
        engine.submit(Ask([3, 4, 5], 20), heard)
        engine.submit(Ask([5, 6, 7], 12), after)
        tokens, how = heard.all()
        assert len(tokens) == 1
        assert how == Ended("error", "the model's logits are not finite: its weights diverged")
        assert after.all() == (alone(model, Ask([5, 6, 7], 12)), Ended("length"))


def test_an_error_of_a_step_ends_those_under_way_and_the_engine_goes_on(
    model: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Generator.decode

    def broken(*_: object) -> torch.Tensor:
        monkeypatch.setattr(Generator, "decode", read)
        raise RuntimeError("device lost")

    monkeypatch.setattr(Generator, "decode", broken)
    with Engine(model, rows=2, positions=64) as engine:
        heard, after = Heard(), Heard()
        engine.submit(Ask([3, 4], 5), heard)
        assert heard.all()[1] == Ended("error", "RuntimeError: device lost")
        engine.submit(Ask([3, 4], 5), after)
        assert after.all()[0] == alone(model, Ask([3, 4], 5))


@pytest.mark.parametrize(
    ("ask", "why"),
    [
        (Ask([], 5), "the prompt: is empty"),
        (Ask([97], 5), "id 97 is outside"),
        (Ask([1] * 60, 5), "need 65 positions"),
        (Ask([1], 0), "max_new_tokens is 0"),
        (Ask([1], 5, temperature=-1.0), "temperature is -1.0"),
        (Ask([1] * 30, 20), "needs 50 positions of 40"),
    ],
)  # fmt: skip
def test_what_the_model_cannot_do_is_refused_at_once(model: Decoder, ask: Ask, why: str) -> None:
    with Engine(model, rows=1, positions=40) as engine, pytest.raises(DataError, match=why):
        engine.submit(ask, Heard())


def test_too_many_at_once_are_told_to_come_again(model: Decoder) -> None:
    engine = Engine(model, rows=1, positions=64, waiting=2)  # not entered: nothing leaves the queue
    for _ in range(2):
        engine.submit(Ask([1], 1), Heard())
    with pytest.raises(BusyError, match="2 requests are waiting already"):
        engine.submit(Ask([1], 1), Heard())


def test_at_its_end_every_request_is_told(model: Decoder) -> None:
    heard = [Heard() for _ in range(4)]
    engine = Engine(model, rows=1, positions=64)
    tickets: list[Ticket] = []
    with engine:
        for one in heard:
            tickets.append(engine.submit(Ask([1, 2], 60), one))
        assert heard[0].first() == alone(model, Ask([1, 2], 1))[0]
    assert [one.all()[1].why for one in heard[1:]] == ["error"] * 3
    with pytest.raises(BusyError, match="ending"):
        engine.submit(Ask([1], 1), Heard())
