"""A server on the loopback interface that answers like the Hugging Face hub: branches and tags, lists of files by pages,
and ranges of files, which it redirects to another address as the hub does to its store. It takes uploads as well.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

PAGE = 50  # entries of a list of files


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def commit_of(name: str) -> str:
    return hashlib.sha1(name.encode()).hexdigest()


@dataclass
class Hub:
    """revisions: branch -> path -> bytes. faults: (what, number of requests so far of it) -> an HTTP status, or None."""

    revisions: Mapping[str, Mapping[str, bytes]]
    tags: Mapping[str, str] = field(default_factory=dict)
    repository: str = "owner/name"
    faults: Callable[[str, int], int | None] = lambda path, count: None
    ranges: bool = True
    asked: list[str] = field(default_factory=list)
    authorized: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)  # what was uploaded, by its SHA-256
    exists: bool = True
    endpoint: str = ""

    def refs(self) -> dict[str, Any]:
        def entry(name: str, kind: str, of: str) -> dict[str, str]:
            return {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": commit_of(of)}

        tags = [entry(name, "tags", of) for name, of in self.tags.items()]
        return {"branches": [entry(name, "heads", name) for name in self.revisions], "converts": [], "tags": tags}

    def files(self, commit: str) -> Mapping[str, bytes] | None:
        return next((files for name, files in self.revisions.items() if commit in (commit_of(name), name)), None)

    def listing(self, files: Mapping[str, bytes]) -> list[dict[str, Any]]:
        found = []
        for path, data in files.items():
            oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            entry: dict[str, Any] = {"type": "file", "oid": oid, "size": len(data), "path": path}
            if path.endswith((".safetensors", ".bin", ".pt")):
                entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 130}
            found.append(entry)
        return [{"type": "directory", "oid": "0" * 40, "size": 0, "path": "runs"}, *found]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"
    hub: Hub

    def log_message(self, *arguments: Any) -> None:
        """Nothing is printed."""

    def do_GET(self) -> None:
        hub, path = self.hub, self.path
        hub.asked.append(path)
        if (token := self.headers.get("Authorization")) is not None:
            hub.authorized.append(path)
            assert token == "Bearer secret"
        hub.counts[path] = hub.counts.get(path, 0) + 1
        if (status := hub.faults(path, hub.counts[path])) is not None:
            return self._send(status, b"")
        parts = urlsplit(path)
        words = unquote(parts.path).strip("/").split("/")
        api = ["api", "models", *hub.repository.split("/")]
        if words == [*api, "refs"] and hub.exists:
            return self._send(200, json.dumps(hub.refs()).encode())
        if words[:-1] == [*api, "tree"] and (files := hub.files(words[-1])) is not None:
            entries, start = hub.listing(files), int(parse_qs(parts.query).get("cursor", ["0"])[0])
            following = f'<{hub.endpoint}{parts.path}?recursive=true&cursor={start + PAGE}>; rel="next"'
            page = json.dumps(entries[start : start + PAGE]).encode()
            return self._send(200, page, {"Link": following} if start + PAGE < len(entries) else {})
        if "resolve" in words[:3]:
            elsewhere = hub.endpoint.replace("127.0.0.1", "localhost")
            return self._send(302, b"", {"Location": f"{elsewhere}/store/{'/'.join(words[3:])}"})
        if words[0] == "store" and (files := hub.files(words[1])) is not None and "/".join(words[2:]) in files:
            return self._part(files["/".join(words[2:])])
        return self._send(404, b"")

    def do_PUT(self) -> None:
        data = self._body()
        self.hub.asked.append(f"PUT {self.path}")
        if (status := self.hub.faults(f"PUT {self.path}", len(self.hub.asked))) is not None:
            return self._send(status, b"")
        self.hub.stored[self.path.rpartition("/")[2]] = data
        self._send(200, b"")

    def do_POST(self) -> None:
        hub, body = self.hub, self._body()
        hub.asked.append(f"POST {self.path}")
        words = unquote(urlsplit(self.path).path).strip("/").split("/")
        if words[-1] == "create":
            status, hub.exists = 409 if hub.exists else 200, True
            return self._json({"url": f"{hub.endpoint}/{hub.repository}"}, status)
        if "branch" in words:
            status = 409 if words[-1] in hub.revisions else 200
            hub.revisions = {words[-1]: dict(hub.revisions.get("main", {})), **hub.revisions}
            return self._json({}, status)
        if "preupload" in words:
            files = [
                {"path": one["path"], "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular"}
                for one in json.loads(body)["files"]
            ]
            return self._json({"files": [{**one, "shouldIgnore": False, "oid": None} for one in files]})
        if words[-1] == "batch":
            objects: list[dict[str, Any]] = []
            for one in json.loads(body)["objects"]:
                href = {"href": f"{hub.endpoint}/lfs/{one['oid']}"}
                objects.append({**one, **({} if one["oid"] in hub.stored else {"actions": {"upload": href}})})
            return self._json({"transfer": "basic", "objects": objects})
        if "commit" in words:
            return self._commit(words[-1], [json.loads(line) for line in body.splitlines()])
        return self._json({})

    def _commit(self, branch: str, lines: list[dict[str, Any]]) -> None:
        files = dict(self.hub.revisions.get(branch, {}))
        for line in lines:
            value, path = line["value"], line["value"].get("path")
            if line["key"] == "file":
                files[path] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[path] = self.hub.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[path]
        self.hub.revisions = {**self.hub.revisions, branch: files}
        oid = commit_of(branch)
        self._json({"commitUrl": f"{self.hub.endpoint}/{self.hub.repository}/commit/{oid}", "commitOid": oid})

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _part(self, data: bytes) -> None:
        asked = self.headers.get("Range")
        if asked is None or not self.hub.ranges:
            return self._send(200, data)
        first, last = map(int, asked.removeprefix("bytes=").split("-"))
        part = data[first : last + 1]
        self._send(206 if part else 416, part, {"Content-Range": f"bytes {first}-{last}/{len(data)}"})

    def _send(self, status: int, data: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


class _Server(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True


@contextmanager
def served(hub: Hub) -> Iterator[Hub]:
    """Serve it until the block ends; its address is `hub.endpoint`."""
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    thread = threading.Thread(target=lambda: server.serve_forever(0.02))
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
