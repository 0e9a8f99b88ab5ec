"""torchrun's rendezvous with spares: in threads of this process, and with real torchruns whose nodes are lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.distributed.elastic.rendezvous.api import RendezvousInfo, RendezvousParameters

from weftrain.backends.cuda import node_rendezvous as module
from weftrain.backends.cuda.node_meeting import ROUND_KEY, Meeting
from weftrain.backends.cuda.node_rendezvous import NodeRendezvous, create


def node(folder: Path, name: str, size: int, **identity: str) -> NodeRendezvous:
    return NodeRendezvous(Meeting(folder, identity, name, 0.4), "r", size, "127.0.0.1", 20, beat_s=0.05)


class Waiting:
    """A thread that asks a node for its next round."""

    def __init__(self, one: NodeRendezvous) -> None:
        self.found: RendezvousInfo | None = None
        self.ended: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(one,), daemon=True)
        self._thread.start()

    def _run(self, one: NodeRendezvous) -> None:
        try:
            self.found = one.next_rendezvous()
        except BaseException as error:
            self.ended = error

    def rank(self) -> int:
        self._thread.join(10)
        assert self.found is not None, self.ended
        return self.found.rank

    def code(self) -> object:
        self._thread.join(10)
        assert isinstance(self.ended, SystemExit)
        return self.ended.code

    @property
    def waits(self) -> bool:
        return self._thread.is_alive()


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def vanish(one: NodeRendezvous) -> None:
    """It beats no more, and leaves its file."""
    one._end.set()
    one._thread.join()


def test_a_spare_takes_the_place_of_the_node_that_hosts_the_store(tmp_path: Path) -> None:
    """Each round has a new store, and the other node keeps its rank. When the run ends, the last spare does."""
    one, two, three, four = nodes = [node(tmp_path, f"host{number}", 2) for number in range(4)]
    first, second = Waiting(one), Waiting(two)
    assert sorted((first.rank(), second.rank())) == [0, 1]
    leads, follows = (one, two) if first.rank() == 0 else (two, one)
    found = first.found if leads is one else second.found
    assert found is not None
    stands_by = [Waiting(three), Waiting(four)]
    time.sleep(0.3)
    assert all(one.waits for one in stands_by)
    assert (leads.num_nodes_waiting(), follows.num_nodes_waiting()) == (0, 0)  # spares end nobody's ranks
    vanish(leads)
    until(follows.num_nodes_waiting)
    again = Waiting(follows)
    until(lambda: sum(one.waits for one in stands_by) == 1)
    replaced = next(one for one in stands_by if not one.waits)
    assert (replaced.rank(), again.rank()) == (0, 1)
    assert again.found is not None
    assert again.found.bootstrap_store_info != found.bootstrap_store_info
    assert again.found.store.underlying_store.get(ROUND_KEY) == b"2"  # type: ignore[attr-defined]
    follows.set_closed()
    assert next(one for one in stands_by if one.waits).code() == 0
    for one in nodes:
        one.shutdown()


def test_a_spare_with_another_version_is_refused_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = node(tmp_path, "host1", 1, weftrain="0.2")
    assert Waiting(one).rank() == 0
    other = node(tmp_path, "host2", 1, weftrain="0.1")
    assert Waiting(other).code() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "weftrain: host2 takes no part: weftrain is 0.1 here, and 0.2 on host1, which came first: install and start "
        "the same everywhere"
    )
    other.shutdown()
    assert not one.is_closed()
    one.shutdown()


def test_another_recipe_is_another_identity(tmp_path: Path) -> None:
    recipe = tmp_path / "own.yaml"
    found = []
    for text, words in (("a: 1", ["x=1"]), ("a: 1", ["x=2"]), ("a: 2", ["x=1"])):
        recipe.write_text(text)
        found.append(module.identity(["--nnodes", "2", "-m", "weftrain.cli", "train", str(recipe), *words]))
    assert [key for key in found[0] if found[0][key] != found[1][key]] == ["command"]
    assert [key for key in found[0] if found[0][key] != found[2][key]] == ["recipe"]


@pytest.mark.parametrize(
    ("nodes", "endpoint", "told"),
    [((1, 4), "/tmp", "--nnodes 1:4: the recipe fixes"), ((4, 4), "head:29500", "name a folder that all nodes share")],
)
def test_what_cannot_be_is_refused(
    nodes: tuple[int, int], endpoint: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        create(RendezvousParameters("weftrain", endpoint, "r", *nodes))
    assert told in capsys.readouterr().err
