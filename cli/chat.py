"""`weftrain chat`: talk to a model in the terminal, by the chat template that it was trained with."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from weftrain.cli import arguments, remote
from weftrain.core.errors import WeftrainError, printable

if TYPE_CHECKING:
    from weftrain.analysis.evaluation.generation import Generator
    from weftrain.analysis.serving.model import ServedModel
    from weftrain.data_prep.conversations.messages import Message

COMMANDS = {
    "/new": "begin again",
    "/again": "another answer to the last message",
    "/system TEXT": "another system message, from a new conversation on",
    "/quit": "end (also Ctrl-D)",
}
template_option = click.option(
    "--chat-template",
    metavar="NAME|FILE",
    help="amberchat, chatml, crystalchat, a file, or `tokenizer`.  [default: that of the dataset or of the model]",
)
tokenizer_option = click.option(
    "--tokenizer",
    type=arguments.NamedPath(path_type=Path),
    help="A tokenizer.json.  [default: of the recipe's first dataset, or the Hugging Face folder's]",
)
device_option = click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")


@click.command()
@remote.run
@arguments.overrides
@click.option("--message", "messages", multiple=True, help="Say this and end (repeatable), instead of a dialogue.")
@click.option("--system", help="The system message.  [default: the template's]")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Of an answer.")
@click.option(
    "--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0: the most likely token."
)
@click.option("--top-p", type=click.FloatRange(min=0, max=1, min_open=True), help="As for `generate`.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Sampling seed.")
@template_option
@tokenizer_option
@device_option
def chat(
    run: Path,
    overrides: tuple[str, ...],
    messages: tuple[str, ...],
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float | None,
    seed: int,
    chat_template: str | None,
    tokenizer: Path | None,
    device: str,
) -> None:
    """Talk to a model. RUN is a run (its newest whole checkpoint), a checkpoint's folder, or a Hugging Face model's.

    An answer ends at a control token of the tokenizer. KEY.SUB=VALUE overrides a value of the recorded recipe.
    """
    from weftrain.analysis.evaluation.generation import Generator
    from weftrain.cli.opened_model import served
    from weftrain.core.errors import DataError

    if temperature == 0 and top_p is not None:
        raise click.UsageError("--top-p needs a --temperature above 0")
    model = served(run, overrides, device, tokenizer, chat_template, None)
    if model.chat is None:
        raise DataError(f"{run}: has no chat template: name one with --chat-template, or use `weftrain generate`")
    talk = _Talk(model, Generator(model.load()), system, max_new_tokens, temperature, top_p, seed)
    if messages:
        for message in messages:
            talk.say(message)
    else:
        _dialogue(talk)


def _dialogue(talk: _Talk) -> None:
    """Until the end of the input or /quit. A message that cannot be answered is told, and the dialogue goes on."""
    terminal = sys.stdin.isatty()
    if terminal:
        click.echo(f"Say something; {', '.join(f'{name}: {words}' for name, words in COMMANDS.items())}.", err=True)
    while True:
        if terminal:
            click.echo("> ", nl=False, err=True)
        line = sys.stdin.readline()
        words, _, rest = line.strip().partition(" ")
        if not line or words == "/quit":
            return
        try:
            if words == "/new":
                talk.begin(talk.system)
            elif words == "/system":
                talk.begin(rest or None)
            elif words == "/again":
                talk.again()
            elif words.startswith("/"):
                click.echo(f"there is {', '.join(COMMANDS)}", err=True)
            elif words:
                talk.say(line.strip())
        except WeftrainError as error:
            click.echo(printable(str(error)), err=True)


class _Talk:
    """A conversation so far. Each answer has random numbers of its own."""

    def __init__(
        self,
        model: ServedModel,
        generator: Generator,
        system: str | None,
        most: int,
        temperature: float,
        top_p: float | None,
        seed: int,
    ) -> None:
        self._model, self._generator, self._most = model, generator, most
        self._temperature, self._top_p, self._seed = temperature, top_p, seed
        self._answers = 0
        self.begin(system)

    def begin(self, system: str | None) -> None:
        from weftrain.data_prep.conversations.messages import Message

        self.system = system
        self._messages: list[Message] = [] if system is None else [Message("system", system)]

    def again(self) -> None:
        """Another answer to the last message."""
        from weftrain.core.errors import DataError

        if len(self._messages) < 2 or self._messages[-1].role != "assistant":
            raise DataError("nothing was answered yet")
        said = self._messages[-2].content
        del self._messages[-2:]
        self.say(said)

    def say(self, text: str) -> None:
        """Print the answer to a message as it comes. Raises WeftrainError; the conversation then is as before."""
        from weftrain.analysis.evaluation.continuation import derived_seed
        from weftrain.analysis.serving.text import TextStream
        from weftrain.data_prep.conversations.messages import Message

        asked = [*self._messages, Message("user", text)]
        prompt = self._model.conversation_ids([message._asdict() for message in asked])
        positions = self._model.config.max_position_embeddings
        most = max(1, min(self._most, positions - len(prompt)))
        stream = TextStream(self._model.decode, prompt, strip=True)
        pieces: list[str] = []

        def told(row: int, token: int) -> None:
            pieces.append(stream.add(token))
            click.echo(printable(pieces[-1], keep="\n\t"), nl=False)

        seed = self._seed if not self._answers else derived_seed(self._seed, "answer", self._answers)
        self._generator.generate(
            [prompt],
            most,
            temperature=self._temperature,
            top_p=self._top_p,
            seed=seed,
            stop_ids=self._model.chat_stop_ids,
            told=told,
        )
        self._answers += 1
        pieces.append(stream.end())
        click.echo(printable(pieces[-1], keep="\n\t"))
        self._messages = [*asked, Message("assistant", "".join(pieces))]
