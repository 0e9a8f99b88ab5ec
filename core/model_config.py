"""The recipe's `model` section: one decoder in fields, which core/blocks.py and core/model.py build.

core/parameters.py counts it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from weftrain.core.experts_section import ExpertsConfig
from weftrain.core.formats.strict_model import Positive, PositiveInt, StrictModel
from weftrain.core.order.data_section import Positions

# Bounds of a model's sizes, at least ten times those of the largest published model: lists of parameters and tables by
# position are made before anything is computed.
Layers = Annotated[int, Field(gt=0, le=10_000)]
Width = Annotated[int, Field(gt=0, le=1 << 22)]

# keys of the model that change what the same weights compute, and no tensor's shape
ChangeableKey = Literal[
    "num_heads",
    "norm_eps",
    "rotary_dim",
    "rotary_interleaved",
    "rope_theta",
    "attention_scale",
    "embedding_scale",
    "logits_scale",
    "norm_placement",
    "norm_weight_offset",
    "residual",
    "rotary_scaling",
    "layer_pattern",
    "logits_softcap",
    "attention_multiplier",
    "residual_multiplier",
    "experts",  # how many of them a token passes through, and with which weights
]


class Initialization(StrictModel):
    """Standard deviations by role. `truncated_normal` cuts at two of them, as CrystalCoder's initialisers do."""

    distribution: Literal["normal", "truncated_normal"]
    embedding_std: Positive
    matrix_std: Positive  # q, k, v, gate, up and, without muP, an untied head
    output_matrix_std: Positive  # the two projections back into the residual stream: o and down


class Mup(StrictModel):
    """Maximal-update parametrisation from a proxy of width `base_hidden_size` (arXiv 2203.03466); see core/mup.py."""

    base_hidden_size: Width
    distribution: Literal["normal", "truncated_normal"]
    base_std: Positive  # the proxy's standard deviation of embedding and matrices
    embedding_scale: Positive  # times the embedding's output; width-independent
    base_logits_scale: Positive  # the proxy's logits multiplier


class LinearScaling(StrictModel):
    """Every rotary frequency divided by `factor` (position interpolation, arXiv 2306.15595)."""

    kind: Literal["linear"]
    factor: Positive


class Llama3Scaling(StrictModel):
    """Llama 3.1's rotary scaling: wavelengths above original_max_position_embeddings / low_freq_factor are stretched by
    `factor`, those below / high_freq_factor are kept, and those between are blended.
    """

    kind: Literal["llama3"]
    factor: Positive
    low_freq_factor: Positive
    high_freq_factor: Positive
    original_max_position_embeddings: Positions

    @model_validator(mode="after")
    def _check(self) -> Llama3Scaling:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor {self.high_freq_factor} must be above low_freq_factor {self.low_freq_factor}"
            )
        return self


class YarnScaling(StrictModel):
    """YaRN (arXiv 2309.00071): dimensions that turn more than `beta_fast` times within the original length are kept,
    those that turn less than `beta_slow` times are stretched by `factor`, and cos and sin are multiplied.
    """

    kind: Literal["yarn"]
    factor: Positive
    original_max_position_embeddings: Positions
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    attention_factor: Positive | None = None  # of cos and sin; default 0.1 ln(factor) + 1, as in the paper
    truncate: bool = True  # round the two bounds to whole dimensions

    @model_validator(mode="after")
    def _check(self) -> YarnScaling:
        if self.beta_fast <= self.beta_slow:
            raise ValueError(f"beta_fast {self.beta_fast} must be above beta_slow {self.beta_slow}")
        return self


RotaryScaling = Annotated[LinearScaling | Llama3Scaling | YarnScaling, Field(discriminator="kind")]


class LayerKind(StrictModel):
    """In what a layer may differ from its neighbours."""

    window: PositiveInt | None = None  # keys that a query sees at most, itself among them; null: all before it
    # scaled: as rotary_scaling says, where there is one; unscaled: without it; none: no rotary positions
    rotary: Literal["scaled", "unscaled", "none"] = "scaled"


def _same_as(name: str) -> Any:
    """A field whose default is another field's value; that one is declared before it."""
    return Field(default_factory=lambda given: given[name])


class ModelConfig(StrictModel):
    """One decoder: the model families differ by these fields only. Give `mup`, or `initialization` and scales.

    The fields after `mup` came after recipes had been recorded: a dump leaves them out where they have their defaults,
    so that a record of an earlier model keeps its bytes.
    """

    vocab_size: Width
    hidden_size: Width
    num_layers: Layers
    num_heads: Width
    intermediate_size: Width
    max_position_embeddings: Positions
    norm: Literal["rms_norm", "layer_norm"]
    norm_eps: Positive
    linear_bias: bool  # on o, gate, up and down, and on q, k and v unless qkv_bias says otherwise; never on the head
    rotary_dim: Width  # leading dimensions of each head that rotate
    rotary_interleaved: bool  # pairs (0,1),(2,3).. rather than rotate-half's (0, d/2)..
    rope_theta: Positive
    attention_scale: Literal["inverse_sqrt_head_dim", "inverse_head_dim"]
    tie_embeddings: bool
    embedding_scale: Positive | None = None  # default 1, or from mup
    logits_scale: Positive | None = None  # default 1, or from mup
    # of the embedding and of what each attention and feed-forward adds
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    initialization: Initialization | None = None
    mup: Mup | None = None

    # key and value heads; each serves num_heads / num_kv_heads query heads (grouped-query attention, arXiv 2305.13245)
    num_kv_heads: Width = _same_as("num_heads")
    head_dim: Width = Field(default_factory=lambda given: given["hidden_size"] // given["num_heads"])
    qkv_bias: bool = _same_as("linear_bias")
    # norms of q and k before they rotate. per_head: one weight of head_dim for all heads; full: over the projection
    qk_norm: Literal["none", "per_head", "full"] = "none"
    norm_placement: Literal["before", "after"] = "before"  # of attention and feed-forward; after: of what they add
    norm_weight_offset: Literal[0, 1] = 0  # 1: norms multiply by 1 + weight, and weights begin at 0
    # sequential: the feed-forward reads what attention added; parallel: both read the layer's input
    residual: Literal["sequential", "parallel"] = "sequential"
    feed_forward: Literal["swiglu", "gelu"] = "swiglu"  # gelu: down(gelu(up(x))), no gate
    rotary_scaling: RotaryScaling | None = None
    # the layers' kinds in turn, repeated until num_layers
    layer_pattern: Annotated[tuple[LayerKind, ...], Field(min_length=1, strict=False)] = (LayerKind(),)
    logits_softcap: Positive | None = None  # c: logits become c tanh(logits / c)
    attention_multiplier: Positive | None = None  # times q k^T, in place of what attention_scale says
    residual_multiplier: Positive = 1.0  # times what each attention and feed-forward adds
    # a mixture of experts in place of the feed-forward, but for its dense_layers; null: none
    experts: ExpertsConfig | None = None

    def kind_of(self, layer: int) -> LayerKind:
        """What is special about a layer."""
        return self.layer_pattern[layer % len(self.layer_pattern)]

    def experts_of(self, layer: int) -> ExpertsConfig | None:
        """The experts of a layer that has them."""
        return self.experts if self.experts is not None and layer >= self.experts.dense_layers else None

    def later_fields(self) -> list[str]:
        """The fields after `mup` that do not have their defaults: what a format of earlier models cannot say."""

        def default(name: str) -> Any:
            return type(self).model_fields[name].get_default(call_default_factory=True, validated_data=dict(self))

        return [name for name in LATER_FIELDS if getattr(self, name) != default(name)]

    @model_serializer(mode="wrap")
    def _dump(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        tree: dict[str, Any] = handler(self)
        said = self.later_fields()
        return {name: value for name, value in tree.items() if name not in LATER_FIELDS or name in said}

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if "head_dim" not in self.model_fields_set and self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}: change one, or give "
                "head_dim"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}: each key and "
                "value head serves the same number of query heads"
            )
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise ValueError(
                f"rotary_dim {self.rotary_dim} must be even and at most the head dimension {self.head_dim}"
            )
        if self.num_layers % len(self.layer_pattern):
            raise ValueError(
                f"layer_pattern names {len(self.layer_pattern)} layers and num_layers {self.num_layers} is not a "
                "multiple of it: give the pattern as many entries as repeat evenly, or one a layer"
            )
        if self.rotary_scaling is not None and all(kind.rotary != "scaled" for kind in self.layer_pattern):
            raise ValueError(
                "rotary_scaling is given and no layer of layer_pattern has 'rotary: scaled': leave it out, or name the "
                "layers"
            )
        if self.residual == "parallel" and self.norm_placement == "after":
            raise ValueError("residual 'parallel' needs norm_placement 'before': both branches read the layer's input")
        if self.attention_multiplier is not None and self.attention_scale != "inverse_sqrt_head_dim":
            raise ValueError(
                f"attention_multiplier {self.attention_multiplier:g} takes the place of attention_scale: leave that at "
                "inverse_sqrt_head_dim"
            )
        if (self.mup is None) == (self.initialization is None):
            raise ValueError("give exactly one of 'mup' and 'initialization'")
        if self.mup is not None and (self.embedding_scale is not None or self.logits_scale is not None):
            raise ValueError("'embedding_scale' and 'logits_scale' follow from 'mup': leave them out")
        if self.experts is not None:
            self._check_experts(self.experts)
        return self

    def _check_experts(self, experts: ExpertsConfig) -> None:
        if experts.dense_layers >= self.num_layers:
            raise ValueError(
                f"experts.dense_layers {experts.dense_layers} leaves none of num_layers {self.num_layers} with "
                "experts: lower it, or leave experts out"
            )
        if self.mup is not None:
            raise ValueError(
                "mup has no rule for a router and for experts of which each sees a part of the tokens: give "
                "'initialization' in place of 'mup', or leave experts out"
            )
        for key, value, needed in (
            ("feed_forward", self.feed_forward, "swiglu"),
            ("linear_bias", self.linear_bias, False),
        ):
            if value != needed:
                raise ValueError(f"experts need {key} {str(needed).lower()}, and it is {str(value).lower()}")


def in_words(config: ModelConfig) -> str:
    """What a reader compares two models by, on one line."""
    heads = f"{config.num_heads} heads"
    if config.num_kv_heads != config.num_heads:
        heads += f" over {config.num_kv_heads} of keys and values"
    parts = [f"{config.num_layers} layers", f"width {config.hidden_size}", heads]
    parts += [] if config.qk_norm == "none" else [f"norms of q and k ({config.qk_norm.replace('_', ' ')})"]
    norm = config.norm + (" of 1 + weight" if config.norm_weight_offset else "")
    parts.append(norm if config.norm_placement == "before" else f"{norm} after each branch")
    parts += ["parallel residual"] if config.residual == "parallel" else []
    parts += _feed_forward_in_words(config)
    rotary = f"rotary {config.rotary_dim} of {config.head_dim}"
    if config.rotary_scaling is not None:
        rotary += f", {config.rotary_scaling.kind} x {config.rotary_scaling.factor:g}"
    parts.append(rotary)
    kinds = config.layer_pattern
    for window in sorted({kind.window for kind in kinds if kind.window is not None}):
        parts.append(f"window {window} on {_share([kind.window == window for kind in kinds])}")
    for rotary in ("unscaled", "none") if len(kinds) > 1 or kinds[0].rotary != "scaled" else ():
        if any(kind.rotary == rotary for kind in kinds):
            named = "no rotary positions" if rotary == "none" else "unscaled rotary positions"
            parts.append(f"{named} on {_share([kind.rotary == rotary for kind in kinds])}")
    if config.attention_multiplier is not None:
        parts.append(f"attention x {config.attention_multiplier:g}")
    parts += [] if config.residual_multiplier == 1.0 else [f"branches x {config.residual_multiplier:g}"]
    parts += [] if config.logits_softcap is None else [f"logits capped at {config.logits_softcap:g}"]
    return ", ".join([*parts, f"vocabulary {config.vocab_size}"])


def _feed_forward_in_words(config: ModelConfig) -> list[str]:
    dense = f"{'SwiGLU' if config.feed_forward == 'swiglu' else 'GELU'} {config.intermediate_size}"
    if (experts := config.experts) is None:
        return [dense]
    shared = f" and {experts.shared} shared" if experts.shared else ""
    found = [f"{experts.top_k} of {experts.count} experts{shared} of SwiGLU {experts.intermediate_size}"]
    return found + ([f"{dense} on the first {experts.dense_layers} layers"] if experts.dense_layers else [])


def _share(chosen: list[bool]) -> str:
    return "all layers" if all(chosen) else f"{sum(chosen)} of {len(chosen)} layers"


LATER_FIELDS = tuple(ModelConfig.model_fields)[tuple(ModelConfig.model_fields).index("mup") + 1 :]
