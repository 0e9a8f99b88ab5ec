"""A prefix in an object store (`s3://bucket/runs`, `gs://…`, any fsspec address) as named objects.

Every request passes `Store._perform`, so that a test can make any one of them fail, and is tried again with a growing,
random wait where that can help. What an upload left is compared with what was sent: its size, and the store's checksum
or, where that says nothing about the bytes, SHA-256 of what is read back. Whatever a library raises becomes a
RemoteError of one line with the remedy; credentials are the library's own business, and no text holds them.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import hashlib
import os
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from weftrain.core.errors import RemoteError, one_line
from weftrain.core.formats import fsops
from weftrain.core.formats.file_systems import no_file_system
from weftrain.core.formats.plain_file import open_plain
from weftrain.core.formats.safe_names import checked_path

T = TypeVar("T")

PART_BYTES = 16 << 20  # of an upload in parts; S3 takes 10,000 of them
_MOST_PARTS = 9_000
_PARTS_AT_ONCE = 4  # in memory
_NICE = 10  # of the threads that upload: a tenth of a core's time where the training wants all of it
_READ_BYTES = 16 << 20
ATTEMPTS, FIRST_WAIT_S, MOST_WAIT_S = 6, 0.2, 20.0

_SECRET_NAME = re.compile("SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|_KEY|KEY_ID|SAS|ACCOUNT", re.IGNORECASE)
_SIGNED = re.compile(
    r"((?:X-Amz-[A-Za-z-]+|Signature|sig|AWSAccessKeyId|access_token|Authorization)\s*[=:]\s*)[^\s&\"'<>]+",
    re.IGNORECASE,
)
_MD5 = re.compile("[0-9a-f]{32}")


@dataclass(frozen=True)
class Stored:
    """An object. tag: changes with its bytes where the store says so (an ETag), else whatever the store has."""

    size: int
    tag: str


class ChangedError(RemoteError):
    """A conditional write that was not done: the object is there, or is not what it was."""


class RefusedError(RemoteError):
    """The store does not let us: waiting a moment does not help."""


def is_address(value: object) -> bool:
    """Whether it is an address (`s3://…`) and no path of this machine."""
    return isinstance(value, str) and "://" in value


def checked_address(address: str) -> str:
    """The address without a slash at its end. Raises RemoteError for one that holds a password or a query."""
    parts = urlsplit(address)
    if "@" in parts.netloc or parts.query or parts.fragment:
        shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        raise RemoteError(
            f"{shown}: the address given holds a user, a password or a query, which would be recorded: leave them out; "
            "credentials come from the environment"
        )
    return address.rstrip("/")


def without_secrets(text: str) -> str:
    """A message without the values of environment variables that hold secrets, and without signatures."""
    for name, value in os.environ.items():
        if len(value) >= 4 and _SECRET_NAME.search(name):
            text = text.replace(value, "***")
    return _SIGNED.sub(r"\1***", text)


class Store:
    """Objects below an address, by their names relative to it. wait: sleeps. All methods raise RemoteError."""

    def __init__(
        self,
        address: str,
        *,
        wait: Callable[[float], object] = time.sleep,
        attempts: int = ATTEMPTS,
    ) -> None:
        self.address = checked_address(address)
        self._wait, self._attempts = wait, attempts
        self.pause: Callable[[], object] = lambda: None  # is called before each part of a large object is sent
        self._connect()
        self._is_s3 = self.address.startswith(("s3://", "s3a://"))

    def _connect(self, **options: bool) -> None:
        try:
            import fsspec

            kind = fsspec.get_filesystem_class(fsspec.utils.get_protocol(self.address))
            self._whole, self._options = self.address, options
            if kind.async_impl:
                self._options |= {"use_listings_cache": False}
            found, root = self._opened()
        except Exception as error:  # each library behind fsspec has exceptions of its own
            raise RemoteError(f"{self.address}: {without_secrets(no_file_system(self.address, error))}") from None
        self._shared, self._root = found if kind.async_impl else None, str(root).rstrip("/")
        self._own = {threading.get_ident(): found}

    def _opened(self) -> tuple[Any, str]:
        import fsspec

        found, root = fsspec.core.url_to_fs(self._whole, **self._options)
        found.dircache.use_listings_cache = False  # some hand all options on to a client that does not know this one
        return found, root

    @property
    def _system(self) -> Any:
        """The file system. One that is not asynchronous (sftp, ftp, smb ..) speaks to its server over a connection that
        two threads must not use at once, so each thread has its own.
        """
        if self._shared is not None:
            return self._shared
        thread = threading.get_ident()
        if thread not in self._own:
            self._own[thread] = self._opened()[0]
        return self._own[thread]

    def renew(self) -> None:
        """Connect anew, so that credentials that were renewed in their files are read again."""
        self._connect(skip_instance_cache=True)

    def below(self, prefix: str) -> Store:
        """The store of the objects below `prefix`."""
        found = copy.copy(self)
        found.address, found._root = f"{self.address}/{checked_path(prefix)}", self._path(prefix)
        return found

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    # -- reading

    def list(self) -> dict[str, Stored]:
        """Every object by name; none where there is nothing, not even the bucket. Raises RemoteError also for a name
        that leads elsewhere.
        """
        try:
            found: Mapping[str, Any] = self._try("list", "", lambda: self._system.find(self._root, detail=True))
        except _AbsentError:
            return {}
        prefix = self._root.lstrip("/") + "/"
        objects = {}
        for path, info in found.items():
            name = path.lstrip("/").removeprefix(prefix)
            if info.get("type") == "directory" or not name or name.endswith("/"):
                continue  # the marker by which some stores remember an empty folder
            try:
                objects[checked_path(name)] = Stored(int(info["size"]), _tag(info))
            except ValueError as error:
                raise RemoteError(f"{self.address}: {error}: remove that object") from None
        return objects

    def stat(self, name: str) -> Stored | None:
        """An object as it is now, or None."""
        try:
            info = self._try("stat", name, lambda: self._system.info(self._path(name)))
        except _AbsentError:
            return None
        return None if info.get("type") == "directory" else Stored(int(info["size"]), _tag(info))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes of an object, from one place up to another. Raises RemoteError if it is not there."""
        data: bytes = self._try("read", name, lambda: self._read_once(name, start, stop))
        return data

    def _read_once(self, name: str, start: int, stop: int | None) -> bytes:
        data: bytes = self._system.cat_file(self._path(name), start=start or None, end=stop)
        if stop is not None and len(data) != stop - start:
            raise OSError(errno.EIO, f"{len(data):,} bytes came of {stop - start:,}")
        return data

    def reader(self, name: str) -> Callable[[int, int], bytes]:
        """`read` of one object, as core/formats/distant_files.py asks for it."""
        return lambda start, stop: self.read(name, start, stop)

    def fetch(self, name: str, target: Path, size: int) -> None:
        """Copy an object into a new file, which appears whole or not at all. Raises OSError for the disk."""
        fsops.write_blocks(
            target, (self.read(name, at, min(size, at + _READ_BYTES)) for at in range(0, size, _READ_BYTES))
        )

    # -- writing

    def put(self, name: str, data: bytes, *, create: bool = False, match: str | None = None) -> str:
        """Write an object at once; what arrived is compared. Its tag.

        create: only where none is there. match: only over the object of this tag. Raises ChangedError otherwise.
        Stores other than S3 are asked before, which leaves a moment in between.
        """
        condition = self._condition(name, create, match)
        self._make_folder(name)

        def write() -> None:
            self._system.pipe_file(self._path(name), data, **condition)

        try:
            self._try("put", name, write)
        except ChangedError:
            # a try before this one may have arrived although its answer did not
            if not (create or match) or (there := self.stat(name)) is None or self.read(name) != data:
                raise
            return there.tag
        try:
            return self._compared(name, len(data), [data]).tag
        except _OtherError:  # what is there is ours, and no condition is needed to replace it
            self._try("put", name, lambda: self._system.pipe_file(self._path(name), data))
            try:
                return self._compared(name, len(data), [data]).tag
            except _OtherError:
                self.delete(name)
                raise

    def _condition(self, name: str, create: bool, match: str | None) -> dict[str, Any]:
        if not create and match is None:
            return {}
        if self._is_s3:
            return {"mode": "create"} if create else {"IfMatch": f'"{match}"'}
        there = self.stat(name)
        if (create and there is not None) or (match is not None and (there is None or there.tag != match)):
            raise ChangedError(f"{self.address}/{name}: is there already, or was changed by somebody else")
        return {}

    def _make_folder(self, name: str) -> None:
        """Make the folder of an object, in stores that have folders."""
        if not self._is_s3:
            parent = self._path(name).rpartition("/")[0]
            self._try("make", name, lambda: self._system.makedirs(parent, exist_ok=True))

    def put_file(self, name: str, path: Path) -> str:
        """Write an object from a local file that nobody changes, in parts where it is large; its tag."""
        size = path.stat().st_size
        part = max(PART_BYTES, -(-size // _MOST_PARTS))
        if size <= part:
            with open_plain(path) as file:
                return self.put(name, file.read())
        self._make_folder(name)
        blocks = _Blocks(path, part)
        if not self._is_s3:
            self._try("put", name, lambda: self._system.put_file(str(path), self._path(name)))
            return self._compared(name, size, blocks).tag
        return self._compared(name, size, blocks, self._put_parts(name, blocks, -(-size // part))).tag

    def _put_parts(self, name: str, blocks: _Blocks, count: int) -> Sequence[bytes]:
        """Upload an object's parts, a few at once, each tried again by itself. Their MD5, in their order.

        Before each part it waits as long as `pause` does. The uploading threads, and the one that speaks to the
        network, have a lower priority than those of the training, which compute.
        """
        bucket, key, *_ = self._system.split_path(self._path(name))
        where = {"Bucket": bucket, "Key": key}

        def call(method: str, **named: Any) -> Any:
            return self._try("put", name, lambda: self._system.call_s3(method, **where, **named))

        upload = call("create_multipart_upload")["UploadId"]

        def send(number: int) -> tuple[str, bytes]:
            self.pause()
            block = blocks.read(number)
            digest = hashlib.md5(block, usedforsecurity=False).digest()
            return call("upload_part", UploadId=upload, PartNumber=number + 1, Body=block)["ETag"], digest

        try:
            with ThreadPoolExecutor(_PARTS_AT_ONCE, "upload", initializer=yield_to_training) as pool:
                sent = list(pool.map(send, range(count)))
            parts = [{"PartNumber": number, "ETag": tag} for number, (tag, _) in enumerate(sent, 1)]
            with contextlib.suppress(_AbsentError):  # S3's NoSuchUpload: it was completed, and the answer lost
                call("complete_multipart_upload", UploadId=upload, MultipartUpload={"Parts": parts})
        except RemoteError:
            with contextlib.suppress(RemoteError):
                call("abort_multipart_upload", UploadId=upload)
            raise
        return [digest for _, digest in sent]

    def _compared(self, name: str, size: int, blocks: Any, digests: Sequence[bytes] | None = None) -> Stored:
        """What is stored, if it is what was sent: `blocks`, the parts of it, whose MD5 are `digests`.

        Raises RemoteError.
        """
        there = self.stat(name)
        if there is not None and there.size == size:
            if digests is None:
                digests = [hashlib.md5(block, usedforsecurity=False).digest() for block in blocks]
            if there.tag == _etag(digests):
                return there
            found, sent = hashlib.sha256(), hashlib.sha256()
            for block in blocks:
                sent.update(block)
            for at in range(0, size, _READ_BYTES):
                found.update(self.read(name, at, min(size, at + _READ_BYTES)))
            if found.digest() == sent.digest():
                return there
        raise _OtherError(
            f"{self.address}/{name}: what was stored is not what was sent "
            f"({'nothing' if there is None else f'{there.size:,} bytes'} of {size:,}): it is sent again"
        )

    def holds(self, name: str, path: Path) -> bool:
        """Whether an object has the bytes of a local file that nobody changes."""
        size = path.stat().st_size
        part = max(PART_BYTES, -(-size // _MOST_PARTS))
        try:
            self._compared(name, size, _Blocks(path, part))
        except _OtherError:
            return False
        return True

    def copy(self, source: str, target: str) -> None:
        """Copy an object within the store."""
        self._make_folder(target)
        self._try("copy", target, lambda: self._system.cp_file(self._path(source), self._path(target)))

    def delete(self, name: str) -> None:
        """Remove an object; one that is not there is fine."""
        try:
            self._try("delete", name, lambda: self._system.rm_file(self._path(name)))
        except _AbsentError:
            return

    # -- one request

    def _perform(self, kind: str, name: str, action: Callable[[], T]) -> T:
        """The one point that every request passes. kind: of the request. name: its object."""
        return action()

    def _try(self, kind: str, name: str, action: Callable[[], T]) -> T:
        for waited in _waits(self._attempts):
            try:
                return self._perform(kind, name, action)
            except Exception as error:
                found = _translated(error, kind, f"{self.address}/{name}" if name else self.address)
                if waited is None or isinstance(found, (RefusedError, ChangedError, _AbsentError)):
                    raise found from None  # what the libraries raise holds whole requests
                self._wait(waited)
        raise AssertionError("unreachable")


class _AbsentError(RemoteError):
    """The object is not there."""


class _OtherError(RemoteError):
    """What is stored is not what was sent."""


class _Blocks:
    """A file's bytes in blocks, as often as they are iterated over."""

    def __init__(self, path: Path, size: int) -> None:
        self._path, self._size = path, size

    def __iter__(self) -> Iterator[bytes]:
        with open_plain(self._path) as file:
            while block := file.read(self._size):
                yield block

    def read(self, number: int) -> bytes:
        """The block of this number, from 0."""
        with open_plain(self._path) as file:
            file.seek(number * self._size)
            return file.read(self._size)


def yield_to_training() -> None:
    """Give this thread, and the one in which fsspec speaks to the network, a lower priority than the others."""
    from fsspec import asyn

    for thread in (threading.current_thread(), asyn.iothread[0]):
        if thread is not None and thread.native_id is not None and sys.platform == "linux":  # where threads have one
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, thread.native_id, _NICE)


def _waits(attempts: int) -> Iterator[float | None]:
    """The wait after each failed attempt, growing and random, and None after the last."""
    for number in range(attempts - 1):
        yield min(MOST_WAIT_S, FIRST_WAIT_S * 2**number) * random.uniform(0.5, 1.0)
    yield None


def _etag(digests: Sequence[bytes]) -> str:
    """S3's ETag of an object of these parts: MD5, or MD5 of the MD5s with the number of parts."""
    if len(digests) == 1:
        return digests[0].hex()
    return f"{hashlib.md5(b''.join(digests), usedforsecurity=False).hexdigest()}-{len(digests)}"


def _tag(info: Mapping[str, Any]) -> str:
    for key in ("ETag", "etag", "md5Hash", "generation", "created", "mtime", "LastModified"):
        if info.get(key) is not None:
            return str(info[key]).strip('"')
    return str(info.get("size"))


def _code(error: BaseException) -> str:
    """The service's own code for an error, such as ExpiredToken; "" where there is none."""
    cause: BaseException | None = error
    while cause is not None:
        response = vars(cause).get("response")
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        cause = cause.__cause__
    return ""


_EXPIRED = ("ExpiredToken", "TokenRefreshRequired", "RequestExpired")
_CHANGED = ("PreconditionFailed", "ConditionalRequestConflict", "412")
_UNKNOWN_KEYS = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "AuthFailure")


def _translated(error: Exception, kind: str, where: str) -> RemoteError:
    """A library's error as one line with its remedy, in a class that says whether to try again."""
    if isinstance(error, RemoteError):
        return error
    code, words = _code(error), without_secrets(one_line(error, 200))
    name = type(error).__name__
    if code in _CHANGED or isinstance(error, FileExistsError):
        return ChangedError(f"{where}: is there already, or was changed by somebody else")
    if code == "RequestTimeTooSkewed":
        return RefusedError(f"{where}: this machine's clock differs from the store's by too much: set it")
    if code in _EXPIRED or "ExpiredToken" in words or "token has expired" in words:
        return RefusedError(f"{where}: the credentials have expired: renew them where the store's library finds them")
    if "NoCredentials" in name or "CredentialRetrieval" in name or "DefaultCredentialsError" in name:
        return RefusedError(f"{where}: there are no credentials: set them as the store's programs expect ({name})")
    if code in _UNKNOWN_KEYS:
        return RefusedError(f"{where}: the store does not accept the credentials ({code}): check them")
    if code == "NoSuchBucket" or "bucket does not exist" in words:
        return RefusedError(f"{where}: there is no such bucket: make it first, or check the name")
    if isinstance(error, NotImplementedError):
        return RefusedError(f"{where}: stores of this kind cannot {kind} an object: use another, such as s3://")
    if isinstance(error, FileNotFoundError):
        return _AbsentError(f"{where}: is not there: check the address")
    if isinstance(error, PermissionError) or code in ("403", "AccessDenied"):
        return RefusedError(
            f"{where}: the store refuses to {kind} it: check what these credentials may do ({code or words})"
        )
    return RemoteError(f"{where}: {name}: {words}: check the address, the network and the store")
