"""Text columns of Arrow batches, for Parquet and Arrow files: finding them, and making documents of their rows.

A key is a column's name, or a path of struct fields with dots. Text is any Arrow string type, UTF-8 bytes, or a
dictionary of either. Input files are not trusted: offsets are validated, and UTF-8 row by row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from weftrain.core.errors import DataError, one_line
from weftrain.data_prep.conversations.messages import NoConversationError, columns_of
from weftrain.data_prep.conversations.preferences import preference_columns
from weftrain.data_prep.readers.documents import Document, Failure, InputFile
from weftrain.data_prep.readers.json_objects import record_document
from weftrain.data_prep.readers.normalisation import normalise
from weftrain.data_prep.readers.read_options import ReadOptions
from weftrain.data_prep.weights import weight_in

BATCH_ROWS = 512
BATCH_BYTES = 8 << 20
# without the promise of UTF-8
_BYTES = {"string": "binary", "large_string": "large_binary", "string_view": "binary_view"}
_TEXT = (*_BYTES, *_BYTES.values())
_NUMBERS = ("halffloat", "float", "double", *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)))
_SHOWN_NAMES = 20


@dataclass(frozen=True)
class ArrowColumn:
    """key: as asked for. path: field names from the top down."""

    key: str
    path: tuple[str, ...]


@dataclass(frozen=True)
class TextColumns:
    """The column of texts, and those of sources and weights if asked for. conversation: instead of a text, the columns
    that may hold parts of a conversation or preference.
    """

    text: ArrowColumn | None
    source: ArrowColumn | None
    conversation: tuple[str, ...] = ()
    weight: ArrowColumn | None = None

    @property
    def paths(self) -> list[tuple[str, ...]]:
        named = [column.path for column in (self.text, self.source, self.weight) if column is not None]
        return named + [(name,) for name in self.conversation]


def find_columns(file: InputFile, schema: Any, options: ReadOptions) -> TextColumns:
    """Raises DataError for a key without a column, with several, or with one that holds no text."""
    source = None if options.source_key is None else _find(file, schema, options.source_key, "--source-key")
    if not (options.conversations or options.preferences):
        text, weight = _find(file, schema, options.text_key, "--text-key"), None
        if options.weight_key is not None:
            weight = _find(file, schema, options.weight_key, "--weight-key", _NUMBERS)
        return TextColumns(text, source, weight=weight)
    try:
        columns = tuple((preference_columns if options.preferences else columns_of)(list(schema.names)))
    except NoConversationError as error:
        raise DataError(
            f"{file.address}: {error}; rename its columns, or say by other options what INPUTS are"
        ) from error
    except UnicodeDecodeError:
        raise DataError(f"{file.address}: a column's name is not UTF-8; rename it, or copy the file again") from None
    if twice := [name for name in columns if schema.names.count(name) > 1]:
        raise DataError(f"{file.address}: has several columns called '{twice[0]}'; rename all but one")
    return TextColumns(None, source, columns)


def batch_rows(num_bytes: int, num_rows: int) -> int:
    """How many rows to read at once, of `num_rows` that take `num_bytes`."""
    return max(1, min(BATCH_ROWS, BATCH_BYTES * num_rows // max(1, num_bytes)))


def documents_of(
    index: int, first: int, batch: Any, columns: TextColumns, file: InputFile, options: ReadOptions
) -> Iterator[Document | Failure]:
    """The documents of a batch whose rows are records from `first` on."""
    if columns.text is None:
        yield from _conversations(index, first, batch, columns, file, options)
        return
    texts = _values(file, batch, columns.text)
    sources = None if columns.source is None else _values(file, batch, columns.source)
    weights = None if columns.weight is None else _values(file, batch, columns.weight)
    for row in range(len(texts)):
        try:
            text, source = _text(texts[row], options.text_key), file.source
            weight = 1.0 if weights is None else weight_in(str(options.weight_key), weights[row].as_py())
            if sources is not None:
                source = _text(sources[row], str(options.source_key))
                if not source:
                    raise ValueError(
                        f"column '{options.source_key}' holds no source's name; repair it, or leave --source-key out"
                    )
        except ValueError as error:
            yield Failure(index, first + row, str(error))
        else:
            yield Document(index, first + row, source, normalise(text, options.normalise), weight=weight)


def _conversations(
    index: int, first: int, batch: Any, columns: TextColumns, file: InputFile, options: ReadOptions
) -> Iterator[Document | Failure]:
    """Rows as the objects that JSON lines would hold. Raises DataError for damaged columns."""
    import pyarrow

    names = {path[0]: batch.column(batch.schema.names.index(path[0])) for path in columns.paths}
    for name, column in names.items():
        try:
            column.validate(full=True)  # offsets and UTF-8, at every depth
        except pyarrow.ArrowException as error:
            raise DataError(f"{file.address}: damaged: column '{name}': {one_line(error)}; copy it again") from error
    for row in range(len(batch)):
        record = {name: column[row].as_py() for name, column in names.items()}
        yield record_document(index, first + row, record, file, options)


def _find(file: InputFile, schema: Any, key: str, option: str, kinds: tuple[str, ...] = _TEXT) -> ArrowColumn:
    try:
        path = _path([schema.field(place) for place in range(len(schema.names))], key)
    except UnicodeDecodeError:
        raise DataError(f"{file.address}: a column's name is not UTF-8; rename it, or copy the file again") from None
    except ValueError as error:
        raise DataError(f"{file.address}: {error}; rename all but one") from None
    if not path:
        names = schema.names[:_SHOWN_NAMES] + ["…"] * (len(schema.names) > _SHOWN_NAMES)
        raise DataError(
            f"{file.address}: has no column '{key}' but {', '.join(names) or 'none at all'}; name it with {option}"
        )
    kind = schema.field(schema.names.index(path[0])).type
    for name in path[1:]:
        kind = kind.field(kind.get_field_index(name)).type
    held = str(getattr(kind, "value_type", "")) if str(kind).startswith("dictionary") else str(kind)
    if held not in kinds:
        wanted = "text" if kinds is _TEXT else "numbers"
        raise DataError(f"{file.address}: column '{key}' holds {kind}, not {wanted}; name another with {option}")
    return ArrowColumn(key, path)


def _path(fields: list[Any], key: str) -> tuple[str, ...]:
    """Where a key leads; empty if nowhere. Raises ValueError for an ambiguous name."""
    names = [field.name for field in fields]
    for end in (len(key), *(place for place, character in enumerate(key) if character == ".")):
        if names.count(key[:end]) > 1:
            raise ValueError(f"has {names.count(key[:end])} columns called '{key[:end]}'")
        if key[:end] not in names:
            continue
        kind = fields[names.index(key[:end])].type
        if end == len(key):
            return (key,)
        if str(kind).startswith("struct") and (
            rest := _path([kind.field(n) for n in range(kind.num_fields)], key[end + 1 :])
        ):
            return (key[:end], *rest)
    return ()


def _values(file: InputFile, batch: Any, column: ArrowColumn) -> Any:
    """The column of a batch: strings, bytes or a dictionary. Raises DataError for invalid offsets."""
    import pyarrow
    import pyarrow.compute

    try:
        array = batch.column(batch.schema.names.index(column.path[0]))
        for name in column.path[1:]:
            array = pyarrow.compute.struct_field(array, [array.type.get_field_index(name)])
        plain = array.dictionary if pyarrow.types.is_dictionary(array.type) else array
        kind = _BYTES.get(str(plain.type))
        (plain if kind is None else plain.view(getattr(pyarrow, kind)())).validate(full=True)
        if plain is not array and array.null_count < len(array):
            ends = pyarrow.compute.min_max(array.indices).as_py()
            if ends["min"] < 0 or ends["max"] >= len(plain):
                raise pyarrow.ArrowException(f"a dictionary of {len(plain)} has no entry {ends['max']}")
    except pyarrow.ArrowException as error:
        raise DataError(f"{file.address}: damaged: column '{column.key}': {one_line(error)}; copy it again") from error
    return array


def _text(scalar: Any, key: str) -> str:
    """Raises ValueError for null, too long a text, and bytes that are not UTF-8."""
    if scalar.is_valid and hasattr(scalar, "dictionary"):
        scalar = scalar.value
    if not scalar.is_valid:
        raise ValueError(f"column '{key}' is null; give it a text, or leave the row out")
    data = scalar.as_buffer()
    if data.size > ReadOptions.max_line_bytes:
        raise ValueError(f"column '{key}' holds more than {ReadOptions.max_line_bytes:,} bytes; split the document")
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"column '{key}': byte {error.start} is not UTF-8 ({error.reason}); convert it to UTF-8"
        ) from None
