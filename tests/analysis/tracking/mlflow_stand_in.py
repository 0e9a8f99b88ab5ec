"""A small stand-in for an MLflow server, with the part of its REST API that is used. It keeps everything in memory."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit


class StandIn:
    """runs: what each has. failing: the status that every call gets; 0: none. asked: the Authorization of each call."""

    def __init__(self) -> None:
        self.experiments: dict[str, str] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.failing, self.asked, self.address = 0, list[str | None](), ""

    def answer(self, method: str, body: dict[str, Any]) -> Any:
        if method == "experiments/get-by-name":
            name = body["experiment_name"]
            return {"experiment": {"experiment_id": self.experiments[name]}} if name in self.experiments else None
        if method == "experiments/create":
            return {"experiment_id": self.experiments.setdefault(body["name"], str(len(self.experiments) + 1))}
        if method == "runs/create":
            run_id = f"{len(self.runs) + 1:032x}"
            tags = {tag["key"]: tag["value"] for tag in body["tags"]}
            self.runs[run_id] = {"name": body["run_name"], "tags": tags, "params": {}, "metrics": {}, "status": ""}
            return {"run": {"info": {"run_id": run_id}}}
        run = self.runs.get(body["run_id"])
        if run is None:
            return None
        if method == "runs/get":
            tags = [{"key": key, "value": value} for key, value in run["tags"].items()]
            latest = [{"key": key, "step": max(step for step, _ in found)} for key, found in run["metrics"].items()]
            return {"run": {"data": {"tags": tags, "metrics": latest}}}
        if method == "runs/update":
            run["status"] = body["status"]
        else:
            assert method == "runs/log-batch"
            for kind in ("tags", "params"):
                run[kind] |= {one["key"]: one["value"] for one in body.get(kind, ())}
            for one in body.get("metrics", ()):
                assert isinstance(one["value"], float | int) or one["value"] in ("NaN", "Infinity", "-Infinity")
                run["metrics"].setdefault(one["key"], {})[one["step"], one["timestamp"]] = one["value"]
        return {}

    def series(self, number: int, key: str) -> list[tuple[int, Any]]:
        """(step, value) of a metric of the `number`-th run, from 1."""
        found = list(self.runs.values())[number - 1]["metrics"].get(key, {})
        return [(step, value) for (step, _), value in sorted(found.items())]


@contextmanager
def stand_in() -> Iterator[StandIn]:
    kept = StandIn()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.handle_call({key: values[0] for key, values in parse_qs(urlsplit(self.path).query).items()})

        def do_POST(self) -> None:
            self.handle_call(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def handle_call(self, body: dict[str, Any]) -> None:
            kept.asked.append(self.headers["Authorization"])
            method = urlsplit(self.path).path.removeprefix("/api/2.0/mlflow/")
            answer = None if kept.failing else kept.answer(method, body)
            status = kept.failing or (404 if answer is None else 200)
            missing = {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such run"}
            data = json.dumps(answer if status == 200 else missing if status == 404 else {}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    kept.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield kept
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
