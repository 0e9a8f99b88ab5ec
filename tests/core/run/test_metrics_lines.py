"""Lines of metrics.jsonl: which count, held to a plain model that keeps everything; what is refused; and memory that
does not grow.
"""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weftrain.core.errors import RunFolderError
from weftrain.core.run import metrics_lines as metrics_lines_module
from weftrain.core.run import step_lines
from weftrain.core.run.metrics import METRICS, effective_records, read_metrics
from weftrain.core.run.metrics_lines import (
    MAX_STEP,
    StepColumns,
    checked_line,
    counted_columns,
    counted_lines,
    damaged_numbers,
    metrics_lines,
)

Records = list[dict[str, Any]]


def write(folder: Path, records: Records) -> Path:
    (folder / METRICS).write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder / METRICS


def model(records: Records) -> tuple[Records, dict[int, int]]:
    """What counts, in order; and for each line that a resume went back behind, that resume's line. All is kept, and
    looked at again.
    """
    left: dict[int, int] = {}
    counted: dict[Any, int] = {}
    for number, record in enumerate(records, 1):
        if record["kind"] == "resume":
            for key, line in list(counted.items()):
                if key[0] != "event" and key[1] > record["step"]:
                    left[counted.pop(key)] = number
                    assert line < number
        key = ("event", number)
        if record["kind"] in ("step", "evaluation", "sample"):
            key = (record["kind"], record["step"], record.get("set"), record.get("prompt"))
        counted.pop(key, None)
        counted[key] = number
    return [records[line - 1] for line in counted.values()], left


STEPS = st.integers(0, 8)
RECORDS = st.lists(
    st.one_of(
        st.builds(lambda step: {"kind": "step", "time": 1.0, "step": step, "loss": 1.0}, STEPS),
        st.builds(
            lambda step, name: {"kind": "evaluation", "step": step, "set": name, "loss": 1.0},
            STEPS,
            st.sampled_from("ab"),
        ),
        st.builds(
            lambda step, prompt: {"kind": "sample", "step": step, "prompt": prompt, "text": "x"},
            STEPS,
            st.sampled_from("ab"),
        ),
        st.builds(lambda step: {"kind": "resume", "step": step}, STEPS),
        st.just({"kind": "checkpoint", "step": 3}),
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(records=RECORDS)
def test_what_counts_is_what_a_model_that_keeps_everything_says(
    records: Records, tmp_path_factory: pytest.TempPathFactory
) -> None:
    numbered = [record | {"n": number} for number, record in enumerate(records)]  # so that no two are equal
    path = write(tmp_path_factory.mktemp("run"), numbered)
    counted, left = model(numbered)
    assert read_metrics(path.parent) == counted
    # A measurement that was made again and then went back behind is left by the resume that the model has, or was
    # measured again.
    found = {line.number: line.left_by for line in counted_lines(path) if line.left_by}
    assert {number: by for number, by in found.items() if by > 0 and number in left} == {
        n: by for n, by in left.items() if found[n] > 0
    }
    assert set(left) <= set(found)


@settings(max_examples=60, deadline=None)
@given(records=RECORDS, block=st.sampled_from([64, 200, 1 << 20]))
def test_columns_hold_what_the_lines_do(records: Records, block: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = write(tmp_path_factory.mktemp("run"), [record | {"n": number} for number, record in enumerate(records)])
    found: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_lines, "_BLOCK_BYTES", block)
        for line in counted_columns(path, ("loss", "n").__contains__):
            if isinstance(line, StepColumns):
                figures = (line.steps, line.column("loss"), line.column("n"))
                found += [(*values, line.left_by) for values in zip(*map(np.ndarray.tolist, figures), strict=True)]
                assert checked_line(line.last)["n"] == found[-1][2] == line.number - 1
            else:
                found.append((line.record["step"], line.record.get("loss"), line.record["n"], line.left_by))
    assert found == [
        (line.record["step"], line.record.get("loss"), line.record["n"], line.left_by) for line in counted_lines(path)
    ]


STEP = {"kind": "step", "time": 1.5, "step": 1, "loss": 2.5, "learning_rate": {"a": 1e-05, "b": 0.0}, "skipped": False}
DAMAGES = {
    "a figure that is no number": ('"loss": 2.5', '"loss": 02.5'),
    "a figure with two points": ('"loss": 2.5', '"loss": 2.5.5'),
    "a figure that is a sign alone": ('"loss": 2.5', '"loss": -'),
    "a figure that is a difference": ('"loss": 2.5', '"loss": 2-5'),
    "a figure behind a plus": ('"loss": 2.5', '"loss": +2.5'),
    "a step with a fraction": ('"step": 3', '"step": 3.5'),
    "a line that a crash tore, and the next one": ('"step": 3', '{"kind": "step", "time": 1.5, "step": 3'),
    "what follows a line": ('"skipped": false}', '"skipped": false} '),
    "a key that stands twice": ('"skipped": false}', '"skipped": false, "skipped": false}'),
    "one apart from its colon": ('"skipped": false}', '"skipped": false, "skipped" : false, "x": ":"}'),
    "a time before 1970": ('"time": 1.5', '"time": -1.5'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_line_among_many_alike_is_found(damage: str, tmp_path: Path) -> None:
    path = write(tmp_path, [STEP | {"step": step} for step in range(1, 9)])
    lines = path.read_text().splitlines()
    good, bad = DAMAGES[damage]
    assert good in lines[2]
    lines[2] = lines[2].replace(good, bad)
    path.write_text("".join(line + "\n" for line in lines))
    blank_at_the_end = damage == "what follows a line"
    assert damaged_numbers(path) == ([] if blank_at_the_end else [3])
    read = [line.number for line in counted_lines(path, without=damaged_numbers(path))]
    assert read == [number for number in range(1, 9) if blank_at_the_end or number != 3]
    if not blank_at_the_end:
        with pytest.raises(RunFolderError, match=r":3: not a metrics line"):
            list(counted_columns(path, ("loss", "skipped").__contains__))


ROOT = "0123456789abcdef" * 4
SAVED = f'{{"kind": "checkpoint", "time": 1796059606.5041122, "step": 4771, "root": "{ROOT}"}}'
CHECKPOINTS = {
    "as written": (SAVED, True),
    "with another key": (SAVED.replace('"step"', '"seconds": 2.5, "step"'), True),
    "at a whole second": (SAVED.replace("1796059606.5041122", "1796059606"), True),
    "without a root": (SAVED.replace(f', "root": "{ROOT}"', ""), True),
    "with a key twice": (SAVED.replace('"step": 4771', '"step": 4771, "step": 1'), False),
    "of a step with a fraction": (SAVED.replace("4771", "4771.5"), False),
    "of a step below 0": (SAVED.replace("4771", "-4771"), False),
    "of a step with a leading 0": (SAVED.replace("4771", "04771"), False),
    "of a root that is a number": (SAVED.replace(f'"{ROOT}"', "12"), False),
    "with something behind it": (SAVED + "x", False),
}


@pytest.mark.parametrize("how", CHECKPOINTS)
def test_a_line_of_a_checkpoint_says_what_its_json_does(how: str) -> None:
    line, valid = CHECKPOINTS[how]
    if valid:
        assert checked_line(line.encode()) == json.loads(line)
        assert [*checked_line(line.encode())] == [*json.loads(line)]
    else:
        with pytest.raises(ValueError):
            checked_line(line.encode())


def test_a_month_of_lines_is_read_by_their_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a thousand step lines that are alike but for their numbers, the first is taken apart."""
    numbers = [10 ** (step % 30 - 15) * 1.2345678901234567 for step in range(1000)]
    steps = [STEP | {"step": step + 1, "loss": number, "skipped": step % 9 == 0} for step, number in enumerate(numbers)]
    path = write(tmp_path, steps)
    read: list[bytes] = []
    parsed = metrics_lines_module.checked_line
    monkeypatch.setattr(metrics_lines_module, "checked_line", lambda line: read.append(line) or parsed(line))
    assert damaged_numbers(path) == []
    monkeypatch.setattr(step_lines, "_BLOCK_BYTES", 1 << 12)
    lines = list(counted_columns(path, ("loss", "learning_rate/a").__contains__))
    assert [loss for line in lines if isinstance(line, StepColumns) for loss in line.column("loss")] == numbers
    rates = [rate for line in lines if isinstance(line, StepColumns) for rate in line.column("learning_rate/a")]
    assert rates == [1e-05] * 1000
    assert list(counted_lines(path, kinds=("evaluation",))) == []
    assert len(read) == 3


def test_lines_are_found_from_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_lines, "_BLOCK_BYTES", 64)
    path = tmp_path / METRICS
    for whole in ([], ["word 1"], ["word 1", "x" * 200, "word word 2" + "y" * 150, "z", "3 word"]):
        path.write_text("".join(line + "\n" for line in whole) + "a torn word")
        wanted = [line.encode() for line in reversed(whole) if "word" in line]
        assert list(step_lines.lines_from_the_end(path, b"word")) == wanted


def test_the_newest_lines_are_read_without_the_others(tmp_path: Path) -> None:
    path = write(tmp_path, [STEP | {"step": step} for step in range(1, 101)])
    size = path.stat().st_size
    assert [step_lines.newest_lines(path, bytes_) for bytes_ in (size, size + 1)] == [0, 0]
    for bytes_ in (0, 1, 500, size - 1):
        begin = step_lines.newest_lines(path, bytes_)
        assert path.read_bytes()[begin - 1 :].startswith(b"\n")
        assert size - bytes_ <= begin < size - bytes_ + 200
        lines = counted_columns(path, ("loss",).__contains__, begin=begin)
        steps = [step for line in lines if isinstance(line, StepColumns) for step in line.steps]
        assert steps == list(range(101 - len(steps), 101))
    path.write_bytes(path.read_bytes()[:-1] + b"x\n")
    with pytest.raises(RunFolderError, match=rf"{METRICS}:100: not a metrics line"):
        list(counted_columns(path, ("loss",).__contains__, begin=step_lines.newest_lines(path, 500)))


ODD: list[Any] = [None, True, "x", [1], {"a": []}, -1, 10**400]
KEYS: dict[str, list[Any]] = {  # what of ODD each key takes
    "step": [],
    "time": [],
    "loss": [-1],
    "grad_norm": [-1],
    "learning_rate": [],
    "tokens": [],
    "tokens_per_second": [-1],
    "step_ms": [-1],
    "skipped": [True],
    "kind": ["x"],
    "prompt": ["x"],
    "text": ["x"],
    "a_backend_s_own": ODD,
}


@pytest.mark.parametrize("key", KEYS)
def test_a_wrong_type_is_named_with_line_and_key(key: str, tmp_path: Path) -> None:
    good = {"kind": "step", "time": 1.0, "step": 1, "loss": 2.0}
    for odd in ODD:
        write(tmp_path, [good, good | {"step": 2} | {key: odd}])
        if odd in KEYS[key] and (odd is not True or True in KEYS[key]):
            assert len(read_metrics(tmp_path)) == 2
            continue
        with pytest.raises(RunFolderError, match=rf"{METRICS}:2: not a metrics line: .*(key '{key}'|no kind)"):
            list(effective_records(tmp_path))


@pytest.mark.parametrize(
    "record",
    [
        {"kind": "step", "step": 1},
        {"kind": "evaluation", "step": 1, "loss": 1.0},
        {"kind": "sample", "step": 1, "prompt": "a"},
        {"kind": "resume"},
    ],
)
def test_what_is_missing_is_named(record: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, [record])
    with pytest.raises(
        RunFolderError, match=rf"{METRICS}:1: .* of kind {record['kind']} without '(loss|set|step|text)'"
    ):
        read_metrics(tmp_path)


def test_a_step_has_a_bound_and_numbers_need_not_be_finite(tmp_path: Path) -> None:
    write(
        tmp_path,
        [{"kind": "step", "step": MAX_STEP, "loss": "inf", "grad_norm": "nan", "learning_rate": {"a": "-inf"}}],
    )
    (record,) = read_metrics(tmp_path)
    assert (record["loss"], record["learning_rate"]["a"]) == (float("inf"), float("-inf"))
    write(tmp_path, [{"kind": "step", "step": MAX_STEP + 1, "loss": 1.0}])
    with pytest.raises(RunFolderError, match="key 'step' is not completed steps"):
        read_metrics(tmp_path)


def test_damaged_lines_are_given_with_the_others(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_bytes(b'{"kind": "end", "step": 1}\nnoise\n{"kind": "end"}\n{"kind": "step", "torn')
    lines = list(metrics_lines(tmp_path / METRICS))
    assert [(line.number, line.record is None, bool(line.error)) for line in lines] == [
        (1, False, False),
        (2, True, True),
        (3, False, False),
    ]
    assert lines[1].data == b"noise"


def peak_bytes(act: Callable[[], Any]) -> int:
    tracemalloc.start()
    try:
        act()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_lines, "_BLOCK_BYTES", 1 << 13)
    path = write(tmp_path, [{"kind": "step", "time": 1.0, "step": step, "loss": 2.0} for step in range(1, 8001)])
    assert path.stat().st_size > 400_000
    assert peak_bytes(lambda: sum(1 for _ in effective_records(tmp_path))) < 100_000


def test_many_restarts_take_logarithmic_time_each(tmp_path: Path) -> None:
    """Ever lower ones: each record before them is cut by the first, and the last record, of step 1, by the last
    alone.
    """
    records: Records = [{"kind": "step", "step": 1, "loss": 1.0}, {"kind": "step", "step": 5000, "loss": 1.0}]
    records += [{"kind": "resume", "step": step} for step in range(4999, -1, -1)]
    found = [line.left_by for line in counted_lines(write(tmp_path, records))]
    assert found[:2] == [len(records), 3]
