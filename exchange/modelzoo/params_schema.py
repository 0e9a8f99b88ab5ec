"""The params files of the Cerebras Model Zoo, release 1.9, as types: every key, what this decoder supports of it, and
which keys a recipe has no use for.

`params_import.py` reads such a file into a recipe and `params_export.py` writes one. Keys are dotted in messages:
`optimizer.adjust_learning_rate.decoder_kernel`.
"""

from __future__ import annotations

from typing import Any, Literal

from weftrain.core.formats.strict_model import Count, NonNegative, Positive, PositiveInt, Scalar, StrictModel

DTYPE_OF_PRECISION = {"bfloat16": True, "float32": False}  # model.mixed_precision and model.use_bfloat16 alike
# model.nonlinearity, which release 1.9 takes in any case, and model.feed_forward; its gelu is the exact one
FEED_FORWARD: dict[str, Literal["swiglu", "gelu"]] = {"swiglu": "swiglu", "gelu": "gelu"}
# Of ModelConfig.later_fields(), what the form can say: num_kv_heads where it is 1 or num_heads.
SAID_FIELDS = ("num_kv_heads", "qkv_bias", "feed_forward")
TRUNCATED_AT = 2.0  # standard deviations, of core.config.Initialization's truncated_normal


class Initializer(StrictModel):
    name: str
    mean: float
    std: Positive
    a: float | None = None
    b: float | None = None


class AttentionParams(StrictModel):
    """`model.extra_attention_params`."""

    num_kv_groups: PositiveInt = 1


class ModelSection(StrictModel):
    """`model`; keys without a default are required."""

    hidden_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_heads: PositiveInt
    filter_size: PositiveInt
    max_position_embeddings: PositiveInt
    vocab_size: PositiveInt
    rotary_dim: PositiveInt
    layer_norm_epsilon: Positive
    share_embedding_weights: bool
    use_ffn_bias: bool
    use_ffn_bias_in_attention: bool
    use_projection_bias_in_attention: bool
    embedding_initializer: Initializer
    initializer: Initializer
    output_layer_initializer: Initializer
    embeddings_scale: Positive = 1.0
    output_logits_scale: Positive = 1.0
    scale_qk_dot_by_d: bool = False
    weight_initialization_seed: Count | None = None
    mixed_precision: bool
    use_bfloat16: bool
    loss_scaling: str
    loss_weight: Positive
    position_embedding_type: str
    use_position_embedding: bool = True
    nonlinearity: str
    attention_type: str
    attention_module: str = "aiayn_attention"
    extra_attention_params: AttentionParams | None = None
    attention_softmax_fp32: bool = True
    attention_dropout_rate: float
    dropout_rate: float
    use_bias_in_output: bool
    boundary_casting: bool = False
    scale_glu_initialization: bool = True
    attention_kernel: str | None = None


class Schedule(StrictModel):
    """An item of `optimizer.learning_rate`."""

    scheduler: str
    initial_learning_rate: NonNegative | None = None
    end_learning_rate: NonNegative | None = None
    learning_rate: NonNegative | None = None
    base_lr: NonNegative | None = None
    steps: PositiveInt | None = None
    decay_steps: PositiveInt | None = None


class AdjustLearningRate(StrictModel):
    decoder_kernel: Positive


class OptimizerSection(StrictModel):
    optimizer_type: str
    beta1: float
    beta2: float
    eps: Positive
    weight_decay_rate: NonNegative
    correct_bias: bool
    learning_rate: list[Schedule]
    max_gradient_norm: NonNegative | None = None
    adjust_learning_rate: AdjustLearningRate | None = None
    amsgrad: bool = False
    loss_scaling_factor: float | str = 1.0
    log_summaries: bool | None = None


class Component(StrictModel):
    """An item of `train_input.mixture`."""

    data_dir: str
    weight: Positive
    data_subset: str | None = None


class InputSection(StrictModel):
    """`train_input` and `eval_input`."""

    batch_size: PositiveInt
    data_processor: str
    data_dir: str | list[str] | None = None
    mixture: list[Component] | None = None
    vocab_size: PositiveInt | None = None
    shuffle: bool = False
    shuffle_seed: Count | None = None
    repeat: bool = True
    micro_batch_size: PositiveInt | None = None
    num_workers: int | None = None
    persistent_workers: bool | None = None
    prefetch_factor: int | None = None
    use_worker_cache: bool | None = None


class RunSection(StrictModel):
    """`runconfig`: keys that are translated or checked, then, from compile_dir on, keys that only a cluster uses."""

    max_steps: PositiveInt
    checkpoint_steps: Count
    eval_steps: Count = 0
    log_steps: PositiveInt
    seed: Count | None = None
    num_csx: PositiveInt = 1
    is_pretrained_checkpoint: bool = False
    checkpoint_path: str | None = None
    mode: str = "train"
    num_epochs: int | None = None
    num_steps: int | None = None
    compile_dir: Scalar | None = None
    compile_only: Scalar | None = None
    credentials_path: Scalar | None = None
    debug_args_path: Scalar | None = None
    disable_version_check: Scalar | None = None
    dist_addr: Scalar | None = None
    dist_backend: Scalar | None = None
    enable_distributed: Scalar | None = None
    experimental_api: Scalar | None = None
    init_method: Scalar | None = None
    job_labels: list[Scalar] | None = None
    job_time_sec: Scalar | None = None
    logging: Scalar | None = None
    mgmt_address: Scalar | None = None
    mgmt_namespace: Scalar | None = None
    model_dir: Scalar | None = None
    mount_dirs: list[Scalar] | None = None
    num_act_servers: Scalar | None = None
    num_wgt_servers: Scalar | None = None
    num_workers_per_csx: Scalar | None = None
    precision_opt_level: Scalar | None = None
    python_paths: list[Scalar] | None = None
    save_initial_checkpoint: Scalar | None = None
    save_losses: Scalar | None = None
    service_dir: Scalar | None = None
    target_device: Scalar | None = None
    use_appliance_data: Scalar | None = None
    use_cs_grad_accum: Scalar | None = None
    validate_only: Scalar | None = None
    wrk_memory_gi: Scalar | None = None


class ClusterSection(StrictModel):
    save_iter_state_path: Scalar | None = None


class ParamsFile(StrictModel):
    model: ModelSection
    optimizer: OptimizerSection
    runconfig: RunSection
    train_input: InputSection
    eval_input: InputSection | None = None
    cerebras: ClusterSection | None = None


# Keys of which this decoder supports one value only, with the reason that ends the error message.
SUPPORTED_VALUES: dict[str, tuple[Any, str]] = {
    "model.position_embedding_type": ("rotary", "rotates, and learns no positions"),
    "model.use_position_embedding": (True, "rotates"),
    "model.attention_type": ("scaled_dot_product", "scales by scale_qk_dot_by_d"),
    "model.attention_softmax_fp32": (True, "takes the softmax in fp32"),
    "model.attention_dropout_rate": (0.0, "has no dropout"),
    "model.dropout_rate": (0.0, "has no dropout"),
    "model.use_bias_in_output": (False, "has no bias on the head"),
    "model.boundary_casting": (False, "casts nothing between layers"),
    "model.scale_glu_initialization": (True, "was only ever compared with files that set it"),
    "optimizer.optimizer_type": ("AdamW", "trains with AdamW"),
    "optimizer.correct_bias": (True, "corrects the bias of both moments"),
    "optimizer.amsgrad": (False, "keeps no maximum of the second moment"),
    "optimizer.loss_scaling_factor": (1.0, "scales no loss: bfloat16 needs none"),
    "train_input.repeat": (True, "repeats each source"),
    "runconfig.mode": ("train", "trains, this is a recipe"),
    "runconfig.num_epochs": (None, "counts steps (max_steps)"),
    "runconfig.num_steps": (None, "counts max_steps"),
}
# Keys that a recipe does not hold, with the reason for the note; '' where they only concern the vendor's cluster.
UNUSED_KEYS: dict[str, str] = {
    "model.attention_kernel": "which kernel computes attention is `kernels` in a recipe",
    "optimizer.log_summaries": "what is logged is weftrain's own choice",
    "train_input.data_processor": "weftrain reads its own prepared datasets: see `weftrain prep`",
    "train_input.shuffle": "the order is weftrain's own, from data.shuffle_seed",
    "train_input.num_workers": "",
    "train_input.persistent_workers": "",
    "train_input.prefetch_factor": "",
    "train_input.use_worker_cache": "",
    "eval_input": "held-out sets belong to the prepared datasets; log.evaluate_rows says how much of each is read",
    "cerebras.save_iter_state_path": "",
    "runconfig.checkpoint_path": "start_from names the run",
} | {
    f"runconfig.{name}": ""
    for name in list(RunSection.model_fields)[list(RunSection.model_fields).index("compile_dir") :]
}
