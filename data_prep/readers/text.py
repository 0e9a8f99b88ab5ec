"""Plain text, one document per file; and the modules of the embedded corpus."""

from __future__ import annotations

from weftrain.data_prep.inputs.compression import begins_compressed, open_decompressed
from weftrain.data_prep.inputs.files import open_address
from weftrain.data_prep.readers import corpus
from weftrain.data_prep.readers.contract import Reader, Records
from weftrain.data_prep.readers.documents import Document, Failure, InputFile, Share
from weftrain.data_prep.readers.normalisation import normalise
from weftrain.data_prep.readers.read_options import ReadOptions


def plain_text(index: int, file: InputFile, share: Share, options: ReadOptions) -> Records:
    yield _document(index, file, options)
    return 1


def _document(index: int, file: InputFile, options: ReadOptions) -> Document | Failure:
    with open_decompressed(file.address) as opened:
        data = opened.read(options.max_line_bytes + 1)
    if len(data) > options.max_line_bytes:
        return Failure(index, 0, f"holds more than {options.max_line_bytes:,} bytes in one document; split it")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        if (compressed := begins_compressed(data)) is not None:
            return Failure(index, 0, compressed)
        line = data.count(b"\n", 0, error.start)
        return Failure(index, line, f"byte {error.start} is not UTF-8 ({error.reason}); convert the file to UTF-8")
    if (place := data.find(0)) >= 0:
        line = data.count(b"\n", 0, place)
        return Failure(index, line, f"byte {place} is NUL, which no text holds; repair or remove the file")
    return Document(index, 0, file.source, normalise(text, options.normalise))


def python_source(index: int, file: InputFile, share: Share, options: ReadOptions) -> Records:
    """A module of the embedded corpus: its source, and its documentation strings if they are long enough."""
    with open_address(file.address) as opened:
        text = corpus.source_text(opened.read(), file.address)
    yield Document(index, 0, corpus.SOURCES, text)
    documentation = corpus.documentation_text(text, file.name)
    if len(documentation) >= corpus.MIN_DOCUMENTATION_CHARACTERS:
        yield Document(index, 1, corpus.DOCUMENTATION, documentation, belongs_to=text)
    return 2


# What no other format claims is text; nothing is told to be a module of the embedded corpus, whose list names them.
TEXT = Reader(name="text", holds="text", read=plain_text, detect=lambda probe: True)
PYTHON = Reader(name="python", holds="text", read=python_source, detect=lambda probe: False)
READERS = (PYTHON, TEXT)
