"""Keys of a parsed config.json: reading them with defaults, and those that change nothing in what a model computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weftrain.core.errors import RecipeError

# Keys that change nothing in what the weights compute: how a model is run, trained, sampled from or shown.
HARMLESS = frozenset(
    """
    model_type architectures torch_dtype dtype transformers_version _name_or_path name_or_path auto_class
    attn_implementation _attn_implementation _attn_implementation_autoset _attn_implementation_internal
    use_cache pretraining_tp initializer_range output_attentions output_hidden_states return_dict torchscript
    is_decoder use_bfloat16 tf_legacy_loss chunk_size_feed_forward gradient_checkpointing
    attention_dropout hidden_dropout classifier_dropout attn_pdrop resid_pdrop embd_pdrop
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id tokenizer_class prefix
    id2label label2id num_labels problem_type finetuning_task task_specific_params
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    max_sequence_length model_max_length max_window_layers transformers.js_config is_llama_config unsloth_version
    output_router_logits
    unsloth_fixed summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout
    """.split()  # noqa: SIM905
)
# Keys that are known beyond their family and change nothing with this value alone.
ABSENT: dict[str, Any] = {
    "quantization_config": None,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "pruned_heads": {},
    "sliding_window": None,
    "use_sliding_window": False,
    "rope_interleaved": False,
    "use_mrope": False,
    "rotary_pct": 1.0,
    "attention_bias": False,
    "mlp_bias": False,
    "auto_map": None,  # code of its own
}


class Keys:
    """A parsed config.json, with the defaults of its config class for keys that are not there."""

    def __init__(self, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.given, self._defaults = given, defaults

    def get(self, key: str) -> Any:
        """The value or its default. Raises RecipeError where there is neither."""
        if key in self.given:
            return self.given[key]
        if key not in self._defaults:
            raise RecipeError(f"config.json: key '{key}' is missing; is the file complete?")
        return self._defaults[key]

    def optional(self, key: str) -> Any:
        """The value, its default, or None."""
        return self.given.get(key, self._defaults.get(key))

    def count(self, key: str) -> int:
        """A whole number of 1 or more."""
        value = self.get(key)
        if type(value) is not int or value <= 0:
            raise RecipeError(f"config.json: {key} is {short(value)}, not a number of 1 or more; is the file damaged?")
        return value

    def number(self, key: str) -> float:
        """A finite number above 0."""
        return as_number(key, self.get(key))

    def flag(self, key: str) -> bool:
        """true or false."""
        value = self.get(key)
        if type(value) is not bool:
            raise RecipeError(f"config.json: {key} is {short(value)}, not true or false; is the file damaged?")
        return value

    def optional_count(self, key: str, otherwise: int) -> int:
        """As `count`; `otherwise` where the value is null or there is none."""
        return otherwise if self.optional(key) is None else self.count(key)

    def require(self, key: str, value: Any) -> None:
        """Refuse a key with another value than `value`."""
        if self.given.get(key, value) != value:
            raise RecipeError(f"config.json: {key} is {short(self.given[key])}; this decoder does {value!r} only")


def short(value: Any) -> str:
    """A value as an error shows it."""
    return repr(value)[:80]


def as_number(key: str, value: Any) -> float:
    """A finite number above 0, or RecipeError."""
    if type(value) not in (int, float) or not 0 < value < 1e30:
        raise RecipeError(f"config.json: {key} is {short(value)}, not a number above 0; is the file damaged?")
    return float(value)
