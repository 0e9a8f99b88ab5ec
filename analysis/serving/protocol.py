"""What clients of OpenAI's protocol send and get, as far as it is spoken here: /v1/completions and
/v1/chat/completions (OpenAI's API reference).

Fields that would change an answer and are not done here are refused by name; others are not read.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from weftrain.core.errors import WeftrainError

MAX_STOPS = 16
MAX_CHOICES = 16
MAX_BODY_BYTES = 4 << 20

# field -> the values at which it asks for nothing
_NOT_DONE: dict[str, tuple[Any, ...]] = {
    "logprobs": (None, False, 0),
    "top_logprobs": (None, 0),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
    "best_of": (None, 1),
    "suffix": (None, ""),
    "audio": (None,),
    "modalities": (None, ["text"]),
}

Stop = Annotated[str, Field(min_length=1, max_length=200)]
Stops = Annotated[
    list[Stop], Field(max_length=MAX_STOPS), BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
]


class RequestError(WeftrainError):
    """A request that cannot be answered. status: of HTTP."""

    def __init__(self, words: str, status: int = 400) -> None:
        super().__init__(words)
        self.status = status


class Request(BaseModel):
    """What both kinds of request have. Without a temperature it is 1, and without a seed one is drawn."""

    model_config = ConfigDict(extra="allow", frozen=True)

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    seed: int | None = None
    stop: Stops | None = None  # a word, or words
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check(self) -> Request:
        for name, value in (self.model_extra or {}).items():
            if name in _NOT_DONE and value not in _NOT_DONE[name]:
                raise ValueError(f"'{name}' is not done by this server: leave it out")
        return self

    @property
    def with_usage(self) -> bool:
        return bool((self.stream_options or {}).get("include_usage"))


class CompletionRequest(Request):
    """prompt: a text, texts, ids, or lists of ids."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: Literal[False] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if all(isinstance(one, int) for one in self.prompt):
            return [list(self.prompt)]  # type: ignore[arg-type]
        return list(self.prompt)  # type: ignore[arg-type]


class ChatRequest(Request):
    """messages: as conversations/messages.py reads them."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=10_000)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def most(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


def parsed(kind: type[Any], value: Any) -> Any:
    """A request, checked. Raises RequestError naming the field."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"][:3])[:100]
        words = str(first["msg"]).removeprefix("Value error, ")[:300]
        raise RequestError(f"{where}: {words}" if where else words) from None


def error_body(words: str, status: int) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": words, "type": kind, "param": None, "code": None}}


def usage(prompt_tokens: int, made: int) -> dict[str, int]:
    return {"prompt_tokens": prompt_tokens, "completion_tokens": made, "total_tokens": prompt_tokens + made}
