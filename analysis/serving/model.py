"""A model that answers: its weights, its tokenizer, the tokens that end an answer, and perhaps a form of chats."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tokenizers import Tokenizer

from weftrain.core.errors import DataError
from weftrain.core.model import Decoder
from weftrain.core.model_config import ModelConfig


class ChatForm(Protocol):
    """How conversations are written for a model; data_prep/conversations has those of chat templates."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    @property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end an answer."""
        ...

    def prompt_ids(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Messages of role and content -> the ids up to where the next answer begins. Raises DataError."""
        ...


@dataclass(frozen=True)
class ServedModel:
    """name: as clients ask for it. begins: whether a text begins with the start token. end_id: ends a text. chat: None
    if the model has no chat template, so that it only continues texts.
    """

    name: str
    config: ModelConfig
    load: Callable[[], Decoder]
    tokenizer: Tokenizer
    begins: bool
    end_id: int
    chat: ChatForm | None

    @property
    def stop_ids(self) -> frozenset[int]:
        return frozenset([self.end_id])

    @property
    def chat_stop_ids(self) -> frozenset[int]:
        """Of an answer in a conversation: also the end of a text."""
        assert self.chat is not None
        return self.chat.stop_ids | {self.end_id}

    def text_ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=self.begins).ids)

    def conversation_ids(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The prompt of an answer. Raises DataError for a conversation that cannot be written."""
        if self.chat is None:
            raise DataError(
                "this model has no chat template: name one when it is started, with --chat-template, or ask for a "
                "completion"
            )
        return self.chat.prompt_ids(messages)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))
