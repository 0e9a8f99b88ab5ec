"""MLflow, by its REST API: no package is needed where the training runs. MLFLOW_TRACKING_URI names the server.

MLFLOW_EXPERIMENT_NAME names the experiment. MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and _PASSWORD, are sent
to the server and go nowhere else. The API: https://mlflow.org/docs/latest/rest-api.html.
"""

from __future__ import annotations

import base64
import http.client
import json
import math
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import unquote, urlencode, urlsplit, urlunsplit

from weftrain.analysis.tracking.tracker import Ending, Record, TrackedRun, TrackerError

EXPERIMENT = "weftrain"  # where MLFLOW_EXPERIMENT_NAME does not name another
_TIMEOUT_S = 20.0
_MOST_METRICS, _MOST_PARAMS, _MOST_TEXT = 1_000, 100, 5_000  # that the API takes at once; characters of a tag
_MOST_VALUE = 500  # characters of a parameter that every version of the server takes
_MOST_EVENTS = 100  # lines of the run's description
_MOST_BYTES = 64 << 20  # of an answer
_NOT_A_NAME = re.compile(r"[^\w./ -]")
_STATUS: dict[Ending, str] = {"finished": "FINISHED", "interrupted": "KILLED", "abandoned": "FINISHED"}


class MLflow:
    """One run of an MLflow server. The latest samples are tags, and events the run's description. It cannot forget what
    it has; a metric that is sent again, with the same step and time, is there once.
    """

    def problem(self) -> str:
        address = os.environ.get("MLFLOW_TRACKING_URI", "")
        if not address:
            return "MLFLOW_TRACKING_URI is not set: set it to the server's address, such as http://127.0.0.1:5000"
        try:
            _Server(address)
        except TrackerError as error:
            return str(error)
        return ""

    def open(self, run: TrackedRun, known: str | None, after: int) -> str:
        if problem := self.problem():
            raise TrackerError(problem)
        self._server = _Server(os.environ["MLFLOW_TRACKING_URI"])
        if known is not None:
            self._id = known
            found = self._server.get("runs/get", run_id=known)["run"]
            tags = {tag["key"]: tag["value"] for tag in found["data"].get("tags", ())}
            self._events = tags.get("mlflow.note.content", "").splitlines()
            self._has = {one["key"]: int(one["step"]) for one in found["data"].get("metrics", ())}
            self._server.post("runs/update", run_id=known, status="RUNNING")
            return known
        tags = {"mlflow.runName": run.name, "mlflow.source.name": "weftrain"}
        if run.continues:
            tags["weftrain.goes_on_from"] = run.continues
        created = self._server.post(
            "runs/create", experiment_id=self._experiment(), run_name=run.name, tags=_pairs(tags)
        )
        self._id, self._events, self._has = str(created["run"]["info"]["run_id"]), list[str](), dict[str, int]()
        values = {_name(key): str(value)[:_MOST_VALUE] for key, value in run.hyperparameters.items()}
        for some in _parts(_pairs(values), _MOST_PARAMS):
            self._server.post("runs/log-batch", run_id=self._id, params=some)
        return self._id

    def send(self, records: Sequence[Record]) -> None:
        metrics = [
            {"key": _name(name), "value": _number(value), "timestamp": round(one.time * 1e3), "step": one.step}
            for one in records
            for name, value in one.numbers.items()
            # A process that was killed may have sent more than it noted, and what is trained again has another time.
            if one.step > self._has.get(_name(name), -1)
        ]
        for some in _parts(metrics, _MOST_METRICS):
            self._server.post("runs/log-batch", run_id=self._id, metrics=some)
        tags = {_name(name): text[:_MOST_TEXT] for one in records for name, text in one.texts.items()}
        if events := [f"- {one.event}" for one in records if one.event]:
            # None twice: a batch may be sent again.
            self._events = list(dict.fromkeys([*self._events, *events]))[-_MOST_EVENTS:]
            tags["mlflow.note.content"] = "\n".join(self._events)[-_MOST_TEXT:]
        if tags:
            self._server.post("runs/log-batch", run_id=self._id, tags=_pairs(tags))

    def rewind(self, step: int) -> bool:
        return False

    def close(self, ending: Ending) -> None:
        if ending == "abandoned":
            self._server.post("runs/log-batch", run_id=self._id, tags=_pairs({"weftrain.state": "abandoned"}))
        self._server.post("runs/update", run_id=self._id, status=_STATUS[ending])

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        try:
            found = self._server.get("experiments/get-by-name", experiment_name=name)
            return str(found["experiment"]["experiment_id"])
        except _MissingError:
            return str(self._server.post("experiments/create", name=name)["experiment_id"])


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would take the credentials to another place."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)


class _MissingError(TrackerError):
    """The server does not have what was asked for."""


class _Server:
    """Calls of the REST API. Messages have the server's address without what may be a secret in it."""

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise TrackerError(
                "MLFLOW_TRACKING_URI is not the address of a server, http or https: start one with `mlflow server "
                "--backend-store-uri sqlite:///mlflow.db`, and set it to http://127.0.0.1:5000"
            )
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        place = f"{host}:{parts.port}" if parts.port else host
        self._address = urlunsplit((parts.scheme, place, parts.path.rstrip("/"), "", ""))
        user, password = parts.username, parts.password
        user = unquote(user) if user else os.environ.get("MLFLOW_TRACKING_USERNAME")
        password = unquote(password) if password else os.environ.get("MLFLOW_TRACKING_PASSWORD", "")
        token = os.environ.get("MLFLOW_TRACKING_TOKEN")
        self._headers = {"Content-Type": "application/json"}
        if user:
            coded = base64.b64encode(f"{user}:{password}".encode()).decode()
            self._headers["Authorization"] = f"Basic {coded}"
        elif token:
            self._headers["Authorization"] = f"Bearer {token}"

    def get(self, method: str, **query: str) -> Any:
        return self._call(f"{method}?{urlencode(query)}", None)

    def post(self, method: str, **body: Any) -> Any:
        return self._call(method, json.dumps(body).encode())

    def _call(self, method: str, body: bytes | None) -> Any:
        request = urllib.request.Request(f"{self._address}/api/2.0/mlflow/{method}", body, self._headers)
        try:
            # The scheme is http or https: __init__ refuses any other.
            with _OPENER.open(request, timeout=_TIMEOUT_S) as answer:
                found = json.loads(answer.read(_MOST_BYTES))
        except urllib.error.HTTPError as error:
            raise self._refused(error, method.partition("?")[0]) from error
        except (OSError, http.client.HTTPException) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            raise TrackerError(
                f"{self._address} does not answer: {reason}: check the network and the server"
            ) from error
        except ValueError as error:
            raise TrackerError(f"{self._address} is no MLflow server: {method}: no JSON came back") from error
        if not isinstance(found, Mapping):
            raise TrackerError(f"{self._address} is no MLflow server: {method}: no mapping came back")
        return found

    def _refused(self, error: urllib.error.HTTPError, method: str) -> TrackerError:
        try:
            said = json.loads(error.read(1 << 20))
            code, message = str(said.get("error_code", "")), str(said.get("message", ""))
        except (ValueError, OSError, AttributeError):
            code, message = "", ""
        if error.code in (401, 403):
            return TrackerError(
                f"{self._address} refuses the credentials ({error.code}): set MLFLOW_TRACKING_TOKEN, or "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        if code == "RESOURCE_DOES_NOT_EXIST":
            return _MissingError(
                f"{self._address}: {method}: {message}: if it was deleted, delete tracking/mlflow.json in the run's "
                "folder, and the run is sent anew"
            )
        return TrackerError(f"{self._address}: {method}: {error.code} {code} {message}: check the server")


def _name(name: str) -> str:
    """A name that the server takes: other characters than letters, digits and _-./ and space become underscores."""
    return _NOT_A_NAME.sub("_", name)[:250]


def _number(value: float) -> float | str:
    """A number in JSON, which has no other than finite ones."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")


def _pairs(values: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"key": key, "value": value} for key, value in values.items()]


def _parts(items: Sequence[Any], most: int) -> Iterator[Sequence[Any]]:
    for first in range(0, len(items), most):
        yield items[first : first + most]
