"""A backend that does not keep the protocol is refused before step 0."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from weftrain.backends import null
from weftrain.core.backend import Fingerprint, Job, Plan
from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError
from weftrain.core.run.prepare import prepare_run


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (
            lambda: {"vendor": "x"},
            "gave a dict without backend, device_type, device: it must return weftrain.core.backend.Fingerprint",
        ),
        (lambda: {"backend": "null", "device": "x"}, "gave a dict without device_type:"),
        (lambda: None, "gave a NoneType without backend"),
        (lambda: Fingerprint("null", "cpu"), "missing 1 required positional argument: 'device'"),  # type: ignore[call-arg]
        (lambda: Fingerprint("null", "cpu", ""), "device is '': give a text"),
        (lambda: Fingerprint("null", "cpu", "x", threads=0), "threads is 0: give a number from 1"),
        (lambda: Fingerprint("null", "cpu", "x", more={"ranks": 2}), "ranks is in `more`"),
        (lambda: Fingerprint("other", "cpu", "x"), "names the backend 'other'"),
        (lambda: Fingerprint("null", "cpu", "x", more={"dtype": object()}), "holds what JSON cannot"),
    ],
)
def test_a_backend_without_a_whole_fingerprint_is_refused_by_name(
    found: Callable[[], Any], words: str, tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = []
    monkeypatch.setattr(null.NullRun, "fingerprint", lambda self: found())
    monkeypatch.setattr(null.NullRun, "close", lambda self: closed.append(self))
    with pytest.raises(BackendError, match=r"the null backend: Run.fingerprint\(\).*" + re.escape(words)):
        prepare_run(null.BACKEND, Job(tiny_recipe(), Plan(0, 1), null.NullOptions()))
    assert len(closed) == 1
