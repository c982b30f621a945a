"""Interleaved turns: every case takes its turn, over and over, so that what disturbs the machine disturbs all alike."""

from __future__ import annotations

import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from perf.clients import Charged
from perf.histogram import Histogram
from perf.setups.base import PROXY_ROLE

SATURATED = 0.9
"""A client process that is so busy may be what limits the figures."""
_BAR_WIDTH = 24


class Case(NamedTuple):
    """What takes turns: a server, with its HSMs as slow as this."""

    server: str
    hsm_latency_s: float = 0.0

    def __str__(self) -> str:
        return f"{self.server} at {self.hsm_latency_s * 1e3:g} ms" if self.hsm_latency_s else self.server


@dataclass(frozen=True, slots=True)
class Turn:
    """What one server did in one turn."""

    operations: float
    """Handshakes, requests, or gigabytes of bodies."""
    per_second: float
    cpu_s: Mapping[str, float]
    """CPU seconds of the server's processes, by role; empty if they are not known."""
    latencies: Histogram
    failures: Mapping[str, int]
    client_busy: float
    probes: Histogram = field(default_factory=Histogram)
    """What a prober saw meanwhile, if there was one."""
    probes_asked: int = 0

    @classmethod
    def of(cls, charged: Charged, operations: float | None = None) -> Turn:
        """The turn that a load was: so many operations, or one for each exchange."""
        result = charged.result
        if operations is None:
            operations = result.completed
        return cls(
            operations,
            operations / result.elapsed_s if result.elapsed_s else 0.0,
            charged.cpu_s,
            result.latencies,
            dict(result.failures),
            result.client_busy,
        )

    def cpu_per_operation_s(self, roles: Iterable[str]) -> float:
        """CPU seconds of these roles for one operation; NaN if they are not known, or there was no operation."""
        known = [self.cpu_s[role] for role in roles if role in self.cpu_s]
        return sum(known) / self.operations if known and self.operations else float("nan")

    def as_json(self) -> dict[str, object]:
        """All of it, for the raw data beside a report."""
        return {
            "operations": self.operations,
            "per_second": self.per_second,
            "cpu_s": dict(self.cpu_s),
            "latencies": self.latencies.as_json(),
            "failures": dict(self.failures),
            "client_busy": self.client_busy,
            "probes": self.probes.as_json(),
            "probes_asked": self.probes_asked,
        }


class Series(list[Turn]):
    """The turns of one case."""

    def median(self, value: Callable[[Turn], float]) -> float:
        """The median over the turns; NaN of none."""
        return statistics.median(map(value, self)) if self else float("nan")

    def spread(self, value: Callable[[Turn], float]) -> tuple[float, float]:
        """Least and greatest; NaN of none."""
        values = [value(turn) for turn in self] or [float("nan")]
        return min(values), max(values)

    @property
    def per_second(self) -> float:
        """Median operations a second."""
        return self.median(lambda turn: turn.per_second)

    @property
    def roles(self) -> list[str]:
        """Of all processes that were charged."""
        return sorted({role for turn in self for role in turn.cpu_s})

    def cpu_s(self, *roles: str) -> float:
        """Median CPU seconds for one operation: of these roles, or of all processes."""
        return self.median(lambda turn: turn.cpu_per_operation_s(roles or self.roles))

    def proxy_cpu_s(self, scale: float) -> tuple[float, tuple[float, float]]:
        """Median, and least and greatest, of the proxy's CPU seconds for one operation, times `scale`."""
        least, greatest = self.spread(lambda turn: turn.cpu_per_operation_s([PROXY_ROLE]))
        return self.cpu_s(PROXY_ROLE) * scale, (least * scale, greatest * scale)

    @property
    def latencies(self) -> Histogram:
        """Of all turns together."""
        return _sum(turn.latencies for turn in self)

    @property
    def probes(self) -> Histogram:
        """Of all turns together."""
        return _sum(turn.probes for turn in self)

    @property
    def failures(self) -> Counter[str]:
        """Of all turns together."""
        total: Counter[str] = Counter()
        for turn in self:
            total.update(turn.failures)
        return total

    @property
    def is_client_bound(self) -> bool:
        """Whether a client process was saturated: the rate is then a lower bound of what the server can do."""
        return self.median(lambda turn: turn.client_busy) >= SATURATED


def _sum(histograms: Iterable[Histogram]) -> Histogram:
    total = Histogram()
    for histogram in histograms:
        total.add(histogram)
    return total


class Results(dict[Case, Series]):
    """The series of every case, in the order of the cases."""

    interrupted = False
    """Ctrl-C has cut it short: there are fewer turns than asked for."""


def interleave(cases: Mapping[Case, Callable[[], Turn]], turns: int, what: str) -> Results:
    """Let every case take `turns` turns and one more, the first, that only warms caches and pools and does not count.

    Tells on a terminal how far it is, as `what`. Ctrl-C ends it: the turns until then are the result.
    """
    results = Results({case: Series() for case in cases})
    progress = Progress(what, (turns + 1) * len(cases))
    try:
        for number in range(turns + 1):
            for case, take in cases.items():
                progress.show(str(case))
                turn = take()
                if number:
                    results[case].append(turn)
                progress.step()
    except KeyboardInterrupt:
        results.interrupted = True
    finally:
        progress.clear()
    return results


class Progress:
    """A bar on stderr, if that is a terminal."""

    def __init__(self, what: str, steps: int) -> None:
        self._what = what
        self._steps = steps
        self._done = 0
        self._begun_s = time.monotonic()
        self._is_shown = sys.stderr.isatty()

    def show(self, current: str) -> None:
        """Tell what is being done now, and how long all the rest may take."""
        if not self._is_shown:
            return
        bar = "#" * (self._done * _BAR_WIDTH // self._steps)
        left = ""
        if self._done:
            left_s = (time.monotonic() - self._begun_s) / self._done * (self._steps - self._done)
            left = f", {left_s:.0f} s left"
        text = f"{self._what} [{bar:.<{_BAR_WIDTH}}] {self._done}/{self._steps}{left}: {current}"
        print(f"\r\x1b[K{text[:110]}", end="", file=sys.stderr, flush=True)

    def step(self) -> None:
        """One more is done."""
        self._done += 1

    def clear(self) -> None:
        """Leave the line empty."""
        if self._is_shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
