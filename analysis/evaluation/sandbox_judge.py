"""Judge an untrusted program: its tests run in another process than the program, and that process gives the verdict.

Two sandboxes are joined by two pipes: one runs the program and has nothing of the tests, not as file, memory or
descriptor; the other has the tests and the problem's own definitions, and nothing of the program. A call of the
program's functions crosses the pipes as data (sandbox_wire.py), and its result is compared where the program cannot
reach it. So a program learns the arguments of calls, never the expected value.

What cannot be judged fails with its reason: a comparison of an object that is not data; a test that passes a function
or an instance of its own class to the program; a class of the program in `isinstance` or `except`; a test that reads
the program's source.
"""

from __future__ import annotations

import ast
import builtins
import os
from dataclasses import dataclass
from pathlib import Path

from weftrain.analysis.evaluation import sandbox_wire
from weftrain.analysis.evaluation.sandbox import Outcome, SandboxLimits, end_stage, outcome_of, start_stage

# Bound to every record of a score: a change of what passes is another measurement.
JUDGE = "tests in a process of their own, 1"


@dataclass(frozen=True)
class ProblemTests:
    """Tests of a program, as Python source; `names`: the names in `tests` that stand for the program's.

    given: what the problem defines, run before the tests. tests: raises for a wrong program. imports: imports of the
    tests' set-up, on which the program may rely.
    """

    tests: str
    names: tuple[str, ...]
    given: str = ""
    imports: str = ""


def judge(program: str, tests: ProblemTests, limits: SandboxLimits) -> Outcome:
    """Run a program and its tests, each in a sandbox with these limits. Blocks; safe to call from threads.

    Raises SandboxError where the machine cannot confine them, ValueError for limits out of range.
    """
    source = Path(sandbox_wire.__file__).read_text(encoding="utf-8")
    to_program, to_tests = os.pipe(), os.pipe()
    ends = [*to_program, *to_tests]
    stages = []
    try:
        for body, after, driver, channel in (
            (program, tests.imports, "serve()", (to_program[0], to_tests[1])),
            (tests.given, tests.tests, f"check({tests.names!r})", (to_tests[0], to_program[1])),
        ):
            stages.append(start_stage(body, after, limits, driver=f"{source}\n{driver}\n", channel=channel))
        while ends:  # each end is then held by one sandbox alone, and its death is seen by the other
            os.close(ends.pop())
        verdict = outcome_of(stages[1], limits)
        if verdict.exit_status == sandbox_wire.GONE:
            found = outcome_of(stages[0], limits)  # how it ended says more
            return (
                found
                if found.status != "passed"
                else Outcome("failed", "left before the end of its tests", found.stderr_tail, 0)
            )
        if verdict.exit_status == sandbox_wire.UNJUDGED:
            return Outcome("failed", verdict.stderr_tail.strip().rsplit("\n", 1)[-1], "", verdict.exit_status)
        return verdict
    finally:
        for end in ends:
            os.close(end)
        for stage in stages:
            end_stage(stage)


def names_under_test(tests: str, solution: str) -> tuple[str, ...]:
    """The names that the tests take from the program: those the published solution defines and the tests read.

    Without a solution, or any such name: what the tests read, do not set, and Python does not define. Built-in names
    count only where the solution defines them, or a program could replace `abs`.
    """
    read, own = _names(tests)
    defined: set[str] = set()
    for node in (_parsed(solution) or ast.Module([], [])).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            defined |= {
                part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)
            }
    return tuple(sorted(read & defined or read - own - set(dir(builtins))))


def imports_of(source: str) -> str:
    """The import statements at the top level of a source; "" where it is not Python 3."""
    tree = _parsed(source)
    body = [] if tree is None else tree.body
    return "".join(f"{ast.unparse(node)}\n" for node in body if isinstance(node, ast.Import | ast.ImportFrom))


def given_by(prompt: str) -> str:
    """Definitions in a prompt that a completion continues; its last function may lack a body. "" if not Python 3."""
    return next((text for text in (prompt, f"{prompt}\n    pass\n") if _parsed(text) is not None), "")


def _parsed(source: str) -> ast.Module | None:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _names(source: str) -> tuple[set[str], set[str]]:
    """(names that a source reads, names that it sets at top level or as arguments)."""
    read: set[str] = set()
    own: set[str] = set()
    for node in ast.walk(_parsed(source) or ast.Module([], [])):
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else own).add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.arg):
            own.add(node.arg)
        elif isinstance(node, ast.alias):
            own.add((node.asname or node.name).partition(".")[0])
    return read, own
