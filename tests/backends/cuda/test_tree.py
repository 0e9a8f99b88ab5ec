"""Sums over ranks in a fixed tree, on a simulated network: whatever the order of arrivals, of the ring's ranks and of
the pieces, the tree's bits stay, and those of a ring or of "as they arrive" do not.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from weftrain.backends.common.sums import TreeSum, tree_sum
from weftrain.backends.cuda import tree

RANKS, SIZE = 8, 1003  # no multiple of the ranks


class Network:
    """Ranks that are threads of this process. Messages are delivered in an order drawn from the seed, whoever sent them
    first, and a rank's number in the network is not its place in the ring that the library would build.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.order = size, random.Random(seed)
        self._here, self._barrier = threading.local(), threading.Barrier(size, timeout=60)
        self._sent: list[tuple[Tensor, Tensor]] = []

    def run(self, work: Callable[[int], None]) -> None:
        failed: list[BaseException] = []

        def one(rank: int) -> None:
            self._here.rank = rank
            try:
                work(rank)
            except BaseException as error:
                failed.append(error)
                self._barrier.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            raise failed[0]

    def _exchange(self, messages: list[tuple[Tensor, Tensor]]) -> None:
        """(target, value) of this rank's messages: copied when all ranks have sent theirs."""
        self._sent += messages
        if self._barrier.wait() == 0:
            self.order.shuffle(self._sent)
            for target, value in self._sent:
                target.copy_(value)
            self._sent = []
        self._barrier.wait()

    def all_to_all(
        self,
        arrived: Tensor,
        whole: Tensor,
        output_splits: list[int] | None = None,
        input_splits: list[int] | None = None,
        group: object = None,
    ) -> None:
        rank = self._here.rank
        self._outputs[rank] = arrived.split(output_splits or arrived.numel() // self.size)
        self._barrier.wait()
        parts = whole.clone().split(input_splits or whole.numel() // self.size)
        self._exchange([(self._outputs[other][rank], parts[other]) for other in range(self.size)])

    def all_gather(self, whole: Tensor, own: Tensor, group: object) -> None:
        rank = self._here.rank
        self._outputs[rank] = whole.chunk(self.size)
        self._barrier.wait()
        self._exchange([(self._outputs[other][rank], own.clone()) for other in range(self.size)])

    @property
    def _outputs(self) -> dict[int, tuple[Tensor, ...]]:
        return self.__dict__.setdefault("outputs", {})


@contextmanager
def on_network(monkeypatch: pytest.MonkeyPatch, network: Network) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(tree.dist, "get_world_size", lambda group: network.size)
        patch.setattr(tree.dist, "all_to_all_single", network.all_to_all)
        patch.setattr(tree, "all_gather", network.all_gather)
        yield


def values() -> list[Tensor]:
    """Of each rank; large and small numbers, so that the order of additions shows."""
    generator = torch.Generator().manual_seed(6)
    return [torch.randn(SIZE, generator=generator) * 10.0 ** (rank % 3) for rank in range(RANKS)]


def ring(parts: list[Tensor], order: list[int]) -> Tensor:
    """A ring's sum: piece k starts at the k-th rank of the ring, and each rank on the way adds its own."""
    pieces = [part.tensor_split(len(parts)) for part in parts]
    found = []
    for k in range(len(parts)):
        route = order[k:] + order[:k]
        total = pieces[route[0]][k]
        for rank in route[1:]:
            total = total + pieces[rank][k]
        found.append(total)
    return torch.cat(found)


def test_no_reordering_changes_a_bit_of_the_tree_and_most_change_a_rings(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, found, rings, by_arrival = values(), [], [], []
    for seed in range(12):
        network, sums = Network(RANKS, seed), {}

        def work(rank: int, sums: dict[int, Tensor] = sums) -> None:
            halves = {"a": parts[rank][:400], "b": parts[rank][400:]}
            done = tree.tree_all_reduce([halves], 1, None)
            sums[rank] = torch.cat([done["a"], done["b"]])

        with on_network(monkeypatch, network):
            network.run(work)
        found += [sums[rank] for rank in range(RANKS)]
        order = random.Random(seed).sample(range(RANKS), RANKS)
        rings.append(ring(parts, order))
        by_arrival.append(sum((parts[rank] for rank in order), torch.zeros(SIZE)))
    assert all(torch.equal(one, tree_sum(parts)) for one in found)
    for other in (rings, by_arrival):
        assert sum(not torch.equal(one, other[0]) for one in other) > 6


def test_large_tensors_are_exchanged_in_pieces_and_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, sums, network = values(), {}, Network(RANKS, 0)
    monkeypatch.setattr(tree, "_PIECE_BYTES", 1000)
    cuts = {"a": slice(0, 100), "b": slice(100, 900), "c": slice(900, 910), "d": slice(910, SIZE)}

    def work(rank: int) -> None:
        sums[rank] = tree.tree_all_reduce([{name: parts[rank][cut] for name, cut in cuts.items()}], 1, None)

    with on_network(monkeypatch, network):
        network.run(work)
    assert list(sums[3]) == list(cuts)
    assert torch.equal(torch.cat(list(sums[3].values())), tree_sum(parts))


@pytest.mark.parametrize(("ranks", "each"), [(2, 3), (3, 1), (3, 4), (5, 2), (6, 2), (7, 3)])
def test_any_number_of_ranks_has_the_tree_of_one(ranks: int, each: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of reduce-scatter and all-reduce: with ranks that hold equally many contributions, and no subtree."""
    count, size, sums, scattered = ranks * each, 10 * ranks, {}, {}
    parts = list(torch.randn(count, size, generator=torch.Generator().manual_seed(7)))
    network = Network(ranks, 1)

    def work(rank: int) -> None:
        own, exchange = TreeSum(count, rank * each), tree.TreeReduceScatter(each, ranks, rank)
        for number, part in enumerate(parts[rank * each : (rank + 1) * each]):
            own.add("a", part[:-3].clone())
            exchange.last, output = number == each - 1, torch.empty(size // ranks)
            exchange(output, part.clone(), None, None)
        sums[rank], scattered[rank] = tree.tree_all_reduce(own.partial_sums(), each, None)["a"], output

    with on_network(monkeypatch, network):
        network.run(work)
    whole = tree_sum(parts)
    assert all(torch.equal(sums[rank], whole[:-3]) for rank in range(ranks))
    assert torch.equal(torch.cat([scattered[rank] for rank in range(ranks)]), whole)


@pytest.mark.parametrize("rows", [1, 5, 8, 19])
def test_values_of_rows_are_gathered_from_ranks_with_fewer(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As FSDP cuts a parameter: equally many rows a rank, and the last ranks fewer or none."""
    whole = {"a": torch.randn(rows, 1, dtype=torch.float64), "b": torch.randn(16, 3, dtype=torch.float64)}
    found, network = {}, Network(4, 0)

    def work(rank: int) -> None:
        own = {}
        for name, value in whole.items():
            each = -(-len(value) // 4)
            own[name] = value[rank * each : (rank + 1) * each]
        found[rank] = tree.gather_row_values(own, {name: len(value) for name, value in whole.items()}, None)

    with on_network(monkeypatch, network):
        network.run(work)
    for rank in range(4):
        assert all(torch.equal(found[rank][name], value) for name, value in whole.items())


def test_what_is_cut_in_one_dimension_or_another_is_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of ranks: the sum of a gradient norm's squares would show another one in its last bits alone."""
    whole = {"rows": torch.randn(8, 3, dtype=torch.float64), "columns": torch.randn(5, 4, dtype=torch.float64)}
    dimensions, found, network = {"rows": 0, "columns": 1}, {}, Network(4, 0)

    def work(rank: int) -> None:
        own = {name: value.chunk(4, dimensions[name])[rank] for name, value in whole.items()}
        found[rank] = tree.gather_cut(own, dimensions, None)

    with on_network(monkeypatch, network):
        network.run(work)
    for rank in range(4):
        assert all(torch.equal(found[rank][name], value) for name, value in whole.items())
