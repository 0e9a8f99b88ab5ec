"""CrystalCoder for Hugging Face's transformers: the file that `convert to-huggingface` and `release` put beside a CrystalCoder's weights.

Load a folder with AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True). The module imports torch and transformers alone,
and nothing of weftrain imports it. The model: LayerNorm, rotary positions in interleaved pairs on the first `rotary_dim` dimensions of
each head, SwiGLU, biases, a tied head, and muP's scales on embeddings, attention and logits. Attention is plain matrix products.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast


class CrystalCoderConfig(PretrainedConfig):
    """The keys of config.json. mup_width_scale: width of the proxy over this model's, by which logits are multiplied."""

    model_type = "crystalcoder"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - transformers reads these as they are, without annotations
    attribute_map = {  # noqa: RUF012
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "intermediate_size": "n_inner",
        "max_position_embeddings": "n_positions",
    }

    def __init__(
        self,
        vocab_size: int = 32032,
        n_positions: int = 2048,
        n_embd: int = 4096,
        n_layer: int = 32,
        n_head: int = 32,
        n_inner: int = 10922,
        rotary_dim: int = 32,
        layer_norm_epsilon: float = 1e-5,
        activation_function: str = "swiglu",
        position_embedding_type: str = "rotary",
        mup_embeddings_scale: float = 14.6,
        mup_output_alpha: float = 2.22,
        mup_width_scale: float = 0.0625,
        mup_scale_qk_dot_by_d: bool = True,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = True,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        **others: Any,
    ) -> None:
        if (activation_function, position_embedding_type, tie_word_embeddings) != ("swiglu", "rotary", True):
            raise ValueError("this code computes CrystalCoder with swiglu, rotary positions and a tied head only")
        self.vocab_size, self.n_positions, self.n_embd, self.n_layer = vocab_size, n_positions, n_embd, n_layer
        self.n_head, self.n_inner, self.rotary_dim, self.layer_norm_epsilon = n_head, n_inner, rotary_dim, layer_norm_epsilon
        self.activation_function, self.position_embedding_type = activation_function, position_embedding_type
        self.mup_embeddings_scale, self.mup_output_alpha = mup_embeddings_scale, mup_output_alpha
        self.mup_width_scale, self.mup_scale_qk_dot_by_d = mup_width_scale, mup_scale_qk_dot_by_d
        self.initializer_range, self.use_cache = initializer_range, others.pop("use_cache", True)
        others |= {"tie_word_embeddings": True, "bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
        super().__init__(**others)


class Conv1D(nn.Module):
    """A linear map whose weight is stored [in, out]: x [..., in] -> [..., out]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.t(), self.bias)


class LayerNorm(nn.LayerNorm):
    """Statistics and affine map in float32, whatever the dtype of the weights."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, T, D], cos and sin [B, 1, T, R/2] -> x with pairs (2i, 2i + 1) of its first R dimensions turned."""
    turning, kept = x[..., : 2 * cos.shape[-1]], x[..., 2 * cos.shape[-1] :]
    first, second = turning[..., 0::2], turning[..., 1::2]
    turned = torch.stack((first * cos + -second * sin, second * cos + first * sin), -1).flatten(-2)
    return torch.cat((turned, kept), -1)


class CrystalCoderAttention(nn.Module):
    def __init__(self, config: CrystalCoderConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.n_head, self.head_dim = layer, config.n_head, config.n_embd // config.n_head
        self.scale = 1 / self.head_dim if config.mup_scale_qk_dot_by_d else self.head_dim**-0.5
        self.c_attn = Conv1D(config.n_embd, 3 * config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, hidden: Tensor, cache: Cache | None) -> Tensor:
        """x [B, T, C], hidden bool [B, 1, T, S] (keys that a query must not see) -> [B, T, C]."""
        q, k, v = (part.unflatten(-1, (self.n_head, self.head_dim)).transpose(1, 2) for part in self.c_attn(x).chunk(3, -1))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        scores = torch.matmul(q, k.transpose(2, 3)) * self.scale  # [B, H, T, S]
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)  # not -inf: a row of padding sees nothing, and stays finite
        probabilities = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
        return self.c_proj(torch.matmul(probabilities, v).transpose(1, 2).flatten(-2))


class CrystalCoderMLP(nn.Module):
    def __init__(self, config: CrystalCoderConfig) -> None:
        super().__init__()
        self.c_fc = Conv1D(config.n_embd, config.n_inner)  # up
        self.c_fc2 = Conv1D(config.n_embd, config.n_inner)  # gate
        self.c_proj = Conv1D(config.n_inner, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.silu(self.c_fc2(x)) * self.c_fc(x))


class CrystalCoderBlock(nn.Module):
    def __init__(self, config: CrystalCoderConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = CrystalCoderAttention(config, layer)
        self.ln_2 = LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = CrystalCoderMLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, hidden: Tensor, cache: Cache | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cos, sin, hidden, cache)
        return x + self.mlp(self.ln_2(x))


class CrystalCoderTransformer(nn.Module):
    """Holds the parameters under the names of the released files."""

    def __init__(self, config: CrystalCoderConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.h = nn.ModuleList(CrystalCoderBlock(config, layer) for layer in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)


class CrystalCoderLMHeadModel(PreTrainedModel, GenerationMixin):
    """The head is the embedding's own weight and has no parameter."""

    config_class = CrystalCoderConfig
    base_model_prefix = "transformer"
    _no_split_modules = ["CrystalCoderBlock"]  # noqa: RUF012
    # The released files also hold causal masks, and may repeat the embedding as a head.
    _keys_to_ignore_on_load_unexpected = [r"attn\.(masked_)?bias$", r"^lm_head\.weight$"]  # noqa: RUF012

    def __init__(self, config: CrystalCoderConfig) -> None:
        super().__init__(config)
        self.transformer = CrystalCoderTransformer(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Conv1D | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.transformer.wte = value  # type: ignore[assignment]

    def get_output_embeddings(self) -> None:
        return None

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **unused: Any,
    ) -> CausalLMOutputWithPast:
        """input_ids [B, T], attention_mask [B, S] of the S positions so far (1: a token, 0: padding) -> logits [B, T, V], in the cache."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, and not both")
        config: Any = self.config
        x = self.transformer.wte(input_ids) if inputs_embeds is None else inputs_embeds
        batch, count, _ = x.shape
        if past_key_values is None and (config.use_cache if use_cache is None else use_cache):
            past_key_values = DynamicCache()
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        place = torch.arange(past + count, device=x.device)
        hidden = (place[None, :] > place[past:, None])[None, None]  # [1, 1, T, S]
        if attention_mask is not None:
            if attention_mask.dim() != 2 or attention_mask.shape[-1] != past + count:
                raise ValueError(f"attention_mask has shape {list(attention_mask.shape)}; it must be [{batch}, {past + count}]")
            hidden = hidden | (attention_mask[:, None, None, :] == 0)
        if position_ids is None:
            position_ids = place[None, past:].expand(batch, -1)
            if attention_mask is not None:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
        exponent = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32, device=x.device) / config.rotary_dim
        angle = position_ids[:, None, :, None].float() * (1.0 / 10000.0**exponent)  # [B, 1, T, R/2]
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        x = x * config.mup_embeddings_scale
        for block in self.transformer.h:
            x = block(x, cos, sin, hidden, past_key_values)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = F.linear(self.transformer.ln_f(x)[:, kept], self.transformer.wte.weight)
        logits = logits * (config.mup_output_alpha * config.mup_width_scale)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
