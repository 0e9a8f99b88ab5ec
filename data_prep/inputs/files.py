"""Opening input files at local paths and fsspec addresses, and checking that they are still what was listed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import IO

from weftrain.core.errors import DataError, file_problem, os_errors_as
from weftrain.core.formats.file_systems import no_file_system
from weftrain.data_prep.inputs.remote import RemoteSystem
from weftrain.data_prep.readers.documents import InputFile

BLOCK_BYTES = 1 << 20


def reading(address: str) -> AbstractContextManager[None]:
    """Raise an OSError of the block as a DataError that names the input file."""
    return os_errors_as(DataError, f"{address}: cannot be read")


def local_path(address: str) -> str:
    """The path of a `file://` address; other addresses and paths unchanged."""
    return next(
        (address.removeprefix(protocol) for protocol in ("file://", "local://") if address.startswith(protocol)),
        address,
    )


def is_local(address: str) -> bool:
    return "://" not in address


def file_system(address: str) -> tuple[RemoteSystem, str]:
    """fsspec's file system of an address, and the path there. Raises DataError."""
    import fsspec

    try:
        system, root = fsspec.core.url_to_fs(address)
    except Exception as error:  # each library behind fsspec has exceptions of its own
        raise DataError(f"{address}: {no_file_system(address, error)}") from error
    return RemoteSystem(system), root


def local_file(path: str, name: str, source: str, format: str) -> InputFile:
    """A local file as an input. Raises OSError."""
    status = os.stat(path)
    return InputFile(path, name, source, format, status.st_size, status.st_mtime_ns)


def open_address(address: str) -> IO[bytes]:
    """The raw bytes of a local path or an address. Raises DataError."""
    with reading(address):
        system = None if is_local(address) else file_system(address)
        return open(address, "rb") if system is None else system[0].open(system[1])


def read_head(address: str, num_bytes: int) -> bytes:
    """The first bytes of a local path or an address, in one request. Raises DataError."""
    try:
        if is_local(address):
            with open(address, "rb", buffering=0) as file:
                return file.read(num_bytes)
        system, path = file_system(address)
        head: bytes = system.cat_file(path, start=0, end=num_bytes)
        return head
    except (OSError, ValueError) as error:
        raise DataError(f"{address}: cannot be read: {file_problem(error)}") from error


def exists(address: str) -> bool:
    """Whether a file is at a local path or an address. Raises DataError where the file system cannot be reached."""
    if is_local(address):
        return os.path.isfile(address)
    system, path = file_system(address)
    with reading(address):
        found = bool(system.isfile(path))
    return found


def check_unchanged(file: InputFile) -> None:
    """Raises DataError where a file is no longer what was listed."""
    with reading(file.address):
        if is_local(file.address):
            status = os.stat(file.address)
            same = (status.st_size, status.st_mtime_ns) == (file.num_bytes, file.modified_ns)
        else:
            system, path = file_system(file.address)
            same = system.size_now(path) == file.num_bytes
    if not same:
        raise changed(file)


def changed(file: InputFile) -> DataError:
    return DataError(f"{file.address}: changed while it was read; run again when nobody writes to it")


def range_sha256(file: InputFile, begin: int, end: int, beside: Sequence[str] = ()) -> str:
    """Hex SHA-256 of the files `beside`, then bytes [begin, end) of a file. Raises DataError where it ends early."""
    digest = hashlib.sha256()
    with reading(file.address):
        for address in beside:
            with open_address(address) as opened:
                while block := opened.read(BLOCK_BYTES):
                    digest.update(block)
        with open_address(file.address) as opened:
            opened.seek(begin)
            left = end - begin
            while left and (block := opened.read(min(left, BLOCK_BYTES))):
                digest.update(block)
                left -= len(block)
    if left:
        raise changed(file)
    return digest.hexdigest()
