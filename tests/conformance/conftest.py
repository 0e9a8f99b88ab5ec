"""The backend that a test of the suite is about: each backend in one process, and the cuda backend on two ranks and on
four.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from weftrain.backends.common.registry import find_backends

HERE = Path(__file__).parent
TRAINERS = sorted(
    name for name, backend in find_backends().items() if backend.returns_gradients and backend.unavailable() is None
)


# cuda-4; and streaming through a device that a part of the CPU's memory stands in for
PROVED = [pytest.param(name, marks=pytest.mark.prove) for name in ("cuda-4", "streaming+device")]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Two and four ranks are asked all that test_backends.py asks. What the other files ask is of losses and tunings, and
    not of the number of ranks: of two it is among the longer proofs, and of four their second variant.
    """
    for item in items:
        here = item.path.parent == HERE and item.path.name != "test_backends.py"
        asked = getattr(item, "callspec", None)
        ranks = asked.params.get("name") if here and asked is not None else None
        if ranks in ("cuda-2", "cuda-4"):
            item.add_marker(pytest.mark.prove if ranks == "cuda-2" else pytest.mark.soak)


@pytest.fixture(scope="module", params=[*TRAINERS, "cuda-2", *PROVED])
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    """Of a backend, with `-ranks` where there are several; their processes are started once for all tests of the
    module.
    """
    from ranks import world_of

    from weftrain.backends.cuda.rendezvous import leave

    wanted: str = request.param
    _, _, ranks = wanted.partition("-")
    if not ranks:
        yield wanted
        leave()  # a world of one that runs of the cuda backend left
        return
    with world_of(int(ranks)):
        yield wanted
