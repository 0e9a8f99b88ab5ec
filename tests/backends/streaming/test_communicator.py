"""The shares of the ranks."""

from __future__ import annotations

from weftrain.backends.streaming.communicator import Communicator


def test_contiguous_shares_of_any_number_of_ranks() -> None:
    alone = Communicator()
    for count in range(1, 20):
        for size in range(1, count + 1):
            shares = []
            for rank in range(size):
                alone.rank, alone.size = rank, size
                shares.append(list(alone.micro_batches(count)))
            assert [number for share in shares for number in share] == list(range(count))
            assert all(shares)
