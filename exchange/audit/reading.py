"""What is read of each revision beyond its list of files, in several threads, and reduced at once to a few hundred
bytes: the layout of its tensors, its config's claims, and on request a sample of its weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from weftrain.core.errors import RemoteError, WeftrainError, file_problem, one_line
from weftrain.core.formats.canonical import canonical_json
from weftrain.exchange.audit.claims import claims_of, contradictions
from weftrain.exchange.audit.findings import Kind
from weftrain.exchange.audit.headers import Kept, Layout, Shapes, read_layout
from weftrain.exchange.audit.samples import Sample, read_sample, tensor_keys
from weftrain.exchange.audit.series import Revision, Series, VanishedError

T = TypeVar("T")
R = TypeVar("R")
_MAX_KEPT_TENSORS = 500_000  # of all layouts, at some hundred bytes each
_MAX_KEPT_CHARACTERS = 32 << 20  # of all configs
Probe = Callable[[Revision], Mapping[str, float]]  # losses of a revision, by what they are of
Keys = np.ndarray[tuple[int], np.dtype[np.uint64]]


@dataclass(slots=True)
class Read:
    """What was read of a revision. layout, config: digests, "" where there is none. keys: one for each tensor, by name.

    problems: what could not be read, as (kind, words).
    """

    revision: Revision
    layout: str = ""
    config: str = ""
    told_step: int | None = None
    contradictions: tuple[str, ...] = ()
    sample: Sample | None = None
    keys: Keys | None = None
    probe: Mapping[str, float] = field(default_factory=dict)
    problems: list[tuple[Kind, str]] = field(default_factory=list)


class Reader:
    """Reads revisions; what several of them share, by its hash, is read once."""

    def __init__(self, series: Series, *, deep: bool, probe: Probe | None = None) -> None:
        self._series, self._deep, self._probe, self._probing = series, deep, probe, threading.Lock()
        self.shapes: Kept[Shapes] = Kept(_MAX_KEPT_TENSORS, len)
        self.claims: Kept[Mapping[str, str]] = Kept(
            _MAX_KEPT_CHARACTERS, lambda found: sum(len(key) + len(value) for key, value in found.items())
        )
        self._configs: dict[str, tuple[str, Mapping[str, Any]]] = {}  # identity -> digest, config: see _config
        self._contradictions: dict[tuple[str, str], tuple[str, ...]] = {}

    def __call__(self, revision: Revision) -> Read:
        """The weights come first, and a revision of which they vanished is asked for nothing more: its config may be
        known from another revision or not, by which thread was first, and a report does not depend on that.
        """
        found = Read(revision)
        config: Mapping[str, Any] | None = None
        layout: Layout | None = None
        with problems_in(found.problems):
            layout = read_layout(self._series, revision)
        if any(kind == "vanished" for kind, _ in found.problems):
            return found
        with problems_in(found.problems):
            config = self._config(found)
        with problems_in(found.problems):
            found.told_step = self._series.told_step(revision)
        if layout is not None:
            with problems_in(found.problems):
                found.layout, shapes = layout.digest, layout.shapes
                self.shapes.keep(found.layout, shapes)
                if config is not None:
                    found.contradictions = self._contradicted(found, config, shapes)
            with problems_in(found.problems):
                found.keys = self._keys(revision, layout)
                if self._deep:
                    found.sample = read_sample(self._series, revision, layout)
                    found.probe = self._series.probe(revision)
                    if self._probe is not None:
                        with self._probing:  # one model in memory
                            found.probe = {**found.probe, **self._probe(revision)}
        return found

    def _config(self, found: Read) -> Mapping[str, Any] | None:
        identity = "" if found.revision.config is None else found.revision.config.identity
        if identity in self._configs:
            found.config, known = self._configs[identity]
            return known
        config = self._series.config(found.revision)
        if config is None:
            return None
        claims = claims_of(config)
        found.config = hashlib.sha256(canonical_json(claims)).hexdigest()
        self.claims.keep(found.config, claims)
        if identity:
            self._configs = {**dict(list(self._configs.items())[-7:]), identity: (found.config, config)}
        return config

    def _contradicted(self, found: Read, config: Mapping[str, Any], shapes: Shapes) -> tuple[str, ...]:
        pair = found.config, found.layout
        if pair not in self._contradictions:
            self._contradictions[pair] = tuple(contradictions(config, shapes, self._series.prefix))
        return self._contradictions[pair]

    def _keys(self, revision: Revision, layout: Layout) -> Keys | None:
        keys = self._series.tensor_keys(revision)
        if not keys and self._series.cheap:
            keys = tensor_keys(self._series, revision, layout)
        if not keys:
            return None
        return np.array([int(keys.get(name, "0")[:16], 16) for name in sorted(layout.places)], np.uint64)


@contextlib.contextmanager
def problems_in(found: list[tuple[Kind, str]]) -> Iterator[None]:
    """Note what goes wrong with one revision, so that the audit goes on."""
    try:
        yield
    except VanishedError as error:
        found.append(("vanished", one_line(error)))
    except (RemoteError, OSError) as error:
        found.append(("unread", file_problem(error) if isinstance(error, OSError) else one_line(error)))
    except (ValueError, WeftrainError) as error:
        found.append(("bad file", one_line(error)))


def in_threads(function: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """The results in the order of the items; at most twice as many as there are threads are under way or waiting."""
    with ThreadPoolExecutor(threads, "audit") as pool:
        under_way: deque[Future[R]] = deque()
        try:
            for item in items:
                under_way.append(pool.submit(function, item))
                if len(under_way) >= 2 * threads:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            for one in under_way:
                one.cancel()
