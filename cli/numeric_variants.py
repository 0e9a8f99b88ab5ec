"""The differences that numeric_differences measures: overrides of a recipe, an environment, ranks, another torch."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from typing import NamedTuple

import click

BASE: tuple[str, ...] = ("backend.name=local", "backend.options={device: cpu, threads: 1}")
AS_IS = "the recipe as it is"


class Variant(NamedTuple):
    """A difference: its row, in words, overrides of the recipe, environment (name and value in turn), number of
    processes, and the interpreter that runs them; None: this one.
    """

    row: str
    what: str
    overrides: tuple[str, ...] = ()
    settings: tuple[tuple[str, str], ...] = ()
    ranks: int = 1
    python: str | None = None

    @property
    def environment(self) -> Mapping[str, str]:
        return dict(self.settings)


def _threads(count: int) -> Variant:
    return Variant("threads", f"{count} threads", (f"backend.options={{device: cpu, threads: {count}}}",))


def _kernels(*preferences: str) -> Variant:
    order = ", ".join(dict.fromkeys((*preferences, "reference")))
    return Variant("kernels", preferences[0], (f"kernels.preferences=[{order}]",))


def _cuda(parallel: str, ranks: int) -> Variant:
    options = f"backend.options={{device: cpu, threads: 1, parallel: {parallel}}}"
    what = f"cuda, {parallel}, {ranks} rank{'s' * (ranks > 1)}"
    return Variant("layout", what, ("backend.name=cuda", options, f"batch.replicas={ranks}"), (), ranks)


def _instructions(what: str, aten: str, onednn: str, mkl: str) -> Variant:
    """As a machine that has no later ones: torch's own loops, oneDNN and MKL each choose theirs."""
    told = {"ATEN_CPU_CAPABILITY": aten, "ONEDNN_MAX_CPU_ISA": onednn, "MKL_ENABLE_INSTRUCTIONS": mkl}
    return Variant("instruction set", what, (), tuple(told.items()))


VARIANTS: tuple[Variant, ...] = (
    _threads(2),
    _kernels("reference"),
    Variant("instruction set", "ATen without vectors", (), (("ATEN_CPU_CAPABILITY", "default"),)),
    _cuda("ddp", 2),
    _kernels("torch"),
    _instructions("AVX2", "avx2", "AVX2", "AVX2"),
    _cuda("fsdp", 2),
    _threads(4),
    _instructions("SSE4", "default", "SSE41", "SSE4_2"),
    Variant("layout", "streaming", ("backend.name=streaming",)),
)

_ASKED = "from importlib.metadata import version; version('weftrain'); print(version('torch'))"


def with_python(python: str) -> Variant:
    """Another environment's interpreter as a difference. Raises BadParameter where it cannot be started, or lacks
    weftrain or torch.
    """
    try:
        asked = subprocess.run([python, "-c", _ASKED], capture_output=True, text=True, check=True)
    except OSError as error:
        raise click.BadParameter(f"--python {python}: cannot be started: {error.strerror}") from error
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or [f"exit status {error.returncode}"])[-1]
        raise click.BadParameter(f"--python {python}: {last}: install this weftrain and another torch there") from error
    return Variant("libraries", f"torch {asked.stdout.split()[-1]}", python=python)
