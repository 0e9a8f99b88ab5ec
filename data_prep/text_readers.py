"""Text documents of one share of one file: JSON lines, Parquet, plain text, Python sources.

What a reader would get wrong: nothing is repaired, and nothing is skipped in silence. A record that cannot be read is a Failure with its
place and a remedy, and reading goes on after it; a file that is damaged as a whole is a DataError, since what follows is lost.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Generator, Iterator
from typing import Any

from weftrain.core.canonical import parse_json
from weftrain.core.errors import DataError
from weftrain.data_prep.documents import Document, Failure, InputFile, Share
from weftrain.data_prep.input_files import is_cut_by_bytes, is_local, open_decompressed, open_file
from weftrain.data_prep.normalisation import normalise
from weftrain.data_prep.read_options import ReadOptions

Records = Generator["Document | Failure", None, int]  # returns how many records the share holds
_PARQUET_ROWS = 512  # of a batch
_BROKEN_ARCHIVE = (EOFError, OSError, zlib.error)


def read_lines(file: InputFile, share: Share) -> Generator[tuple[int, bytes | None], None, int]:
    """(line number within the share, the line) of each line that begins within the share; None for one that is too long.

    Returns how many there are. Raises DataError where the file cannot be read to its end.
    """
    number = 0
    try:
        with open_decompressed(file) as opened:
            position, end = 0, None
            if is_cut_by_bytes(file):
                position, end = share.begin, share.end
                if position:
                    opened.seek(position - 1)
                    position += len(opened.readline()) - 1  # the rest of a line that began before
            while end is None or position < end:
                line = opened.readline(ReadOptions.max_line_bytes + 1)
                if not line:
                    break
                position += len(line)
                if len(line) > ReadOptions.max_line_bytes and not line.endswith(b"\n"):
                    while (rest := opened.readline(1 << 20)) and not rest.endswith(b"\n"):
                        position += len(rest)
                    position += len(rest)
                    yield number, None
                else:
                    yield number, line
                number += 1
    except _BROKEN_ARCHIVE as error:
        raise DataError(f"{file.address}: damaged or truncated: {error}; copy it again") from error
    return number


def json_lines(index: int, file: InputFile, share: Share, options: ReadOptions) -> Records:
    """One JSON object a line, the text under options.text_key."""
    lines = read_lines(file, share)
    while True:
        try:
            number, line = next(lines)
        except StopIteration as stop:
            records: int = stop.value
            return records
        if line is not None and not line.strip():
            continue
        yield _json_document(index, number, line, file, options)


def parse_object(line: bytes | None) -> dict[str, Any] | str:
    """The object of a line, or what is wrong with it."""
    if line is None:
        return f"the line is longer than {ReadOptions.max_line_bytes:,} bytes; split the document"
    try:
        value = parse_json(line)
    except UnicodeDecodeError as error:
        return f"byte {error.start} of the line is not UTF-8 ({error.reason}); convert the file to UTF-8"
    except ValueError as error:
        return f"not JSON: {error}; each line must be one JSON object"
    return value if isinstance(value, dict) else "not a JSON object; each line must be one"


def _json_document(index: int, number: int, line: bytes | None, file: InputFile, options: ReadOptions) -> Document | Failure:
    value = parse_object(line)
    if isinstance(value, str):
        return Failure(index, number, value)
    if options.text_key not in value:
        return Failure(index, number, f"no field '{options.text_key}'; name the field that holds the text with --text-key")
    text = value[options.text_key]
    if not isinstance(text, str):
        return Failure(index, number, f"field '{options.text_key}' holds {type(text).__name__}, not text")
    if line is not None and b"\\u" in line and has_lone_surrogate(text):  # without an escape, strict UTF-8 has excluded it
        return Failure(index, number, f"field '{options.text_key}' holds a lone surrogate, which is no character; repair the line")
    source: Any = file.source
    if options.source_key is not None:
        source = value.get(options.source_key)
        if not isinstance(source, str) or not source or has_lone_surrogate(source):
            return Failure(index, number, f"field '{options.source_key}' holds no source's name; repair it, or leave --source-key out")
    return Document(index, number, source, normalise(text, options.normalise))


def has_lone_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def plain_text(index: int, file: InputFile, share: Share, options: ReadOptions) -> Records:
    """A file, a document."""
    try:
        with open_decompressed(file) as opened:
            data = opened.read(options.max_line_bytes + 1)
    except _BROKEN_ARCHIVE as error:
        raise DataError(f"{file.address}: damaged or truncated: {error}; copy it again") from error
    if len(data) > options.max_line_bytes:
        yield Failure(index, 0, f"holds more than {options.max_line_bytes:,} bytes in one document; split it")
        return 1
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start)
        yield Failure(index, line, f"byte {error.start} is not UTF-8 ({error.reason}); convert the file to UTF-8")
        return 1
    yield Document(index, 0, file.source, normalise(text, options.normalise))
    return 1


def python_source(index: int, file: InputFile, share: Share, options: ReadOptions) -> Records:
    """A module of the embedded corpus: its source, and its documentation strings where they are long enough."""
    from weftrain.data_prep import corpus

    with open_file(file) as opened:
        text = corpus.source_text(opened.read(), file.address)
    yield Document(index, 0, corpus.SOURCES, text)
    documentation = corpus.documentation_text(text, file.name)
    if len(documentation) >= corpus.MIN_DOCUMENTATION_CHARACTERS:
        owner = hashlib.sha256(text.encode()).digest()
        yield Document(index, 1, corpus.DOCUMENTATION, documentation, belongs_to=owner)
    return 2


def open_parquet(file: InputFile) -> Any:
    """A pyarrow ParquetFile. Raises DataError."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise DataError("reading .parquet needs pyarrow: pip install 'weftrain[data]'") from None
    try:
        return ParquetFile(file.address if is_local(file.address) else open_file(file))
    except (ArrowException, OSError) as error:
        raise DataError(f"{file.address}: cannot be read as Parquet: {_one_line(error)}; copy it again") from error


def parquet_rows(index: int, file: InputFile, share: Share, options: ReadOptions) -> Records:
    """Rows of a Parquet file's row groups, the text in the column options.text_key; a few hundred rows in memory at once."""
    opened = open_parquet(file)
    keys = [options.text_key] + ([options.source_key] if options.source_key is not None else [])
    for key in keys:
        if key not in opened.schema_arrow.names:
            raise DataError(f"{file.address}: has no column '{key}' but {', '.join(opened.schema_arrow.names)}; name it with --text-key")
        kind = str(opened.schema_arrow.field(key).type)
        if kind not in ("string", "large_string", "string_view"):
            raise DataError(f"{file.address}: column '{key}' holds {kind}, not text; name another with --text-key")
    groups = list(range(share.begin, share.end if share.end != -1 else opened.num_row_groups))
    number = 0
    for batch in _batches(file, opened, groups, keys):
        columns = [batch.column(key).to_pylist() for key in keys]
        for values in zip(*columns, strict=True):
            if any(value is None for value in values):
                yield Failure(index, number, f"column '{keys[values.index(None)]}' is null; give it a text, or leave the row out")
            else:
                source = values[1] if len(values) > 1 else file.source
                yield Document(index, number, source, normalise(values[0], options.normalise))
            number += 1
    return number


def _batches(file: InputFile, opened: Any, groups: list[int], keys: list[str]) -> Iterator[Any]:
    from pyarrow import ArrowException

    try:
        for batch in opened.iter_batches(_PARQUET_ROWS, row_groups=groups, columns=keys):
            batch.validate(full=True)  # UTF-8 too, which a damaged file need not hold
            yield batch
    except (ArrowException, OSError) as error:
        raise DataError(f"{file.address}: damaged: {_one_line(error)}; copy it again") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
