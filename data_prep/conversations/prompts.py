"""The prompt of an answer, by the chat template that a model was trained with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weftrain.core.errors import DataError
from weftrain.core.formats.dataset import read_chat_template
from weftrain.core.formats.dataset_manifest import DatasetManifest
from weftrain.data_prep.conversations.encode import ConversationEncoder
from weftrain.data_prep.conversations.messages import NoConversationError, messages_of
from weftrain.data_prep.conversations.template import ChatTemplate, TemplateError, load_template, template_beside
from weftrain.data_prep.tokens.markers import Markers, recorded_markers
from weftrain.data_prep.tokens.tokenization import load_encoder


@dataclass(frozen=True)
class Prompts:
    """Writes conversations for a model."""

    encoder: ConversationEncoder

    @property
    def name(self) -> str:
        return self.encoder.template.name

    @property
    def stop_ids(self) -> frozenset[int]:
        """Every control token: no answer has one in it."""
        return frozenset(self.encoder.encoder.control_ids.tolist())

    def prompt_ids(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Raises DataError for a conversation that cannot be written."""
        try:
            return [int(index) for index in self.encoder.prompt(messages_of("messages", list(messages)))]
        except (NoConversationError, TemplateError) as error:
            raise DataError(f"this conversation cannot be written: {error}") from error


def open_prompts(tokenizer: Path, dataset: tuple[Path, DatasetManifest] | None, template: str | None) -> Prompts | None:
    """How a model with this tokenizer writes conversations: by `template`, as --chat-template names it, else by that of
    the dataset that it was trained on, or, without one, by that beside the tokenizer. None: there is none. Raises
    DataError.
    """
    chosen = _template(tokenizer, dataset, template)
    markers = Markers() if dataset is None else recorded_markers(dataset[1])
    if chosen is None:
        return None
    return Prompts(ConversationEncoder(load_encoder(tokenizer, markers, engine="tokenizers"), chosen))


def _template(
    tokenizer: Path, dataset: tuple[Path, DatasetManifest] | None, template: str | None
) -> ChatTemplate | None:
    if template is not None:
        return load_template(template, tokenizer)
    if dataset is not None:
        text = read_chat_template(*dataset)
        return None if text is None else ChatTemplate(text, str(dataset[0]))
    return template_beside(tokenizer)
