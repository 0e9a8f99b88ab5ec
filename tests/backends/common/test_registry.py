"""A plugin that is broken in any way is named and passed over: every other backend is found all the same."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any

import pytest
from click.testing import CliRunner

from weftrain.backends.common.registry import find_backends, get_backend
from weftrain.backends.null import BACKEND as NULL
from weftrain.cli.main import main
from weftrain.core.errors import BackendError


class Theirs(type(NULL)):  # type: ignore[misc]
    name = "theirs"


class Broken(Theirs):
    def unavailable(self) -> str | None:
        raise OSError("no such driver")


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """offer(object or exception): what the one installed plugin loads to."""

    def install(offered: Any) -> None:
        class Fake:
            name, value = "theirs", "their_package:BACKEND"

            def load(self) -> Any:
                if isinstance(offered, BaseException):
                    raise offered
                return offered

        monkeypatch.setattr(
            importlib.metadata, "entry_points", lambda *, group: [Fake()] if group == "weftrain.backends" else []
        )

    return install


def test_a_backend_of_another_package_is_found(offer: Callable[[Any], None]) -> None:
    offer(Theirs())
    assert get_backend("theirs").name == "theirs"
    assert find_backends().broken_plugins == {}


@pytest.mark.parametrize(
    ("offered", "reason"),
    [
        (ImportError("no module named tape"), "cannot be loaded: ImportError: no module named tape"),
        (RuntimeError("driver too old"), "cannot be loaded: RuntimeError: driver too old"),
        (SystemExit(3), "cannot be loaded: SystemExit: 3"),
        (
            object(),
            "BACKEND lacks name, summary, options, returns_gradients, portable_options, unsupported, unavailable, prepare, stored_state",
        ),
        (NULL, "a second backend named 'null'"),
    ],
)
def test_a_broken_plugin_is_named_and_passed_over(offer: Callable[[Any], None], offered: Any, reason: str) -> None:
    offer(offered)
    assert get_backend("local").name == "local"
    ((origin, said),) = find_backends().broken_plugins.items()
    assert origin == "entry point 'theirs' (their_package:BACKEND)"
    assert reason in said
    with pytest.raises(BackendError, match=r"no backend 'theirs'.* entry point 'theirs' .* was passed over"):
        get_backend("theirs")
    shown = CliRunner().invoke(main, ["backends"])
    assert shown.exit_code == 0
    assert "warning: entry point 'theirs' (their_package:BACKEND) was passed over" in shown.output
    assert "local" in shown.output


def test_a_backend_whose_own_question_fails_cannot_run(offer: Callable[[Any], None]) -> None:
    offer(Broken())
    with pytest.raises(
        BackendError, match="backend 'theirs' cannot run here: its own `unavailable` failed: OSError: no such driver"
    ):
        get_backend("theirs")
    assert CliRunner().invoke(main, ["backends"]).exit_code == 0
