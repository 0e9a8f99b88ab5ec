"""moto's S3 server in this process, on the loopback interface, as a fixture for tests of runs in object stores."""

from __future__ import annotations

import logging
import urllib.request
from collections.abc import Iterator
from typing import Any

import fsspec
import pytest

pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'weftrain[s3]'")
moto_server = pytest.importorskip(
    "moto.server", reason="moto is not installed: pip install 'moto[s3]' flask flask-cors"
)

BUCKET = "shelf"


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    started = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    started.start()
    host, port = started.get_host_and_port()
    yield f"http://{host}:{port}"
    started.stop()


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An empty bucket `shelf` in a server that this process reaches by its environment; the file system."""
    return _connected(server, monkeypatch)


def _connected(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    secrets = {"ACCESS_KEY_ID": "the-key-id", "SECRET_ACCESS_KEY": "the-secret-key", "DEFAULT_REGION": "us-east-1"}
    for name, value in secrets.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/moto-api/reset", method="POST")).close()
    system = fsspec.filesystem("s3", use_listings_cache=False)
    system.mkdir(BUCKET)
    return system
