"""The smallest backend that trains: one process on a CPU, the whole batch in one forward and backward pass."""

import time
from functools import partial

import torch

from weftrain.backends.common import base, device, in_memory, step
from weftrain.core.backend import StepResult
from weftrain.core.formats.strict_model import StrictModel
from weftrain.core.objectives import loss_of
from weftrain.core.optim import group_learning_rates


class MinimalRun(in_memory.InMemoryRun):
    def train(self, source):
        recipe, rows = self.recipe, self.recipe.batch.global_batch_size
        while (number := self.step_number) < self.plan.last_step:
            self.snapshots.detach()
            start = time.perf_counter()
            batch = source.rows(number, 0, rows)
            waited_ms = (time.perf_counter() - start) * 1e3
            sums, scale, gradients = self.sums_and_gradients(batch)
            (loss, measures), losses = scale.reported(sums), [sums]  # of the micro-batches: there is one
            norm = step.global_norm([gradient.norm() for gradient in gradients.values()])
            rates, bearing = group_learning_rates(self.groups, recipe.schedule, number), batch.bearing_tokens
            if finite := step.step_happens(recipe, source, number, loss, norm, bearing, partial(list, losses)):
                self.update(gradients, norm, rates)
            self.step_number, step_ms = number + 1, (time.perf_counter() - start) * 1e3
            tokens = recipe.tokens_per_step
            yield StepResult(
                number, loss, norm, rates, tokens, bearing, step_ms, waited_ms, skipped=not finite, measures=measures
            )

    def sums_and_gradients(self, batch):
        scale = step.LossScale.of(self.recipe, batch.bearing_tokens)
        sums = self.model(*step.to_device(batch, self.device)) / scale.divisor
        found = torch.autograd.grad(loss_of(sums), list(self.parameters.values()))
        named = zip(self.parameters, found, strict=True)
        return sums.detach(), scale, {name: gradient.float() for name, gradient in named}

    def gradients(self, batch):
        sums, scale, gradients = self.sums_and_gradients(batch)
        return float(scale.reported(sums)[0]), gradients

    def fingerprint(self):
        more = {"compute": self.recipe.precision.compute}
        return device.device_fingerprint("minimal", self.device, self.kernels.manifest, more, recomputes="none")


class MinimalBackend(base.PlainBackend):
    name = "minimal"
    summary = "one process on a CPU, the whole batch at once"
    options = StrictModel  # it has none
    returns_gradients = True
    unsupported = frozenset({"dropout", "experts", "replayable", "replicas", "frozen_model"})

    def prepare(self, job):
        device.use_threads(job, 0)
        return MinimalRun(job, torch.device("cpu"))


BACKEND = MinimalBackend()
