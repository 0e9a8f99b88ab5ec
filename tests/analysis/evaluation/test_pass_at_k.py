"""The estimator against enumeration, both published file shapes, and a score of programs whose results are known."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import os
import threading
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weftrain.analysis.evaluation import pass_at_k as module
from weftrain.analysis.evaluation.pass_at_k import CompletionError, Problem, pass_at_k, read_problems, score, truncate
from weftrain.analysis.evaluation.sandbox import Outcome, SandboxError, SandboxLimits, reason_unavailable
from weftrain.analysis.evaluation.sandbox_judge import ProblemTests
from weftrain.core.errors import DataError
from weftrain.core.formats.canonical import canonical_json, parse_json

UNAVAILABLE = reason_unavailable()
confined = pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))

HUMANEVAL: dict[str, Any] = {
    "task_id": "T/0",
    "prompt": 'def add(a, b):\n    """The sum.\n    >>> add(2, 3)\n    5\n    """\n',
    "entry_point": "add",
    "canonical_solution": "    return a + b\n",
    "test": "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    assert candidate(2, 3) == 5\n    assert candidate(-1, 1) == 0\n",
}
MBPP: dict[str, Any] = {
    "task_id": 11,
    "text": "Write a function to double a number.",
    "code": "def double(x):\r\n  return 2 * x",
    "test_list": ["assert double(2) == four", "assert double(0) == 0"],
    "test_setup_code": "four = 4",
    "challenge_test_list": [],
}


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_estimator_is_the_share_of_draws_that_hold_a_right_one(data: st.DataObject) -> None:
    samples = data.draw(st.integers(1, 9))
    correct, k = data.draw(st.integers(0, samples)), data.draw(st.integers(1, samples))
    draws = list(itertools.combinations([True] * correct + [False] * (samples - correct), k))
    assert pass_at_k(samples, correct, k) == float(Fraction(sum(map(any, draws)), len(draws)))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_estimator_at_any_size(data: st.DataObject) -> None:
    """Against the paper's product, within rounding; monotone in c; k = 1 is the plain share."""
    samples = data.draw(st.integers(1, 3000))
    correct, k = data.draw(st.integers(0, samples)), data.draw(st.integers(1, samples))
    value = pass_at_k(samples, correct, k)
    product = math.prod(1 - k / i for i in range(samples - correct + 1, samples + 1)) if samples - correct >= k else 0.0
    assert value == pytest.approx(1 - product, abs=1e-9)
    assert pass_at_k(samples, correct, 1) == pytest.approx(correct / samples)
    assert correct == 0 or value >= pass_at_k(samples, correct - 1, k)


def test_estimator_is_unbiased() -> None:
    """Its mean over all outcomes of n independent samples is the true 1 - (1 - p)^k."""
    n, p = 7, Fraction(3, 10)
    for k in range(1, n + 1):
        mean = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * Fraction(pass_at_k(n, c, k)) for c in range(n + 1))
        assert float(mean) == pytest.approx(float(1 - (1 - p) ** k), abs=1e-12)


@pytest.mark.parametrize("arguments", [(3, 1, 4), (3, 1, 0), (3, 4, 1), (3, -1, 1), (0, 0, 1)])
def test_estimator_refuses(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="is not within"):
        pass_at_k(*arguments)


def test_truncate() -> None:
    assert truncate("    return 1\ndef other():\n# x", ("\n#", "\ndef")) == "    return 1"
    assert truncate("    return 1\n", ("\ndef",)) == "    return 1\n"
    assert truncate("a", ()) == "a"
    assert truncate("\ndef", ("\ndef",)) == ""
    with pytest.raises(ValueError, match="empty stop"):
        truncate("a", ("b", ""))


def written(folder: Path, *rows: Any, name: str = "problems.jsonl") -> Path:
    data = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()
    path = folder / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


@pytest.mark.parametrize("name", ["problems.jsonl", "problems.jsonl.gz"])
def test_both_published_shapes(tmp_path: Path, name: str) -> None:
    first, second = read_problems(written(tmp_path, HUMANEVAL, "", MBPP, name=name))
    assert (first.task_id, first.prompt, first.entry_point) == ("T/0", HUMANEVAL["prompt"], "add")
    assert first.tests.endswith("\n\ncheck(add)\n")
    assert first.program("    return 1") == HUMANEVAL["prompt"] + "    return 1\n"
    assert second.task_id == "MBPP/11"
    assert second.prompt == '"""\nWrite a function to double a number.\nassert double(2) == four\n"""\n'
    assert second.held_to().tests == "four = 4\nassert double(2) == four\nassert double(0) == 0\n"
    assert (first.held_to().names, second.held_to().names) == (("add",), ("double",))
    assert first.held_to().given == HUMANEVAL["prompt"]
    assert second.program("x = 1") == "x = 1\n"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", "not a line of JSON"),
        ('{"task_id": "a", "task_id": "b"}', "appears twice"),
        ([1], "a list, not an object"),
        ({"task_id": "x"}, "keys task_id are of neither shape"),
        (HUMANEVAL | {"task_id": 3}, "'task_id' is 3; expected text"),
        (HUMANEVAL | {"prompt": ""}, "'prompt' is ''"),
        ({key: value for key, value in HUMANEVAL.items() if key != "prompt"}, "'prompt' is missing"),
        (HUMANEVAL | {"entry_point": "add(1) or x"}, "expected the name of a function"),
        (HUMANEVAL | {"test": "assert True"}, "nothing would be tested"),
        (HUMANEVAL | {"task_id": "T/9"}, "'T/9' stands on line 1 already"),
        (MBPP | {"test_list": []}, "'test_list' is []"),
        (MBPP | {"test_list": "assert x"}, "expected a list"),
        (MBPP | {"task_id": True}, "'task_id' is True"),
        (MBPP | {"test_setup_code": None}, "'test_setup_code' is None"),
        (MBPP | {"text": 1}, "'text' is 1"),
    ],
)
def test_errors_name_the_line(tmp_path: Path, row: Any, words: str) -> None:
    path = written(tmp_path, HUMANEVAL | {"task_id": "T/9"}, "", row)
    with pytest.raises(DataError) as caught:
        read_problems(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:3: ")
    assert words in message
    assert "\n" not in message


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "torn.gz").write_bytes(gzip.compress(b"x" * 9999)[:-20])
    (tmp_path / "no.gz").write_bytes(b"{}")
    for name in ("absent.jsonl", "torn.gz", "no.gz"):
        with pytest.raises(DataError, match="cannot read the problems"):
            read_problems(tmp_path / name)
    with pytest.raises(DataError, match="no problem in it"):
        read_problems(written(tmp_path, ""))


def test_a_large_file_is_refused_before_it_fills_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LARGEST_FILE", 1000)
    with pytest.raises(DataError, match="no file of problems"):
        read_problems(written(tmp_path, "x" * 100_000, name="bomb.gz"))


@pytest.mark.prove
@confined
def test_published_solutions_pass_and_a_score_counts(tmp_path: Path) -> None:
    problems = read_problems(written(tmp_path, HUMANEVAL, MBPP))
    answers = {
        problems[0].prompt: [
            "    return a + b\ndef add(a, b): return 0",
            "    return a - b",
            "    import sys; sys.exit(0)",
            "    while True: pass",
        ],
        problems[1].prompt: [
            MBPP["code"],
            MBPP["code"],
            "def double(x): return x + 2",
            "def double(x): import os; os.kill(os.getpid(), 9)",
        ],
    }
    heard: list[tuple[int, int]] = []
    report = score(
        problems,
        lambda prompt, samples: answers[prompt][:samples],
        4,
        [1, 2, 4],
        SandboxLimits(4.0, 256 << 20, 1 << 20, 2),
        lambda *told: heard.append(told),
    )
    assert [(one.task_id, one.samples, one.correct) for one in report.problems] == [("T/0", 4, 1), ("MBPP/11", 4, 2)]
    assert report.pass_at_k_percent == pytest.approx({1: 37.5, 2: 100 * (1 / 2 + 5 / 6) / 2, 4: 100.0})
    assert report.outcomes == {"passed": 3, "failed": 3, "timed_out": 1, "killed": 1}
    assert report.problems[0].outcomes == {"passed": 1, "failed": 2, "timed_out": 1, "killed": 0}
    assert report.problems[0].first_failure == "ended with exit status 1: AssertionError"
    assert heard[-1] == (8, 8)
    assert [done for done, _ in heard] == sorted(done for done, _ in heard)
    told = parse_json(canonical_json(report.as_json()))
    assert told["pass_at_k_percent"]["1"] == pytest.approx(37.5)
    assert told["problems"][1]["task_id"] == "MBPP/11"
    assert told["limits"]["disk_bytes"] == 1 << 20


def sandboxes(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    monkeypatch.setattr(module, "reason_unavailable", lambda: None)
    monkeypatch.setattr(module, "judged", run)


PROBLEMS = [Problem(f"T/{number}", f"p{number}", "assert x", "") for number in range(5)]


def test_as_many_sandboxes_as_processors_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    together, lock, now, most = threading.Barrier(3), threading.Lock(), 0, 0

    def run(program: str, tests: ProblemTests, limits: SandboxLimits) -> Outcome:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        together.wait(30)  # passes only where three are here at once
        with lock:
            now -= 1
        return Outcome("passed", "", "")

    sandboxes(monkeypatch, run)
    report = score(PROBLEMS, lambda prompt, samples: [prompt] * samples, 6, [1])
    assert most == 3
    assert report.pass_at_k_percent == {1: 100.0}


def test_what_is_wrong_is_said_before_anything_is_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(prompt: str, samples: int) -> list[str]:
        raise AssertionError("generated")

    for problems, ks in (([], [1]), (PROBLEMS, []), (PROBLEMS, [4]), (PROBLEMS, [0])):
        with pytest.raises(ValueError, match="needs a problem"):
            score(problems, never, 3, ks)
    monkeypatch.setattr(module, "reason_unavailable", lambda: "sandbox: no namespaces")
    with pytest.raises(SandboxError, match="no namespaces"):
        score(PROBLEMS, never, 3, [1])


def test_a_generator_that_gives_too_few_and_a_sandbox_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    sandboxes(monkeypatch, lambda *_: Outcome("failed", "", ""))
    with pytest.raises(CompletionError, match="T/0: the generator gave 1 completions for 2"):
        score(PROBLEMS, lambda prompt, samples: ["x"], 2, [1])

    def broken(*_: Any) -> Outcome:
        raise SandboxError("gone")

    sandboxes(monkeypatch, broken)
    with pytest.raises(SandboxError, match="gone"):
        score(PROBLEMS, lambda prompt, samples: ["x"] * samples, 2, [1])


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
def test_a_fifo_in_the_place_of_the_problems_is_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match=r"cannot read the problems \(is not a regular file\)"):
        read_problems(tmp_path / name)
