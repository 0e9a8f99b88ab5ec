"""Chat templates: Jinja text that makes one string of a conversation, as tokenizers carry it.

A template is a stranger's program. It runs in Jinja's sandbox, may make and put out a bounded number of characters
(bounded_jinja.py), and may take a bounded number of steps. What the assistant said is found by marks: characters that
Unicode reserves for such use stand around its words while the template runs, and are taken out again. So the text is
the one that the template makes of the words alone, and yet every character of an answer is known. A template that has
`{% generation %}` blocks says itself what the model writes, and is believed.

Control tokens are the template's. The same spelling in a message is text: it is broken by another mark before the
template runs, and stays text when the whole is encoded (encode.py).
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from weftrain.core.errors import DataError, file_problem, one_line, printable
from weftrain.core.formats.plain_file import read_plain
from weftrain.data_prep.conversations.messages import Message, is_answer

if TYPE_CHECKING:
    import jinja2

    from weftrain.data_prep.conversations.bounded_jinja import BoundedEnvironment

# Noncharacters (The Unicode Standard, section 23.7): no text that is exchanged has them.
BEGIN, END, BREAK = "\ufdd0", "\ufdd1", "\ufdd2"  # of an answer; within a spelled control token
RESERVED = re.compile("[\ufdd0-\ufdef]")
MAX_CHARACTERS = 16 << 20  # of a rendered conversation
MAX_STEPS = 2_000_000  # lines of the compiled template
BUILT_IN = ("amberchat", "chatml", "crystalchat")
OF_TOKENIZER = "tokenizer"  # in place of a name: the template beside the tokenizer


class TemplateError(ValueError):
    """A template did not render a conversation. The text says why."""


@dataclass(frozen=True)
class ChatTemplate:
    """text: Jinja. name: a built-in's, or where it was read. turn_end: control tokens that, right behind an answer, end
    it and bear loss; (): whichever control token stands there.
    """

    text: str
    name: str
    turn_end: tuple[str, ...] = ()

    def render(self, messages: Sequence[Message], tokens: Mapping[str, str], control: re.Pattern[str]) -> str:
        """The conversation as one string, with BEGIN and END around what the assistant wrote, and BREAK in the
        messages' spellings of control tokens. tokens: `bos_token` and others by name. control: the spellings.
        Raises TemplateError.
        """
        return self._run(messages, tokens, control, answer_follows=False)

    def prompt(self, messages: Sequence[Message], tokens: Mapping[str, str], control: re.Pattern[str]) -> str:
        """The conversation up to where the assistant's next answer begins, marked likewise. Raises TemplateError."""
        return self._run(messages, tokens, control, answer_follows=True)

    def check(self) -> None:
        """Raises jinja2.TemplateSyntaxError."""
        assert self._compiled is not None

    @property
    def marks_answers(self) -> bool:
        """Whether the template itself says what the model writes."""
        return re.search(r"\{%-?\s*generation\b", self.text) is not None

    def _run(
        self, messages: Sequence[Message], tokens: Mapping[str, str], control: re.Pattern[str], answer_follows: bool
    ) -> str:
        import jinja2

        from weftrain.data_prep.conversations.bounded_jinja import TooLargeError

        values = [{"role": one.role, "content": self._marked(one, control)} for one in messages]
        try:
            with _environment().bounds(), _limited_steps(f"<template of {self.name}>"):
                pieces, length = [], 0
                for piece in self._compiled.generate(
                    messages=values, add_generation_prompt=answer_follows, tools=None, documents=None, **tokens
                ):
                    pieces.append(piece)
                    length += len(piece)
                    if length > MAX_CHARACTERS:
                        raise TemplateError(f"its template writes more than {MAX_CHARACTERS:,} characters")
        except TemplateError:
            raise
        except jinja2.TemplateError as error:
            raise TemplateError(f"its template refuses it: {one_line(error, 200)}") from error
        except TooLargeError as error:
            raise TemplateError(f"its template would make {error}: it is refused") from None
        except RecursionError:
            raise TemplateError("its template calls itself too often") from None
        except Exception as error:  # arithmetic, keys, memory: a program of somebody else's
            raise TemplateError(f"its template fails: {type(error).__name__}: {one_line(error, 200)}") from error
        return "".join(pieces)

    def _marked(self, message: Message, control: re.Pattern[str]) -> str:
        """The content as the template gets it. Marks stand inside white space, which templates may strip."""
        content = message.content
        if RESERVED.search(content) is not None:
            raise TemplateError("holds a character that Unicode reserves (U+FDD0 to U+FDEF): take it out")
        content = control.sub(lambda found: f"{found[0][:1]}{BREAK}{found[0][1:]}", content)
        if self.marks_answers or not is_answer(message):
            return content
        words = content.strip()
        before, after = content.split(words, 1) if words else ("", "")
        return f"{before}{BEGIN}{words}{END}{after}"

    @functools.cached_property
    def _compiled(self) -> jinja2.Template:
        """Raises jinja2.TemplateSyntaxError."""
        environment = _environment()
        code = environment.compile(self.text, name=self.name, filename=f"<template of {self.name}>")
        return environment.template_class.from_code(environment, code, environment.make_globals(None))


@functools.cache
def _environment() -> BoundedEnvironment:
    """With the settings and names that templates of tokenizers rely on (transformers' documentation of chat templates)
    but `strftime_now`: a dataset must not depend on the day it was made, and templates have a date for that case.
    """
    from jinja2.ext import loopcontrols

    from weftrain.data_prep.conversations.bounded_jinja import BoundedEnvironment

    environment = BoundedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_generation_extension(), loopcontrols]
    )
    environment.add_filter("tojson", _to_json)
    environment.globals["raise_exception"] = _raise_exception
    return environment


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> None:
    raise TemplateError(f"its template refuses it: {printable(str(message)[:200])}")


def _generation_extension() -> type[Any]:
    """The block `{% generation %}`, which marks its output as the model's."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 - the name that Jinja asks for

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_written"), [], [], body).set_lineno(line)

        def _written(self, caller: Callable[[], str]) -> str:
            return f"{BEGIN}{caller()}{END}"

    return Generation


class _limited_steps:  # noqa: N801 - used as a function in `with`
    """Counts the lines of a compiled template that run, so that one which loops for ever ends. It counts the same on
    every machine, unlike a time limit.
    """

    def __init__(self, file: str) -> None:
        self._file, self._left = file, MAX_STEPS

    def __enter__(self) -> None:
        self._before = sys.gettrace()
        sys.settrace(self._called)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _called(self, frame: FrameType, event: str, value: Any) -> Any:
        if frame.f_code.co_filename != self._file:
            return None
        return self._stepped

    def _stepped(self, frame: FrameType, event: str, value: Any) -> Any:
        self._left -= 1
        if self._left < 0:
            raise TemplateError(f"its template takes more than {MAX_STEPS:,} steps: does it loop?")
        return self._stepped


def load_template(name: str, tokenizer: Path | None = None, turn_end: Sequence[str] = ()) -> ChatTemplate:
    """A chat template by the name of a built-in one, by a path (.jinja, or a .json with the key `chat_template`), or,
    for 'tokenizer', from the folder of `tokenizer`. turn_end: instead of the template's own. Raises DataError.
    """
    import jinja2

    found: ChatTemplate | None
    if name in BUILT_IN:
        found = _built_in(name)
    elif name == OF_TOKENIZER:
        found = _of_tokenizer(tokenizer)
    else:
        found = _read(Path(name))
        if found is None:
            raise DataError(f"{name}: has no key 'chat_template' with a template: name the template's file")
    try:
        found.check()
    except jinja2.TemplateError as error:
        raise DataError(f"{found.name}: is no Jinja template: {one_line(error, 200)}; repair it") from error
    return ChatTemplate(found.text, found.name, tuple(turn_end)) if turn_end else found


def _built_in(name: str) -> ChatTemplate:
    text = (resources.files("weftrain.data_prep.conversations") / f"{name}.jinja").read_text(encoding="utf-8")
    # CrystalChat's rows bear loss on the end of the whole conversation, not on the start of the next question.
    return ChatTemplate(text, name, ("</s>",) if name == "crystalchat" else ())


def _of_tokenizer(tokenizer: Path | None) -> ChatTemplate:
    if tokenizer is None:
        raise DataError("--chat-template tokenizer: takes the template of --tokenizer, so name that, too")
    if (found := template_beside(tokenizer)) is None:
        raise DataError(
            f"{tokenizer.parent}: has no chat_template.jinja and no chat_template in a tokenizer_config.json: name the "
            f"template's file with --chat-template, or one of {', '.join(BUILT_IN)}"
        )
    return found


def template_beside(tokenizer: Path) -> ChatTemplate | None:
    """The chat template in a tokenizer's folder; None if it has none. Raises DataError for one that cannot be read."""
    for name in ("chat_template.jinja", "chat_template.json", "tokenizer_config.json"):
        if (tokenizer.parent / name).is_file() and (found := _read(tokenizer.parent / name)) is not None:
            return found
    return None


def _read(path: Path) -> ChatTemplate | None:
    """None for JSON without a template."""
    try:
        data = read_plain(path, "chat template")
        text = data.decode()
    except (OSError, UnicodeDecodeError) as error:
        problem = file_problem(error) if isinstance(error, OSError) else "is not UTF-8"
        raise DataError(
            f"{path}: the chat template cannot be read: {problem}; name a file, or one of {', '.join(BUILT_IN)}"
        ) from error
    if path.suffix == ".json":
        found = _from_json(path, text)
        return None if found is None else ChatTemplate(found, str(path))
    return ChatTemplate(text, str(path))


def _from_json(path: Path, text: str) -> str | None:
    """`chat_template` of tokenizer_config.json: a text, or a list of named ones, of which `default` is taken."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is no JSON: {one_line(error)}; repair it") from error
    found = value.get("chat_template") if isinstance(value, dict) else None
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None
