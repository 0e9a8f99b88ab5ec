"""`weftrain serve`: a model behind OpenAI's protocol, for programs on this machine."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

import click

from weftrain.cli import arguments, remote
from weftrain.cli.chat import device_option, template_option, tokenizer_option
from weftrain.cli.display import Console
from weftrain.core.errors import DataError, file_problem
from weftrain.core.formats.units import gib

LOOPBACK = "127.0.0.1"


@click.command()
@remote.run
@arguments.overrides
@click.option(
    "--port", type=click.IntRange(min=0, max=65535), default=8000, show_default=True, help="0: any that is free."
)
@click.option("--name", help="The model's name for clients.  [default: the folder's]")
@click.option("--rows", type=click.IntRange(min=1, max=1024), default=32, show_default=True, help="Requests at once.")
@click.option(
    "--positions", type=click.IntRange(min=2), help="Of a request, prompt and answer.  [default: the model's]"
)
@template_option
@tokenizer_option
@device_option
def serve(
    run: Path,
    overrides: tuple[str, ...],
    port: int,
    name: str | None,
    rows: int,
    positions: int | None,
    chat_template: str | None,
    tokenizer: Path | None,
    device: str,
) -> None:
    """Serve a model on 127.0.0.1 until Ctrl-C: /v1/completions and /v1/chat/completions as OpenAI has them.

    RUN is a run (its newest whole checkpoint), a checkpoint's folder, or a Hugging Face model's. Requests are computed
    side by side, and join and leave between two tokens.
    """
    from weftrain.analysis.serving.engine import Engine
    from weftrain.analysis.serving.http import Server
    from weftrain.cli.opened_model import served

    try:
        import uvicorn
    except ImportError:
        raise DataError("`weftrain serve` needs uvicorn and starlette: pip install 'weftrain[serve]'") from None
    console = Console()
    model = served(run, overrides, device, tokenizer, chat_template, name)
    most = model.config.max_position_embeddings
    if positions is not None and positions > most:
        raise click.BadParameter(f"the model has {most}", param_hint="--positions")
    listening = _listening(port)
    with listening, Engine(model.load(), rows, positions or most) as engine:
        address = f"http://{LOOPBACK}:{listening.getsockname()[1]}/v1"
        talk = "text only, it has no chat template" if model.chat is None else f"chats by {model.chat.name}"
        console.print(f"model {model.name} at {address}: {talk}")
        console.print(
            f"{rows} requests at once, {engine.positions:,} positions each: {gib(engine.cache_bytes)} of cache"
        )
        config = uvicorn.Config(
            Server(model, engine).app(), log_level="warning", timeout_graceful_shutdown=5, lifespan="off"
        )
        with contextlib.suppress(KeyboardInterrupt):  # which uvicorn raises again when it has ended
            uvicorn.Server(config).run(sockets=[listening])
    console.print(f"ended: {engine.tokens_made:,} tokens were made")


def _listening(port: int) -> socket.socket:
    """A socket of this machine alone. Raises DataError where the port is taken."""
    found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((LOOPBACK, port))
    except OSError as error:
        found.close()
        raise DataError(f"port {port}: {file_problem(error)}: name another with --port") from error
    return found
