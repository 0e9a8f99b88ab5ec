"""Calls between two processes as messages of data: the two programs of sandbox_judge.py, which run in its sandboxes.

`serve` runs the program under test and answers questions about it; `check` runs the tests, where each name under test
stands for the program's. A message is JSON, never code or a pickle: None, bool, numbers of any size, text, bytes,
lists, tuples, sets, dicts, and some types of the standard library. Anything else (an instance, a function, a generator)
stays in its process, and the tests hold a `Remote` that can be called and read but not compared: an object that decides
what it equals would pass any test. Standard library only: it runs without site-packages.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib
import io
import json
import os
import struct
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import SourceFileLoader
from types import BuiltinFunctionType, ModuleType
from typing import Any, NoReturn

READ, WRITE = 3, 4  # the descriptors of the two pipes, in either process
# exit statuses of `check`: the program gave what cannot be judged; it is gone, and its own end says why
UNJUDGED, GONE = 97, 98
_LARGEST_MESSAGE_BYTES = 1 << 26
_KEPT_OUTPUT_BYTES = 1 << 20  # of what one call prints

# Types and functions that are sent by name. Nothing here runs text, opens files or imports.
_TYPES = "bool bytearray bytes complex dict float frozenset int list object range set str tuple type"
_FUNCTIONS = "abs all any chr divmod len max min ord pow round sorted sum zip"
_NAMED = frozenset(f"{_TYPES} {_FUNCTIONS}".split())
# module, type -> its parts, from which the type makes it again
_LIBRARY: dict[tuple[str, str], Callable[[Any], list[Any]]] = {
    ("collections", "Counter"): lambda value: [dict(value)],
    ("collections", "OrderedDict"): lambda value: [list(value.items())],
    ("collections", "deque"): lambda value: [list(value), value.maxlen],
    ("decimal", "Decimal"): lambda value: [str(value)],
    ("fractions", "Fraction"): lambda value: [value.numerator, value.denominator],
    ("datetime", "date"): lambda value: [value.year, value.month, value.day],
    ("datetime", "timedelta"): lambda value: [value.days, value.seconds, value.microseconds],
}

Refer = Callable[[Any], Any]


class UnsendableError(Exception):
    """A value that no message can carry. Its text says which."""


def encode(value: Any, refer: Refer) -> Any:
    """A value as JSON: None, bool, text and small integers as they are, everything else as [tag, content].

    refer: called for what is no data; returns the content of a reference, or raises UnsendableError. A value of a
    subclass is sent as its base.
    """
    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        number = int.__int__(value)
        return number if abs(number) < 1 << 53 else ["int", hex(number)]  # by hexadecimal: decimal digits are limited
    if isinstance(value, float):
        return ["float", float.hex(value)]
    if isinstance(value, complex):
        return ["complex", [value.real.hex(), value.imag.hex()]]
    kind = (type(value).__module__, type(value).__name__)
    if kind in _LIBRARY and type(value) is getattr(sys.modules.get(kind[0]), kind[1], None):
        return ["library", [*kind, encode(_LIBRARY[kind](value), refer)]]
    for tag, base in (("list", list), ("tuple", tuple), ("set", set), ("frozenset", frozenset)):
        if isinstance(value, base):
            return [tag, [encode(item, refer) for item in value]]
    if isinstance(value, dict):
        return ["dict", [[encode(key, refer), encode(item, refer)] for key, item in value.items()]]
    if isinstance(value, bytes | bytearray):
        return ["bytearray" if isinstance(value, bytearray) else "bytes", value.hex()]
    if type(value) is range:
        return ["range", [encode(part, refer) for part in (value.start, value.stop, value.step)]]
    if value is ...:
        return ["ellipsis", None]
    name = getattr(value, "__name__", None) if isinstance(value, type | BuiltinFunctionType) else None
    if name in _NAMED and value is getattr(builtins, name):
        return ["named", name]
    return ["ref", refer(value)]


def decode(data: Any, refer: Refer) -> Any:
    """The value of a message. Raises ValueError, TypeError or the like for a message that `encode` does not write."""
    if data is None or isinstance(data, bool | int | str):
        return data
    tag, content = data
    if tag == "ref":
        return refer(content)
    if tag == "int":
        return int(content, 16)
    if tag == "float":
        return float.fromhex(content)
    if tag == "complex":
        return complex(*map(float.fromhex, content))
    if tag in ("bytes", "bytearray"):
        return getattr(builtins, tag).fromhex(content)
    if tag in ("list", "tuple", "set", "frozenset"):
        return getattr(builtins, tag)([decode(item, refer) for item in content])
    if tag == "dict":
        return {decode(key, refer): decode(item, refer) for key, item in content}
    if tag == "range":
        return range(*(decode(part, refer) for part in content))
    if tag == "ellipsis":
        return ...
    if tag == "named" and content in _NAMED:
        return getattr(builtins, content)
    if tag == "library" and (content[0], content[1]) in _LIBRARY:
        return getattr(importlib.import_module(content[0]), content[1])(*decode(content[2], refer))
    raise ValueError(f"no such tag: {tag!r:.40}")


def send(message: Any) -> None:
    body = json.dumps(message).encode()  # lone surrogates are escaped
    view = memoryview(struct.pack("<Q", len(body)) + body)
    while view:
        view = view[os.write(WRITE, view) :]


def receive() -> Any:
    """The next message. Raises EOFError where the other process has closed, ValueError for what is no message."""

    def exactly(count: int) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            part = os.read(READ, min(count - len(parts), 1 << 20))
            if not part:
                raise EOFError
            parts += part
        return bytes(parts)

    (length,) = struct.unpack("<Q", exactly(8))
    if length > _LARGEST_MESSAGE_BYTES:
        raise ValueError(f"a message of {length} bytes")
    return json.loads(exactly(length))


def _execute(module: ModuleType, path: str) -> None:
    module.__file__ = path
    SourceFileLoader("__main__", path).exec_module(module)


def _main_module() -> ModuleType:
    sys.argv[:] = ["/program.py"]
    module = sys.modules["__main__"] = ModuleType("__main__")
    return module


# ---- the program's side: nothing here is trusted by the other side


class _Kept(io.RawIOBase):
    """Standard output of one call: the first _KEPT_OUTPUT_BYTES are kept, the rest is discarded."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = bytearray()

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return 1

    def write(self, data: Any) -> int:
        self.kept += bytes(data)[: _KEPT_OUTPUT_BYTES - len(self.kept)]
        return len(data)


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda target, *values, **named: target(*values, **named),
    "getattr": getattr,
    "setattr": setattr,
    "getitem": lambda target, key: target[key],
    "iter": iter,
    "next": next,
    "len": len,
    "str": str,
}


def serve() -> NoReturn:
    """Run /program.py, then /tests.py (imports of the tests' set-up), and answer until the other side closes."""
    os.read(0, 64)  # the token of this process, which says nothing: standard input is empty from here on
    kept = _Kept()
    output = sys.stdout = io.TextIOWrapper(io.BufferedWriter(kept), encoding="utf-8", errors="backslashreplace")
    module = _main_module()
    objects: list[Any] = []
    numbers: dict[int, int] = {}  # by id(), which stays an object's own because `objects` keeps it

    def refer(value: Any) -> list[Any]:
        number = numbers.setdefault(id(value), len(objects))
        if number == len(objects):
            objects.append(value)
        return [number, type(value).__name__]

    def answer(operation: str, data: Any) -> Any:
        if operation == "name":
            found = data in vars(module)
            return ["value", encode(vars(module)[data], refer) if found else None, found, "", None]
        values, named = decode(data, lambda content: objects[content[0]])
        try:
            result = _OPERATIONS[operation](*values, **named)
        except Exception as error:
            names = [kind.__name__ for kind in type(error).__mro__]
            said = [item if isinstance(item, str | int | float | bool | None) else repr(item) for item in error.args]
            return ["raised", names, encode(said, refer), str(error), None]
        output.flush()
        printed, kept.kept = kept.kept.decode("utf-8", "replace"), bytearray()
        after = encode([values, named], refer)
        return ["value", encode(result, refer), True, printed, None if after == data else after]

    for path in ("/program.py", "/tests.py"):
        _execute(module, path)
    output.flush()
    kept.kept = bytearray()
    while True:
        try:
            operation, data = receive()
        except EOFError:
            sys.stderr.flush()
            os._exit(0)
        try:
            reply = answer(operation, data)
        except RecursionError:
            reply = ["unsendable", "a value that is nested too deeply, or within itself"]
        send(reply)


# ---- the tests' side


def _unjudged(reason: str, status: int = UNJUDGED) -> NoReturn:
    """End here: no `except` of the tests can turn this into a pass."""
    sys.stderr.flush()
    os.write(2, f"{reason}\n".encode(errors="backslashreplace"))
    os._exit(status)


def _argument(value: Any) -> list[Any]:
    """The reference of a value that the tests give to the program and that is no data."""
    if isinstance(value, Remote):
        return list(object.__getattribute__(value, "_reference"))
    raise UnsendableError(f"the tests give the program an object of class '{type(value).__name__}', which is no data")


def _ask(operation: str, *values: Any, **named: Any) -> Any:
    """One question to the program, and its answer: a value, or the exception that it raised."""
    given: list[Any] = [list(values), named]
    try:
        question = [operation, values[0] if operation == "name" else encode(given, _argument)]
    except UnsendableError as error:
        _unjudged(f"cannot be judged: {error}")
    except RecursionError:
        _unjudged("cannot be judged: the tests give the program a value that is nested too deeply, or within itself")
    try:
        send(question)
        kind, *reply = receive()
    except (EOFError, BrokenPipeError):
        _unjudged("the program left before the end of its tests", GONE)
    except (ValueError, TypeError, RecursionError) as error:
        _unjudged(f"the program answered with what is no message: {error}")
    if kind == "unsendable":
        _unjudged(f"cannot be judged: the program gave {str(reply[0])[:200]}")
    try:
        if kind == "raised":
            result: Any = _exception(*reply)
            # else it would end a loop of the tests over map(function, ...)
            if isinstance(result, StopIteration) and operation != "next":
                result = RuntimeError("the program raised StopIteration")
        else:
            value, found, printed, after = reply
            result = decode(value, Remote) if found else None
            if after is not None:
                _take_over(given, decode(after, Remote))
    except Exception as error:
        _unjudged(f"the program answered with what is no message: {type(error).__name__}: {error}")
    if kind == "raised":
        raise result
    if printed:
        sys.stdout.write(str(printed))
    if not found:
        raise NameError(f"name '{values[0]}' is not defined")
    return result


def _exception(names: Sequence[str], said: Any, text: str, _: Any) -> Exception:
    """The nearest built-in class of an exception of the program."""
    kind = next(
        found
        for name in names
        if isinstance(found := getattr(builtins, name, None), type) and issubclass(found, Exception)
    )
    try:
        return kind(*decode(said, Remote))
    except TypeError:  # as UnicodeDecodeError, which wants its own arguments
        return RuntimeError(str(text))


def _take_over(old: Any, new: Any) -> Any:
    """Apply in place what the program changed in a call's arguments. Returns the replacement of the old value."""
    if type(old) is not type(new):
        return new
    if isinstance(old, list):
        old[:] = [_take_over(old[index], item) if index < len(old) else item for index, item in enumerate(new)]
        return old
    if isinstance(old, dict):
        kept = {key: _take_over(old[key], item) if key in old else item for key, item in new.items()}
        old.clear()
        old.update(kept)
        return old
    if isinstance(old, tuple) and len(old) == len(new):
        for before, after in zip(old, new, strict=True):
            _take_over(before, after)
        return old
    if isinstance(old, set):
        old.clear()
        old.update(new)
        return old
    if isinstance(old, bytearray):
        old[:] = new
        return old
    return new


class Remote:
    """An object in the program's process: it can be called, read, iterated and passed back, not compared."""

    __slots__ = ("_reference",)
    _reference: list[Any]  # its number and the name of its class

    def __init__(self, reference: Any) -> None:
        number, kind = reference
        object.__setattr__(self, "_reference", [int(number), str(kind)])

    def __repr__(self) -> str:
        return f"<{object.__getattribute__(self, '_reference')[1]} in the program's process>"

    def _refuse(self, *_: Any) -> NoReturn:
        kind = object.__getattribute__(self, "_reference")[1]
        _unjudged(f"cannot be judged: the program gave an object of class '{kind}', and only data is compared")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __hash__ = __contains__ = _refuse  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        _ask("setattr", self, name, value)

    def __call__(self, *values: Any, **named: Any) -> Any:
        return _ask("call", self, *values, **named)

    def __getitem__(self, key: Any) -> Any:
        return _ask("getitem", self, key)

    def __iter__(self) -> Any:
        return _ask("iter", self)

    def __next__(self) -> Any:
        return _ask("next", self)

    def __len__(self) -> int:
        return int(_ask("len", self))

    def __str__(self) -> str:
        return str(_ask("str", self))


def check(names: Sequence[str]) -> NoReturn:
    """Run /program.py (the problem's definitions), take `names` from the program, run /tests.py, witness its end."""
    token, own = os.read(0, 64), os.getpid()
    module = _main_module()
    _execute(module, "/program.py")
    for name in names:
        vars(module).pop(name, None)
        with contextlib.suppress(NameError):  # the tests say so where they need it, as they would in one process
            vars(module)[name] = _ask("name", name)
    _execute(module, "/tests.py")
    sys.stderr.flush()
    if os.getpid() == own:
        os.write(2, token)
    os._exit(0)
