"""`prepare_run`: the one way from a backend and a job to a run, with the checks that every backend has to pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set

from weftrain.core.backend import Backend, Feature, Fingerprint, Job, Run
from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError
from weftrain.core.formats.canonical import canonical_json
from weftrain.core.parameters import Role


def prepare_run(backend: Backend, job: Job) -> Run:
    """backend.prepare(job), if the backend supports the recipe and its run has a whole fingerprint.

    Raises BackendError naming the backend and what is missing, and whatever the backend raises; the run is closed then.
    """
    refuse_unsupported(backend.name, backend.unsupported, job.recipe)
    check_first_model(job)
    run = backend.prepare(job)
    try:
        _check_fingerprint(backend.name, run.fingerprint)
    except BaseException:
        run.close()
        raise
    return run


def check_first_model(job: Job) -> None:
    """Raises BackendError where the objective reads the model that the run began with, and the job does not have it."""
    recipe, plan = job.recipe, job.plan
    trains_on = 0 < plan.start_step < plan.last_step
    if recipe.objective.keeps_first_model and trains_on and recipe.start_from and job.first_weights is None:
        raise BackendError(
            f"objective.name is {recipe.objective.name}, which reads the model that the run began with, and a start at "
            f"step {plan.start_step} was not given its weights: Job.first_weights"
        )


def refuse_unsupported(name: str, unsupported: Set[Feature], recipe: Recipe) -> None:
    """Raises BackendError for a recipe that asks for what the backend of that name does not support."""
    batch = recipe.batch
    for feature in sorted(unsupported & set(recipe.objective.features)):
        others = "use the local, cuda or streaming backend"
        if feature in ("dpo", "forget", "hidden_states", "frozen_model"):
            raise BackendError(
                f"objective.name is {recipe.objective.name} and the {name} backend does not compute it: {others}"
            )
        asked = f"objective.{feature} is {getattr(recipe.objective, feature)}"
        raise BackendError(f"{asked} and the {name} backend does not compute it: {others}, or leave the key out")
    if "experts" in unsupported and recipe.model.experts is not None:
        raise BackendError(
            f"model.experts: the {name} backend has no mixture of experts: use local, cuda or streaming, "
            "or a model without"
        )
    if "replayable" in unsupported and recipe.precision.numerics == "replayable":
        raise BackendError(
            f"precision.numerics is replayable and the {name} backend does not add in a fixed tree: use the local or "
            "cuda backend, or numerics=fast"
        )
    if "dropout" in unsupported and recipe.tuning.lora is not None and recipe.tuning.lora.dropout:
        raise BackendError(
            f"tuning.lora.dropout is {recipe.tuning.lora.dropout} and the {name} backend has no dropout: use local or "
            "cuda, or dropout=0"
        )
    if "dropout" in unsupported and recipe.model.dropout:
        raise BackendError(
            f"model.dropout is {recipe.model.dropout} and the {name} backend has no dropout: use local or cuda, or "
            "dropout=0"
        )
    if "lora" in unsupported and recipe.tuning.lora is not None:
        raise BackendError(
            f"tuning.lora: the {name} backend has no adapters: use the local backend, or leave tuning.lora out"
        )
    freezes = any(not spec.trained and spec.role is not Role.ROUTER_BIAS for spec in recipe.parameters)
    if "freeze" in unsupported and recipe.tuning.lora is None and freezes:
        raise BackendError(
            f"tuning.freeze: the {name} backend trains every parameter: use the local backend, or leave it out"
        )
    if "muon" in unsupported and recipe.optimizer.muon is not None:
        raise BackendError(
            f"optimizer.name is muon and the {name} backend updates every parameter by AdamW: use the local or cuda "
            "backend, or optimizer.name=adamw"
        )
    if "replicas" in unsupported and batch.replicas != 1:
        raise BackendError(
            f"batch.replicas is {batch.replicas} and the {name} backend is one process: set batch.replicas=1 (the same "
            f"batch in {batch.global_batch_size // batch.micro_batch_size} accumulation steps)"
        )


def _check_fingerprint(name: str, ask: Callable[[], object]) -> None:
    whose = f"the {name} backend: Run.fingerprint()"
    try:
        found = ask()
    except (TypeError, ValueError) as error:  # Fingerprint itself refuses what it is given
        raise BackendError(f"{whose} failed: {error}") from error
    if not isinstance(found, Fingerprint):
        keys = found.keys() if isinstance(found, Mapping) else ()
        missing = [key for key in ("backend", "device_type", "device") if key not in keys]
        lacks = f" without {', '.join(missing)}" if missing else ""
        raise BackendError(
            f"{whose} gave a {type(found).__name__}{lacks}: it must return weftrain.core.backend.Fingerprint with "
            "these fields"
        )
    if found.backend != name:
        raise BackendError(
            f"{whose} names the backend '{found.backend}': it must be the name that the recipe gives, '{name}'"
        )
    try:
        canonical_json(found.as_json())
    except (TypeError, ValueError) as error:
        raise BackendError(
            f"{whose} holds what JSON cannot: {error}: give texts, numbers, lists and mappings in `more`"
        ) from None
