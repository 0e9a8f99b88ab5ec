"""Params files in and out: CrystalCoder's released ones give the shipped recipes, and nothing is dropped or guessed
without a word.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from places import SHARED

from weftrain.core.config import Recipe, StartFrom
from weftrain.core.errors import RecipeError
from weftrain.core.formats.strict_yaml import LineMap, parse
from weftrain.core.recipe_file import load_recipe
from weftrain.exchange.modelzoo.params_import import Imported, dump, export_params, import_params

RELEASED = SHARED / "data" / "crystalcoder"
PHASES = pytest.mark.parametrize("phase", [1, 2, 3])
MEANINGLESS = "it concerns the vendor's cluster or its programs"


def released(phase: int) -> Path:
    path = RELEASED / f"phase{phase}.yaml"
    if not path.exists():
        pytest.skip("the released params files are not beside this checkout")
    return path


def shipped(phase: int) -> Recipe:
    return load_recipe(f"crystalcoder_7b_phase{phase}").recipe


def import_phase(phase: int, *overrides: str) -> Imported:
    ours = shipped(phase)
    return import_params(
        released(phase),
        name=ours.name,
        description=ours.description,
        micro_batch_size=66,
        start_from=None if phase == 1 else f"crystalcoder_7b_phase{phase - 1}",
        overrides=overrides,
    )


def leaves(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything that is no mapping or list."""
    if not isinstance(tree, dict | list | tuple):
        yield key, tree
        return
    for name, item in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield from leaves(item, f"{key}.{name}" if key else str(name))


def differing(one: Any, other: Any) -> set[str]:
    """Keys that one side lacks or has another value for; list positions are written '*'."""
    left, right = dict(leaves(one)), dict(leaves(other))
    absent = object()
    keys = {key for key in left.keys() | right.keys() if left.get(key, absent) != right.get(key, absent)}
    return {".".join("*" if part.isdigit() else part for part in key.split(".")) for key in keys}


def written(folder: Path, params: dict[str, Any] | str) -> Path:
    path = folder / "params.yaml"
    path.write_text(params if isinstance(params, str) else dump(params))
    return path


@PHASES
def test_a_released_file_is_the_shipped_recipe_but_for_what_it_cannot_know(phase: int) -> None:
    """Exactly these fields differ; names and folders are weftrain's, FIM rates stand nowhere in the file, phase 3 has
    no num_csx.
    """
    imported = import_phase(phase)
    fim = {"data.sources.*.fim.rate", "data.sources.*.fim.spm_share", "data.sources.*.fim.mode", "data.sources.*.fim"}
    unknown = {"data.sources.*.name", "data.sources.*.path"} | (fim if phase > 1 else set())
    unknown |= {"batch.replicas"} if phase == 3 else set()
    assert differing(imported.recipe.model_dump(), shipped(phase).model_dump()) == unknown


@PHASES
def test_with_what_it_cannot_know_it_is_the_shipped_recipe(phase: int) -> None:
    ours = shipped(phase)
    overrides = ["batch.replicas=16"] if phase == 3 else []
    for index, source in enumerate(ours.data.sources):
        overrides += [f"data.sources.{index}.name={source.name}", f"data.sources.{index}.path={source.path}"]
        if source.fim is not None:
            overrides.append(f"data.sources.{index}.fim={{rate: {source.fim.rate}, spm_share: {source.fim.spm_share}}}")
    imported = import_phase(phase, *overrides)
    assert imported.recipe == ours
    assert Recipe.model_validate(imported.tree) == ours


@PHASES
def test_what_a_released_file_says_beyond_a_recipe_is_named(phase: int) -> None:
    """Every key of the file is in the recipe, has the one value that can be, or is in a note."""
    notes = import_phase(phase).notes
    run = yaml.safe_load(released(phase).read_text())["runconfig"]
    used = {"max_steps", "checkpoint_steps", "eval_steps", "log_steps", "seed", "num_csx", "is_pretrained_checkpoint"}
    used |= {"mode", "num_epochs", "num_steps"}  # checked
    for key in run:
        assert any(note.startswith(f"runconfig.{key} (") for note in notes) != (key in used), key
    expected = [f"runconfig.mgmt_namespace ('rel-191-g42'): not in a recipe: {MEANINGLESS}"]
    expected += ["optimizer.log_summaries (True): not in a recipe: what is logged is weftrain's own choice"]
    assert set(expected) <= set(notes)
    guesses = [note for note in notes if "not in a recipe" not in note]
    folders = {1: 0, 2: 1, 3: 5}[phase]  # whose path says fim
    assert len(guesses) == folders + (phase == 3)
    assert ("runconfig.num_csx is not there: batch.replicas is 1" in guesses) == (phase == 3)


@PHASES
def test_an_exported_recipe_is_the_released_file_but_for_these_keys(phase: int) -> None:
    """Model, optimizer, weights, subsets and batch are equal to the last bit; every key that differs stands here."""
    theirs, ours = yaml.safe_load(released(phase).read_text()), export_params(shipped(phase))
    differences = differing(ours, theirs)
    assert {key for key in differences if key.startswith("train_input.")} == {
        "train_input.mixture.*.data_dir",  # folders are weftrain's
        *(f"train_input.{key}" for key in ("num_workers", "persistent_workers", "prefetch_factor", "use_worker_cache")),
    }
    redundant = {"optimizer.learning_rate.*.base_lr", "optimizer.learning_rate.*.learning_rate"}
    defaults = {
        "optimizer.loss_scaling_factor",
        "optimizer.learning_rate.*.steps",
        "optimizer.learning_rate.*.decay_steps",
    }
    softmax = {"model.attention_softmax_fp32"}  # its default, which phase 3 leaves out
    assert {key for key in differences if key.startswith(("model.", "optimizer."))} == (
        {"model.attention_kernel", "optimizer.log_summaries"} | (defaults | softmax if phase == 3 else redundant)
    )
    ours_only = {"runconfig.mode", "runconfig.num_csx"} if phase == 3 else set()
    for key in (key for key in differences if key.startswith("runconfig.")):
        assert (key.split(".")[1] in ours["runconfig"]) == (key in ours_only)
    assert {key.split(".")[0] for key in differences} <= {
        "model",
        "optimizer",
        "train_input",
        "runconfig",
        "eval_input",
        "cerebras",
    }


# Round trip: a recipe that the form can hold, through a file and back.

RATES = st.floats(0, 1, allow_nan=False, width=32)
POSITIVE = st.floats(1e-12, 1e3, allow_nan=False)
FEW_DIGITS = st.integers(1, 10**6).map(lambda number: number / 1000)  # as a person writes it; see params._shortest


@st.composite
def models(draw: st.DrawFn) -> dict[str, Any]:
    heads, pairs = draw(st.integers(1, 8)), draw(st.integers(1, 32))
    hidden = heads * 2 * pairs
    model: dict[str, Any] = {
        name: draw(st.integers(1, 5000)) for name in ("vocab_size", "num_layers", "intermediate_size")
    }
    model |= {"hidden_size": hidden, "num_heads": heads, "max_position_embeddings": draw(st.integers(1, 5000))}
    model |= {
        "norm": "layer_norm",
        "norm_eps": draw(POSITIVE),
        "linear_bias": draw(st.booleans()),
        "rope_theta": 10000.0,
    }
    model |= {
        "rotary_dim": 2 * draw(st.integers(1, pairs)),
        "rotary_interleaved": True,
        "tie_embeddings": draw(st.booleans()),
    }
    model["attention_scale"] = draw(st.sampled_from(["inverse_sqrt_head_dim", "inverse_head_dim"]))
    distribution = draw(st.sampled_from(["normal", "truncated_normal"]))
    if draw(st.booleans()):
        model["mup"] = {
            "base_hidden_size": draw(st.integers(1, 2 * hidden)),
            "distribution": distribution,
            "base_std": draw(POSITIVE),
        }
        model["mup"] |= {"embedding_scale": draw(POSITIVE), "base_logits_scale": draw(FEW_DIGITS)}
        return model
    stds = {name: draw(POSITIVE) for name in ("embedding_std", "matrix_std", "output_matrix_std")}
    model["initialization"] = {"distribution": distribution, **stds}
    for name in ("embedding_scale", "logits_scale"):
        if draw(st.booleans()):
            model[name] = draw(POSITIVE.filter(lambda scale: scale != 1))
    return model


@st.composite
def schedules(draw: st.DrawFn) -> dict[str, Any]:
    segments = []
    for shape in draw(st.lists(st.sampled_from(["linear", "cosine", "constant"]), min_size=1, max_size=4)):
        segment = {"shape": shape, "steps": draw(st.integers(1, 10**6)), "start": draw(RATES)}
        segments.append(segment if shape == "constant" else segment | {"end": draw(RATES)})
    return {"steps": draw(st.integers(1, sum(segment["steps"] for segment in segments))), "learning_rate": segments}


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    model = draw(models())
    optimizer = {
        "name": "adamw",
        "beta1": draw(st.floats(0, 0.999)),
        "beta2": draw(st.floats(0, 0.9999)),
        "eps": draw(POSITIVE),
    }
    optimizer |= {"eps_placement": "before_bias_correction", "decay": "matrices_and_embeddings"}
    optimizer |= {"weight_decay": draw(RATES), "clip_norm": draw(st.none() | POSITIVE)}
    sources = []
    for index in range(draw(st.integers(1, 3))):
        source: dict[str, Any] = {"name": f"source{index}", "path": f"folder/source{index}", "weight": draw(POSITIVE)}
        bounds = sorted(draw(st.lists(st.floats(0, 1), min_size=2, max_size=2, unique=True)))
        sources.append(source | {"subset": bounds} if draw(st.booleans()) else source)
    total = sum(source["weight"] for source in sources)
    for source in sources:
        source["weight"] = max(source["weight"] / total, 1e-12)
    normalizer = draw(st.sampled_from(["all_positions", "bearing_tokens"]))
    length = (
        model["max_position_embeddings"]
        if normalizer == "bearing_tokens"
        else draw(st.integers(1, model["max_position_embeddings"]))
    )
    micro, replicas = draw(st.integers(1, 50)), draw(st.integers(1, 20))
    return Recipe.model_validate(
        {
            "name": "round_trip",
            "description": "",
            "seed": draw(st.integers(0, 2**31)),
            "start_from": draw(
                st.sampled_from([None, {"run": "before", "state": "weights"}, {"run": "before", "state": "all"}])
            ),
            "model": model,
            "objective": {"normalizer": normalizer},
            "optimizer": optimizer,
            "schedule": draw(schedules()),
            "precision": {"compute": draw(st.sampled_from(["float32", "bfloat16"]))},
            "data": {
                "root": "/data",
                "sequence_length": length,
                "shuffle_seed": draw(st.integers(0, 99)),
                "sources": sources,
            },
            "batch": {
                "global_batch_size": micro * replicas * draw(st.integers(1, 9)),
                "micro_batch_size": micro,
                "replicas": replicas,
            },
            "backend": {"name": "local"},
            "checkpoint": {"every_steps": draw(st.integers(0, 9999))},
            "log": {"every_steps": draw(st.integers(1, 99)), "evaluate_every_steps": draw(st.integers(0, 9999))},
        }
    )


def back(recipe: Recipe, folder: Path) -> Recipe:
    return import_params(
        written(folder, export_params(recipe)),
        name=recipe.name,
        description=recipe.description,
        micro_batch_size=recipe.batch.micro_batch_size,
        start_from=None if recipe.start_from is None else recipe.start_from.run,
        data_root=recipe.data.root,
    ).recipe


@settings(max_examples=150, deadline=None)
@given(recipe=recipes())
def test_export_and_import_give_the_recipe_back(recipe: Recipe) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert back(recipe, Path(folder)) == recipe


def test_what_export_leaves_out(tmp_path: Path) -> None:
    """These fields come back as defaults or derived; the form has no keys for them."""
    recipe = load_recipe(
        "crystalcoder_7b_phase3",
        [
            "kernels.preferences=[reference]",
            "kernels.pins={adamw: reference}",
            "checkpoint.at_end=false",
            "log.evaluate_rows=7",
            "log.tensorboard=false",
            "data.sources.0.name=styles",
        ],
        backend="streaming",
    ).recipe
    assert differing(recipe.model_dump(), back(recipe, tmp_path).model_dump()) == {
        "kernels.preferences.*",
        "kernels.pins.adamw",
        "backend.name",
        "checkpoint.at_end",
        "log.evaluate_rows",
        "log.tensorboard",
        "data.sources.*.name",
        "data.sources.*.fim",
        "data.sources.*.fim.rate",
        "data.sources.*.fim.spm_share",
        "data.sources.*.fim.mode",
    }


@given(values=st.lists(st.floats(allow_nan=False, allow_infinity=False)))
def test_floats_survive_the_text(values: list[float]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = written(Path(folder), {"values": values})
        assert yaml.safe_load(path.read_text())["values"] == values
        assert load_values(path) == values


def test_the_text_is_plain() -> None:
    text = dump(base())
    assert "  eps: 1.0e-09\n" in text
    assert not any(mark in text for mark in ("!", "&", "*", "{"))


def load_values(path: Path) -> list[float]:
    tree = parse(path.read_text(), LineMap("text"))
    assert all(type(value) is float for value in tree["values"])
    return list(tree["values"])


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("model.norm=rms_norm", "model.norm: layer_norm"),
        ("model.rotary_interleaved=false", "model.rotary_interleaved: true"),
        ("model.rope_theta=500000", "model.rope_theta: 10000"),
        ("optimizer.eps_placement=after_bias_correction", "optimizer.eps_placement: before_bias_correction"),
        ("optimizer.decay=all", "optimizer.decay: matrices_and_embeddings"),
        ("optimizer.non_finite=skip", "optimizer.non_finite: halt"),
        ("data.document_attention=true", r"no data\.document_attention"),
        ("data.chunks=1", r"no data\.chunks"),
    ],
)
def test_recipes_that_the_form_cannot_hold_are_refused(override: str, reason: str) -> None:
    with pytest.raises(RecipeError, match=f"recipe 'crystalcoder_7b_phase1': .*cannot say this: it needs {reason}$"):
        export_params(load_recipe("crystalcoder_7b_phase1", [override]).recipe)


def test_amber_and_synthetic_rows_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"model\.norm: layer_norm; .*optimizer\.eps_placement"):
        export_params(load_recipe("amber_7b").recipe)
    with pytest.raises(RecipeError, match=r"it needs data\.sources"):
        export_params(load_recipe("crystalcoder_7b_phase1", ["data.sources=[]", "data.synthetic_rows=4"]).recipe)


# Files that say something else than this decoder does, or say it wrongly: what is wrong, its line, what to do.


def base() -> dict[str, Any]:
    return export_params(shipped(1))


def put(params: dict[str, Any], key: str, value: Any) -> None:
    """Set (or, with ..., remove) the dotted key."""
    target: Any = params
    *parents, last = key.split(".")
    for part in parents:
        target = target[int(part)] if part.isdigit() else target.setdefault(part, {})
    index: Any = int(last) if last.isdigit() else last
    if value is ...:
        del target[index]
    else:
        target[index] = value


def test_a_file_of_ours_is_imported_and_its_numbers_are_muP(tmp_path: Path) -> None:  # noqa: N802
    imported = import_params(written(tmp_path, base()), name="again", micro_batch_size=66)
    assert imported.recipe.model == shipped(1).model
    assert imported.recipe.description == "from params.yaml, a params file of Model Zoo 1.9"
    assert imported.recipe.batch == shipped(1).batch


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("model.position_embedding_type", "learned", "position_embedding_type is 'learned'; this decoder rotates"),
        ("model.use_position_embedding", False, "use_position_embedding is False"),
        ("model.nonlinearity", "gelu", "nonlinearity is 'gelu'"),
        ("model.attention_type", "dot_product", "attention_type is 'dot_product'"),
        ("model.attention_softmax_fp32", False, "attention_softmax_fp32 is False"),
        (
            "model.attention_dropout_rate",
            0.1,
            "attention_dropout_rate is 0.1; this decoder has no dropout: only 0.0 can be imported",
        ),
        ("model.dropout_rate", 0.1, "dropout_rate is 0.1"),
        ("model.use_bias_in_output", True, "use_bias_in_output is True"),
        ("model.boundary_casting", True, "boundary_casting is True"),
        ("model.scale_glu_initialization", False, "scale_glu_initialization is False"),
        ("model.loss_scaling", "num_tokens", "loss_weight is 0.000488.*, and loss_scaling num_tokens takes none"),
        ("model.loss_scaling", "sum", "loss_scaling is 'sum'; it is batch_size or num_tokens"),
        ("model.loss_weight", 0.3, "loss_weight is 0.3; it is 1 / sequence length"),
        ("model.loss_weight", 1 / 4096, "loss_weight is 0.000244"),
        ("model.loss_weight", 1 / 2049, "loss_weight is 0.000488"),
        ("model.use_ffn_bias", False, "use_ffn_bias_in_attention and use_projection_bias_in_attention differ"),
        ("model.use_bfloat16", False, "use_bfloat16 False; weftrain computes in bfloat16"),
        ("model.weight_initialization_seed", 2, "weight_initialization_seed is 2 and runconfig.seed 1"),
        ("model.initializer.name", "uniform", "embedding_initializer.name is 'truncated_normal'; a recipe has one of"),
        ("model.initializer.mean", 0.5, "initializer.mean is 0.5"),
        (
            "model.initializer.b",
            0.05,
            r"initializer is 'truncated_normal' from a = -0.0365 to b = 0.05; truncated_normal is cut at two",
        ),
        ("model.initializer.std", 0.02, "initializer is 'truncated_normal' from"),
        ("model.rotary_dim", 256, "rotary_dim 256 must be even and at most the head dimension 128"),
        ("optimizer.optimizer_type", "SGD", "optimizer_type is 'SGD'"),
        ("optimizer.correct_bias", False, "correct_bias is False"),
        ("optimizer.amsgrad", True, "amsgrad is True"),
        ("optimizer.loss_scaling_factor", "dynamic", "loss_scaling_factor is 'dynamic'"),
        ("optimizer.beta1", 1.5, "beta1"),
        (
            "optimizer.adjust_learning_rate.decoder_kernel",
            0.125,
            "muP does not explain it: model.output_logits_scale|muP does not explain it",
        ),
        ("optimizer.adjust_learning_rate.decoder_kernel", 0.0601, "4096 x 0.0601, is no whole number"),
        (
            "optimizer.adjust_learning_rate.encoder_kernel",
            0.5,
            "unknown key 'optimizer.adjust_learning_rate.encoder_kernel'; did you mean",
        ),
        ("optimizer.learning_rate", [], "learning_rate is empty"),
        ("optimizer.learning_rate.0.scheduler", "Step", "scheduler is 'Step'; Linear, CosineDecay and Constant"),
        ("optimizer.learning_rate.0.steps", 5, "steps 5 and decay_steps 86 differ"),
        ("optimizer.learning_rate.0.base_lr", 0.5, "base_lr is 0.5, the schedule starts at 0.0"),
        (
            "optimizer.learning_rate.0.end_learning_rate",
            ...,
            "missing key 'optimizer.learning_rate.0.end_learning_rate'",
        ),
        (
            "optimizer.learning_rate.0.initial_learning_rate",
            ...,
            "missing key 'optimizer.learning_rate.0.initial_learning_rate'",
        ),
        ("train_input.repeat", False, "repeat is False"),
        ("train_input.vocab_size", 5, "train_input.vocab_size is 5, model.vocab_size 32032"),
        ("train_input.mixture.0.data_subset", "first tenth", "data_subset 'first tenth' is not START-END"),
        ("train_input.mixture.0.data_subset", "0.5-0.5", "is empty"),
        ("train_input.mixture.0.data_dir", "/", "names no folder"),
        ("train_input.mixture.0.data_dir", "a/../b", "names no folder"),
        ("train_input.mixture", ..., "missing key 'train_input.mixture'"),
        ("train_input.data_dir", "both", "both mixture and data_dir"),
        (
            "train_input.micro_batch",
            3,
            "unknown key 'train_input.micro_batch'; did you mean 'train_input.micro_batch_size'",
        ),
        ("runconfig.mode", "eval", "mode is 'eval'"),
        ("runconfig.num_epochs", 2, "num_epochs is 2"),
        ("runconfig.is_pretrained_checkpoint", True, "is_pretrained_checkpoint starts from another run: say which"),
        ("runconfig.checkpoint_path", "/some/where", "checkpoint_path starts from another run: say which"),
        ("runconfig.max_step", 5, "unknown key 'runconfig.max_step'; did you mean 'runconfig.max_steps'"),
        ("sparsity.type", "static", "unknown key 'sparsity'"),
        ("runconfig.max_steps", "many", "runconfig.max_steps: input should be a valid integer, not a string"),
        ("runconfig.max_steps", ..., r"missing key 'runconfig.max_steps' \(int\); add it"),
        ("model.layer_norm_epsilon", ..., "missing key 'model.layer_norm_epsilon'"),
        ("optimizer.correct_bias", ..., "missing key 'optimizer.correct_bias'"),
        ("model", ..., "missing key 'model'"),
    ],
)
def test_what_a_recipe_cannot_say_is_refused(tmp_path: Path, key: str, value: Any, reason: str) -> None:
    params = base()
    put(params, key, value)
    with pytest.raises(RecipeError, match=reason) as caught:
        import_params(written(tmp_path, params), name="x", micro_batch_size=66)
    assert "params.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    1e-320,
    1e308,
    10**30,
    "",
    "x",
    "1-2",
    [],
    [1],
    {},
    {"x": 1},
    float("nan"),
    float("inf"),
)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_whatever_a_value_is_the_answer_is_a_recipe_or_one_line(data: st.DataObject) -> None:
    params = base()
    keys = [key for key, _ in leaves(params)]
    keys += [
        "model.initializer",
        "optimizer.learning_rate",
        "train_input.mixture",
        "optimizer.adjust_learning_rate",
        "model",
        "runconfig",
    ]
    for key in data.draw(st.lists(st.sampled_from(keys), min_size=1, max_size=2, unique=True)):
        try:
            # `put` reaches into what it was given before
            put(params, key, copy.deepcopy(data.draw(st.sampled_from(ODD))))
        except (KeyError, IndexError, TypeError, AttributeError):
            continue  # the first change took the second's place away
    with tempfile.TemporaryDirectory() as folder:
        message = ""
        try:
            import_params(written(Path(folder), params), name="x")
        except RecipeError as error:
            message = str(error)
        assert "\n" not in message


def test_errors_name_the_line(tmp_path: Path) -> None:
    text = dump(base())
    line = 1 + text.splitlines().index("  dropout_rate: 0.0")
    path = written(tmp_path, text.replace("  dropout_rate: 0.0", "  dropout_rate: 0.2"))
    with pytest.raises(RecipeError, match=rf"params\.yaml:{line}: model\.dropout_rate is 0\.2"):
        import_params(path, name="x")
    path = written(tmp_path, text.replace("  dropout_rate: 0.0", "  dropout_rat: 0.0"))
    with pytest.raises(
        RecipeError, match=rf"params\.yaml:{line}: unknown key 'model\.dropout_rat'; did you mean 'model\.dropout_rate'"
    ):
        import_params(path, name="x")


def test_the_strict_loader_reads_it(tmp_path: Path) -> None:
    """Duplicate keys, tags, aliases, files that are none."""
    text = dump(base())
    for change, reason in (
        (lambda: text.replace("  beta1: 0.9\n", "  beta1: 0.9\n  beta1: 0.8\n"), r"duplicate key 'optimizer\.beta1'"),
        (lambda: text.replace("beta1: 0.9", "beta1: !!python/name:os.system 0.9"), "tag"),
        (lambda: text.replace("beta1: 0.9", "beta1: &a 0.9").replace("beta2: 0.95", "beta2: *a"), "alias"),
        (lambda: "- 1\n", "a params file is a mapping"),
        (lambda: "", "a params file is a mapping"),
        (lambda: "optimizer: 3\n", r"missing key 'model' \(ModelSection\); add it"),
    ):
        with pytest.raises(RecipeError, match=reason):
            import_params(written(tmp_path, change()), name="x")
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        import_params(Path("absent"), name="x")


def imported(tmp_path: Path, *changes: tuple[str, Any], **arguments: Any) -> Imported:
    params = base()
    for key, value in changes:
        put(params, key, value)
    return import_params(written(tmp_path, params), name="x", **({"micro_batch_size": 66} | arguments))


def test_numbers_that_muP_does_not_give_are_taken_as_they_stand(tmp_path: Path) -> None:  # noqa: N802
    """Without a multiplier, or with a multiplier of 1; a multiplier of 1 that muP gives stays muP."""
    for change in (("optimizer.adjust_learning_rate", ...), ("optimizer.adjust_learning_rate.decoder_kernel", 1.0)):
        model = imported(tmp_path, change).recipe.model
        assert model.mup is None
        assert model.initialization is not None
        stds = (
            model.initialization.embedding_std,
            model.initialization.matrix_std,
            model.initialization.output_matrix_std,
        )
        assert stds == (0.073, 0.01825, 0.00228125)
        assert (model.embedding_scale, model.logits_scale) == (14.6, 0.13875)


@pytest.mark.parametrize(
    ("key", "factor", "named"),
    [
        (
            "model.output_layer_initializer",
            1.001,
            "model.output_layer_initializer.std would be 0.00228125, not 0.0022835312",
        ),
        ("model.initializer", 0.5, "model.initializer.std would be 0.01825, not 0.009125"),
    ],
)
def test_a_multiplier_without_mup_is_refused(tmp_path: Path, key: str, factor: float, named: str) -> None:
    given = base()["model"][key.split(".")[1]]
    changes = [(f"{key}.{name}", given[name] * factor) for name in ("std", "a", "b")]
    with pytest.raises(
        RecipeError, match=rf"decoder_kernel is 0\.0625, and muP does not explain it: {named}; a recipe has"
    ):
        imported(tmp_path, *changes)


def test_other_ways_to_say_a_schedule(tmp_path: Path) -> None:
    def segments(*changes: tuple[str, Any]) -> tuple[Any, list[str]]:
        result = imported(tmp_path, *changes)
        notes = [note for note in result.notes if "learning_rate" in note]
        return [segment.model_dump(exclude_none=True) for segment in result.recipe.schedule.learning_rate], notes

    constant = [{"shape": "constant", "steps": 79721, "start": 0.25}]
    assert segments(("optimizer.learning_rate", 0.25)) == (constant, [])
    assert segments(("optimizer.learning_rate", {"scheduler": "constant", "learning_rate": 0.25})) == (constant, [])
    short = {"scheduler": "CosineDecay", "initial_learning_rate": 1.0, "end_learning_rate": 0.5, "decay_steps": 79720}
    assert segments(("optimizer.learning_rate", short)) == (
        [
            {"shape": "cosine", "steps": 79720, "start": 1.0, "end": 0.5},
            {"shape": "constant", "steps": 1, "start": 0.5},
        ],
        ["optimizer.learning_rate ends 1 steps before runconfig.max_steps: the last rate, 0.5, holds for them"],
    )
    step = ("optimizer.learning_rate", {"learning_rate": 0.25, "scheduler": "Step"})
    params = base()
    put(params, *step)
    line = 1 + dump(params).splitlines().index("    scheduler: Step")
    with pytest.raises(RecipeError, match=rf"params\.yaml:{line}: optimizer\.learning_rate\.0\.scheduler is 'Step'"):
        segments(step)


def test_sources(tmp_path: Path) -> None:
    folders = ["/here/a/train", "/here/b/train", "/here/c_fim_0.3/other"]
    result = imported(tmp_path, ("train_input.mixture", ...), ("train_input.data_dir", folders))
    names = [(source.name, source.path, source.weight) for source in result.recipe.data.sources]
    assert names == [("train", "train", 1 / 3), ("train#1", "train", 1 / 3), ("other", "other", 1 / 3)]
    assert any(
        "data.sources.2 (/here/c_fim_0.3/other) seems to hold fill-in-the-middle" in note for note in result.notes
    )
    assert any("equal weights" in note for note in result.notes)
    result = imported(tmp_path, ("train_input.mixture", ...), ("train_input.data_dir", folders), data_root="/here")
    assert [(source.name, source.path) for source in result.recipe.data.sources] == [
        ("train", "a/train"),
        ("b/train", "b/train"),
        ("other", "c_fim_0.3/other"),
    ]
    assert result.recipe.data.root == "/here"
    with pytest.raises(
        RecipeError, match=r"params\.yaml:\d+: data_dir '/here/a/train' does not lie below data_root '/there'"
    ):
        imported(tmp_path, ("train_input.mixture", ...), ("train_input.data_dir", folders), data_root="/there")


def test_the_micro_batch(tmp_path: Path) -> None:
    assert imported(tmp_path).recipe.batch.micro_batch_size == 66
    derived = imported(tmp_path, micro_batch_size=None)
    assert derived.recipe.batch.micro_batch_size == 132
    assert "the file has no micro-batch: batch.micro_batch_size is 2112 / 16 = 132, no accumulation" in derived.notes
    assert (
        imported(tmp_path, ("train_input.micro_batch_size", 33), micro_batch_size=None).recipe.batch.micro_batch_size
        == 33
    )
    with pytest.raises(
        RecipeError,
        match=r"train_input\.batch_size 2112 is not a multiple of runconfig\.num_csx 5: give micro_batch_size",
    ):
        imported(tmp_path, ("runconfig.num_csx", 5), micro_batch_size=None)
    with pytest.raises(RecipeError, match="global_batch_size 2112 is not a multiple"):
        imported(tmp_path, micro_batch_size=67)


@pytest.mark.parametrize(("pretrained", "state"), [(True, "weights"), (False, "all")])
def test_the_run_before(tmp_path: Path, pretrained: bool, state: str) -> None:
    result = imported(tmp_path, ("runconfig.is_pretrained_checkpoint", pretrained), start_from="before")
    assert result.recipe.start_from == StartFrom(run="before", state=state)  # type: ignore[arg-type]
    assert imported(tmp_path).recipe.start_from is None


def test_overrides_are_checked_as_a_recipe_is(tmp_path: Path) -> None:
    assert imported(tmp_path, overrides=["schedule.steps=7"]).recipe.schedule.steps == 7
    with pytest.raises(RecipeError, match=r"unknown key 'schedule\.step'; did you mean 'schedule\.steps'"):
        imported(tmp_path, overrides=["schedule.step=7"])
