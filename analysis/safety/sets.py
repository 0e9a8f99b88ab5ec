"""Sets of the safety analyses: rows of JSON lines, CSV, Parquet or plain text, read from the user's folder.

Nothing is downloaded: a set that is not there is named with the place to get it. Every file is bound to what was
measured with it by its SHA-256.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weftrain.core.errors import DataError, file_problem, one_line
from weftrain.core.formats.canonical import parse_json
from weftrain.core.formats.plain_file import read_plain

ENDINGS = (".jsonl", ".csv", ".parquet", ".txt")
_LONGEST_CELL = 1 << 24  # characters of a cell in a CSV file

Row = dict[str, Any]


@dataclass(frozen=True)
class SafetySet:
    """Rows of one file. places: where each row stands, for messages. sha256: of the file's bytes."""

    path: Path
    sha256: str
    rows: tuple[Row, ...]

    def place(self, index: int) -> str:
        return f"{self.path}: row {index + 1}"


def find_file(folder: Path, name: str, endings: Collection[str] = ENDINGS) -> Path | None:
    """The file of a set in a folder, whatever its format; None where there is none. Raises DataError for two."""
    found = [path for ending in endings if (path := folder / f"{name}{ending}").exists()]
    if len(found) > 1:
        raise DataError(f"{found[0]}: {found[1].name} is of the same set: move one of them away")
    return found[0] if found else None


def missing(folder: Path, name: str, source: str) -> DataError:
    """The error of a set that is not there. source: where it can be had."""
    return DataError(f"{folder / name}: there is no such set ({', '.join(ENDINGS)}): {source}")


def read_set(path: Path, columns: Sequence[str], optional: Collection[str] = ()) -> SafetySet:
    """The rows of a file, each with these columns and with those of `optional` that the file has.

    Rows of .txt have the column `text`, one a line. Cells of CSV are text; empty cells are "". Raises DataError: not
    readable, not UTF-8, damaged, without a column, or without a row.
    """
    try:
        data = read_plain(path, "evaluation set")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {file_problem(error)}: correct the file or its place") from error
    reader = {".jsonl": _json_lines, ".csv": _csv, ".parquet": _parquet, ".txt": _text_lines}.get(path.suffix)
    if reader is None:
        raise DataError(f"{path}: is neither of {', '.join(ENDINGS)}: write it as one of them")
    wanted = [*columns, *optional]
    rows = reader(path, data, wanted)
    if not rows:
        raise DataError(f"{path}: holds no row: get the set again, or leave it out")
    for index, row in enumerate(rows):
        if absent := [name for name in columns if name not in row]:
            raise DataError(
                f"{path}: row {index + 1} has no column '{absent[0]}'; it has {', '.join(map(str, row)) or 'none'}: "
                "name the columns as the published set does"
            )
    kept = tuple({name: row[name] for name in wanted if name in row} for row in rows)
    return SafetySet(path, hashlib.sha256(data).hexdigest(), kept)


def text_of(found: SafetySet, index: int, column: str) -> str:
    """A cell that must hold text. Raises DataError for another type or nothing but white space."""
    value = found.rows[index][column]
    if not isinstance(value, str) or not value.strip():
        what = "is empty" if isinstance(value, str) else f"is {type(value).__name__}, not text"
        raise DataError(f"{found.place(index)}: '{column}' {what}: correct or remove the row")
    return value


def _decoded(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}: line {line} is not UTF-8 (byte {error.start}): convert the file, with iconv -t UTF-8 for one"
        ) from None


def _json_lines(path: Path, data: bytes, columns: Sequence[str]) -> list[Row]:
    rows = []
    for number, line in enumerate(_decoded(path, data).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line.encode())
        except ValueError as error:
            raise DataError(f"{path}: line {number} is not JSON ({error}): write one object a line") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}: line {number} is no JSON object: write one object a line")
        rows.append(row)
    return rows


def _csv(path: Path, data: bytes, columns: Sequence[str]) -> list[Row]:
    before = csv.field_size_limit(_LONGEST_CELL)
    try:
        reader = csv.DictReader(io.StringIO(_decoded(path, data), newline=""), strict=True)
        rows: list[Row] = []
        for row in reader:
            if None in row or None in row.values():
                raise DataError(
                    f"{path}: line {reader.line_num} has {'more' if None in row else 'fewer'} cells than the "
                    "header: correct it"
                )
            rows.append(row)
        return rows
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num} is not CSV ({error}): correct it") from None
    finally:
        csv.field_size_limit(before)


def _parquet(path: Path, data: bytes, columns: Sequence[str]) -> list[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: reading .parquet needs pyarrow: pip install 'weftrain[data]'") from None
    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data))
        names = file.schema_arrow.names
        rows: list[Row] = file.read(columns=[name for name in columns if name in names]).to_pylist()
        return rows
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: is damaged: {one_line(error)}: get the set again") from error


def _text_lines(path: Path, data: bytes, columns: Sequence[str]) -> list[Row]:
    lines = _decoded(path, data).replace("\r\n", "\n").split("\n")
    return [{"text": line} for line in lines if line.strip()]
