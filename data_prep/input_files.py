"""Which files there are, how they are cut into parts, and opening them: local paths and any fsspec address.

What a reader would get wrong: the list is sorted by name and names do not depend on where a folder lies, so the same files in another
place, listed in another order, are the same dataset. A part is a function of names and sizes alone.
"""

from __future__ import annotations

import glob
import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from weftrain.core.errors import DataError
from weftrain.core.plain_file import real_path
from weftrain.data_prep.documents import Format, InputFile, Part, Share

COMPRESSED = (".gz", ".zst")
LINES = (".jsonl", ".ndjson")
FORMATS = ("jsonl", "parquet", "text", "python", "amber", "cerebras", "cerebras_corpus", "megatron")
_PEEK_BYTES = 1 << 20
_BLOCK_BYTES = 1 << 20


def is_local(address: str) -> bool:
    return "://" not in address


def list_inputs(
    addresses: Sequence[str], *, source: str | None, suffixes: Sequence[str] = (), format: str | None = None
) -> list[InputFile]:
    """The files of addresses: paths, folders, patterns with `*`, of this machine or of any fsspec file system (`s3://…`, `memory://…`).

    source: what their documents are counted as; None: the folder's name, or the file's. suffixes: of a folder, only files that end so;
    none: every file of a format that is known by its suffix, and every other one that is UTF-8 text. Hidden files and links in a folder
    are left out. Raises DataError.
    """
    if format is not None and format not in FORMATS:
        raise DataError(f"--format {format}: there is {', '.join(FORMATS)}")
    if not addresses:
        raise DataError("no input: name a .jsonl, a text file or a folder")
    files = [file for address in addresses for file in (_local if is_local(address) else _remote)(address, source, tuple(suffixes), format)]
    names = {file.name for file in files}
    if len(names) < len(files):
        twice = next(name for name in sorted(names) if sum(file.name == name for file in files) > 1)
        raise DataError(f"two inputs are called {twice!r}, and messages could not tell them apart: name the folder that holds both")
    return files


def _local(address: str, source: str | None, suffixes: tuple[str, ...], format: str | None) -> list[InputFile]:
    path = Path(address)
    if "*" in address and not path.exists():
        found = sorted(glob.glob(address, recursive=True))
        if not found:
            raise DataError(f"{address}: matches no file")
        return [file for match in found for file in _local(match, source, suffixes, format)]
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; name a .jsonl, a text file or a folder")
    if not path.is_dir():
        if not path.is_file():
            raise DataError(f"{path}: is not a regular file, and inputs are read several times; write it to a file first")
        return [_file(str(path), path.name, source or path.name, path.stat(), format)]
    folder_name = real_path(path).name
    files = []
    for found_path in sorted(_below(path), key=lambda found: found.relative_to(path).as_posix()):
        if suffixes and found_path.suffix not in suffixes:
            continue
        kind = format or _format_of(found_path.name, str(found_path))
        if kind is None or (kind == "text" and not suffixes and format is None and not _is_text(found_path)):
            continue
        name = f"{folder_name}/{found_path.relative_to(path).as_posix()}"
        files.append(_file(str(found_path), name, source or folder_name, found_path.stat(), kind))
    if not files:
        wanted = f"file ending in {', '.join(suffixes)}" if suffixes else "text file"
        raise DataError(f"{path}: holds no {wanted}; name another folder or another --suffix")
    return files


def _remote(address: str, source: str | None, suffixes: tuple[str, ...], format: str | None) -> list[InputFile]:
    system, root = file_system(address)
    try:
        if "*" in root:
            found = dict.fromkeys(system.glob(root))
        elif system.isdir(root):
            found = dict.fromkeys(system.find(root), root)
        elif system.exists(root):
            found = {root: None}
        else:
            found = {}
        folder_name = root.rstrip("/").rpartition("/")[2]
        files = []
        for path in sorted(found):
            inside = found[path] is not None
            relative = path.removeprefix(root).lstrip("/") if inside else path.rpartition("/")[2]
            hidden = any(part.startswith(".") for part in relative.split("/"))
            if inside and (hidden or (suffixes and not path.endswith(suffixes))):
                continue
            full = system.unstrip_protocol(path)
            kind = format or _format_of(path, full)
            if kind is None:
                continue
            name = f"{folder_name}/{relative}" if inside else relative
            files.append(InputFile(full, name, source or (folder_name if inside else relative), kind, int(system.size(path)), None))  # type: ignore[arg-type]
    except OSError as error:
        raise DataError(f"{address}: cannot be listed: {error}") from error
    if not files:
        raise DataError(f"{address}: no such file or folder there; name a .jsonl, a text file or a folder")
    return files


def file_system(address: str) -> tuple[Any, str]:
    """fsspec's file system of an address, and the path there. Raises DataError."""
    import fsspec

    try:
        system, root = fsspec.core.url_to_fs(address)
    except (ValueError, ImportError, OSError) as error:
        raise DataError(f"{address}: no such file system: {error}; install what it needs") from error
    return system, root


def _file(address: str, name: str, source: str, status: os.stat_result, format: str | None) -> InputFile:
    kind = format or _format_of(name, address) or "text"
    return InputFile(address, name, source, kind, status.st_size, status.st_mtime_ns)  # type: ignore[arg-type]


def _below(folder: Path) -> Iterator[Path]:
    """Files below a folder, in any order, without hidden ones and links."""
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(root, name)
            if not name.startswith(".") and not path.is_symlink() and path.is_file():
                yield path


def _format_of(name: str, address: str) -> Format | None:
    """What a file is by its suffix and, where that leaves it open, by its beginning; None for one that goes with another."""
    plain = name
    for suffix in COMPRESSED:
        plain = plain.removesuffix(suffix)
    if plain.endswith(LINES) or (plain != name and plain.endswith(".json")):
        return "amber" if _holds_token_ids(name, address) else "jsonl"
    if name.endswith(".parquet"):
        return "parquet"
    if name.endswith((".h5", ".hdf5")):
        from weftrain.data_prep.token_readers import hdf5_format

        return hdf5_format(address)
    if name.endswith(".idx") and is_local(address) and Path(address).with_suffix(".bin").exists():
        return None
    if name.endswith(".bin") and is_local(address) and Path(address).with_suffix(".idx").exists():
        return "megatron"
    return "text"


def _holds_token_ids(name: str, address: str) -> bool:
    """Whether the first line is a tokenised row. A compressed file is said to be one with --format."""
    if name.endswith(COMPRESSED) or not is_local(address):
        return False
    try:
        with open(address, "rb") as file:
            line = file.readline(_PEEK_BYTES)
    except OSError as error:
        raise DataError(f"{address}: cannot be read: {error.strerror}") from error
    return b'"token_ids"' in line and b'"text"' not in line


def _is_text(path: Path) -> bool:
    try:
        data = path.read_bytes()
        data.decode()
    except UnicodeDecodeError:
        return False
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    return b"\0" not in data


def is_cut_by_bytes(file: InputFile) -> bool:
    return file.format in ("jsonl", "amber") and not file.address.endswith(COMPRESSED)


def split_parts(files: Sequence[InputFile], part_bytes: int) -> list[Part]:
    """Files in order, as parts of about `part_bytes`: small ones together, large ones that can be cut as several. Raises DataError."""
    parts: list[Part] = []
    shares: list[Share] = []
    held = 0
    for index, file in enumerate(files):
        for share, size in _shares(index, file, part_bytes):
            if shares and held + size > part_bytes:
                parts.append(Part(tuple(shares)))
                shares, held = [], 0
            shares.append(share)
            held += size
    if shares:
        parts.append(Part(tuple(shares)))
    return parts


def _shares(index: int, file: InputFile, part_bytes: int) -> Iterator[tuple[Share, int]]:
    """A file's shares and about how many bytes each reads."""
    pieces = max(1, -(-file.num_bytes // part_bytes))
    units = file.num_bytes if is_cut_by_bytes(file) else num_units(file) if pieces > 1 else 1
    pieces = min(pieces, max(1, units))
    if not is_cut_by_bytes(file) and pieces == 1:
        yield Share(index, 0, -1), file.num_bytes
        return
    for piece in range(pieces):
        yield Share(index, units * piece // pieces, units * (piece + 1) // pieces), file.num_bytes // pieces


def num_units(file: InputFile) -> int:
    """How many row groups, rows or documents a file that is not cut by bytes can be cut into; 1 where it cannot be cut."""
    if file.format == "parquet":
        from weftrain.data_prep.text_readers import open_parquet

        return int(open_parquet(file).num_row_groups)
    if file.format in ("cerebras", "cerebras_corpus", "megatron"):
        from weftrain.data_prep.token_readers import num_records

        return num_records(file)
    return 1


def lines_before(file: InputFile, share: Share) -> int:
    """How many lines of a file begin before its share does; 0 for one that is not cut by bytes. Raises DataError."""
    if not is_cut_by_bytes(file) or not share.begin:
        return 0
    lines, left, last = 0, share.begin, b""
    with open_file(file) as opened:
        while left and (block := opened.read(min(left, _BLOCK_BYTES))):
            lines, left, last = lines + block.count(b"\n"), left - len(block), block[-1:]
    return lines + (last != b"\n")  # the line in which the share begins belongs to the one before


def open_file(file: InputFile) -> IO[bytes]:
    """The file's raw bytes. Raises DataError."""
    try:
        if is_local(file.address):
            return open(file.address, "rb")
        import fsspec

        opened: IO[bytes] = fsspec.open(file.address, "rb").open()
        return opened
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"{file.address}: cannot be read: {error}") from error


def open_decompressed(file: InputFile) -> IO[bytes]:
    """The file's bytes, decompressed where its name ends in .gz or .zst; a damaged archive raises EOFError, OSError or zlib.error."""
    raw = open_file(file)
    if file.address.endswith(".gz"):
        import gzip

        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    if file.address.endswith(".zst"):
        return io.BufferedReader(_Zstandard(raw), _BLOCK_BYTES)
    return raw


class _Zstandard(io.RawIOBase):
    """Frame after frame, in bounded memory. The library's own stream reader takes a truncated frame for the end of the file."""

    _INPUT_BYTES = 8 << 10  # a frame's data is at most 32768 times as large

    def __init__(self, raw: IO[bytes]) -> None:
        try:
            import zstandard
        except ImportError:
            raise DataError("reading .zst needs zstandard: pip install 'weftrain[data]'") from None
        self._raw, self._library = raw, zstandard
        self._frame: Any = None
        self._input, self._output, self._at = b"", b"", 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while self._at == len(self._output):
            if not self._input:
                self._input = self._raw.read(self._INPUT_BYTES)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("the archive ends within a frame")
                return 0
            self._frame = self._frame or self._library.ZstdDecompressor().decompressobj()
            try:
                self._output, self._at = self._frame.decompress(self._input), 0
            except self._library.ZstdError as error:
                raise OSError(f"damaged archive: {error}") from error
            self._input = b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._output) - self._at)
        buffer[:count] = self._output[self._at : self._at + count]
        self._at += count
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


def check_unchanged(file: InputFile) -> None:
    """Raises DataError where a file is no longer what was listed."""
    try:
        if is_local(file.address):
            status = os.stat(file.address)
            same = (status.st_size, status.st_mtime_ns) == (file.num_bytes, file.modified_ns)
        else:
            system, path = file_system(file.address)
            same = int(system.size(path)) == file.num_bytes
    except OSError as error:
        raise DataError(f"{file.address}: cannot be read: {error}") from error
    if not same:
        raise DataError(f"{file.address}: changed while it was read; run again when nobody writes to it")


def share_sha256(file: InputFile, share: Share) -> str:
    """SHA-256 of a share's raw bytes: the range itself, or the same proportion of the file's bytes where a share counts something else.

    A Megatron index goes with the first share of its data. Raises DataError.
    """
    begin, end = share.begin, share.end
    if not is_cut_by_bytes(file):
        units = num_units(file) if share.end != -1 else 1
        begin, end = file.num_bytes * begin // max(1, units), file.num_bytes * (end if end != -1 else 1) // max(1, units)
    digest = hashlib.sha256()
    if file.format == "megatron" and begin == 0:
        digest.update(Path(file.address).with_suffix(".idx").read_bytes())
    try:
        with open_file(file) as opened:
            opened.seek(begin)
            left = end - begin
            while left and (block := opened.read(min(left, _BLOCK_BYTES))):
                digest.update(block)
                left -= len(block)
    except OSError as error:
        raise DataError(f"{file.address}: cannot be read: {error.strerror or error}") from error
    if left:
        raise DataError(f"{file.address}: changed while it was read; run again when nobody writes to it")
    return digest.hexdigest()
