"""Jinja's sandbox with bounds on what a template may make: numbers, texts and lists of bounded size, and of all of them
together a bounded amount.

The sandbox alone keeps a template from the process's objects, not from its memory and time: `10 ** (10 ** 9)` and
`'a' * 10 ** 10` are one step each. Here every operation that can make something larger than its operands asks first.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_ITEMS = 16 << 20  # characters of a text, or elements of a list
MAX_PRODUCT = 1 << 30  # of the sizes of a call's arguments, which bounds what it makes
MAX_MADE = 1 << 30  # characters and elements that one rendering makes
MAX_BITS = 4096  # of a whole number
_WIDTH = re.compile(r"[0-9]{7}")  # in a format


class TooLargeError(ValueError):
    """A template would make something larger than it may. The text says what."""


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Render in `with environment.bounds():`. Raises TooLargeError."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._thread = threading.local()
        self.filters = {name: self._bounded(one) for name, one in self.filters.items()}

    @contextmanager
    def bounds(self) -> Iterator[None]:
        """What is made in here, by this thread, counts from 0."""
        self._thread.made = 0
        yield

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """A filter that is bounded as the others are."""
        self.filters[name] = self._bounded(function)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """See SandboxedEnvironment."""
        if operator == "**":
            if _bits(left) * (abs(right) if isinstance(right, int) else 1) > MAX_BITS:
                raise TooLargeError(f"a number of more than {MAX_BITS:,} bits")
        elif operator == "*":
            _check_product((left, right), MAX_ITEMS)
        elif operator == "%" and isinstance(left, str):
            _check_format(left)
            _check_product((left, *(right if isinstance(right, tuple) else (right,))))
        return self._counted(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - as Jinja has it
        """See SandboxedEnvironment."""
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, (str, bytes)):
            _check_product((owner, *args, *kwargs.values()))
        return __self._counted(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """See SandboxedEnvironment: the methods format and format_map of a text."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        text = value.__self__

        def bounded(*args: Any, **kwargs: Any) -> str:
            _check_format(text)
            _check_product((text, *args, *kwargs.values()))
            return str(self._counted(wrapped(*args, **kwargs)))

        return bounded

    def joined(self, values: tuple[Any, ...]) -> str:
        """The operator `~`."""
        return str(self._counted("".join(map(str, values))))

    def _bounded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)  # which copies the marks by which Jinja hands some of them the environment
        def bounded(*args: Any, **kwargs: Any) -> Any:
            _check_product((*args, *kwargs.values()))
            return self._counted(function(*args, **kwargs))

        return bounded

    def _counted(self, value: Any) -> Any:
        size = _size(value)
        if size > MAX_ITEMS:
            raise TooLargeError(f"something of more than {MAX_ITEMS:,} characters or elements")
        self._thread.made = made = getattr(self._thread, "made", 0) + size
        if made > MAX_MADE:
            raise TooLargeError(f"more than {MAX_MADE:,} characters and elements altogether")
        if _bits(value) > MAX_BITS:
            raise TooLargeError(f"a number of more than {MAX_BITS:,} bits")
        return value


class _Generator(CodeGenerator):
    """Compiles `~` into a call of the environment; Jinja's own calls a function that cannot be replaced."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802 - as Jinja has it
        self.write("environment.joined((")
        for value in node.nodes:
            self.visit(value, frame)
            self.write(", ")
        self.write("))")


BoundedEnvironment.code_generator_class = _Generator


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 0


def _size(value: Any) -> int:
    return len(value) if isinstance(value, (str, bytes, list, tuple, dict, set, frozenset)) else 0


def _check_product(values: tuple[Any, ...], most: int = MAX_PRODUCT) -> None:
    """Whether texts, lists and numbers of these sizes, multiplied, stay within bounds. Numbers alone do."""
    if not any(map(_size, values)):
        return
    product = 1
    for value in values:
        product *= max(1, abs(value) if isinstance(value, int) else _total(value))
    if product > most:
        raise TooLargeError(f"something of more than {MAX_ITEMS:,} characters or elements")


def _total(value: Any) -> int:
    """The elements of a list and the characters of the texts in it, or the size of something else."""
    if isinstance(value, (list, tuple)):
        return len(value) + sum(len(one) for one in value if isinstance(one, (str, bytes)))
    return _size(value)


def _check_format(text: str) -> None:
    if _WIDTH.search(text):
        raise TooLargeError("a text padded to a million characters or more")
