"""`weftrain`: finds the verbs, each in a small file, and turns errors into messages.

Every expected failure is one line on stderr with its own exit code; a traceback means a defect of weftrain. Verbs
import what they need when they run, so that `weftrain --help` and `weftrain show` do not wait for torch.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.metadata
import os
import shutil
from collections.abc import Iterable
from typing import Any, NamedTuple

import click

from weftrain.cli.display import (
    LINES,
    as_called,
    as_named,
    follows,
    open_streams,
    os_problem,
    plain_output,
    reader_left,
)
from weftrain.core.errors import (
    EverywhereError,
    OutOfMemoryError,
    RecipeError,
    WeftrainError,
    is_out_of_memory,
    one_line,
    printable,
)
from weftrain.core.stop import sigterm_unwinds


class Verb(NamedTuple):
    """Where a verb's command is, loaded when it is asked for, and its line in `weftrain --help`."""

    module: str
    attribute: str
    summary: str


VERBS = {
    "Prepare": {
        "prep": Verb("prep", "prep", "turn text or token ids into a shuffled, packed dataset"),
        "data": Verb("data", "data", "inspect, verify and export datasets; trace a sample"),
        "recipe": Verb("recipe", "recipe", "print a built-in recipe, to copy and change"),
        "show": Verb("show", "show", "print a resolved recipe and its arithmetic"),
        "plan": Verb("plan", "plan", "predict time, memory and disk of a step"),
    },
    "Train": {
        "train": Verb("train", "train", "train a recipe; the same command resumes it"),
        "resume": Verb("resume", "resume", "continue a release as a new run of your own"),
        "launch": Verb("launch", "launch", "write or submit a job over many nodes"),
        "replica": Verb("replica", "replica", "join a weight-streaming run as one more replica"),
        "rollback": Verb("ledger", "rollback", "go back to an earlier checkpoint of a run"),
        "prune": Verb("prune", "prune", "remove checkpoints of a run by a rule"),
        "defer": Verb("ledger", "defer", "move a chunk that is not trained yet to the end"),
    },
    "Look": {
        "runs": Verb("runs", "runs", "list runs with state, step, loss, last activity"),
        "track": Verb("track", "track", "send a run to TensorBoard, W&B, MLflow"),
        "watch": Verb("watch", "watch", "show live what runs are doing"),
        "follow": Verb("follow", "follow", "measure and audit revisions as they appear"),
        "report": Verb("report", "report", "write one HTML page about a run or release"),
        "log": Verb("ledger", "log", "print a run's ledger: how each step was made"),
        "eval": Verb("evaluate", "evaluate", "measure held-out loss, or tasks, of a checkpoint"),
        "generate": Verb("generate", "generate", "continue a prompt"),
        "chat": Verb("chat", "chat", "talk to a model in the terminal"),
        "serve": Verb("serve", "serve", "serve a model to programs, by OpenAI's protocol"),
        "memorize": Verb("memorize", "memorize", "measure memorization of training rows"),
        "safety": Verb("safety", "safety", "analyse the safety of checkpoints, in one table"),
        "timeline": Verb("timeline", "timeline", "show compute, disk and stalls of a streamed run"),
    },
    "Compare": {
        "compare": Verb("compare", "compare", "compare runs and model series by tokens seen"),
        "figures": Verb("figures", "figures", "draw the figures of LLM360's paper of a run"),
        "bench": Verb("bench", "bench", "measure speed: training, data, kernels, machine"),
    },
    "Record": {
        "release": Verb("release", "release", "write a release that others can verify"),
        "sign": Verb("sign", "sign", "sign the root of a release"),
        "publish": Verb("publish", "publish", "put a release on the hub, in a bucket, in a folder"),
        "verify": Verb("verify", "verify", "check every byte and claim of a release"),
        "replay": Verb("release", "replay", "train links of a release again, compare bits"),
        "audit": Verb("audit", "audit", "find mistakes in an open checkpoint series"),
        "openness": Verb("openness", "openness", "show what a release gives and lacks"),
        "convert": Verb("convert", "convert", "from and to Hugging Face and Model Zoo files"),
    },
    "Machines": {
        "backends": Verb("backends", "backends", "list backends, their options, what each needs"),
        "kernels": Verb("kernels", "kernels", "list, check, compile and time kernels"),
        "gpu": Verb("gpu", "gpu", "prove and measure weftrain on this GPU"),
        "lower": Verb("lower", "lower", "lower a training step for a Cerebras system"),
    },
}

# What other programs call these verbs.
OTHER_WORDS = {
    "pretrain": "train",
    "continue": "train",
    "tokenize": "prep",
    "prepare": "prep",
    "preprocess": "prep",
    "evaluate": "eval",
    "test": "eval",
    "benchmark": "bench",
    "profile": "bench",
    "sample": "generate",
    "export": "convert",
    "import": "convert",
    "clean": "prune",
    "gc": "prune",
    "ls": "runs",
    "list": "runs",
    "status": "runs",
    "monitor": "watch",
    "tail": "watch",
    "top": "watch",
    "config": "show",
    "init": "recipe",
    "doctor": "backends",
    "devices": "backends",
}

# What an interrupted verb's message adds where its work so far is kept.
CONTINUES = {
    "prep": "; the same command goes on where it stopped",
    "eval": "; the same command computes what is not recorded yet",
    "follow": "; the same command goes on with what is not done yet",
    "memorize": "; the same command computes what is not recorded yet",
    "safety": "; the same command computes what is not recorded yet",
    "compare": "; the same command measures what is not recorded yet",
}


class Failure(click.ClickException):
    """An expected failure, printed as one line."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        vars(self)["exit_code"] = exit_code  # click declares it as the class's

    def show(self, file: Any = None) -> None:
        click.echo(f"weftrain: {printable(as_named(as_called(self.message)), keep=LINES)}", err=True)


class Help(click.HelpFormatter):
    """In a narrow terminal an option's meaning begins below the option, so that it breaks no word."""

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        super().write_dl(rows, col_max if self.width >= 50 else 12, col_spacing)


click.Context.formatter_class = Help  # of every verb


class Verbs(click.Group):
    """Loads verbs on demand and turns expected errors into one line."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Run as a program. A verb that is called in-process, as tests do, keeps the caller's signal handlers."""
        open_streams()
        # A rank may wait for others in native code, where no handler runs: a signal keeps its default effect there.
        with contextlib.nullcontext() if "RANK" in os.environ else sigterm_unwinds():
            try:
                return super().__call__(*arguments, **named)
            except OSError as error:  # of --help and --version, which no verb prints
                Failure(os_problem(error), 2).show()
                raise SystemExit(2) from error

    def make_context(self, *arguments: Any, **named: Any) -> click.Context:
        """click's help has at least 50 columns; a narrower terminal would break its words."""
        if (columns := shutil.get_terminal_size().columns) < 52:
            named["terminal_width"] = max(30, columns - 1)
        try:
            return super().make_context(*arguments, **named)
        except BrokenPipeError:  # while --help or --version was printed
            reader_left()

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for verbs in VERBS.values() for name in verbs]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        for verbs in VERBS.values():
            if (verb := verbs.get(cmd_name)) is not None:
                command: click.Command = getattr(importlib.import_module(f"weftrain.cli.{verb.module}"), verb.attribute)
                return command
        return None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.exceptions.NoSuchCommand as error:
            word = error.command_name
            like = [OTHER_WORDS[word]] if word in OTHER_WORDS else []
            like = like or difflib.get_close_matches(word, self.list_commands(ctx), n=1)
            meant = f"; did you mean `weftrain {like[0]}`?" if like else ":"
            ctx.fail(f"no verb '{word}'{meant} `weftrain --help` lists all verbs")

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """A section a group; no verb is imported."""
        width = max(map(len, self.list_commands(ctx)))
        for group, verbs in VERBS.items():
            with formatter.section(group):
                formatter.write_dl([(f"{name:{width}}", verb.summary) for name, verb in verbs.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with plain_output():
                return super().invoke(ctx)
        except WeftrainError as error:
            if isinstance(error, (EverywhereError, RecipeError)) and follows():
                # the process that leads was given the same command, and says it
                raise SystemExit(error.exit_code) from error
            raise Failure(str(error), error.exit_code) from error
        except click.UsageError as error:
            vars(error)["message"] = as_called(error.message)  # click declares it as final
            raise
        except KeyboardInterrupt:
            if follows():
                raise SystemExit(130) from None
            raise Failure(f"interrupted{CONTINUES.get(ctx.invoked_subcommand or '', '')}", 130) from None
        except BrokenPipeError:
            reader_left()
        except OSError as error:
            raise Failure(os_problem(error), 2) from error
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            words = f"out of memory: {one_line(error, 160)}: what is saved is whole; ask for less at once"
            raise Failure(words, OutOfMemoryError.exit_code) from error
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
