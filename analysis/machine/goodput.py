"""Goodput: the share of a long run's time that training keeps, where nodes fail, and what to choose so that it is high.

Nodes fail independently at a constant rate; a failure loses what was trained since the last durable checkpoint, and a
restart. From that follow the interval between checkpoints (Young, CACM 17(9), 1974; Daly, Future Generation Computer
Systems 22, 2006), the expected goodput (Daly's complete model, equation 13), and the spare nodes that are worth having.
tests/analysis/machine/test_goodput.py holds the formulas to a simulation of every node, and shows where they fail.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Conditions:
    """What a run meets. All times are in seconds.

    stall_s: training waits so long for each save. write_s: a save is durable so long after it began, at least stall_s;
    the next one begins after that. restart_s: from a failure to the first step of the restarted run. repair_s: until a
    failed node is there again.
    """

    nodes: int
    node_mtbf_s: float  # mean time between two failures of one node
    stall_s: float
    write_s: float
    restart_s: float
    repair_s: float

    def __post_init__(self) -> None:
        if self.nodes < 1 or not self.node_mtbf_s > 0 or min(self.stall_s, self.restart_s, self.repair_s) < 0:
            raise ValueError("goodput: nodes and mean time between failures are above 0, and no time is negative")
        if self.write_s < self.stall_s:
            raise ValueError("goodput: a save is durable only after the time that training waits for it")

    @property
    def mtbf_s(self) -> float:
        """Mean time between two failures of any node."""
        return self.node_mtbf_s / self.nodes


def young_interval_s(found: Conditions) -> float:
    """Seconds of training between two saves by Young's formula, sqrt(2 x stall x MTBF), for an MTBF far above it."""
    return math.sqrt(2 * found.stall_s * found.mtbf_s)


def daly_interval_s(found: Conditions) -> float:
    """Seconds of training between two saves by Daly's formula (his equation 37), which also holds where the stall is a
    large part of the MTBF.
    """
    stall, mtbf = found.stall_s, found.mtbf_s
    if stall >= 2 * mtbf:
        return mtbf
    share = stall / (2 * mtbf)
    return math.sqrt(2 * stall * mtbf) * (1 + math.sqrt(share) / 3 + share / 9) - stall


def best_interval_s(found: Conditions) -> float:
    """Daly's interval, and never less than a save takes to become durable."""
    return max(daly_interval_s(found), found.write_s - found.stall_s)


def goodput(found: Conditions, interval_s: float) -> float:
    """Expected share of the time that is spent on steps that count, with `interval_s` of training between two saves.

    Daly's complete model gives the expected time of an interval with its save, failures and restarts; a save that is
    durable only write_s after it began loses the difference once more at each failure.
    """
    if interval_s <= 0:
        raise ValueError("goodput: the interval between checkpoints must be above 0")
    exponent = (interval_s + found.stall_s) / found.mtbf_s
    if exponent > 500:  # no interval is ever completed
        return 0.0
    failures = math.expm1(exponent)  # expected, until one interval is through
    expected_s = found.mtbf_s * math.exp(min(found.restart_s / found.mtbf_s, 500)) * failures
    return interval_s / (expected_s + failures * (found.write_s - found.stall_s))


def failed_nodes(found: Conditions) -> float:
    """How many nodes are away on average: Little's law."""
    return found.nodes * found.repair_s / found.node_mtbf_s


def spares(found: Conditions, risk: float = 0.01) -> int:
    """The fewest spare nodes that are all away at most this share of the time (a Poisson number is away)."""
    mean, count = failed_nodes(found), 0
    log_term, below = -mean, math.exp(-mean)  # of a Poisson distribution: log P(count), P(at most count)
    while 1 - below > risk:
        count += 1
        log_term += math.log(mean) - math.log(count)
        below += math.exp(log_term)
    return count
