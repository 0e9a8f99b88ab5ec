"""Which nodes make a run, kept in a folder that all of them see: who is there, who is lost, and who takes part next.

    node-000001.json      one node (a torchrun): its number, a beat that it counts up, the round that it has left
                          behind, its host, and what it runs
    round-000003.json     the nodes that take part from here on, in the order of their ranks; made once, by whoever
                          sees first that it can be made
    round-000003.broken   a node of the round has left it, or is lost: the others leave it too
    round-000003.address  where the store of its ranks is
    round-000003.closed   the run has ended

No clock of another machine is read: a node is lost when its beat has not changed for `lost_s` of one's own time. Each
file is written aside and renamed, and a round is made by a link that exists once, so no file system locks are needed.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from weftrain.core.formats import fsops
from weftrain.core.formats.canonical import canonical_json, parse_json
from weftrain.core.formats.plain_file import read_plain

NEVER = 0  # the number of the round before the first
ROUND_KEY = "weftrain/round"  # in the store of a round's ranks, which no earlier ranks wrote to: the round's number

_NODE, _ROUND = re.compile(r"node-(\d{6})\.json"), re.compile(r"round-(\d{6})\.json")


@dataclass(frozen=True)
class Node:
    """A node as its file says. left: the newest round that it takes no part in; while it waits, that is the newest."""

    number: int
    beat: int
    left: int
    host: str
    process: int
    started: float
    identity: Mapping[str, str]


@dataclass(frozen=True)
class Round:
    """members: numbers of nodes, in the order of their ranks."""

    number: int = NEVER
    members: tuple[int, ...] = ()


def next_members(
    before: Sequence[int], waiting: Collection[int], alive: Collection[int], size: int
) -> list[int] | None:
    """The members of the next round, or None while it cannot be made: nodes of the round before still run, or too few
    wait. Those that took part keep their places, so that what a node keeps for its ranks stays with them.
    """
    if any(number in alive and number not in waiting for number in before):
        return None
    places = [number if number in waiting else None for number in before] if len(before) == size else [None] * size
    spares = iter(sorted(set(waiting) - set(places)))
    found = [next(spares, None) if number is None else number for number in places]
    return [number for number in found if number is not None] if None not in found else None


class Meeting:
    """One node's view of the folder, and its own file there. Not thread-safe: the caller holds a lock."""

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, str],
        host: str,
        lost_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder, self._lost_s, self._clock = folder, lost_s, clock
        self._seen: dict[int, tuple[int, float, bool]] = {}  # node -> its beat, since when, whether it ever changed
        fsops.make_dirs(folder)
        mine = psutil.Process()
        self.own = Node(0, 0, NEVER, host, mine.pid, mine.create_time(), identity)
        while True:
            number = 1 + max([node.number for node in self.nodes()], default=0)
            own = replace(self.own, number=number, left=self.newest().number)
            if self._make(self._path(own), vars(own)):
                break
        self.own = own

    # -- this node

    def beat(self, left: int | None = None) -> None:
        """Say that this node is there, and that it has left round `left` behind."""
        self.own = replace(self.own, beat=self.own.beat + 1, left=self.own.left if left is None else left)
        path = self._path(self.own)
        temporary = fsops.temporary_beside(path)
        temporary.write_bytes(canonical_json(vars(self.own)))  # a beat need not be durable
        os.replace(temporary, path)

    def leave(self) -> None:
        """This node is not there any more."""
        self._path(self.own).unlink(missing_ok=True)

    # -- the others

    def nodes(self) -> list[Node]:
        found = [self.node(int(match[1])) for name in self._names() if (match := _NODE.fullmatch(name))]
        return [node for node in found if node is not None]

    def node(self, number: int) -> Node | None:
        """None if it has left, or if its file cannot be read."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            return Node(**parse_json(read_plain(self.folder / f"node-{number:06d}.json", "record")))
        return None

    def is_lost(self, number: int) -> bool:
        """Whether it has left, its process on this host is gone, or its beat has stood still for too long."""
        node = self.node(number)
        if node is None:
            return True
        beat, since, beats = self._seen.get(number, (-1, 0.0, False))
        if beat != node.beat:
            beats, since = beat >= 0, self._clock()
            self._seen[number] = node.beat, since, beats
        gone = node.host == self.own.host and not _runs(node.process, node.started)
        return gone or (number != self.own.number and self._clock() - since > self._lost_s)

    def beats(self, number: int) -> bool:
        """Whether its beat has changed since this node first saw it: it is no file of an earlier attempt."""
        return not self.is_lost(number) and self._seen[number][2]

    def newest(self) -> Round:
        numbers = [int(match[1]) for name in self._names() if (match := _ROUND.fullmatch(name))]
        if not numbers:
            return Round()
        found = parse_json(read_plain(self.folder / f"round-{max(numbers):06d}.json", "record"))
        return Round(max(numbers), tuple(found["members"]))

    def propose(self, before: Round, size: int) -> None:
        """Make the next round if it can be made. Nodes that run something else are not counted."""
        alive = [node for node in self.nodes() if not self.is_lost(node.number)]
        waiting = {node.number for node in alive if node.left >= before.number and node.identity == self.own.identity}
        members = next_members(before.members, waiting, {node.number for node in alive}, size)
        if members is not None:
            self._make(self.folder / f"round-{before.number + 1:06d}.json", {"members": members})

    def refusal(self) -> tuple[Node, str] | None:
        """A node that came before this one, is there, and runs something else; and what of it differs."""
        for node in self.nodes():
            if node.number < self.own.number and node.identity != self.own.identity and self.beats(node.number):
                keys = sorted(node.identity.keys() | self.own.identity.keys())
                return node, next(key for key in keys if node.identity.get(key) != self.own.identity.get(key))
        return None

    # -- a round

    def mark(self, number: int, what: str) -> None:
        """what: broken or closed."""
        with contextlib.suppress(FileExistsError):
            os.close(os.open(self.folder / f"round-{number:06d}.{what}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))

    def is_marked(self, number: int, what: str) -> bool:
        return (self.folder / f"round-{number:06d}.{what}").exists()

    def set_address(self, number: int, host: str, port: int) -> None:
        self._make(self.folder / f"round-{number:06d}.address", {"host": host, "port": port})

    def address(self, number: int) -> tuple[str, int] | None:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found = parse_json(read_plain(self.folder / f"round-{number:06d}.address", "record"))
            return str(found["host"]), int(found["port"])
        return None

    def _names(self) -> list[str]:
        return os.listdir(self.folder)

    def _path(self, node: Node) -> Path:
        return self.folder / f"node-{node.number:06d}.json"

    def _make(self, path: Path, content: Mapping[str, Any]) -> bool:
        """A file that is made once, whole. Whether it was this node that made it."""
        temporary = fsops.temporary_beside(path)
        temporary.write_bytes(canonical_json(content))
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        finally:
            temporary.unlink()
        return True


def _runs(process: int, started: float) -> bool:
    try:
        found = psutil.Process(process)
        return abs(found.create_time() - started) < 1 and found.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
