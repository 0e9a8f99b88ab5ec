"""Which files of a folder are read, by name and first bytes. docs/data-formats.md states these rules.

Rules for names apply below folders only: a file that is named, or matched by a pattern, is judged by its content.
"""

from __future__ import annotations

import codecs
import fnmatch
import re

from weftrain.core.errors import DataError
from weftrain.data_prep.inputs.compression import COMPRESSED, plain_name

MARKER_FILES = """
    _SUCCESS _committed_* _started_* _metadata _common_metadata *.crc *.done *.md5 *.sha1 *.sha256 *.sha512 Thumbs.db desktop.ini
"""
MARKER_FOLDERS = ("_temporary", "__MACOSX")
MANIFEST = "manifest.json"  # of a dataset that weftrain prep made
MANIFEST_HEAD_BYTES = 1 << 16
_UNFINISHED = ".part .partial .tmp .temp .crdownload .download .incomplete .filepart .aria2 .unfinished"
UNFINISHED = frozenset(_UNFINISHED.split())
_ARCHIVES = ".zip .7z .rar .tar .tgz .tbz2 .txz .jar .whl .lz4 .lz .lzma .lzo .br .snappy .z"
ARCHIVES = frozenset(_ARCHIVES.split())  # and compressions that are not read
JSON = (".jsonl", ".ndjson", ".json")
BINARY_FORMATS = (".parquet", ".arrow", ".feather", ".orc", ".avro", ".warc", ".wet", ".h5", ".hdf5", ".npy")
PLAIN_TEXT = (".txt", ".text", ".csv", ".tsv")
# Text whose suffix says what it is: never looked into for JSON lines, and a failure where it is not UTF-8.
SOURCE_TEXT = """
    md markdown rst adoc org tex bib html htm xhtml xml svg css scss sass less yaml yml toml ini cfg conf properties
    py pyi pyx pxd ipynb c h cc cpp cxx hpp hh cu cuh m mm java kt kts scala groovy clj cljs go rs rb php pl pm lua r jl js mjs cjs
    jsx ts tsx vue svelte dart swift cs fs vb hs lhs ml mli elm erl ex exs lisp el scm rkt f f90 f95 for pas ada adb ads v sv vhd
    vhdl asm s sql graphql proto thrift sh bash zsh fish ps1 bat cmd mk cmake gradle dockerfile tf nix zig nim d cr sol tcl
    diff patch po pot srt vtt geojson jsonc json5
"""
_SOURCE_TEXT = frozenset(f".{suffix}" for suffix in SOURCE_TEXT.split())
_TEXT_OR_DATA = frozenset((*JSON, *BINARY_FORMATS, *PLAIN_TEXT)) | _SOURCE_TEXT
_NOT_JSON = _SOURCE_TEXT.union(BINARY_FORMATS)

_MARKERS = re.compile("|".join(fnmatch.translate(pattern) for pattern in MARKER_FILES.split()))
_UTF_16_AND_32 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)  # UTF-32-LE begins as UTF-16-LE does
_CONTROL = re.compile(rb"[\x00-\x06\x0e-\x1a\x1c-\x1f]")  # not what shapes text, nor backspace and escape
_ARCHIVE_MAGIC = (
    b"%PDF-",
    b"\x1f\x8b",
    b"BZh",
    b"\xfd7zXZ",
    b"\x28\xb5\x2f\xfd",
    b"PK\x03\x04",
    b"7z\xbc\xaf",
    b"Rar!",
)
_MAGIC = (*_ARCHIVE_MAGIC, b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"\x7fELF", b"OggS", b"fLaC")


def skips_folder(name: str) -> bool:
    return name.startswith(".") or name in MARKER_FOLDERS


def folder_reason(name: str) -> str:
    """Why a folder is not entered, as counted in summaries."""
    return "hidden folder" if name.startswith(".") else "marker folder"


def is_dataset(manifest: bytes) -> bool:
    """Whether a folder is a dataset, by the first bytes of its manifest.json, which is canonical JSON."""
    return manifest.startswith(b"{") and b'"format":"weftrain-dataset"' in manifest


def is_marker(name: str) -> bool:
    return _MARKERS.fullmatch(name) is not None


def suffix_of(name: str) -> str:
    """The last suffix of the last component in lower case, or ''; a hidden file's whole name is no suffix."""
    base = name.rpartition("/")[2].lower()
    stem, dot, suffix = base.rpartition(".")
    return f".{suffix}" if dot and stem else ""


def is_archive(name: str) -> bool:
    """Whether the name is of an archive or compression that is not read."""
    return suffix_of(name) in ARCHIVES or suffix_of(plain_name(name.lower())) in ARCHIVES


def looks_like_data(name: str) -> bool:
    """Whether the suffix is of a format or of text, compressed or not."""
    suffix = suffix_of(name)
    return suffix in _TEXT_OR_DATA or (suffix in COMPRESSED and looks_like_data(name[: -len(suffix)]))


def is_source_text(name: str) -> bool:
    """Whether the suffix is of a programming or markup language. name: without a compression suffix."""
    return suffix_of(name) in _SOURCE_TEXT


def may_hold_json(name: str) -> bool:
    """Whether a file is searched for JSON. name: without a compression suffix."""
    return suffix_of(name) not in _NOT_JSON


def is_binary(head: bytes) -> bool:
    """Whether first bytes are not text: a NUL, a known magic number, or control characters outside UTF-8. Text in
    another encoding counts as text: its reader says that it must be converted.
    """
    if head.startswith(_MAGIC):
        return True
    if head.startswith(_UTF_16_AND_32):
        return False
    if b"\0" in head:
        return True
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # the end may lie within a character
    except UnicodeDecodeError:
        return _CONTROL.search(head) is not None
    return False


def printable_name(name: str) -> str:
    """A file's name with bytes that are not UTF-8 escaped, as `\\xff`."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def is_utf8_name(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def spelled_suffix(suffix: str) -> str:
    """A `--suffix` in lower case with its dot. Raises DataError for an empty one."""
    if not suffix.strip("."):
        raise DataError(f"--suffix {suffix!r}: give an ending of names, such as .py or .jsonl.gz")
    return suffix.lower() if suffix.startswith(".") else f".{suffix.lower()}"
