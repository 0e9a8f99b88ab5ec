"""WARC: the texts of WET files and of plain responses, what is refused, and every kind of damage."""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weftrain.core.errors import DataError
from weftrain.data_prep.readers import read_options
from weftrain.data_prep.readers.documents import Document, Failure
from weftrain.data_prep.readers.listing import Wanted, find_inputs

pytest.importorskip("warcio", reason="warcio is not installed: pip install 'weftrain[warc]'")
Read = Callable[..., list[Document | Failure]]


def record(kind: str, content: bytes, content_type: str = "text/plain", uri: str = "https://example.org/a") -> bytes:
    """A record as the standard has it, a gzip member as Common Crawl writes them."""
    head = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Record-ID: <urn:uuid:0f3a>\r\nWARC-Date: 2024-05-01T00:00:00Z\r\n"
        f"WARC-Target-URI: {uri}\r\nContent-Type: {content_type}\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return gzip.compress(head.encode() + content + b"\r\n\r\n", mtime=0)


def response(content_type: str, content: bytes, *headers: str) -> bytes:
    lines = ["HTTP/1.1 200 OK", f"Content-Type: {content_type}", *headers, "", ""]
    return record("response", "\r\n".join(lines).encode() + content, "application/http; msgtype=response")


INFO = record("warcinfo", b"software: none\r\n", "application/warc-fields")
WET = (
    INFO
    + record("conversion", "Ein Text,\nzwei Zeilen é\n".encode(), uri="https://a.org/1")
    + record("conversion", b"second")
)


@pytest.mark.parametrize("name", ["CC-MAIN-1.warc.wet.gz", "t.WARC", "t.wet", "plain.gz"])
def test_a_wet_file(tmp_path: Path, read_all: Read, name: str) -> None:
    (tmp_path / name).write_bytes(WET if name.endswith(".gz") else gzip.decompress(WET))
    first, second = read_all(tmp_path / name)
    assert isinstance(first, Document)
    assert isinstance(second, Document)
    assert (first.record, first.text, first.source) == (1, "Ein Text,\nzwei Zeilen é\n", name)
    assert (second.record, second.text) == (2, "second")
    sources = [
        item.source for item in read_all(tmp_path / name, source_key="WARC-Target-URI") if isinstance(item, Document)
    ]
    assert sources == ["https://a.org/1", "https://example.org/a"]
    (failed, _) = read_all(tmp_path / name, source_key="WARC-Language")
    assert isinstance(failed, Failure)
    assert failed.reason == "has no header 'WARC-Language'; name another with --source-key, or leave it out"
    assert [file.format for file in find_inputs([Wanted((str(tmp_path),))]).files] == ["warc"]


def test_responses_by_what_the_server_said(tmp_path: Path, read_all: Read) -> None:
    path = tmp_path / "t.warc.gz"
    parts = [
        INFO,
        record("request", b"GET / HTTP/1.1\r\n\r\n", "application/http; msgtype=request"),
        response("text/plain", "é".encode()),
        response('text/plain; charset="ISO-8859-1"', "é".encode("latin-1")),
        response("text/plain", b"\xe9"),
        response("image/png", b"\x89PNG"),
        response("text/plain; charset=no-such", b"x"),
        response("text/markdown", b"5\r\n# abc\r\n0\r\n\r\n", "Transfer-Encoding: chunked"),
        record("response", b"1 IN A 127.0.0.1", "text/dns", "dns:example.org"),
        record("resource", b"a resource", "text/plain; charset=utf-8"),
        record("metadata", b"fetchTimeMs: 1", "application/warc-fields"),
    ]
    path.write_bytes(b"".join(parts))
    items = read_all(path)
    assert [(item.record, item.text if isinstance(item, Document) else item.reason) for item in items] == [
        (2, "é"),
        (3, "é"),
        (4, "byte 0 is not utf-8 (unexpected end of data); repair the record"),
        (5, "holds image/png, not text; leave such records out"),
        (6, "unknown encoding: no-such"),
        (7, "# abc"),
        (9, "a resource"),
    ]
    for html in (response("text/html; charset=utf-8", b"<p>x"), record("resource", b"<p>x", "Application/XHTML+XML")):
        path.write_bytes(b"".join(parts[:3]) + html)
        with pytest.raises(DataError, match=r"t\.warc\.gz: record 4 holds HTML.*name the WET file of the same pages"):
            read_all(path)
    path.write_bytes(INFO + parts[1])
    with pytest.raises(DataError, match=r"none of its records \(1 request, 1 warcinfo\) holds text"):
        read_all(path)


def test_damage(tmp_path: Path, read_all: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    path, plain = tmp_path / "t.warc", gzip.decompress(WET)
    for data, message in (
        (plain[:-6], "damaged near record 3: the archive ends within the record; copy it again"),
        (plain[: plain.rindex(b"Content-Length")], "damaged near record 3: "),
        (plain + b"something else\n", "damaged near record 4: "),
        (plain.replace(b"Content-Length: 6", b"Content-Length: 3"), "damaged near record "),
        (b"no archive\n" * 9, "damaged near record 1: "),
    ):
        path.write_bytes(data)
        with pytest.raises(DataError, match=rf"t\.warc: {message}"):
            read_all(path, format="warc")
    (tmp_path / "t.warc.gz").write_bytes(WET[:-9])
    with pytest.raises(DataError, match=r"t\.warc\.gz: damaged or truncated: the archive ends too early"):
        read_all(tmp_path / "t.warc.gz")
    monkeypatch.setattr(read_options.ReadOptions, "max_line_bytes", 10)
    path.write_bytes(plain)
    long, second = read_all(path)
    assert isinstance(long, Failure)
    assert long.reason == "holds more than 10 bytes; split it"
    assert isinstance(second, Document)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1), damage=st.binary(min_size=1, max_size=6), packed=st.booleans())
def test_any_damage_is_documents_failures_or_one_error(
    tmp_path: Path, check_damaged: Callable[..., None], place: float, damage: bytes, packed: bool
) -> None:
    data = bytearray(WET + response("text/plain", b"1\r\nx\r\n0\r\n\r\n", "Transfer-Encoding: chunked"))
    data = data if packed else bytearray(gzip.decompress(data))
    begin = int(place * (len(data) - len(damage)))
    data[begin : begin + len(damage)] = damage
    path = tmp_path / ("t.warc.gz" if packed else "t.warc")
    path.write_bytes(data)
    check_damaged(path, source_key="WARC-Target-URI", format="warc")


def test_what_warcio_itself_writes(tmp_path: Path, read_all: Read) -> None:
    from warcio.warcwriter import WARCWriter

    with (tmp_path / "t.warc.gz").open("wb") as opened:
        writer = WARCWriter(opened, gzip=True)
        for number in range(5):
            content = io.BytesIO(f"text {number} é".encode())
            writer.write_record(
                writer.create_warc_record(
                    f"https://a.org/{number}", "conversion", payload=content, warc_content_type="text/plain"
                )
            )
    assert [item.text for item in read_all(tmp_path / "t.warc.gz") if isinstance(item, Document)] == [
        f"text {number} é" for number in range(5)
    ]
