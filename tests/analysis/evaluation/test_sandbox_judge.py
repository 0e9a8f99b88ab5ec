"""A verdict that a program cannot reach: what cheats try, and that right programs pass with every usual kind of
value.
"""

from __future__ import annotations

import gc
import json
import math
import os
import textwrap
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weftrain.analysis.evaluation import sandbox_wire
from weftrain.analysis.evaluation.sandbox import Outcome, SandboxLimits, reason_unavailable
from weftrain.analysis.evaluation.sandbox_judge import ProblemTests, given_by, imports_of, judge, names_under_test
from weftrain.analysis.evaluation.sandbox_wire import decode, encode

UNAVAILABLE = reason_unavailable()
confined = pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))
LIMITS = SandboxLimits(timeout_s=20.0, memory_bytes=256 << 20, disk_bytes=1 << 20, processes=3)


def judged(program: str, tests: str, *names: str, **more: Any) -> Outcome:
    return judge(textwrap.dedent(program), ProblemTests(textwrap.dedent(tests), names, **more), LIMITS)


TESTS = """
    def check(candidate):
        assert candidate(2, 3) == 5
        assert candidate(-1, 1) == 0
        try:
            assert candidate(10, 7) == 17
        except ValueError:
            pass
        for got, expected in zip(map(lambda a: candidate(a, 1), [4, 5]), [5, 6]):
            assert got == expected
    check(add)
"""

EQUAL = """
    class Equal:
        def __eq__(self, other): return True
        __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __contains__ = __eq__
        def __hash__(self): return 5
"""
# Each solves nothing. Where the tests were in one process with the program, each of them, or one of its kind, was
# scored as right.
CHEATS = {
    "equal to everything": EQUAL + "    def add(a, b): return Equal()",
    "a list of what is equal to everything": EQUAL + "    def add(a, b): return [Equal()]",
    "a number that is equal to everything": "class Equal(int):\n    __eq__ = lambda *_: True\nadd = lambda a, b: Equal(1)",
    "text that is equal to everything": "class Equal(str):\n    __eq__ = lambda *_: True\nadd = lambda a, b: Equal()",
    "a function that is equal to everything": EQUAL + "    add = Equal()",
    "leaves": "import sys\ndef add(a, b): sys.exit(0)",
    "leaves at once": "import os\nos._exit(0)",
    "leaves by an exception that tests expect": "def add(a, b): raise ValueError",
    "ends the loop of its tests": """
        answers = [5, 0, 17]
        def add(a, b):
            if not answers: raise StopIteration
            return answers.pop(0)
    """,
    "replaces exit and assertions": """
        import builtins, sys, os
        builtins.AssertionError = type('Quiet', (SystemExit,), {})
        sys.excepthook = lambda *_: os._exit(0)
        builtins.__build_class__ = builtins.isinstance = builtins.abs = lambda *_: True
        def add(a, b): return 0
    """,
    "skips the tests": "from importlib.machinery import SourceFileLoader\nSourceFileLoader.exec_module = lambda *_: None\n",
    "reads what expects": """
        import gc, os, sys
        def found():
            texts = []
            for name in ('/tests.py', '/program.py', '/proc/self/cmdline', '/proc/1/environ'):
                try: texts.append(open(name).read())
                except OSError: pass
            for number in [*range(0, 3), *range(5, 64)]:  # 3 and 4 carry the calls
                try: os.set_blocking(number, False); texts.append(os.read(number, 1 << 20).decode())
                except OSError: pass
            frame = sys._getframe()
            while frame:
                texts += [repr(frame.f_locals), repr(frame.f_globals)]
                frame = frame.f_back
            texts += [repr(thing) for thing in gc.get_objects() if type(thing) in (str, list, tuple, dict)]
            texts += [*sys.argv, *sys.orig_argv, *os.environ.values()]
            return '\\n'.join(texts)
        def add(a, b):
            text = found()
            return a + b if ''.join(reversed('2(etadidnac')) in text or ''.join(reversed('71 ==')) in text else None
    """,
    "prints the token": """
        import gc, os, sys
        frame = sys._getframe()
        while frame:
            for value in list(frame.f_locals.values()):
                if type(value) is bytes: os.write(1, value); os.write(2, value)
            frame = frame.f_back
        os.write(2, os.read(0, 64)); os._exit(0)
    """,
    "answers for the tests": """
        import json, os, struct
        body = json.dumps(['value', True, True, '', None]).encode()
        os.write(4, (struct.pack('<Q', len(body)) + body) * 50)
    """,
    "answers with more than there is": "import os, struct\nos.write(4, struct.pack('<Q', 1 << 60))",
    "answers with brackets": """
        import os, struct
        os.write(4, struct.pack('<Q', 1 << 20))
        for _ in range(1 << 8): os.write(4, b'[' * (1 << 12))
    """,
    "answers without end": "import os\nwhile True: os.write(4, bytes(8))",
    "answers with an exception that is none": """
        import json, os, struct
        for message in (['raised', ['SystemExit', 'KeyboardInterrupt', 'BaseException'], ['list', [0]], '', None],):
            body = json.dumps(message).encode(); os.write(4, struct.pack('<Q', len(body)) + body)
    """,
    "forks": "import os\nif os.fork(): os._exit(0)\ndef add(a, b): return 0",
    "becomes another program": "import os, sys\ndef add(a, b): os.execv(sys.executable, [sys.executable, '-c', 'pass'])",
    "kills": """
        import os, signal
        def add(a, b):
            for pid in (1, os.getppid(), -1):
                try: os.kill(pid, signal.SIGKILL)
                except OSError: pass
            os.kill(os.getpid(), signal.SIGKILL)
    """,
    "closes": "import os\ndef add(a, b): os.closerange(0, 64)",
    "ends in a string": 'x = """',
    "is nothing": "",
}


@confined
def test_no_cheat_passes() -> None:
    with ThreadPoolExecutor(3) as pool:
        found = dict(zip(CHEATS, pool.map(lambda text: judged(text, TESTS, "add"), CHEATS.values()), strict=True))
    assert {name: one for name, one in found.items() if one.status == "passed"} == {}
    assert {name for name, one in found.items() if one.status != "failed"} == {"kills"}
    assert (
        found["equal to everything"].reason
        == "cannot be judged: the program gave an object of class 'Equal', and only data is compared"
    )
    assert found["leaves"].reason == "left with exit status 0 before the end of its tests"
    assert found["leaves at once"].reason == "left with exit status 0 before the end of its tests"
    assert found["leaves by an exception that tests expect"].reason == "ended with exit status 1"
    assert "NameError: name 'add' is not defined" in found["is nothing"].stderr_tail
    for name in ("answers without end", "answers with brackets"):
        assert found[name].reason.startswith("the program answered with what is no message")
    assert "RuntimeError: the program raised StopIteration" in found["ends the loop of its tests"].stderr_tail


@confined
def test_the_tests_cannot_read_the_program_and_their_helpers_are_the_problems_own() -> None:
    """`poly` stands in the prompt: a program that brings another one changes nothing. And the dataset's code is
    confined as well.
    """
    prompt = "def poly(xs, x):\n    return sum(c * x**i for i, c in enumerate(xs))\ndef zero(xs):\n    'A root.'\n"
    tests = "assert abs(poly([-6, 2], zero([-6, 2]))) < 1e-4\n"
    given = given_by(prompt)
    assert judged(prompt + "    return -xs[0] / xs[1]\n", tests, "zero", given=given).status == "passed"
    assert (
        judged(prompt + "    return 0\npoly = lambda *_: 0\nabs = poly\n", tests, "zero", given=given).status
        == "failed"
    )
    reach = """
        import os
        assert not os.path.exists('/proc/self') and open('/program.py').read() == ''
        try: open('/x', 'w')
        except OSError: pass
        else: raise AssertionError
    """
    assert judged("secret = 1\n", reach, "secret").status == "passed"


EVERYTHING = """
    import collections, decimal, fractions, datetime, math, enum
    echo = lambda value: value
    kinds = lambda value: type(value).__name__
    Point = collections.namedtuple('Point', 'x y')
    class Colour(enum.IntEnum):
        RED = 1
    class Named(str): pass
    class Node:
        def __init__(self, value, left=None): self.value, self.left = value, left
        def depth(self): return 1 + (self.left.depth() if self.left else 0)
        def __str__(self): return f'Node {self.value}'
    def height(node): return 0 if node is None else 1 + height(node.left)
    def counted(words): return collections.Counter(words)
    def table(words):
        found = collections.defaultdict(list)
        for word in words: found[len(word)].append(word)
        return found
    def sort(values): values.sort()
    def grow(values, other, named=None):
        values[0].append(other); other.append(9); named['x'] = {1}
    def point(): return Point(1, 2.5)
    def odd(): return {Colour.RED: Named('x')}
    def fail(kind): raise {'value': ValueError('no', 3), 'key': KeyError('k'), 'own': type('Own', (LookupError,), {})('o')}[kind]
    def many():
        n = 0
        while True: yield n; n += 1
    def adder(n): return lambda m: n + m
    def only(values, kind): return [value for value in values if type(value) is kind]
    def say(text): print(text); return len(text)
    def deep(n): return deep(n - 1)
    def keep(*, a, b=2): return a - b
    def later(): return math.factorial(5)
    LIMIT = 12
    print('at the start')
"""

EVERY_TEST = """
    import contextlib, io, math
    from collections import Counter, OrderedDict, deque
    from datetime import date, timedelta
    from decimal import Decimal
    from fractions import Fraction
    values = [
        None, True, False, 0, -1, 2**53, -(2**53), 2**64 - 1, 10**4000, 0.1, -0.0, 1e308, 5e-324, math.inf, -math.inf, 1 + 2j, '', 'a',
        'täglich \\x00 \\ud800 \\U0001f600 "', b'\\x00\\xff', bytearray(b'x'), [], [[1, [2, (3,)]], {}], (), (1,), ((1, 2), [3]), set(),
        {1, 2}, {(1, 'a'), frozenset({2})}, frozenset(), {}, {1: 'a', 'b': [2], (1, 2): {3: None}, None: 0}, range(1, 9, 2), int, ...,
        Decimal('0.10'), Fraction(1, 3), date(2024, 2, 29), timedelta(1, 2, 3), deque([1], 3), Counter('aab'), OrderedDict(a=1),
    ]
    for value in values:
        found = echo(value)
        assert found == value and type(found) is type(value) and repr(found) == repr(value), (found, value)
        assert kinds(value) == type(value).__name__
        assert echo([value]) == [value] and echo({'x': (value,)}) == {'x': (value,)}
    assert echo(7**9000) == 7**9000 and math.isnan(echo(math.nan)) and math.copysign(1, echo(-0.0)) == -1
    assert echo(None) is None and echo(True) is True
    assert counted(['a', 'b', 'a']) == {'a': 2, 'b': 1} and table(['a', 'bb', 'c']) == {1: ['a', 'c'], 2: ['bb']}
    assert point() == (1, 2.5) and odd() == {1: 'x'} and isinstance(odd()[1], str)
    values = [3, 1, 2]
    assert sort(values) is None and values == [1, 2, 3]
    inner, other, named = [1], [2], {}
    grow([inner], other, named=named)
    assert inner == [1, [2, 9]] and other == [2, 9] and named == {'x': {1}}
    for kind, expected, words in (('value', ValueError, "('no', 3)"), ('key', KeyError, "'k'"), ('own', LookupError, 'o')):
        try: fail(kind)
        except expected as error: assert str(error) == words, str(error)
        else: raise AssertionError
    try: deep(1)
    except RecursionError: pass
    else: raise AssertionError
    root = Node(1)
    root.left = Node(2, left=Node(3))
    root.left.left.left = Node(4)
    assert height(root) == 4 and root.depth() == 4 and root.left.value == 2 and str(root) == 'Node 1' and height(None) == 0
    assert hasattr(root, 'value') and not hasattr(root, 'other') and root is not None
    numbers = many()
    assert [next(numbers) for _ in range(3)] == [0, 1, 2]
    assert [a for a, _ in zip(many(), range(4))] == [0, 1, 2, 3]
    assert adder(3)(4) == 7 and only([1, 'a', 2.0, 3], int) == [1, 3] and keep(a=5) == 3 and LIMIT == 12 and later() == 120
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert say('hello') == 5
    assert out.getvalue() == 'hello\\n'
"""


@confined
def test_right_programs_pass_with_every_usual_value() -> None:
    names = [
        "echo",
        "kinds",
        "counted",
        "table",
        "sort",
        "grow",
        "point",
        "odd",
        "fail",
        "many",
        "adder",
        "only",
        "say",
        "deep",
        "keep",
    ]
    found = judged(EVERYTHING, EVERY_TEST, *names, "Node", "height", "later", "LIMIT")
    assert (found.status, found.stderr_tail) == ("passed", "")


@confined
@pytest.mark.parametrize(
    ("program", "tests", "words"),
    [
        (
            "def f(): return object()",
            "try: assert f() == 1\nexcept Exception: pass",
            "the program gave an object of class 'object'",
        ),
        ("def f(): return lambda: 1", "assert f()", "the program gave an object of class 'function'"),
        (
            "def f(g): return g(1)",
            "assert f(lambda x: x) == 1",
            "the tests give the program an object of class 'function', which is no data",
        ),
        ("def f():\n    x = []\n    x.append(x)\n    return x", "assert f()", "nested too deeply, or within itself"),
    ],
)
def test_what_cannot_be_judged_fails_and_says_so(program: str, tests: str, words: str) -> None:
    found = judged(program, tests, "f")
    assert found.status == "failed"
    assert found.reason.startswith("cannot be judged: ")
    assert words in found.reason


@confined
def test_time_is_up_on_either_side() -> None:
    limits = SandboxLimits(0.7, 256 << 20, 1 << 20, 2)
    sides = (("def f():\n    while True: pass", "f()"), ("f = 1", "while True: pass"))
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda side: judge(side[0], ProblemTests(side[1], ("f",)), limits), sides))
    assert [(one.status, one.reason) for one in found] == [("timed_out", "took more than 0.7 s")] * 2


@confined
def test_descriptors_are_closed_again() -> None:
    gc.collect()  # or what earlier tests left open could be closed between the two counts
    before = len(os.listdir("/proc/self/fd"))
    judged("f = 1", "assert f == 1", "f")
    assert len(os.listdir("/proc/self/fd")) == before


def test_names_under_test() -> None:
    tests = (
        "import math\nfrom x import y as z\nassert math.isclose(abs(f(Node(1), lambda q: q)), z) and all(sum(i) for i "
        "in w)"
    )
    assert names_under_test(tests, "") == ("Node", "f", "w")
    assert names_under_test(tests, "not python") == ("Node", "f", "w")
    assert names_under_test(
        tests, "import math\ndef f(a): pass\nclass Node: pass\ndef sum(x): pass\ndef unused(): pass\nw: int = 1"
    ) == (
        "Node",
        "f",
        "sum",
        "w",
    )
    assert imports_of("import math\nx = 4\nfrom os import path as p\n") == "import math\nfrom os import path as p\n"
    assert given_by("def f():\n    'x'\n") == "def f():\n    'x'\n"
    assert given_by("def f():\n") == "def f():\n\n    pass\n"
    assert given_by("Write a function.") == ""
    assert imports_of("(" * 100_000) == ""


NUMBERS = st.integers() | st.floats(allow_nan=False) | st.complex_numbers(allow_nan=False)
PLAIN = st.none() | st.booleans() | NUMBERS | st.text() | st.binary()
HASHABLE = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3), max_leaves=6
)
VALUES = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(HASHABLE, inner, max_size=4) | st.sets(HASHABLE, max_size=3)
    ),
    max_leaves=8,
)


@given(VALUES)
@settings(max_examples=80, deadline=None)
def test_any_value_survives_a_message(value: Any) -> None:
    def refuse(thing: Any) -> Any:
        raise AssertionError(thing)

    found = decode(json.loads(json.dumps(encode(value, refuse))), refuse)
    assert type(found) is type(value)
    assert found == value


@pytest.mark.parametrize(
    "message",
    [
        1.5,
        [],
        ["list"],
        ["list", 3],
        ["code", "x"],
        ["named", "eval"],
        ["library", ["os", "system", []]],
        {"a": 1},
        ["int", "x"],
        ["bytes", "g"],
    ],
)
def test_a_message_that_is_none_is_refused(message: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        decode(message, lambda content: content)


def test_nothing_is_sent_by_name_that_runs_text() -> None:
    assert not set(sandbox_wire._NAMED) & {
        "eval",
        "exec",
        "compile",
        "open",
        "__import__",
        "getattr",
        "setattr",
        "input",
        "breakpoint",
    }
    assert math.isnan(decode(encode(math.nan, list), list))
