"""WARC: one document per record of a web archive.

Records of type conversion (Common Crawl's WET files), resource and response are documents if they hold plain text. HTML
is refused, because extracting its text is a filter's task. Records of other types are only counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from weftrain.core.errors import DataError, one_line
from weftrain.data_prep.inputs.compression import open_decompressed
from weftrain.data_prep.inputs.files import BLOCK_BYTES
from weftrain.data_prep.readers.contract import Probe, Reader, Records
from weftrain.data_prep.readers.documents import Document, Failure, InputFile, Share
from weftrain.data_prep.readers.normalisation import normalise
from weftrain.data_prep.readers.read_options import ReadOptions

_SUFFIXES = (".warc", ".wet", ".wat")
_WITH_TEXT = ("conversion", "resource", "response")
_HTML = ("text/html", "application/xhtml+xml")


@contextmanager
def _records(file: InputFile) -> Iterator[Iterator[Any]]:
    """warcio's records of a file. Raises DataError, also for damage found later."""
    try:
        from warcio.archiveiterator import ArchiveIterator
    except ImportError:
        raise DataError("reading WARC files needs warcio: pip install 'weftrain[warc]'") from None
    number = 0

    def counted(archive: Any) -> Iterator[Any]:
        nonlocal number
        for record in archive:
            check(archive, record.length is not None)
            yield record
            number += 1
        check(archive, True)

    def check(archive: Any, has_length: bool) -> None:
        if archive.err_count or not has_length:
            raise ValueError("a record's Content-Length is not that of its content")

    with open_decompressed(file.address) as opened:
        try:
            yield counted(ArchiveIterator(opened, block_size=BLOCK_BYTES))
        except (DataError, OSError, GeneratorExit):
            raise
        except Exception as error:  # the library's own, and those of parsing what is no WARC
            raise DataError(
                f"{file.address}: damaged near record {number + 1:,}: {one_line(error)}; copy it again"
            ) from error


def warc_records(index: int, file: InputFile, share: Share, options: ReadOptions) -> Records:
    """Each record with plain text. The source is the file's, or the record's header options.source_key."""
    number, documents = 0, 0
    kinds: Counter[str] = Counter()
    with _records(file) as records:
        for number, record in enumerate(records, start=1):
            kinds[str(record.rec_type)] += 1
            kind, charset = _content_type(record)
            if record.rec_type not in _WITH_TEXT or kind == "text/dns":
                continue
            if kind in _HTML:
                raise DataError(
                    f"{file.address}: record {number:,} holds HTML, whose text is not extracted here; name the WET "
                    "file of the same pages, or extract the text first, with datatrove's Trafilatura for instance"
                )
            documents += 1
            try:
                if not kind.startswith("text/"):
                    raise ValueError(f"holds {kind or 'content of no stated type'}, not text; leave such records out")
                text = _content(record).decode(charset)
                yield Document(index, number - 1, _source(record, file, options), normalise(text, options.normalise))
            except UnicodeDecodeError as error:
                yield Failure(
                    index, number - 1, f"byte {error.start} is not {charset} ({error.reason}); repair the record"
                )
            except (ValueError, LookupError) as error:
                yield Failure(index, number - 1, str(error))
    if number and not documents:
        found = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items()))
        raise DataError(f"{file.address}: none of its records ({found}) holds text; leave the file out")
    return number


def _content_type(record: Any) -> tuple[str, str]:
    """Type and charset of a record's payload; for an HTTP response as the server declared them."""
    headers = (
        record.http_headers if record.rec_type == "response" and record.http_headers is not None else record.rec_headers
    )
    kind, _, parameters = (headers.get_header("Content-Type") or "").partition(";")
    for parameter in parameters.split(";"):
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "charset":
            return kind.strip().lower(), value.strip().strip("\"'").lower() or "utf-8"
    return kind.strip().lower(), "utf-8"


def _content(record: Any) -> bytes:
    """The payload. Raises ValueError if it is too long, EOFError if it is cut off."""
    stream, pieces, size = record.content_stream(), [], 0
    while data := stream.read(BLOCK_BYTES):
        pieces.append(data)
        size += len(data)
        if size > ReadOptions.max_line_bytes:
            raise ValueError(f"holds more than {ReadOptions.max_line_bytes:,} bytes; split it")
    if record.raw_stream.limit:
        raise EOFError("the archive ends within the record")
    return b"".join(pieces)


def _source(record: Any, file: InputFile, options: ReadOptions) -> str:
    if options.source_key is None:
        return file.source
    source = record.rec_headers.get_header(options.source_key)
    if not source:
        raise ValueError(f"has no header '{options.source_key}'; name another with --source-key, or leave it out")
    return str(source)


def _is_warc(probe: Probe) -> bool:
    return probe.plain_name.endswith(_SUFFIXES) or probe.head.startswith((b"WARC/1.", b"WARC/0."))


READERS = (Reader(name="warc", holds="text", read=warc_records, detect=_is_warc),)
