"""pass@k: the probability that at least one of k programs that a model writes for a problem passes its tests.

The estimator is that of Chen et al. 2021, "Evaluating Large Language Models Trained on Code" (arXiv 2107.03374),
section 2.1. sandbox_judge.py judges the programs; the caller generates them. The estimate from n > k samples varies far
less than one from k samples, and 1 - (1 - c/n)^k, which looks the same, is biased low. `pass_at_k` is in 0..1,
`PassAtK` in percent.
"""

from __future__ import annotations

import gzip
import math
import os
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from weftrain.analysis.evaluation.sandbox import STATUSES, Outcome, SandboxError, SandboxLimits, reason_unavailable
from weftrain.analysis.evaluation.sandbox_judge import ProblemTests, given_by, imports_of, judge, names_under_test
from weftrain.core.errors import DataError, WeftrainError
from weftrain.core.formats.canonical import parse_json
from weftrain.core.formats.plain_file import open_plain
from weftrain.core.formats.units import gb

# A completion goes on after the function it was asked for; these begin what no longer belongs to it. HumanEval's are
# those of the paper's section 2.2; MBPP's asks for a whole program, where a function or a comment may follow another.
HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
MBPP_STOPS = ("\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n<|/", "\n```")
_LARGEST_FILE = 1 << 28  # bytes, uncompressed; the published files are a few hundred times smaller
_LONGEST_LINE = 200  # characters of an error that are kept: a report of 100,000 samples is still one a person can open
_SHAPES = "HumanEval's task_id, prompt, entry_point, test; or MBPP's task_id, text, code, test_list, test_setup_code"


class CompletionError(WeftrainError):
    """A generator that does not give the completions it was asked for."""


@dataclass(frozen=True)
class Problem:
    """prompt: what the model continues. tests: Python source that raises for a wrong solution. setup: runs before it.

    entry_point, solution: "" where there is none. continues: the program is prompt + completion, else the completion
    alone.
    """

    task_id: str
    prompt: str
    tests: str
    entry_point: str
    stops: tuple[str, ...] = ()
    continues: bool = True
    solution: str = ""
    setup: str = ""

    def held_to(self) -> ProblemTests:
        """The tests, and what a judge must know to run them apart from the program."""
        tests = f"{self.setup}\n{self.tests}" if self.setup else self.tests
        names = (self.entry_point,) if self.entry_point else names_under_test(tests, self.solution)
        given = given_by(self.prompt) if self.continues else imports_of(self.solution)
        return ProblemTests(tests, names, given, imports_of(self.setup))

    def program(self, completion: str) -> str:
        """The source to be tested, of a completion that is already truncated."""
        return (self.prompt if self.continues else "") + completion + "\n"


@dataclass(frozen=True)
class ProblemScore:
    """One problem's result: how many of its samples passed, and how they ended."""

    task_id: str
    samples: int
    correct: int
    outcomes: dict[str, int]
    # reason, and last line of the standard error, of the first sample, in order, that did not pass; "" where all did
    first_failure: str


@dataclass(frozen=True)
class PassAtK:
    """pass_at_k_percent: k -> mean over problems, 0..100. outcomes: status -> samples, over all problems."""

    samples_per_problem: int
    pass_at_k_percent: dict[int, float]
    problems: tuple[ProblemScore, ...]
    outcomes: dict[str, int]
    limits: SandboxLimits

    def as_json(self) -> dict[str, Any]:
        """Of text, numbers, lists and dicts with text keys alone, as canonical_json takes it."""
        shares = {str(k): percent for k, percent in self.pass_at_k_percent.items()}
        return {**asdict(self), "pass_at_k_percent": shares, "problems": [asdict(problem) for problem in self.problems]}


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The unbiased estimate 1 - C(n-c, k) / C(n, k), in 0..1, from n samples of which c are correct.

    Exact integers and one division give the nearest float. Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not 0 <= correct <= samples:
        raise ValueError(f"pass_at_k: correct={correct} is not within 0..samples={samples}")
    if not 1 <= k <= samples:
        raise ValueError(f"pass_at_k: k={k} is not within 1..samples={samples}; draw at least k samples")
    every = math.comb(samples, k)
    return (every - math.comb(samples - correct, k)) / every


def truncate(completion: str, stops: Sequence[str]) -> str:
    """Up to the first place where any stop begins. Raises ValueError for an empty stop."""
    if "" in stops:
        raise ValueError("truncate: an empty stop would leave nothing")
    places = [place for place in (completion.find(stop) for stop in stops) if place >= 0]
    return completion[: min(places)] if places else completion


def read_problems(path: Path) -> list[Problem]:
    """Read HumanEval's or MBPP's published rows from JSON lines (or .gz); further keys are ignored.

    Raises DataError with file and line: unreadable, not JSON, a key missing or of another type, a task twice, no
    problem.
    """
    problems: list[Problem] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = parse_json(line)
        except ValueError as error:
            raise DataError(f"{where}: not a line of JSON ({error}); expected one problem a line") from None
        problem = _problem(row, where)
        if problem.task_id in seen:
            raise DataError(
                f"{where}: task {problem.task_id!r} stands on line {seen[problem.task_id]} already; remove one"
            )
        seen[problem.task_id] = number
        problems.append(problem)
    if not problems:
        raise DataError(f"{path}: no problem in it; expected one JSON object a line with {_SHAPES}")
    return problems


def _lines(path: Path) -> list[bytes]:
    try:
        with open_plain(path) as raw, gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw as file:
            data: bytes = file.read(_LARGEST_FILE + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: cannot read the problems ({error}); give a readable .jsonl or .jsonl.gz file"
        ) from None
    if len(data) > _LARGEST_FILE:
        raise DataError(f"{path}: more than {gb(_LARGEST_FILE)}; this is no file of problems")
    return data.split(b"\n")


def _problem(row: Any, where: str) -> Problem:
    if not isinstance(row, dict):
        raise DataError(f"{where}: a {type(row).__name__}, not an object; expected {_SHAPES}")
    if "entry_point" in row or "test" in row:
        return _humaneval(row, where)
    if "test_list" in row:
        return _mbpp(row, where)
    raise DataError(f"{where}: keys {', '.join(sorted(row)) or 'none'} are of neither shape; expected {_SHAPES}")


def _text(row: dict[str, Any], key: str, where: str, *, empty: bool = False) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not (value.strip() or empty):
        found = "is missing" if key not in row else f"is {value!r:.40}"
        raise DataError(f"{where}: {key!r} {found}; expected {'text' if empty else 'text that is not empty'}")
    return value


def _humaneval(row: dict[str, Any], where: str) -> Problem:
    entry = _text(row, "entry_point", where)
    if not entry.isidentifier():
        raise DataError(f"{where}: 'entry_point' is {entry!r:.40}; expected the name of a function")
    test = _text(row, "test", where)
    if "check(" not in test:
        raise DataError(
            f"{where}: 'test' defines no function check(candidate), so nothing would be tested; take the published file"
        )
    solution = _text(row, "canonical_solution", where, empty=True) if "canonical_solution" in row else ""
    tests = f"{test}\n\ncheck({entry})\n"
    return Problem(
        _text(row, "task_id", where), _text(row, "prompt", where), tests, entry, HUMANEVAL_STOPS, True, solution
    )


def _mbpp(row: dict[str, Any], where: str) -> Problem:
    number = row.get("task_id")
    if isinstance(number, bool) or not isinstance(number, int | str):
        raise DataError(f"{where}: 'task_id' is {number!r:.40}; expected a number or text")
    tests = row["test_list"]
    if not (isinstance(tests, list) and tests and all(isinstance(test, str) and test.strip() for test in tests)):
        raise DataError(
            f"{where}: 'test_list' is {tests!r:.40}; expected a list of assert statements that is not empty"
        )
    setup = _text(row, "test_setup_code", where, empty=True) if "test_setup_code" in row else ""
    # Without examples, after InCoder (Fried et al. 2022, arXiv 2204.05999): a docstring of the task and one test, which
    # names the function.
    prompt = '"""\n' + _text(row, "text", where) + "\n" + tests[0] + '\n"""\n'
    task = f"MBPP/{number}" if isinstance(number, int) else number
    return Problem(task, prompt, "\n".join(tests) + "\n", "", MBPP_STOPS, False, _text(row, "code", where), setup)


def score(
    problems: Sequence[Problem],
    complete: Callable[[str, int], list[str]],
    samples: int,
    ks: Sequence[int],
    limits: SandboxLimits | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PassAtK:
    """Generate `samples` completions of each problem, run each against the tests, and report pass@k for each of `ks`.

    complete(prompt, samples) returns that many texts; it runs in the calling thread while up to os.cpu_count() programs
    are tested, each in a sandbox and its tests in another. progress(samples tested, all samples). Raises ValueError (no
    problem, a k outside 1..samples) and SandboxError before anything is generated, CompletionError for a wrong number
    of texts.
    """
    limits = limits or SandboxLimits()
    if not problems or not ks or not all(1 <= k <= samples for k in ks):
        raise ValueError(
            f"score: {len(problems)} problems, ks={list(ks)}; needs a problem, and each k within 1..samples={samples}"
        )
    reason = reason_unavailable()
    if reason is not None:
        raise SandboxError(reason)
    outcomes_of = _judge_all(problems, complete, samples, limits, progress or (lambda done, total: None))
    solved = [_solved(problem, outcomes) for problem, outcomes in zip(problems, outcomes_of, strict=True)]
    percent = {
        k: 100 * math.fsum(pass_at_k(samples, one.correct, k) for one in solved) / len(solved) for k in sorted(set(ks))
    }
    outcomes: dict[str, int] = {status: sum(one.outcomes[status] for one in solved) for status in STATUSES}
    return PassAtK(samples, percent, tuple(solved), outcomes, limits)


def _judge_all(
    problems: Sequence[Problem],
    complete: Callable[[str, int], list[str]],
    samples: int,
    limits: SandboxLimits,
    progress: Callable[[int, int], None],
) -> list[list[Outcome]]:
    """The outcomes of each problem's samples. Programs of earlier problems are tested while later ones are written."""
    total = len(problems) * samples
    pending: set[Future[Outcome]] = set()
    futures: list[list[Future[Outcome]]] = []

    def collect(*, until_all: bool) -> None:
        nonlocal pending
        while pending:
            done, pending = wait(pending, None if until_all else 0, FIRST_COMPLETED)
            for future in done:
                future.result()  # where the sandbox itself failed, say so now
            if done:
                progress(sum(map(len, futures)) - len(pending), total)
            if not until_all:
                return

    with ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="sandbox") as pool:
        try:
            for problem in problems:
                texts, tests = _completions(problem, complete, samples), problem.held_to()
                sources = [problem.program(truncate(text, problem.stops)) for text in texts]
                futures.append([pool.submit(judged, source, tests, limits) for source in sources])
                pending.update(futures[-1])
                collect(until_all=False)
            collect(until_all=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [[future.result() for future in row] for row in futures]


def judged(program: str, tests: ProblemTests, limits: SandboxLimits) -> Outcome:
    """One program's verdict, with only the last line of standard error."""
    outcome = judge(program, tests, limits)
    return replace(outcome, stderr_tail=outcome.stderr_tail.strip().rsplit("\n", 1)[-1][:_LONGEST_LINE])


def _completions(problem: Problem, complete: Callable[[str, int], list[str]], samples: int) -> list[str]:
    texts = complete(problem.prompt, samples)
    if len(texts) != samples or not all(isinstance(text, str) for text in texts):
        raise CompletionError(
            f"{problem.task_id}: the generator gave {len(texts)} completions for {samples}, or one that is no text"
        )
    return texts


def _solved(problem: Problem, outcomes: Sequence[Outcome]) -> ProblemScore:
    counted = Counter(outcome.status for outcome in outcomes)
    failures = [
        f"{one.reason}: {one.stderr_tail}" if one.stderr_tail else one.reason
        for one in outcomes
        if one.status != "passed"
    ]
    by_status: dict[str, int] = {status: counted[status] for status in STATUSES}
    return ProblemScore(problem.task_id, len(outcomes), counted["passed"], by_status, failures[0] if failures else "")
