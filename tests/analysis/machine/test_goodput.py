"""The formulas of goodput against a simulation of every node of a run, up to 400 nodes of 8 devices."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from weftrain.analysis.machine.goodput import (
    Conditions,
    best_interval_s,
    daly_interval_s,
    failed_nodes,
    goodput,
    spares,
    young_interval_s,
)

HOUR, DAY = 3600.0, 86400.0
K2_V2 = Conditions(nodes=400, node_mtbf_s=180 * DAY, stall_s=20.0, write_s=120.0, restart_s=900.0, repair_s=2 * DAY)
Draw = Callable[[random.Random], float]


@dataclass
class Simulated:
    goodput: float
    failures: int
    away: float  # mean number of nodes that are being repaired
    short: float  # share of the time without a node that the run needs


def simulate(
    found: Conditions,
    interval_s: float,
    days: float,
    *,
    spare: int = 10**6,
    draw: Draw | None = None,
    slow: float = 1.0,
) -> Simulated:
    """Events in the order of time: each node fails by itself, a spare takes its place, and it comes back repaired; the
    run trains, saves, loses what is not durable, and restarts once enough nodes are there. draw: seconds to a node's
    next failure. slow: seconds that one second of training takes, a straggler's factor.
    """
    chance, end = random.Random(0), days * DAY
    draw = draw or (lambda chance: chance.expovariate(1 / found.node_mtbf_s))
    failures = [draw(chance) for _ in range(found.nodes)]  # when each node fails next
    heapq.heapify(failures)
    repaired: list[float] = []  # when each node that is away comes back
    begins = trained_s = away_s = short_s = 0.0
    count = 0
    while begins < end:
        trained_s += _durable(min(failures[0], end) - begins, found, interval_s, slow)
        ready = begins
        while failures[0] <= ready or ready == begins:  # the failure that ends the stretch, and those in its restart
            failed = heapq.heappop(failures)
            heapq.heappush(failures, failed + draw(chance))  # of the node that takes its place
            heapq.heappush(repaired, failed + found.repair_s)
            while repaired[0] <= failed:
                heapq.heappop(repaired)
            away = sorted(repaired)
            there = failed if len(away) <= spare else away[len(away) - spare - 1]
            count, away_s, short_s = count + 1, away_s + found.repair_s, short_s + there - failed
            ready = max(ready, there + found.restart_s)
        begins = ready
    return Simulated(trained_s / end, count, away_s / end, short_s / end)


def _durable(length_s: float, found: Conditions, interval_s: float, slow: float) -> float:
    """Training that a stretch of this length leaves durable: whole intervals whose saves are through."""
    cycle = interval_s * slow + found.stall_s
    return max(0, math.floor((length_s - found.write_s + found.stall_s) / cycle)) * interval_s


@pytest.mark.parametrize("nodes", [4, 64, 400])
@pytest.mark.parametrize("write_s", [20.0, 120.0])
def test_goodput_is_what_a_simulation_gives(nodes: int, write_s: float) -> None:
    found = replace(K2_V2, nodes=nodes, write_s=write_s)
    for interval in (best_interval_s(found), HOUR, 3 * HOUR):
        measured = simulate(found, interval, days=400 * 180 / nodes * 5)
        assert measured.failures > 800
        assert measured.goodput == pytest.approx(goodput(found, interval), abs=0.006)


def test_no_other_interval_is_better_than_dalys() -> None:
    for stall in (5.0, 60.0, 600.0):
        found = replace(K2_V2, stall_s=stall, write_s=stall)
        best = daly_interval_s(found)
        assert all(goodput(found, best) >= goodput(found, best * factor) for factor in (0.5, 0.8, 1.25, 2.0))
        measured = [simulate(found, best * factor, days=2000).goodput for factor in (0.4, 1.0, 2.5)]
        assert max(measured) == measured[1]


def test_youngs_interval_is_worse_where_a_save_takes_as_long_as_the_time_between_failures() -> None:
    found = Conditions(nodes=400, node_mtbf_s=400 * 1200.0, stall_s=600.0, write_s=600.0, restart_s=60.0, repair_s=DAY)
    young, daly = young_interval_s(found), daly_interval_s(found)
    assert young / daly > 1.4
    assert simulate(found, daly, days=200).goodput > simulate(found, young, days=200).goodput + 0.01
    usual = replace(K2_V2, write_s=20.0)
    assert young_interval_s(usual) == pytest.approx(daly_interval_s(usual), rel=0.02)


def test_the_formulas_expect_failures_at_a_constant_rate() -> None:
    """Nodes that fail soon after they were replaced (Weibull, shape 0.5) fail in bursts: more is lost in restarts that
    fail, and less in long quiet stretches, so the same mean gives another goodput.
    """
    found = Conditions(nodes=64, node_mtbf_s=64 * 2 * HOUR, stall_s=60.0, write_s=60.0, restart_s=900.0, repair_s=HOUR)
    interval = daly_interval_s(found)
    scale = found.node_mtbf_s / math.gamma(1 + 1 / 0.5)
    bursts = simulate(found, interval, days=2000, draw=lambda chance: chance.weibullvariate(scale, 0.5))
    steady = simulate(found, interval, days=2000)
    assert steady.goodput == pytest.approx(goodput(found, interval), abs=0.01)
    assert abs(bursts.goodput - goodput(found, interval)) > abs(steady.goodput - goodput(found, interval))


def test_a_straggler_costs_what_it_slows_and_failures_do_not_hide_it() -> None:
    found = replace(K2_V2, nodes=64)
    interval = best_interval_s(found)
    slow = simulate(found, interval, days=3000, slow=1.25).goodput
    assert slow == pytest.approx(simulate(found, interval, days=3000).goodput / 1.25, abs=0.01)


def test_spares() -> None:
    mean = failed_nodes(K2_V2)
    assert mean == pytest.approx(400 * 2 / 180)
    assert simulate(K2_V2, HOUR, days=3000).away == pytest.approx(mean, rel=0.05)
    count = spares(K2_V2)
    poisson = [math.exp(-mean) * mean**away / math.factorial(away) for away in range(count + 1)]
    assert sum(poisson) >= 0.99 > sum(poisson[:-1])
    enough, none = (simulate(K2_V2, HOUR, days=2000, spare=number) for number in (count, 0))
    assert enough.short < 0.02
    assert none.short > 0.5
    assert none.goodput < enough.goodput / 2
    assert spares(replace(K2_V2, repair_s=0.0)) == 0


@pytest.mark.parametrize("change", [{"nodes": 0}, {"node_mtbf_s": 0.0}, {"stall_s": -1.0}, {"write_s": 1.0}])
def test_conditions_that_cannot_be_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="goodput"):
        replace(K2_V2, **change)  # type: ignore[arg-type]
    assert goodput(replace(K2_V2, node_mtbf_s=400.0), 10 * HOUR) == 0.0
    with pytest.raises(ValueError, match="interval"):
        goodput(K2_V2, 0.0)
