"""The same model trained by PyTorch's own FSDP2 in a plain loop, for `weftrain bench train RECIPE --against`.

    weftrain bench train RECIPE --against "analysis/bench/fsdp2_loop.py RECIPE"
    weftrain bench train RECIPE --ranks 2 --against "analysis/bench/fsdp2_loop.py RECIPE --ranks 2 --no-offload"

The first is one process with CPU offload, the second two processes under torchrun. `bench train` passes nothing on:
give overrides, --steps, --warmup and --threads to both programs. On the CPU: `fully_shard` on every Block and on the
root, fused AdamW, as a user of torch would write it. Model, kernels, weights, rows and schedule are those of the local
backend; of `backend.options` only `compile` is read.

With one process nothing is gathered or reduced, and offload from CPU to CPU moves nothing. What remains of FSDP2 is its
schedule and its copies: a block's weights are copied before its forward and again before its backward, its gradients
twice after it. The fp32 state stays in memory, so the figure says nothing about a slower link or a model larger than
memory. Needs torch 2.6 or newer; written with 2.13.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, cast

import click
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from weftrain.analysis.bench.train import RESULT_PREFIX, bench_source, plain_result, plain_weights, take_steps
from weftrain.core.backend import Run, StepResult
from weftrain.core.blocks import Block
from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError, NonFiniteError, WeftrainError
from weftrain.core.initialization import initialize
from weftrain.core.model import Decoder, kernel_specs
from weftrain.core.optim import group_learning_rates, parameter_groups
from weftrain.core.order.batch import BatchSource
from weftrain.core.recipe_file import load_recipe
from weftrain.kernels import KernelError, Spec, select
from weftrain.kernels.host_memory import use_huge_pages


def refuse_what_differs(recipe: Recipe) -> None:
    """Raise BackendError for a recipe that this program would train differently from our backends."""
    placement = recipe.optimizer.eps_placement
    if placement != "after_bias_correction":
        raise BackendError(
            f"optimizer.eps_placement is {placement} and torch.optim.AdamW knows after_bias_correction alone: set that"
        )
    if recipe.optimizer.non_finite != "halt":
        raise BackendError("optimizer.non_finite is skip and this program skips no step: set optimizer.non_finite=halt")
    ranks = dist.get_world_size()
    if recipe.batch.replicas != ranks:
        raise BackendError(
            f"batch.replicas is {recipe.batch.replicas} and this program is {ranks} processes: set "
            f"batch.replicas={ranks}"
        )


def build(recipe: Recipe) -> Decoder:
    """The local backend's model in fp32 on the CPU, with `plain_weights` where they exist, else drawn from the seed."""
    compute = getattr(torch, recipe.precision.compute)
    uses = kernel_specs(recipe.model, "cpu", compute, residual_dtype=torch.float32)
    # Of no use here, but a recipe may pin them.
    attributes = {"eps_placement": recipe.optimizer.eps_placement}
    uses += [Spec(op, "optimizer", "cpu", compute, attributes) for op in ("adamw", "grad_norm")]
    selection = select(uses, recipe.kernels.preferences, recipe.kernels.pins)
    model = Decoder(recipe.model, selection, residual_dtype=torch.float32)
    weights = plain_weights(recipe.model)
    if weights is None:
        initialize(model, recipe.model, recipe.seed)
        return model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.pop(name))
    return model


def shard(model: Decoder, compute: torch.dtype, offload: bool) -> None:
    """FSDP2 over CPU processes: a group for each Block and the root, and in bf16 one for the norms, which stay fp32."""
    policies: dict[str, Any] = {"mesh": init_device_mesh("cpu", (dist.get_world_size(),))}
    if offload:
        policies["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    # Nothing is cast on its way in: the residual stream and the rotary tables are fp32, and the modules cast for
    # themselves.
    mixed = MixedPrecisionPolicy(param_dtype=compute, cast_forward_inputs=False)
    blocks = [cast(Block, block) for block in model.layers]
    if compute != torch.float32:
        for block in blocks:
            fully_shard([block.attention_norm, block.ffn_norm], **policies)
        fully_shard(model.final_norm, **policies)
    for block in blocks:
        fully_shard(block, mp_policy=mixed, **policies)
    fully_shard(model, mp_policy=mixed, **policies)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # gloo adds and does not average
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


class Fsdp2Run:
    """The part of the Run protocol that `take_steps` uses."""

    def __init__(self, recipe: Recipe, steps: int, offload: bool) -> None:
        self._recipe, self._steps = recipe, steps
        self._model = build(recipe)
        if recipe.backend.options.get("compile"):
            for block in self._model.layers:
                block.compile(dynamic=False)
        shard(self._model, getattr(torch, recipe.precision.compute), offload)
        self._groups = parameter_groups(recipe.model, recipe.optimizer, recipe.tuning)
        parameters = dict(self._model.named_parameters())
        config = recipe.optimizer
        self._adamw = torch.optim.AdamW(
            [
                {"params": [parameters[name] for name in group.parameters], "weight_decay": group.weight_decay}
                for group in self._groups
            ],
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=True,
        )

    def train(self, source: BatchSource) -> Iterator[StepResult]:
        recipe, micro = self._recipe, self._recipe.batch.micro_batch_size
        max_norm = math.inf if recipe.optimizer.clip_norm is None else recipe.optimizer.clip_norm
        for step in range(self._steps):
            shares = []
            each = recipe.batch.global_batch_size // recipe.batch.replicas
            for first in range(dist.get_rank() * each, (dist.get_rank() + 1) * each, micro):
                ids = torch.from_numpy(source.rows(step, first, micro).ids)
                loss = self._model(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), None) / recipe.tokens_per_step
                loss.backward()
                shares.append(loss.detach())
            loss = torch.stack(shares).sum()
            dist.all_reduce(loss)
            norm = cast(DTensor, torch.nn.utils.clip_grad_norm_(self._model.parameters(), max_norm)).full_tensor()
            if not torch.isfinite(loss + norm):
                raise NonFiniteError(
                    f"step {step}: loss {float(loss)}, gradient norm {float(norm)}; lower the learning rate"
                )
            rates = group_learning_rates(self._groups, recipe.schedule, step)
            for mine, group in zip(self._adamw.param_groups, self._groups, strict=True):
                mine["lr"] = rates[group.name]
            self._adamw.step()
            self._adamw.zero_grad()
            yield StepResult(step, loss, norm, rates, recipe.tokens_per_step, recipe.tokens_per_step, 0.0, 0.0)

    def stats(self) -> dict[str, float]:
        return {}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY.SUB=VALUE]...")
@click.option("--steps", type=click.IntRange(min=2), default=20, show_default=True, help="Steps, warm-up included.")
@click.option(
    "--warmup", type=click.IntRange(min=1), default=4, show_default=True, help="First steps that are not counted."
)
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True, help="CPU threads.")
@click.option(
    "--huge-pages",
    is_flag=True,
    help="Allocate as our backends do (kernels/host_memory.py), not as torch does by itself.",
)
@click.option(
    "--ranks", type=click.IntRange(min=1), default=1, show_default=True, help="Processes, started by torchrun."
)
@click.option("--offload/--no-offload", default=True, show_default=True, help="FSDP2's CPUOffloadPolicy.")
def main(
    recipe: str,
    overrides: tuple[str, ...],
    steps: int,
    warmup: int,
    threads: int,
    huge_pages: bool,
    ranks: int,
    offload: bool,
) -> None:
    """Train RECIPE with FSDP2 on fixed random rows and print a line `RESULT {json}`."""
    if ranks > 1 and "RANK" not in os.environ:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        sys.exit(
            subprocess.run(
                [*launcher, *sys.argv], env={**os.environ, "OMP_NUM_THREADS": str(threads)}, check=False
            ).returncode
        )
    if warmup >= steps:
        raise click.BadParameter("--warmup must be less than --steps")
    torch.set_num_threads(threads)
    if huge_pages and (reason := use_huge_pages()):
        raise click.ClickException(f"no huge pages: {reason}")
    if ranks > 1:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        found = bench(load_recipe(recipe, overrides).recipe, steps, warmup, huge_pages, offload)
        if dist.get_rank() == 0:
            click.echo(RESULT_PREFIX + json.dumps(found))
    except (WeftrainError, KernelError) as error:
        raise click.ClickException(str(error)) from error
    finally:
        dist.destroy_process_group()


def bench(recipe: Recipe, steps: int, warmup: int, huge_pages: bool, offload: bool) -> dict[str, object]:
    """The measurement of one run, with losses as they are. Needs a process group."""
    refuse_what_differs(recipe)
    run = Fsdp2Run(recipe, steps, offload)
    name = f"fsdp2{'-offload' if offload else ''}-{recipe.precision.compute}{'-huge-pages' if huge_pages else ''}"
    return plain_result(take_steps(cast(Run, run), bench_source(recipe)), recipe.tokens_per_step, warmup, name)


if __name__ == "__main__":
    main()
