"""`weftrain show`: a resolved recipe with its arithmetic, without hardware, allocation or torch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

import click
from rich.table import Table

from weftrain.cli import arguments
from weftrain.cli.display import Console, as_called
from weftrain.cli.resolve import backend_options, resolve_recipe
from weftrain.core.config import Recipe
from weftrain.core.evaluations_section import EvaluationConfig
from weftrain.core.flops import formula, training_flops
from weftrain.core.formats.strict_yaml import dump_yaml
from weftrain.core.formats.units import gb, gib
from weftrain.core.model_config import in_words
from weftrain.core.mup import resolve_scales
from weftrain.core.optim import group_learning_rates, parameter_groups
from weftrain.core.order.data_section import SkipRule
from weftrain.core.order.mixture import make_mixture, source_shares
from weftrain.core.order.timeline import timeline
from weftrain.core.parameters import Role, active_parameter_count
from weftrain.core.prediction import Predictor
from weftrain.core.recipe_file import RecipeFile, builtin_recipes, load_recipe
from weftrain.core.run.retention_rule import DiskNeed, disk_need


@click.command()
@click.argument("recipe", required=False, shell_complete=arguments.complete_recipes)
@arguments.overrides
@click.option(
    "--step",
    "steps",
    type=click.IntRange(min=0),
    multiple=True,
    help="Learning rates and samples read at this 0-based step (repeatable).",
)
@click.option(
    "--backend", help="Also show what a step of this backend does (streaming: its schedule, with every byte)."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON (docs/json-output.md) instead of tables.")
def show(
    recipe: str | None, overrides: tuple[str, ...], steps: tuple[int, ...], backend: str | None, as_json: bool
) -> None:
    """Print a resolved recipe with its arithmetic: parameters, tokens, steps, learning rates, bytes.

    RECIPE is a built-in name or the path of a .yaml file; without it, the built-in recipes are listed.
    """
    console = Console()
    if recipe is None:
        if as_json:
            names = {name: load_recipe(name).recipe.description for name in builtin_recipes()}
            click.echo(json.dumps({"schema_version": 1, "recipes": names}, indent=1))
            return
        table = Table("recipe", "what it is", box=None)
        for name in builtin_recipes():
            table.add_row(name, load_recipe(name).recipe.description)
        console.print(table)
        return
    if "://" in recipe:
        raise click.BadParameter(
            f"'{recipe}' is an address: copy the run's recipe.yaml here and name that, or see `weftrain report`",
            param_hint="RECIPE",
        )
    file = resolve_recipe(recipe, overrides, backend)
    resolved_recipe = file.recipe
    beyond = [
        step for step in steps if step >= sum(segment.steps for segment in resolved_recipe.schedule.learning_rate)
    ]
    if beyond:
        raise click.BadParameter(f"step {beyond[0]} lies beyond the learning-rate schedule", param_hint="--step")
    if as_json:
        click.echo(json.dumps(_as_json(resolved_recipe, steps), indent=1))
        return
    outline = _outline(file) if backend is not None else ()
    console.print(dump_yaml(resolved_recipe.model_dump(mode="json")))
    for line in arithmetic(resolved_recipe):
        console.print(line)
    console.print(_parameter_table(resolved_recipe))
    console.print(_learning_rate_table(resolved_recipe, steps))
    if (counts := _samples_table(resolved_recipe, steps)) is not None:
        console.print(counts)
    for line in outline:
        console.print(as_called(line))


def _outline(file: RecipeFile) -> Sequence[str]:
    """What the recipe's backend says of a step. Raises BackendError, RecipeError."""
    chosen, options = backend_options(file)
    return chosen.outline(file.recipe, options) if isinstance(chosen, Predictor) else ()


def _counts(recipe: Recipe) -> tuple[int, int, int]:
    """Parameters; those that are trained; and those with an fp32 weight on the device, beside a bf16 copy if any."""
    specs, narrow = recipe.parameters, recipe.precision.compute == "bfloat16"
    trained = sum(spec.size for spec in specs if spec.trained)
    return sum(spec.size for spec in specs), trained, trained if narrow else sum(spec.size for spec in specs)


def _optimizer_bytes(recipe: Recipe) -> dict[str, int]:
    """Bytes of optimizer state, by the optimizer."""
    found: dict[str, int] = {}
    for spec in recipe.parameters:
        if spec.trained:
            found[spec.optimizer] = found.get(spec.optimizer, 0) + 4 * (len(spec.planes) - 1) * spec.size
    return found


def _optimizer_state(recipe: Recipe) -> str:
    of = _optimizer_bytes(recipe)
    muon = [f"Muon's momentum 4 B = {_bytes(of['muon'])}"] if "muon" in of else []
    return "; ".join([f"AdamW moments 8 B = {_bytes(of.get('adamw', 0))}", *muon])


def arithmetic(recipe: Recipe) -> list[str]:
    """The derived quantities of a recipe, each with its calculation. The start of a run prints them too."""
    batch, data, schedule = recipe.batch, recipe.data, recipe.schedule
    parameters, trained, masters = _counts(recipe)
    tokens = recipe.tokens_per_step
    flops = training_flops(recipe).total
    scales = resolve_scales(recipe.model)
    copies = f"; bf16 copies 2 B = {_bytes(2 * parameters)}" if recipe.precision.compute == "bfloat16" else ""
    active = active_parameter_count(recipe.model)
    of_these = f", of which a token is computed with {active:,}" if recipe.model.experts is not None else ""
    # biases of routers, which no gradient trains, are part of training too
    if any(not spec.trained and spec.role is not Role.ROUTER_BIAS for spec in recipe.parameters):
        of_these += f", of which {trained:,} are trained"
    total = recipe.total_tokens
    of_all = f"{tokens:,} x {schedule.steps:,} steps = {total:,} tokens"
    if recipe.changes:
        of_all = f"{total:,} in {schedule.steps:,} steps, which change {len(recipe.changes)} times"
    lines = [
        f"model        {in_words(recipe.model)}",
        f"parameters   {parameters:,}{of_these}",
        f"batch        {batch.micro_batch_size} x {batch.replicas} x {batch.accumulation_steps} = "
        f"{batch.global_batch_size} sequences "
        f"x {data.sequence_length} = {tokens:,} tokens a step   (micro-batch x replicas x accumulation)",
        f"tokens       {of_all}",
        *(_stage(*stage) for stage in recipe.stages() if recipe.changes),
        f"model FLOPs  {flops:,} a token = {formula(recipe)}; {flops * total:.3e} in all",
        f"memory       weights 4 B x {masters:,} = {_bytes(4 * masters)}; gradients 4 B = "
        f"{_bytes(4 * trained)}; "
        f"{_optimizer_state(recipe)}{copies}; activations not counted",
    ]
    if recipe.model.mup is not None:
        base = recipe.model.mup.base_hidden_size
        lines.append(
            f"muP          width {recipe.model.hidden_size} / {base} = {recipe.model.hidden_size / base:g}: std "
            "embedding "
            f"{scales.embedding_std:.6g}, matrices {scales.matrix_std:.6g}, output projections "
            f"{scales.output_matrix_std:.6g}; "
            f"logits x {scales.logits_scale:.6g}, embedding x {scales.embedding_scale:.6g}, matrix learning rate x "
            f"{scales.matrix_learning_rate_multiplier:.6g}"
        )
    if data.chunks is not None:
        lines.append(
            f"chunks       {data.chunks:,} x {schedule.steps // data.chunks:,} steps = {schedule.steps:,} steps"
        )
    lines.append(f"checkpoints  {_disk(disk_need(recipe))}")
    lines += [f"evaluation   {_evaluation(one)}" for one in recipe.evaluations]
    lines += [f"skip         {_skipped(entry)}: {entry.reason}" for entry in data.skip]
    if data.sources and data.sources[0].epochs is not None:
        lines += [
            f"source       {source.name:<14} {source.epochs:g} epochs of its prepared rows" for source in data.sources
        ]
    elif len(data.sources) > 1:
        shares = source_shares(data.sources)
        for source, share in zip(data.sources, shares, strict=True):
            part = float(share / sum(shares))
            lines.append(f"source       {source.name:<14} {part:8.4%} = {part * total / 1e9:,.2f} B tokens")
    return lines


def _evaluation(one: EvaluationConfig) -> str:
    """What is measured besides the recipe's own held-out sets, how often, and by which process."""
    what = f"the {one.preset} preset" if one.preset is not None else ", ".join((*one.tasks, *one.datasets))
    limit = "" if one.limit is None else f", {one.limit:,} of each"
    where = "" if one.where == "train" else ", by a process on the side (`weftrain eval RUN --watch`)"
    return f"{one.name}: {what}{limit}, every {one.every_steps:,} steps{where}"


def _stage(first: int, stop: int, recipe: Recipe) -> str:
    """A part of a run between two changes of its recipe."""
    batch, length = recipe.batch.global_batch_size, recipe.data.sequence_length
    shares = [f"{source.name} {source.weight:g}" for source in recipe.data.sources if source.weight is not None]
    mixture = f"; {', '.join(shares)}" if len(shares) > 1 else ""
    return f"steps        {first:,}..{stop - 1:,}: {batch:,} sequences x {length:,} tokens{mixture}"


def _disk(need: DiskNeed) -> str:
    if not need.checkpoints:
        return "none"
    archives = f", and weights of {need.archives:,} more" if need.archives else ""
    return f"{need.checkpoints:,} of at most {gb(need.each_bytes)}{archives} = {gb(need.total_bytes)} of disk"


def _as_json(recipe: Recipe, steps: Sequence[int]) -> dict[str, object]:
    groups = parameter_groups(recipe.model, recipe.optimizer, recipe.tuning)
    (parameters, trained, masters), tokens = _counts(recipe), recipe.tokens_per_step
    return {
        "schema_version": 1,
        "recipe": recipe.model_dump(mode="json"),
        "parameters": parameters,
        "tokens_per_step": tokens,
        "tokens": recipe.total_tokens,
        "flops_per_token": training_flops(recipe).total,
        "trained_parameters": trained,
        "weight_bytes": 4 * masters,
        "gradient_bytes": 4 * trained,
        "optimizer_bytes": sum(_optimizer_bytes(recipe).values()),
        "learning_rates": {str(step): group_learning_rates(groups, recipe.schedule, step) for step in (0, *steps)},
    }


def _skipped(entry: SkipRule) -> str:
    if entry.chunk is not None:
        return f"chunk {entry.chunk} is {'deferred' if entry.action == 'defer' else 'dropped'}"
    return f"rows {list(entry.rows or ())} of {entry.source}"


def _bytes(count: int) -> str:
    return gib(count)


def _parameter_table(recipe: Recipe) -> Table:
    groups = {group.name: group for group in parameter_groups(recipe.model, recipe.optimizer, recipe.tuning)}
    sizes: Counter[str] = Counter()
    size_of = {spec.name: spec.size for spec in recipe.parameters}
    for group in groups.values():
        sizes[group.name] = sum(size_of[name] for name in group.parameters)
    table = Table("parameter group", "tensors", "parameters", "learning rate x", "weight decay", box=None)
    for name, group in groups.items():
        row = (
            f"{len(group.parameters):,}",
            f"{sizes[name]:,}",
            f"{group.learning_rate_multiplier:g}",
            f"{group.weight_decay:g}",
        )
        table.add_row(name, *row)
    return table


def _samples_table(recipe: Recipe, asked: Sequence[int]) -> Table | None:
    """Samples of each source that are read before a step, exactly and without any dataset; None if shares are in
    epochs.
    """
    data, steps, batch = recipe.data, recipe.schedule.steps, recipe.batch.global_batch_size
    if len(data.sources) < 2 or data.sources[0].epochs is not None or data.order != "feistel":
        return None
    mixture = make_mixture(data.sources, data.shuffle_seed)
    times = timeline(data, steps, batch)
    steps = recipe.changes[0].step if recipe.changes else steps  # from there on the datasets are needed
    asked = [step for step in asked if step <= steps]
    wanted = {steps, *([] if data.chunks is None else [steps // data.chunks]), *asked}
    edges = sorted(step for step in wanted if step >= times.first_step)  # what lies before, the run's ledger tells
    table = Table("samples read before step", *(f"{step:,}" for step in edges), box=None)
    columns = [times.counts(mixture, step) for step in edges]
    cursors = {} if data.continues is None else data.continues.sources
    for index, source in enumerate(data.sources):
        read = cursors[source.name].read if source.name in cursors else 0
        table.add_row(source.name, *(f"{read + column[index]:,}" for column in columns))
    return table


def _learning_rate_table(recipe: Recipe, asked: Sequence[int]) -> Table:
    schedule = recipe.at(recipe.schedule.steps).schedule
    first, edges = 0, {0, schedule.steps - 1, *(change.step for change in recipe.changes)}
    for segment in schedule.learning_rate:
        edges.add(first)
        first += segment.steps
    groups = parameter_groups(recipe.model, recipe.optimizer, recipe.tuning)
    table = Table("learning rate at step", *(group.name for group in groups), box=None)
    for step in sorted({step for step in edges if step < schedule.steps} | set(asked)):
        rates = group_learning_rates(groups, recipe.at(step).schedule, step)
        table.add_row(f"{step:,}", *(f"{rates[group.name]:.8g}" for group in groups))
    return table
