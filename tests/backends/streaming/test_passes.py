"""A pass over the model, event by event, without a store."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from streaming_runs import prepare, source_of

from weftrain.backends.common.decoder import call
from weftrain.backends.common.step import norm_of_each, to_device
from weftrain.backends.streaming.communicator import Communicator, Gradients
from weftrain.backends.streaming.options import StreamingOptions, layout_of
from weftrain.backends.streaming.passes import Computation, Pass
from weftrain.backends.streaming.placement import Placement
from weftrain.backends.streaming.schedule import COMPUTING, PassScheduler
from weftrain.backends.streaming.store.layout import Record
from weftrain.core.config import Recipe
from weftrain.core.initialization import draw
from weftrain.core.model import Decoder, kernel_specs
from weftrain.core.parameters import parameter_specs
from weftrain.kernels import Spec, select


@pytest.mark.parametrize("keep_activations", [True, False])
def test_gradients_are_those_of_the_local_backend(keep_activations: bool, tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe("amber", "batch.micro_batch_size=2")
    uses = kernel_specs(recipe.model, "cpu", torch.float32, torch.float32)
    selection = select([*uses, Spec("grad_norm", "optimizer", "cpu", torch.float32)], recipe.kernels.preferences)
    model = Decoder(recipe.model, selection, residual_dtype=torch.float32)
    for spec in parameter_specs(recipe.model):
        model.get_parameter(spec.name).data = draw(spec, recipe.model, recipe.seed)
    norms = partial(norm_of_each, selection.function("grad_norm", "optimizer"))
    parameters = dict(model.named_parameters())
    computation = Computation(model, model.segments(), parameters, call, norms, keep_activations, True, nullcontext)
    found: Gradients = {}

    def keep(record: Record, gradients: Gradients) -> None:
        found.update({name: gradient.clone() for name, gradient in gradients.items()})

    source = source_of(recipe)
    rows = [to_device(source.rows(0, first, 2), torch.device("cpu")) for first in (0, 2)]
    model_pass = Pass(computation, rows, Communicator(), keep, recipe.tokens_per_step)
    layout = layout_of(recipe, StreamingOptions())
    for event in PassScheduler(layout, "ram", Placement(), 0).step(None).events:
        if event.kind in (*COMPUTING, "spool"):
            model_pass(event)
    model_pass.end()
    loss, wanted = prepare(recipe).gradients(source.rows(0, 0, 4))
    assert float(torch.stack(model_pass.losses).sum()) == loss
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
