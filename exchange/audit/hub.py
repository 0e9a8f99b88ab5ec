"""The revisions of a model repository on the Hugging Face hub, or on a server that answers like it.

Three requests are made: the branches and tags, the files of one commit with the SHA-256 of those that are stored
outside git, and a range of one file's bytes. So the hashes of all weights are known and nothing is downloaded but
headers and configs. A token is sent to the endpoint alone, never to where it redirects.
"""

from __future__ import annotations

import email.message
import http.client
import random
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import quote, urlsplit

from weftrain.core.errors import RemoteError, one_line, printable
from weftrain.core.formats.canonical import parse_json
from weftrain.exchange.audit.names import place_of
from weftrain.exchange.audit.series import (
    ListedFile,
    Revision,
    Series,
    VanishedError,
    is_wanted,
    revision_folders,
    revision_of,
)

ENDPOINT = "https://huggingface.co"
ADDRESS = "hub:"
ATTEMPTS = 5
_FIRST_WAIT_S, _MOST_WAIT_S = 0.5, 30.0
_TIMEOUT_S, _MOST_REQUEST_S = 30.0, 120.0
_MAX_REFS_BYTES, _MAX_PAGE_BYTES = 64 << 20, 16 << 20
_MAX_PAGES = 200  # of a list of files: a thousand files a page
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
_SHA256, _OID = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{40}([0-9a-f]{24})?")
_NEXT = re.compile(r'<([^<>]{1,4000})>\s*;\s*rel="next"')
_AGAIN = (408, 425, 429, 500, 502, 503, 504)


def is_hub(address: str) -> bool:
    """Whether an address names a repository on the hub: `hub:owner/name`."""
    return address.startswith(ADDRESS)


class HubSeries(Series):
    """The branches of a repository, and those of its tags whose names have a step. wait: sleeps."""

    kind = "repository on the Hugging Face hub"

    def __init__(
        self,
        address: str,
        endpoint: str = ENDPOINT,
        token: str | None = None,
        *,
        wait: Callable[[float], object] = time.sleep,
    ) -> None:
        name = address.removeprefix(ADDRESS).strip("/")
        if not _REPOSITORY.fullmatch(name) or ".." in name:
            raise RemoteError(f"{printable(address[:200])}: is no repository: name it as hub:owner/name")
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.netloc or "@" in parts.netloc or parts.query:
            raise RemoteError("the hub's endpoint is no http or https address without user and query: give another one")
        self.where, self._name, self._endpoint = f"{ADDRESS}{name}", name, endpoint.rstrip("/")
        self._token, self._wait = token, wait
        self._commits: dict[str, str] = {}  # of the branches and tags
        self._known: dict[str, Revision] = {}  # commit -> its files, which never change
        self._folders: dict[str, Revision] = {}  # where there are no branches with steps
        self.requests = 0  # for people: threads may lose one
        self.read_bytes = 0

    def refs(self) -> Sequence[str]:
        before = set(self._commits.values())
        self._commits.clear()
        self._folders.clear()
        found = self._json(f"/api/models/{self._name}/refs", _MAX_REFS_BYTES, "the list of its branches")[0]
        if not isinstance(found, dict):
            raise RemoteError(f"{self.where}: the list of its branches is no JSON object: check the endpoint")
        for kind in ("branches", "tags"):
            entries = found.get(kind)
            for entry in entries if isinstance(entries, list) else ():
                name, commit = (entry.get(key) if isinstance(entry, dict) else None for key in ("name", "targetCommit"))
                if not isinstance(name, str) or not isinstance(commit, str) or not _OID.fullmatch(commit):
                    continue
                if kind == "branches" or (place_of(name) is not None and name not in self._commits):
                    self._commits[name[:256]] = commit
        for commit in before - set(self._commits.values()):
            self._known.pop(commit, None)
        if "main" in self._commits and not any(map(place_of, self._commits)):
            self._find_folders(self._commits["main"])
        return [*self._commits, *self._folders]

    def _find_folders(self, commit: str) -> None:
        """The folders of the main branch that are revisions: some repositories have these in place of branches."""
        files = {file.path: file for file in map(_listed, self._entries(commit)) if file is not None}
        for folder, names in revision_folders(files).items():
            listed = [replace(files[f"{folder}/{name}"], path=name) for name in names]
            self._folders[folder] = revision_of(folder, f"{commit}/{quote(folder)}", listed)

    def revision(self, name: str) -> Revision:
        if name in self._folders:
            return self._folders[name]
        commit = self._commits[name]
        if commit not in self._known:
            self._known[commit] = revision_of(name, commit, filter(None, map(_listed, self._entries(commit))))
        return replace(self._known[commit], name=name)

    def mark(self, name: str) -> str:
        """A branch's commit says it without a request."""
        return self._commits[name] if name not in self._folders else super().mark(name)

    def identities(self, name: str) -> dict[str, str]:
        """Every file of a branch with its identity, "" where that is not known."""
        found = (_listed(entry, whatever=True) for entry in self._entries(self._commits[name]))
        return {file.path: file.identity for file in found if file is not None}

    def _entries(self, commit: str) -> Iterator[Any]:
        path: str | None = f"/api/models/{self._name}/tree/{commit}?recursive=true"
        for _ in range(_MAX_PAGES):
            if path is None:
                return
            page, path = self._json(path, _MAX_PAGE_BYTES, f"the list of files of commit {commit[:12]}")
            if not isinstance(page, list):
                raise RemoteError(f"{self.where}: the list of files of commit {commit[:12]} is no JSON list")
            yield from page
        raise RemoteError(f"{self.where}: commit {commit[:12]} has more than {_MAX_PAGES:,} pages of files")

    def read(self, revision: Revision, path: str, start: int, stop: int) -> bytes:
        if stop <= start:
            return b""
        where = f"/{self._name}/resolve/{revision.commit}/{quote(path, safe='/')}"
        headers = {"Range": f"bytes={start}-{stop - 1}"}
        return self._get(where, stop - start, path, headers, start)[0]

    def _json(self, path: str, limit: int, what: str) -> tuple[Any, str | None]:
        """A JSON value, and the path of the page after it."""
        data, headers = self._get(path, limit + 1, what, {"Accept": "application/json"})
        if len(data) > limit:
            raise RemoteError(f"{self.where}: {what} is larger than the {limit:,} bytes that are read of it")
        try:
            value = parse_json(data)
        except ValueError as error:
            raise RemoteError(f"{self.where}: {what} is no JSON ({one_line(error, 80)}): check the endpoint") from None
        following = _NEXT.search(headers.get("Link") or "")
        if following is None:
            return value, None
        parts = urlsplit(following[1])
        return value, f"{parts.path}?{parts.query}"  # of this endpoint, whatever host it names

    def _get(
        self, path: str, most: int, what: str, headers: Mapping[str, str], start: int = 0
    ) -> tuple[bytes, email.message.Message]:
        """At most `most` bytes from `start` on, tried again where that can help."""
        for attempt in range(ATTEMPTS):
            try:
                return self._once(path, most, headers, start)
            except urllib.error.HTTPError as error:
                error.close()
                if error.code == 416:
                    return b"", error.headers
                if error.code not in _AGAIN or attempt == ATTEMPTS - 1:
                    raise self._refusal(error.code, what) from None
                asked = error.headers.get("Retry-After") or ""
                self._pause(attempt, float(asked) if asked.isdecimal() else 0.0)
            except (OSError, http.client.HTTPException, ValueError) as error:
                if attempt == ATTEMPTS - 1:
                    reason = getattr(error, "reason", error)
                    words = one_line(reason, 120) if isinstance(reason, BaseException) else str(reason)[:120]
                    raise RemoteError(
                        f"{self.where}: {what} cannot be fetched from {self._endpoint}: {words}: check the network and "
                        "the endpoint"
                    ) from None
                self._pause(attempt, 0.0)
        raise AssertionError("unreachable")

    def _pause(self, attempt: int, asked_s: float) -> None:
        own = _FIRST_WAIT_S * 2**attempt * (0.5 + random.random())
        self._wait(min(_MOST_WAIT_S, max(own, asked_s)))

    def _once(
        self, path: str, most: int, headers: Mapping[str, str], start: int
    ) -> tuple[bytes, email.message.Message]:
        self.requests += 1
        request = urllib.request.Request(self._endpoint + path, headers={"User-Agent": "weftrain-audit", **headers})
        if self._token:
            request.add_unredirected_header("Authorization", f"Bearer {self._token}")
        until = time.monotonic() + _MOST_REQUEST_S
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
            # A server without ranges sends the whole file: its beginning is passed over, and the rest never read.
            to_skip = start if "Range" in headers and answer.status == 200 else 0
            if to_skip > _MAX_PAGE_BYTES:
                raise OSError("the server sends whole files where parts of them are asked for")
            data = bytearray()
            while len(data) < to_skip + most and (block := answer.read1(min(1 << 20, to_skip + most - len(data)))):
                data += block
                if time.monotonic() > until:
                    raise TimeoutError(f"took longer than {_MOST_REQUEST_S:.0f} s")
            self.read_bytes += len(data)
            return bytes(data[to_skip:]), answer.headers

    def _refusal(self, code: int, what: str) -> RemoteError:
        if code in (404, 410):
            return VanishedError(f"{self.where}: {what} is not there (HTTP {code}): check the name")
        if code in (401, 403):
            return RemoteError(
                f"{self.where}: the hub refuses {what} (HTTP {code}): the repository does not exist, or is private or "
                "gated: check the name, or set HF_TOKEN"
            )
        return RemoteError(f"{self.where}: the hub answers HTTP {code} for {what}: try again later")


def _listed(entry: object, *, whatever: bool = False) -> ListedFile | None:
    """A file of a list, if it means anything to an audit. whatever: also if it does not."""
    if not isinstance(entry, dict) or entry.get("type") != "file":
        return None
    path, size, lfs = entry.get("path"), entry.get("size"), entry.get("lfs")
    if not isinstance(path, str) or len(path) > 1024 or not (whatever or is_wanted(path)):
        return None
    size, identity = size if type(size) is int and 0 <= size < 2**63 else 0, ""
    sha256 = lfs.get("oid") if isinstance(lfs, dict) else None
    if isinstance(sha256, str) and _SHA256.fullmatch(sha256):
        identity = f"sha256:{sha256}"
    elif lfs is None and isinstance(entry.get("oid"), str) and _OID.fullmatch(entry["oid"]):
        identity = f"git:{entry['oid']}"
    return ListedFile(path, size, identity)
