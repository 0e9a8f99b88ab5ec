"""Observers: what one of them does wrong is a line for the user, and the run and the others go on."""

from __future__ import annotations

from weftrain.core.run.observers import Observers


class Watching:
    """Notes what it was called with. fails: the method that raises."""

    def __init__(self, name: str, fails: str = "") -> None:
        self.name, self._fails = name, fails
        self.calls: list[object] = []

    def _call(self, what: object) -> None:
        if what == self._fails:
            raise OSError("no route to host")
        self.calls.append(what)

    def recorded(self, saves_next: bool) -> None:
        self._call("recorded")

    def problems(self) -> tuple[str, ...]:
        return (f"{self.name} is slow",) if len(self.calls) == 1 else ()

    def close(self, wait_s: float) -> None:
        self._call(("close", wait_s))


def test_an_observer_that_raises_is_named_and_let_go() -> None:
    broken, whole, said = Watching("broken", "recorded"), Watching("whole"), list[str]()
    with Observers([broken, whole], lambda: 7.0, said.append) as observers:
        left_out = "broken: failed, and is left out from here on: OSError: no route to host"
        assert observers.recorded(False) == [left_out, "whole is slow"]
        assert observers.recorded(False) == []
    assert broken.calls == []
    assert whole.calls == ["recorded", "recorded", ("close", 7.0)]
    assert said == []


def test_what_happens_at_the_end_is_said() -> None:
    said = list[str]()
    with Observers([Watching("a")], lambda: 0.0, said.append):
        pass
    assert said == ["a is slow"]
