"""OpenAI's protocol over HTTP, for clients on this machine: /v1/models, /v1/completions, /v1/chat/completions.

Starlette routes, uvicorn serves; a request's tokens come from the engine's thread into its queue here. A client that
goes away frees its row. Names of other hosts in a request's Host header are refused, so that a page in a browser cannot
reach the server under a name of its own.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from weftrain.analysis.serving.engine import Ask, BusyError, Ended, Engine, Ticket
from weftrain.analysis.serving.model import ServedModel
from weftrain.analysis.serving.protocol import (
    MAX_BODY_BYTES,
    ChatRequest,
    CompletionRequest,
    Request,
    RequestError,
    error_body,
    parsed,
    usage,
)
from weftrain.analysis.serving.text import TextStream
from weftrain.core.errors import WeftrainError

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request as HttpRequest
    from starlette.responses import Response

HOSTS = ["127.0.0.1", "localhost", "[::1]"]
_COMPLETION_TOKENS = 16  # OpenAI's default


@dataclass
class _Choice:
    """One answer under way. queue: what the engine told of it."""

    prompt: list[int]
    text: TextStream
    queue: asyncio.Queue[int | Ended] = field(default_factory=asyncio.Queue)
    ticket: Ticket | None = None
    made: int = 0

    async def pieces(self) -> AsyncIterator[tuple[str, str | None]]:
        """(text, why it ended or None). Raises RequestError if the engine cannot go on."""
        while True:
            told = await self.queue.get()
            if isinstance(told, Ended):
                if told.why == "error":
                    raise RequestError(told.words, 500)
                yield self.text.end(), told.why
                return
            self.made += 1
            piece = self.text.add(told)
            if self.text.stopped:
                assert self.ticket is not None
                self.ticket.cancel()
                yield piece, "stop"
                return
            if piece:
                yield piece, None


class Server:
    """The answers of one model. engine: entered by the caller."""

    def __init__(self, model: ServedModel, engine: Engine) -> None:
        self._model, self._engine, self._since = model, engine, int(time.time())

    def app(self) -> Starlette:
        from starlette.applications import Starlette
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware
        from starlette.routing import Route

        return Starlette(
            routes=[
                Route("/health", self._health),
                Route("/v1/models", self._models),
                Route("/v1/completions", self._completions, methods=["POST"]),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
            ],
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS, www_redirect=False)],
        )

    async def _health(self, request: HttpRequest) -> Response:
        from starlette.responses import JSONResponse

        return JSONResponse({"status": "ok"})

    async def _models(self, request: HttpRequest) -> Response:
        from starlette.responses import JSONResponse

        entry = {"id": self._model.name, "object": "model", "created": self._since, "owned_by": "weftrain"}
        return JSONResponse({"object": "list", "data": [entry]})

    async def _completions(self, http: HttpRequest) -> Response:
        return await self._answered(http, CompletionRequest)

    async def _chat(self, http: HttpRequest) -> Response:
        return await self._answered(http, ChatRequest)

    async def _answered(self, http: HttpRequest, kind: type[Request]) -> Response:
        from starlette.responses import JSONResponse, StreamingResponse

        choices: list[_Choice] = []
        try:
            request = parsed(kind, await _body(http))
            self._check_model(request)
            chat = isinstance(request, ChatRequest)
            choices = self._begin(request)
            answer = _Answer(self._model.name, chat, choices, request.with_usage)
            if request.stream:
                return StreamingResponse(answer.events(), media_type="text/event-stream")
            return JSONResponse(await _unless_gone(http, answer.whole()))
        except WeftrainError as error:
            _cancel(choices)
            status = error.status if isinstance(error, RequestError) else 503 if isinstance(error, BusyError) else 400
            return JSONResponse(error_body(str(error), status), status)
        except BaseException:
            _cancel(choices)
            raise

    def _check_model(self, request: Request) -> None:
        if request.model not in (None, self._model.name):
            raise RequestError(f"model '{request.model}' is not here: this is '{self._model.name}'", 404)

    def _begin(self, request: Request) -> list[_Choice]:
        """Submit the request's answers, all or none."""
        if isinstance(request, ChatRequest):
            prompts = [self._model.conversation_ids(request.messages)]
            stop_ids, asked = self._model.chat_stop_ids, request.most
        else:
            assert isinstance(request, CompletionRequest)
            prompts = [one if isinstance(one, list) else self._model.text_ids(one) for one in request.prompts]
            stop_ids, asked = self._model.stop_ids, request.max_tokens or _COMPLETION_TOKENS
        seed = secrets.randbits(63) if request.seed is None else request.seed % (1 << 63)
        loop, choices = asyncio.get_running_loop(), []
        try:
            for prompt in prompts:
                for number in range(request.n or 1):
                    chat = isinstance(request, ChatRequest)
                    choice = _Choice(prompt, TextStream(self._model.decode, prompt, request.stop or (), strip=chat))
                    choices.append(choice)
                    ask = Ask(
                        prompt,
                        asked or max(1, self._engine.positions - len(prompt)),
                        1.0 if request.temperature is None else request.temperature,
                        request.top_k,
                        request.top_p,
                        seed,
                        number,
                        stop_ids,
                    )
                    choice.ticket = self._engine.submit(ask, _told_to(loop, choice.queue))
        except BaseException:
            _cancel(choices)
            raise
        return choices


def _told_to(loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[int | Ended]) -> Any:
    return lambda what: loop.call_soon_threadsafe(queue.put_nowait, what)


def _cancel(choices: Sequence[_Choice]) -> None:
    for choice in choices:
        if choice.ticket is not None:
            choice.ticket.cancel()


async def _body(http: HttpRequest) -> Any:
    """The JSON of a request. Raises RequestError for one that is too large, or none."""
    data = bytearray()
    async for block in http.stream():
        data += block
        if len(data) > MAX_BODY_BYTES:
            raise RequestError(f"the request has more than {MAX_BODY_BYTES:,} bytes", 413)
    try:
        return json.loads(bytes(data))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the request is no JSON: {str(error)[:200]}") from None


async def _unless_gone(http: HttpRequest, answer: Any) -> Any:
    """The answer, unless its client goes away before."""
    task = asyncio.ensure_future(answer)
    try:
        while not task.done():
            await asyncio.wait([task], timeout=0.5)
            if not task.done() and await http.is_disconnected():
                raise RequestError("the client is gone", 499)
        return task.result()
    finally:
        task.cancel()


@dataclass(frozen=True)
class _Answer:
    """Puts choices into the shapes of the protocol."""

    model: str
    chat: bool
    choices: Sequence[_Choice]
    with_usage: bool
    id: str = field(default_factory=lambda: f"cmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    async def whole(self) -> dict[str, Any]:
        made = await asyncio.gather(*(self._text(number, choice) for number, choice in enumerate(self.choices)))
        kind = "chat.completion" if self.chat else "text_completion"
        return self._envelope(kind) | {"choices": list(made), "usage": self._usage()}

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events, the choices' pieces as they come. A client that goes away ends this generator."""
        queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        tasks = [asyncio.create_task(self._feed(number, one, queue)) for number, one in enumerate(self.choices)]
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        try:
            for number in range(len(self.choices)) if self.chat else ():
                yield _event(self._envelope(kind) | {"choices": [_piece(number, {"role": "assistant"}, None)]})
            left = len(tasks)
            while left:
                entry = await queue.get()
                if entry is None:
                    left -= 1
                elif "error" in entry:
                    yield _event(entry)
                    return
                else:
                    yield _event(self._envelope(kind) | {"choices": [entry]})
            if self.with_usage:
                yield _event(self._envelope(kind) | {"choices": [], "usage": self._usage()})
            yield b"data: [DONE]\n\n"
        finally:
            _cancel(self.choices)
            for task in tasks:
                task.cancel()

    async def _feed(self, number: int, choice: _Choice, queue: asyncio.Queue[dict[str, Any] | None]) -> None:
        try:
            async for text, why in choice.pieces():
                if text or why:
                    delta = ({"content": text} if text else {}) if self.chat else None
                    queue.put_nowait(_piece(number, delta, why, text))
        except WeftrainError as error:
            queue.put_nowait(error_body(str(error), 500))
        queue.put_nowait(None)

    async def _text(self, number: int, choice: _Choice) -> dict[str, Any]:
        pieces, reason = [], None
        async for text, why in choice.pieces():
            pieces.append(text)
            reason = why
        entry: dict[str, Any] = {"index": number, "finish_reason": reason, "logprobs": None}
        if self.chat:
            return entry | {"message": {"role": "assistant", "content": "".join(pieces)}}
        return entry | {"text": "".join(pieces)}

    def _envelope(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _usage(self) -> dict[str, int]:
        prompts = {id(choice.prompt): len(choice.prompt) for choice in self.choices}
        return usage(sum(prompts.values()), sum(choice.made for choice in self.choices))


def _piece(number: int, delta: dict[str, Any] | None, why: str | None, text: str = "") -> dict[str, Any]:
    entry: dict[str, Any] = {"index": number, "finish_reason": why, "logprobs": None}
    return entry | ({"text": text} if delta is None else {"delta": delta})


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"
