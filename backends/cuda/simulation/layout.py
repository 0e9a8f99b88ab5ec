"""How a simulated step is laid out over devices: ranks, stages of a pipeline, and what a device has of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import NamedTuple

from weftrain.backends.cuda.degrees import Degrees
from weftrain.backends.cuda.options import CudaOptions
from weftrain.backends.cuda.pipeline_layout import layers_of_stages, stage_of_turn
from weftrain.backends.cuda.simulation.schedules import Schedule
from weftrain.backends.cuda.simulation.work import Program
from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError
from weftrain.core.parameters import FP32_ROLES, Role

OUTER = -1  # in place of a layer's number: the embedding and the head


@dataclass(frozen=True)
class Layout(Degrees):
    """Degrees, and what else of the options decides a step."""

    schedule: Schedule = "1f1b"
    chunks: int = 1  # parts of the model a device
    layers: tuple[int, ...] | None = None  # of each stage; None: as even as they can be
    whole: bool = False  # every data-parallel rank has the whole of its stage, as in DDP
    reshard: bool = True  # free a layer's gathered weights after its forward, and gather them again for its backward
    reduce_every_micro_batch: bool = False
    overlaps: bool = True  # gradients are reduced while backward goes on

    @property
    def parts(self) -> int:
        """Devices that share the weights of a layer, of the tensor ranks one."""
        return 1 if self.whole else self.shard * self.context

    @property
    def splits_backward(self) -> bool:
        """Whether the gradients of inputs and of weights are passes of their own."""
        return self.pipeline > 1 and self.schedule in ("interleaved_zero_bubble", "zbv")

    def stages(self, device: int) -> list[int]:
        """Of the model, that a device has, by its parts."""
        return [stage_of_turn(device, chunk, self.pipeline, self.schedule) for chunk in range(self.chunks)]

    def micro_batches(self, recipe: Recipe) -> int:
        """That a replica computes in a step. Raises BackendError where they do not divide."""
        batch = recipe.batch
        count, rest = divmod(batch.global_batch_size, batch.micro_batch_size * self.data)
        if rest or not count:
            raise BackendError(
                f"batch.global_batch_size is {batch.global_batch_size} and {self.data} replicas of "
                f"micro-batches of {batch.micro_batch_size} do not divide it: change batch.micro_batch_size"
            )
        return count


def layout_of(recipe: Recipe, options: CudaOptions, shape: Degrees) -> Layout:
    """Raises BackendError for what is not simulated."""
    if options.cpu_offload or options.in_float8 is not None:
        name = "cpu_offload" if options.cpu_offload else "float8"
        raise BackendError(f"backend.options.{name} is not simulated: leave it at false, or leave --simulate out")
    return Layout(
        **asdict(shape),
        schedule=options.pipeline_schedule,
        chunks=options.pipeline_virtual_stages,
        layers=tuple(map(len, layers_of_stages(recipe, options))) if shape.pipeline > 1 else None,
        whole=options.parallel == "ddp",
        reshard=options.reshard_after_forward,
        reduce_every_micro_batch=options.reduce_every_micro_batch,
    )


def program_of(recipe: Recipe, options: CudaOptions) -> Program:
    """How this trainer's own step is programmed: a residual stream of fp32, one kernel a norm."""
    item = 2 if recipe.precision.compute == "bfloat16" else 4
    return Program(
        "compiled" if options.compile else "kernels",
        item=item,
        recomputed={"none": (0.0, 0.0, 0.0), "selective": (0.0, 0.0, 1.0), "full": (1.0, 1.0, 1.0)}[
            options.activation_checkpointing
        ],
        reduce_item=4 if options.reduce == "float32" else 2,
        gather_item=item,
    )


class Sizes(NamedTuple):
    """Elements of the matrices and biases of each layer, and of embedding and head."""

    layers: tuple[int, ...]  # without its experts
    experts: tuple[int, ...]
    embedding: int
    head: int  # 0 where it is the embedding


def sizes_of(recipe: Recipe) -> Sizes:
    layers, experts, embedding, head = [0] * recipe.model.num_layers, [0] * recipe.model.num_layers, 0, 0
    for spec in recipe.parameters:
        if spec.role is Role.EMBEDDING:
            embedding += spec.size
        elif spec.role is Role.HEAD:
            head += spec.size
        elif spec.role not in FP32_ROLES:
            of_layer = experts if len(spec.shape) == 3 else layers
            of_layer[int(spec.name.split(".")[1])] += spec.size
    return Sizes(tuple(layers), tuple(experts), embedding, head)


def stages_of(layers: int, layout: Layout) -> list[range]:
    """Layers of each stage: as the layout says, else as even as they can be, the larger ones first. Raises
    BackendError.
    """
    stages = layout.pipeline * layout.chunks
    if stages > layers:
        raise BackendError(f"{layers} layers are fewer than the {stages} pipeline stages: use {layers} stages or fewer")
    least, more = divmod(layers, stages)
    counts = layout.layers or [least + (stage < more) for stage in range(stages)]
    ends = [sum(counts[: stage + 1]) for stage in range(stages)]
    return [range(end - count, end) for count, end in zip(counts, ends, strict=True)]
