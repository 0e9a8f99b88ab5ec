"""A world of four ranks, started once for the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[None]:
    from ranks import world_of

    with world_of(4):
        yield
