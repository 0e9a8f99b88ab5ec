"""Reading a part: the documents of its shares in order, what could not be read, and what each share held.

What a reader would get wrong: text_readers.py and token_readers.py read, this file only chooses; a new format is one function there and
one line here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from weftrain.core.errors import DataError
from weftrain.data_prep.documents import Document, Failure, FileRead, Format, InputFile, Part
from weftrain.data_prep.input_files import check_unchanged, list_inputs, share_sha256, split_parts
from weftrain.data_prep.normalisation import check_normalisations
from weftrain.data_prep.read_options import ReadOptions
from weftrain.data_prep.text_readers import json_lines, parquet_rows, plain_text, python_source
from weftrain.data_prep.token_readers import amber_rows, cerebras_rows, corpus_rows, megatron_documents

__all__ = ["ReadOptions", "list_inputs", "read_part", "share_sha256", "split_parts"]

READERS = {
    "jsonl": json_lines,
    "parquet": parquet_rows,
    "text": plain_text,
    "python": python_source,
    "amber": amber_rows,
    "cerebras": cerebras_rows,
    "cerebras_corpus": corpus_rows,
    "megatron": megatron_documents,
}


def read_part(files: Sequence[InputFile], part: Part, options: ReadOptions) -> Iterator[Document | Failure | FileRead]:
    """Everything of a part, in order; a FileRead ends each share. Raises DataError for a file that cannot be read, or that changed."""
    check_normalisations(options.normalise)
    for share in part.shares:
        file = files[share.file]
        check_unchanged(file)
        kind: Format = file.format
        try:
            records = yield from READERS[kind](share.file, file, share, options)
        except OSError as error:
            raise DataError(f"{file.address}: cannot be read: {error.strerror or error}") from error
        sha256 = share_sha256(file, share)
        check_unchanged(file)
        yield FileRead(share, records, sha256)
