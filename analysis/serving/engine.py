"""Continuous batching: requests share one key-value cache, a row each, and join and leave between two tokens.

One thread owns the model. `submit` may be called from any thread; what a request gets is told to it from the engine's
thread, token by token. A request's sampled tokens depend on its own seed and on nothing else in the batch.

    engine = Engine(model, rows=32, positions=2048)
    with engine:
        engine.submit(Ask(prompt=[1, 5, 9], most=64, stop_ids=frozenset({2})), told=print)
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal

import numpy as np
import torch

from weftrain.analysis.evaluation.generation import Generator, sample
from weftrain.core.errors import DataError, WeftrainError, one_line
from weftrain.core.model import Decoder

_LOG = logging.getLogger(__name__)
PREFILL_TOKENS = 8192  # of prompts that are read at once, their padding counted


@dataclass(frozen=True)
class Ask:
    """What is asked for. most: new tokens, at most. temperature 0: the most likely token. number: of several answers to
    one prompt, each of which has random numbers of its own.
    """

    prompt: Sequence[int]
    most: int
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    number: int = 0
    stop_ids: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Ended:
    """stop: one of stop_ids came, which is not told; length: `most` tokens were told; error: words say why."""

    why: Literal["stop", "length", "error", "cancelled"]
    words: str = ""


Told = Callable[[int | Ended], None]


@dataclass(eq=False)
class Ticket:
    """A request under way. told: gets its tokens, then how it ended."""

    ask: Ask
    told: Told
    tokens: list[int] = field(default_factory=list)
    cancelled: bool = False
    random: np.random.Generator | None = None

    @property
    def position(self) -> int:
        """Of its newest token, which the model has not read yet."""
        return len(self.ask.prompt) + len(self.tokens) - 1

    def cancel(self) -> None:
        """From any thread: its row is free before the next token."""
        self.cancelled = True


class BusyError(WeftrainError):
    """More requests wait than the engine keeps. The same request may be made again later."""


class Engine:
    """rows: requests that are computed side by side. positions: of a row, prompt and answer. waiting: requests that may
    wait besides.
    """

    def __init__(self, model: Decoder, rows: int, positions: int, waiting: int = 256) -> None:
        self._generator, self._rows, self.positions = Generator(model), rows, positions
        self._most_waiting = waiting
        self._kv = self._generator.new_cache(rows, positions)
        self._active: list[Ticket] = []  # the number of a ticket here is its row of the cache
        self._waiting: deque[Ticket] = deque()
        self._change = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.tokens_made = 0

    @property
    def cache_bytes(self) -> int:
        return self._kv.numel() * self._kv.element_size()

    def __enter__(self) -> Engine:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End what is under way, and the thread."""
        with self._change:
            self._closing = True
            self._change.notify()
        self._thread.join()

    def submit(self, ask: Ask, told: Told) -> Ticket:
        """Ask for an answer. Raises DataError for what the model cannot do, BusyError for too many at once."""
        self._check(ask)
        ticket = Ticket(ask, told)
        if ask.temperature > 0:
            ticket.random = np.random.Generator(np.random.Philox(key=np.array([ask.seed, ask.number], np.uint64)))
        with self._change:
            if self._closing:
                raise BusyError("the server is ending: ask again when it has been started anew")
            if len(self._waiting) >= self._most_waiting:
                raise BusyError(f"{self._most_waiting} requests are waiting already: ask again later")
            self._waiting.append(ticket)
            self._change.notify()
        return ticket

    def _check(self, ask: Ask) -> None:
        self._generator.check(ask.prompt, ask.most, ask.temperature, ask.top_k, ask.top_p, ask.seed)
        if len(ask.prompt) + ask.most > self.positions:
            raise DataError(
                f"the prompt has {len(ask.prompt)} tokens, and with {ask.most} new ones needs "
                f"{len(ask.prompt) + ask.most} positions of {self.positions}: ask for fewer, or start with more"
            )

    # -- the engine's thread

    def _run(self) -> None:
        while True:
            with self._change:
                while not (self._active or self._waiting or self._closing):
                    self._change.wait()
                if self._closing:
                    left = [*self._active, *self._waiting]
                    self._active.clear()
                    self._waiting.clear()
                    break
            try:
                self._step()
            except Exception as error:  # the requests at hand are lost, the server is not
                words = str(error) if isinstance(error, WeftrainError) else f"{type(error).__name__}: {one_line(error)}"
                for ticket in self._active:
                    _tell(ticket, Ended("error", words))
                self._active.clear()
        for ticket in left:
            _tell(ticket, Ended("error", "the server is ending"))

    @torch.inference_mode()
    def _step(self) -> None:
        """One new token for each request under way, and the first one for those that can begin."""
        self._leave([place for place, ticket in enumerate(self._active) if ticket.cancelled], Ended("cancelled"))
        if self._active:
            positions = [ticket.position for ticket in self._active]
            tokens = torch.tensor([ticket.tokens[-1] for ticket in self._active])
            self._add(0, self._generator.decode(tokens, positions, self._kv[:, :, : len(positions)]))
        while joining := self._joining():
            first = len(self._active)
            self._active += joining
            rows = self._kv[:, :, first : len(self._active)]
            self._add(first, self._generator.prefill([ticket.ask.prompt for ticket in joining], rows))

    def _joining(self) -> list[Ticket]:
        """The next requests that find a row: as many as are read at once."""
        found: list[Ticket] = []
        with self._change:
            while self._waiting and len(self._active) + len(found) < self._rows:
                if self._waiting[0].cancelled:
                    _tell(self._waiting.popleft(), Ended("cancelled"))
                    continue
                longest = max(len(ticket.ask.prompt) for ticket in (*found, self._waiting[0]))
                if found and longest * (len(found) + 1) > PREFILL_TOKENS:
                    break
                found.append(self._waiting.popleft())
        return found

    def _add(self, first: int, logits: torch.Tensor) -> None:
        """Give each active request from `first` on its next token, by its row of logits [n, V]."""
        tickets = self._active[first:]
        finite = torch.isfinite(logits.amax(-1)).tolist()
        chosen = _chosen(logits, tickets)
        ended: list[tuple[int, Ended]] = []
        for place, (ticket, token, good) in enumerate(zip(tickets, chosen, finite, strict=True), first):
            if not good:
                ended.append((place, Ended("error", "the model's logits are not finite: its weights diverged")))
            elif token in ticket.ask.stop_ids:
                ended.append((place, Ended("stop")))
            else:
                ticket.tokens.append(token)
                self.tokens_made += 1
                if not _tell(ticket, token):
                    ended.append((place, Ended("cancelled")))
                elif len(ticket.tokens) == ticket.ask.most:
                    ended.append((place, Ended("length")))
        for place, how in reversed(ended):
            self._leave([place], how)

    def _leave(self, places: Sequence[int], how: Ended) -> None:
        """Free rows, the last one first: the request in the last row moves into the one that is free."""
        for place in sorted(places, reverse=True):
            ticket, last = self._active[place], len(self._active) - 1
            if how.why == "error":
                self._kv[:, :, place].zero_()  # what is masked counts zero times its value, and NaN would stay NaN
            if place != last:
                read = self._active[last].position + 1  # what the cache holds of it, at most
                self._kv[:, :, place, :read] = self._kv[:, :, last, :read]
                self._active[place] = self._active[last]
            self._active.pop()
            _tell(ticket, how)


def _tell(ticket: Ticket, what: int | Ended) -> bool:
    """Whether its owner took it; one that is gone, or fails, must not end the others."""
    try:
        ticket.told(what)
    except Exception:
        _LOG.exception("a request is given up: what was to take its answer failed")
        return False
    return True


def _chosen(logits: torch.Tensor, tickets: Sequence[Ticket]) -> list[int]:
    """The next token of each ticket. Those that are sampled alike are sampled together."""
    chosen: list[int] = logits.argmax(-1).tolist()
    alike: dict[tuple[float, int | None, float | None], list[int]] = {}
    for place, ticket in enumerate(tickets):
        if ticket.random is not None:
            alike.setdefault((ticket.ask.temperature, ticket.ask.top_k, ticket.ask.top_p), []).append(place)
    for (temperature, top_k, top_p), places in alike.items():
        uniform = torch.tensor([_next_uniform(tickets[place]) for place in places], dtype=torch.float64)
        tokens = sample(logits[places], uniform.to(logits.device), temperature, top_k, top_p)
        for place, token in zip(places, tokens.tolist(), strict=True):
            chosen[place] = token
    return chosen


def _next_uniform(ticket: Ticket) -> float:
    assert ticket.random is not None
    return float(ticket.random.random())
