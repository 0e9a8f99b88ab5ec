"""`weftrain`: finds the verbs, each in a small file, and turns errors into messages.

Every expected failure is one line on stderr with its own exit code; a traceback means a defect of weftrain. Verbs
import what they need when they run, so that `weftrain --help` and `weftrain show` do not wait for torch.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
from typing import Any

import click

from weftrain.cli.display import LINES, plain_output
from weftrain.core.errors import EverywhereError, RecipeError, WeftrainError, printable
from weftrain.core.stop import sigterm_unwinds

# verb -> (module, attribute): loaded when the verb is asked for.
VERBS = {
    "prep": ("weftrain.cli.prep", "prep"),
    "train": ("weftrain.cli.train", "train"),
    "replica": ("weftrain.cli.replica", "replica"),
    "eval": ("weftrain.cli.evaluate", "evaluate"),
    "show": ("weftrain.cli.show", "show"),
    "backends": ("weftrain.cli.backends", "backends"),
    "kernels": ("weftrain.cli.kernels", "kernels"),
    "bench": ("weftrain.cli.bench", "bench"),
    "plan": ("weftrain.cli.plan", "plan"),
    "timeline": ("weftrain.cli.timeline", "timeline"),
    "lower": ("weftrain.cli.lower", "lower"),
    "convert": ("weftrain.cli.convert", "convert"),
    "data": ("weftrain.cli.data", "data"),
    "generate": ("weftrain.cli.generate", "generate"),
    "memorize": ("weftrain.cli.memorize", "memorize"),
    "log": ("weftrain.cli.ledger", "log"),
    "rollback": ("weftrain.cli.ledger", "rollback"),
    "defer": ("weftrain.cli.ledger", "defer"),
    "release": ("weftrain.cli.release", "release"),
    "sign": ("weftrain.cli.release", "sign"),
    "verify": ("weftrain.cli.release", "verify"),
    "replay": ("weftrain.cli.release", "replay"),
    "openness": ("weftrain.cli.openness", "openness"),
    "compare": ("weftrain.cli.compare", "compare"),
    "report": ("weftrain.cli.report", "report"),
}


def _follows() -> bool:
    """Whether a launcher started this process as a rank other than 0."""
    return os.environ.get("RANK", "0") != "0" and "WORLD_SIZE" in os.environ


class Failure(click.ClickException):
    """An expected failure, printed as one line."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        vars(self)["exit_code"] = exit_code  # click declares it as the class's

    def show(self, file: Any = None) -> None:
        click.echo(f"weftrain: {printable(self.message, keep=LINES)}", err=True)


class Verbs(click.Group):
    """Loads verbs on demand and turns expected errors into one line."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Run as a program. A verb that is called in-process, as tests do, keeps the caller's signal handlers."""
        # A rank may wait for others in native code, where no handler runs: a signal keeps its default effect there.
        with contextlib.nullcontext() if "RANK" in os.environ else sigterm_unwinds():
            return super().__call__(*arguments, **named)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module, attribute = VERBS[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with plain_output():
                return super().invoke(ctx)
        except WeftrainError as error:
            if isinstance(error, (EverywhereError, RecipeError)) and _follows():
                # the process that leads was given the same command, and says it
                raise SystemExit(error.exit_code) from error
            raise Failure(str(error), error.exit_code) from error
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise Failure(f"{where}{error.strerror or error}", 2) from error
        except ValueError as error:
            # kernels/ imports nothing of ours, so its errors are no WeftrainError.
            from weftrain.kernels import KernelError

            if isinstance(error, KernelError):
                raise Failure(str(error), 2) from error
            raise


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(importlib.metadata.version("weftrain"), prog_name="weftrain")
def main() -> None:
    """Train the LLM360 models (Amber, CrystalCoder) from one backend-agnostic core.

    Start with `weftrain prep` and `weftrain train crystal_demo`; `weftrain show RECIPE` explains a recipe without any
    hardware.
    """
