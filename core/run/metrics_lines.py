"""Lines of metrics.jsonl as they are read: each checked, with its number, in one pass that keeps none of them.

`metrics_lines` gives every line, a damaged one with what is wrong with it, and `damaged_numbers` the numbers of those
alone. `counted_lines` says of each line whether it counts, and if not, which resume went back behind it: two passes
over the file, in memory that does not grow with it. `counted_columns` does so too, and gives step lines many at a time:
it keeps their columns and the other lines, and reads again only what it cannot keep.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from pydantic_core import from_json

from weftrain.core.errors import RunFolderError, file_problem
from weftrain.core.experts_section import ROUTER_MEASURES
from weftrain.core.formats.canonical import parse_json
from weftrain.core.formats.plain_file import UnreadableFileError, plain_lines
from weftrain.core.objectives_section import MEASURES
from weftrain.core.run.step_lines import LineGroup, StepColumns, StepShapes, line_blocks, line_groups

MetricsRecord = dict[str, Any]
MEASURED = ("step", "evaluation", "sample", "score")
# JSON has no such numbers; they are these strings in the file
NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
MAX_STEP = 1 << 53  # beyond it a float does not count by ones
_MAX_NUMBER = 1e300  # JSON may hold integers that no float does
_MAX_TEXT = 10_000
_SHORT = 4096  # bytes of a line that a reader without limits of its own is given
_MAX_SAMPLE = 1_000_000  # characters of a prompt, and of what the model made of it
_LAST_SECOND = 253_402_300_799  # of the year 9999
_MAX_REMEMBERED = 1_000_000  # restarts, and steps measured twice, that a file may tell of
_MAX_SERIES = 1_000  # training and held-out sets
_MAX_KEPT_BYTES = 64 << 20  # of lines that are no columns, between the two passes
_PIECE_BYTES = 400  # that keeping one takes besides


class MetricsLine(NamedTuple):
    """A line of the file, counted from 1. Either `record` is there, or `error` says what is wrong with it."""

    number: int
    data: bytes
    record: MetricsRecord | None
    error: str = ""


class CountedLine(NamedTuple):
    """A checked line. left_by: line of the resume that went behind it; 0: it counts; -1: it was measured again."""

    number: int
    record: MetricsRecord
    left_by: int


def metrics_lines(path: Path) -> Iterator[MetricsLine]:
    """Every whole line of the file; what follows the last line break is torn, and left out. Raises OSError."""
    for number, data in enumerate(plain_lines(path, "metrics"), 1):
        try:
            yield MetricsLine(number, data, checked_line(data))
        except ValueError as error:
            yield MetricsLine(number, data, None, str(error))


def damaged_numbers(
    path: Path, begin: int = 0, first: int = 1, seen: Callable[[bytes], None] = lambda lines: None
) -> list[int]:
    """Numbers, from 1, of the damaged lines; what follows the last line break is not counted. Raises OSError.

    begin, first: byte and number of the line to begin with. seen: is given all lines that are read, in their order.
    """
    found, shapes = list[int](), StepShapes()
    for group in line_groups(path, begin=begin, number=first):
        seen(group.data)
        if group.steps and _are_alike(shapes, group):
            continue
        for number, data in group.lines():
            try:
                checked_line(data)
            except ValueError:
                found.append(number)
    return found


def _are_alike(shapes: StepShapes, group: LineGroup) -> bool:
    """Whether the step lines of a group are alike but for their numbers, and thereby all checked."""
    return shapes.match(group.data) or (_is_new(shapes, group.first) and shapes.match(group.data))


def _is_new(shapes: StepShapes, line: bytes) -> bool:
    try:
        return shapes.note(checked_line(line), line)
    except ValueError:
        return False


def counted_lines(
    path: Path, without: Collection[int] = (), kinds: Collection[str] | None = None
) -> Iterator[CountedLine]:
    """Every line of the file, checked. Nothing where there is no file. Raises RunFolderError for a damaged line, naming
    it.

    without: numbers of damaged lines that are passed over, because the caller is about to move them aside. kinds: those
    wanted; lines of another are only checked. A measurement does not count where a later resume begins before its step,
    or where the same step (and set) is measured again later.
    """
    shapes = StepShapes() if kinds is not None and "step" not in kinds else None
    for line in _counted(path, without, shapes):
        if isinstance(line, CountedLine) and (kinds is None or line.record["kind"] in kinds):
            yield line


def counted_columns(
    path: Path, columns: Callable[[str], bool], upto: int = MAX_STEP, begin: int = 0
) -> Iterator[CountedLine | StepColumns]:
    """`counted_lines`, with consecutive step lines as columns where they differ in their numbers alone, and all count
    or were all left by the same resume.

    columns: whether the figure of that name is wanted; a learning rate is learning_rate/<group>. upto: lines of later
    steps that count come one by one. begin: byte at which a line begins, the first that is read and number 1; which of
    the lines from there on count is seen by these alone.
    """
    return _counted(path, (), StepShapes(columns), upto, begin)


def _counted(
    path: Path, without: Collection[int], shapes: StepShapes | None, upto: int = MAX_STEP, begin: int = 0
) -> Iterator[CountedLine | StepColumns]:
    """shapes: gives step lines as columns, or leaves them out where it takes no columns; None: line by line."""
    taken, alike = (shapes, None) if shapes is not None and shapes.wanted else (None, shapes)
    try:
        cuts, again, pieces = _survey(path, begin, taken)
        repeated = max((key[1] for key in again), default=-1)
        for piece in pieces:
            if (columns := piece.columns) is not None:
                first, last = int(columns.steps.min()), int(columns.steps.max())
                left_by = cuts.first_behind(piece.number, last)
                if left_by and cuts.first_behind(piece.number, first) == left_by:
                    yield columns._replace(left_by=left_by)
                    continue
                if not left_by and first > repeated and last <= upto:
                    yield columns
                    continue
            for group in piece.groups(path):
                if alike is not None and group.steps and _are_alike(alike, group):
                    continue
                for number, data in group.lines():
                    if number not in without:
                        yield _counted_line(path, number, data, cuts, again, begin)
    except FileNotFoundError:
        return
    except OSError as error:
        raise RunFolderError(
            f"{path}: cannot be read: {file_problem(error)}: check the file and its permissions"
        ) from error


class _Piece(NamedTuple):
    """Lines of the file from line `number` on, which take its bytes from `begin` to `end`: as columns, or as they are,
    if they are kept.
    """

    number: int
    begin: int
    end: int
    columns: StepColumns | None = None
    kept: LineGroup | None = None

    def groups(self, path: Path) -> Iterable[LineGroup]:
        """The lines themselves."""
        return (
            line_groups(path, begin=self.begin, number=self.number, stop=self.end) if self.kept is None else [self.kept]
        )


def _add_piece(pieces: list[_Piece], group: LineGroup, columns: StepColumns | None, room: int) -> None:
    """Add a group behind the pieces before it. room: bytes; if the group takes more, it is not kept."""
    begin = pieces[-1].end
    end = begin + len(group.data)
    if columns is None and len(group.data) > room:
        last = pieces[-1]
        if last.columns is None and last.kept is None:
            pieces[-1] = last._replace(end=end)  # read again with the lines before it
            return
        pieces.append(_Piece(group.number, begin, end))
        return
    pieces.append(_Piece(group.number, begin, end, columns, group if columns is None else None))


def _block_columns(shapes: StepShapes | None, block: bytes, groups: Sequence[LineGroup]) -> dict[int, StepColumns]:
    """Of a block's groups of step lines that can be taken as columns these, by the number of the first line."""
    steps = [group for group in groups if group.steps]
    if shapes is None or not steps:
        return {}
    if (found := shapes.columns(steps, block)) is not None:  # as nearly always
        return {group.number: columns for group, columns in zip(steps, found, strict=True)}
    one_by_one = {}
    for group in steps:
        own = shapes.columns([group], group.data)
        if own is None and _is_new(shapes, group.first):
            own = shapes.columns([group], group.data)
        if own is not None:
            one_by_one[group.number] = own[0]
    return one_by_one


def _counted_line(
    path: Path, number: int, data: bytes, cuts: _Cuts, again: Mapping[tuple[Any, ...], int], begin: int
) -> CountedLine:
    try:
        record = checked_line(data)
    except ValueError as error:
        before = sum(group.size for group in line_groups(path, stop=begin))
        raise RunFolderError(
            f"{path}:{before + number}: not a metrics line: {error}: start the run again (`weftrain train`, also where "
            "it is complete), which moves the line to metrics.torn"
        ) from error
    left_by = 0
    if (cuts.lines or again) and record["kind"] in MEASURED:
        left_by = cuts.first_behind(number, record["step"])
        if not left_by and again.get(measurement(record), number) != number:
            left_by = -1
    return CountedLine(number, record, left_by)


def checked_line(data: bytes) -> MetricsRecord:
    """What a line says, with numbers that are not finite as floats. Raises ValueError for what is no line."""
    if (saved := _CHECKPOINT_LINE.fullmatch(data)) is not None:  # a month leaves tens of thousands, all alike
        return {"kind": "checkpoint", "time": float(saved[1]), "step": int(saved[2]), "root": saved[3].decode()}
    record = _parsed(data)
    check_record(record)
    return _restored(record) if b'nan"' in data or b'inf"' in data else record


def _parsed(data: bytes) -> Any:
    """What `parse_json` gives, in half the time for a line as this program writes it.

    The fast reader keeps the last of two equal keys. So it is believed only where no text holds a quotation mark and no
    key stands apart from its colon, and there are as many keys as quotation marks before colons.
    """
    if len(data) < _SHORT and b"\\" not in data and b" :" not in data and b"\t" not in data and b"\r" not in data:
        try:
            record = from_json(data, allow_inf_nan=False)
        except ValueError:
            return parse_json(data)  # says what is wrong
        if type(record) is dict:
            keys = len(record) + sum(len(value) for value in record.values() if type(value) is dict)
            if data.count(b'":') == keys:
                return record
    return parse_json(data)


def measurement(record: MetricsRecord) -> tuple[Any, ...]:
    """What a step, evaluation or sample record measured: of two with the same, the later one counts."""
    kind, step = record["kind"], record["step"]
    if kind == "sample":
        return (kind, step, kind, record["prompt"])
    return (kind, step) if kind == "step" else (kind, step, record["set"])


def _survey(
    path: Path, begin: int, shapes: StepShapes | None
) -> tuple[_Cuts, dict[tuple[Any, ...], int], Sequence[_Piece]]:
    """The file's resumes, the last line of each measurement repeated between two of them, and its lines in pieces.

    shapes: gives the columns of step lines; without it, nothing of the file is kept. What a run appends later is not
    in the pieces.
    """
    resumes: list[tuple[int, int]] = []
    reached: dict[Any, int] = {}  # series -> the step after which its measurements are new
    again: dict[tuple[Any, ...], int] = {}
    repeated, pieces = -1, [_Piece(1, begin, begin)]
    room = 0 if shapes is None else _MAX_KEPT_BYTES
    for block, groups in line_blocks(path, begin=begin):
        taken = _block_columns(shapes, block, groups)
        for group in groups:
            columns, steps = taken.get(group.number), list[int]()
            _add_piece(pieces, group, columns, room)
            if columns is not None:
                steps = columns.steps.tolist()
            elif group.steps:
                steps = [int(step) for step in _STEP_LINES.findall(group.data)]
            if columns is None:
                room -= len(group.data) + _PIECE_BYTES
            if len(steps) == group.size and steps[0] > max(reached.get((), -1), repeated) and _ascend(steps):
                reached[()] = steps[-1]
                continue
            repeated = _survey_lines(group, resumes, reached, again, repeated)
            if len(again) > _MAX_REMEMBERED or len(reached) > _MAX_SERIES:
                raise UnreadableFileError(
                    f"has more than {_MAX_REMEMBERED:,} steps measured twice, or {_MAX_SERIES:,} sets: no run writes "
                    "this",
                    path,
                )
    if len(resumes) > _MAX_REMEMBERED:
        raise UnreadableFileError(f"has more than {_MAX_REMEMBERED:,} restarts: no run writes this", path)
    return _Cuts(resumes), again, pieces


def _survey_lines(
    group: LineGroup,
    resumes: list[tuple[int, int]],
    reached: dict[Any, int],
    again: dict[tuple[Any, ...], int],
    repeated: int,
) -> int:
    """Note what the lines of a group tell, one by one. The highest step that is repeated so far."""
    for number, data in group.lines():
        # as this program writes it: the second pass checks it
        if found := _STEP_LINES.match(data):
            key: tuple[Any, ...] = ("step", int(found[1]))
        elif found := _EVALUATION_LINES.match(data):
            key = ("evaluation", int(found[1]), found[2].decode(errors="replace"))
        elif data.startswith(_CHECKPOINT):
            continue
        else:
            try:
                record = _parsed(data)
                check_record(record)
            except ValueError:
                continue  # the second pass names it
            if record["kind"] == "resume":
                resumes.append((number, record["step"]))
                reached.update({series: min(step, record["step"]) for series, step in reached.items()})
            if record["kind"] not in MEASURED:
                continue
            key = measurement(record)
        series = key[2:]
        if key[1] <= reached.get(series, -1):
            again[key], repeated = number, max(repeated, key[1])
        else:
            reached[series] = key[1]
            if key in again:
                again[key] = number
    return repeated


def _ascend(steps: Sequence[int]) -> bool:
    return all(map(operator.lt, steps, islice(steps, 1, None)))


class _Cuts:
    """Resumes in the order of their lines; which of them first went back behind a step, in logarithmic time."""

    def __init__(self, resumes: Sequence[tuple[int, int]]) -> None:
        self.lines = [line for line, _ in resumes]
        self._steps = [step for _, step in resumes] + [-1]  # the last stands for none
        none, self._next = len(resumes), 0
        lower, open_ = [none] * (none + 1), list[int]()  # the next resume from a lower step
        for index in range(none):
            while open_ and self._steps[open_[-1]] > self._steps[index]:
                lower[open_.pop()] = index
            open_.append(index)
        self._jumps = [lower]  # then two such steps at once, four, ..
        while any(target != none for target in self._jumps[-1]):
            last = self._jumps[-1]
            self._jumps.append([last[target] for target in last])

    def first_behind(self, line: int, step: int) -> int:
        """Line of the first resume after `line` from before `step`; 0: none. Ask for lines in ascending order."""
        while self._next < len(self.lines) and self.lines[self._next] < line:
            self._next += 1
        index = self._next
        if index == len(self.lines):
            return 0
        if self._steps[index] >= step:
            for jump in reversed(self._jumps):
                if self._steps[jump[index]] >= step:
                    index = jump[index]
            index = self._jumps[0][index]
        return self.lines[index] if index < len(self.lines) else 0


# What a line may hold


def _is_number(value: Any) -> bool:
    if type(value) is float:
        return True
    return (
        value in ("nan", "inf", "-inf")
        if type(value) is str
        else type(value) is int and -_MAX_NUMBER < value < _MAX_NUMBER
    )


def _is_step(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_STEP


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MAX_NUMBER


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= _LAST_SECOND


def _is_text(value: Any) -> bool:
    return type(value) is str and len(value) <= _MAX_TEXT


def _is_long_text(value: Any) -> bool:
    return type(value) is str and len(value) <= _MAX_SAMPLE


def _is_rates(value: Any) -> bool:
    return type(value) is dict and all(type(rate) is float or _is_number(rate) for rate in value.values())


def _is_utilization(value: Any) -> bool:
    return _is_number(value) or _is_text(value)  # "unknown"


# key -> what it must be, wherever it stands. Any other key is kept unchecked, since backends add their own (Run.stats):
# a key that this program reads is listed here.
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "kind": (_is_text, "text"),
    "time": (_is_time, "seconds since 1970"),
    "step": (_is_step, "completed steps"),
    "set": (_is_text, "a set's name"),
    "rows": (_is_count, "a count"),
    "rows_available": (_is_count, "a count"),
    "dataset_id": (_is_text, "a hash"),
    "evaluation_s": (_is_number, "a number"),
    "metric": (_is_text, "a metric's name"),
    "value": (_is_number, "a number"),
    "stderr": (_is_number, "a number"),
    "metrics": (_is_rates, "numbers by metric"),
    "samples": (_is_count, "a count"),
    "loss": (_is_number, "a number"),
    **dict.fromkeys((*MEASURES, *ROUTER_MEASURES), (_is_number, "a number")),
    "perplexity": (_is_number, "a number"),
    "grad_norm": (_is_number, "a number"),
    "learning_rate": (_is_rates, "numbers by parameter group"),
    "tokens": (_is_count, "a count"),
    "bearing_tokens": (_is_count, "a count"),
    "tokens_per_second": (_is_number, "a number"),
    "step_ms": (_is_number, "a number"),
    "data_wait_ms": (_is_number, "a number"),
    "model_flops_utilization": (_is_utilization, "a number or 'unknown'"),
    "skipped": (lambda value: type(value) is bool, "true or false"),
    "root": (_is_text, "a hash"),
    "kernels": (lambda value: value is None or type(value) is dict, "a mapping"),
    "peak_flops": (lambda value: value is None or _is_number(value), "a number"),
    "peak_origin": (_is_text, "text"),
    "peak_machine": (_is_text, "text"),
    "flops_per_token": (_is_number, "a number"),
    "preparation_s": (_is_number, "a number"),
    "torn_lines": (_is_count, "a count"),
    "prompt": (_is_long_text, "text"),
    "text": (_is_long_text, "text"),
    "problem": (_is_text, "text"),
}
# what only a line of one kind has
_FIELDS_OF: dict[str, dict[str, tuple[Callable[[Any], bool], str]]] = {
    "alert": {
        "rule": (_is_text, "a rule's name"),
        "action": (_is_text, "text"),
        "words": (_is_text, "text"),
        "value": (_is_number, "a number"),
    },
}
_FLOATS = frozenset(key for key, (check, _) in _FIELDS.items() if check is _is_number)
_REQUIRED = {
    "step": ("step", "loss"),
    "evaluation": ("step", "set", "loss"),
    "score": ("step", "set", "metric", "value"),
    "sample": ("step", "prompt", "text"),
    "resume": ("step",),
    "alert": ("step",),
}
_TEXTS = ("kind", "set", "metric", "prompt", "text", "problem")  # where "nan" is a word
_STEP_LINES = re.compile(rb'(?m)^\{"kind": "step", "time": [0-9.e+]{1,30}, "step": ([0-9]{1,15}), ".*$')
_EVALUATION_LINES = re.compile(
    rb'\{"kind": "evaluation", "time": [0-9.e+]{1,30}, "step": ([0-9]{1,15}), "set": "([^"\\]{0,10000})", '
)
_CHECKPOINT = b'{"kind": "checkpoint", '
_CHECKPOINT_LINE = re.compile(
    rb'\{"kind": "checkpoint", "time": ((?:0|[1-9][0-9]{0,10})\.[0-9]{1,25}), "step": (0|[1-9][0-9]{0,14}), '
    rb'"root": "([0-9a-f]{64})"\}'
)


def check_record(record: Any) -> None:
    """Raises ValueError, naming the key, for what is no line of metrics. Unknown kinds of events are lines."""
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        raise ValueError("it has no kind")
    kind = record["kind"]
    for key, (holds, what) in _FIELDS_OF.get(kind, {}).items():
        if not holds(record.get(key)):
            raise ValueError(f"key '{key}' of a line of kind {kind} is not {what}")
    for key in _REQUIRED.get(kind, ()):
        if key not in record:
            raise ValueError(f"a line of kind {kind} without '{key}'")
    for key, value in record.items():
        if type(value) is float and key in _FLOATS:
            continue  # most of what a file holds: a million lines are read in some seconds
        check = _FIELDS.get(key)
        if check is not None and not check[0](value):
            raise ValueError(f"key '{key[:80]}' is not {check[1]}")


def _restored(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: item if key in _TEXTS else _restored(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_restored(item) for item in value]
    return NON_FINITE.get(value, value) if isinstance(value, str) else value
