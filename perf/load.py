"""One client process's load: many connections on one selector, closed loop or open.

Closed loop: `concurrency` exchanges are kept under way. Open loop: exchanges are due at `rate` a second, Poisson
arrivals, whatever the server does; at most `concurrency` are under way, what is due beyond that waits, and latency
counts from the time it was *due*: a server that stands still is charged for every exchange that it holds up
(no coordinated omission). What was due and could not even begin is a failure.
"""

from __future__ import annotations

import contextlib
import random
import select
import selectors
import ssl
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, TypeVar

from perf.histogram import Histogram

_TAIL_S = 30.0
"""What is under way at the end may take so much longer."""


@dataclass(frozen=True, slots=True)
class Load:
    """Whom to load, for how long, and how much."""

    host: str
    port: int
    server_name: str
    ca_file: Path
    seconds: float
    concurrency: int
    rate: float | None
    """Exchanges due each second; None for a closed loop."""
    seed: int = 1


LoadType = TypeVar("LoadType", bound=Load)


def shares(load: LoadType, processes: int) -> list[LoadType]:
    """Split a load among client processes."""
    sizes = [load.concurrency // processes + (index < load.concurrency % processes) for index in range(processes)]
    rate = None if load.rate is None else load.rate / processes
    return [
        replace(load, concurrency=size, rate=rate, seed=load.seed * 1000 + index)
        for index, size in enumerate(sizes)
        if size
    ]


@dataclass(slots=True)
class LoadResult:
    """What came of it."""

    completed: int = 0
    resumed: int = 0
    received_bytes: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    latencies: Histogram = field(default_factory=Histogram)
    """Closed loop: from the exchange's begin; open loop: from when it was due."""
    elapsed_s: float = 0.0
    client_cpu_s: float = 0.0
    client_busy: float = 0.0
    """The part of its time a client process computed or waited for a CPU: near 1 it is what limits the run."""

    @property
    def per_second(self) -> float:
        """Completed exchanges a second."""
        return self.completed / self.elapsed_s if self.elapsed_s else 0.0


def merged(parts: Iterable[LoadResult]) -> LoadResult:
    """Add up client processes that ran at the same time; the busiest one counts, and the one that took longest."""
    total = LoadResult()
    for part in parts:
        total.completed += part.completed
        total.resumed += part.resumed
        total.received_bytes += part.received_bytes
        total.failures += part.failures
        total.latencies.add(part.latencies)
        total.client_cpu_s += part.client_cpu_s
        total.elapsed_s = max(total.elapsed_s, part.elapsed_s)
        total.client_busy = max(total.client_busy, part.client_busy)
    return total


class Exchange(Protocol):
    """Something a client does over and over: a handshake, or a request on a connection that lives on."""

    tls: ssl.SSLSocket
    done_s: float
    """When what counts as latency ended, by time.perf_counter()."""

    def begin(self) -> int:
        """Begin; return the selector events to wait for. Raises OSError."""

    def advance(self) -> int:
        """Do what can be done now; return the selector events to wait for, 0 when all is done. Raises OSError."""

    def add_to(self, result: LoadResult) -> None:
        """Count what is particular to this exchange, which is done."""


def _cpu_and_run_delay_s() -> tuple[float, float]:
    """This process's CPU time, and how long its one thread was ready to run and had no CPU."""
    with contextlib.suppress(FileNotFoundError):
        used_ns, waited_ns, _ = map(int, Path("/proc/self/schedstat").read_text().split())
        return used_ns / 1e9, waited_ns / 1e9
    return time.process_time(), 0.0


class _Driver:
    """The loop of one client process."""

    def __init__(self, load: Load, make: Callable[[], Exchange], *, reusable: bool) -> None:
        self._load = load
        self._reusable = reusable
        self._make = make
        self._result = LoadResult()
        self._selector = selectors.EpollSelector()
        self._registered: dict[Exchange, int] = {}
        self._started_s: dict[Exchange, float] = {}
        self._idle: list[Exchange] = []
        self._due_s: deque[float] = deque()
        self._random = random.Random(load.seed)

    def run(self, ready: Callable[[], None]) -> LoadResult:
        """Make connections that can live on, call `ready`, then load until the time is over."""
        if self._reusable:
            self._idle = [self._make() for _ in range(self._load.concurrency)]
        ready()
        cpu_s, delay_s = _cpu_and_run_delay_s()
        started_s = time.perf_counter()
        end_s = started_s + self._load.seconds
        next_due_s = started_s
        while (now_s := time.perf_counter()) < end_s or (self._started_s and now_s < end_s + _TAIL_S):
            if self._load.rate is None:
                wanted = self._load.concurrency - len(self._started_s) if now_s < end_s else 0
                self._due_s.extend([now_s] * wanted)
            else:
                while next_due_s <= min(now_s, end_s):
                    self._due_s.append(next_due_s)
                    next_due_s += self._random.expovariate(self._load.rate)
            while self._due_s and len(self._started_s) < self._load.concurrency and now_s < end_s:
                self._begin(self._due_s.popleft())
            self._wait(min(next_due_s, end_s) if self._load.rate is not None and now_s < end_s else now_s + 0.05)
        result = self._result
        result.elapsed_s = time.perf_counter() - started_s
        cpu_after_s, delay_after_s = _cpu_and_run_delay_s()
        result.client_cpu_s = cpu_after_s - cpu_s
        result.client_busy = (result.client_cpu_s + delay_after_s - delay_s) / result.elapsed_s
        for reason, number in (("never begun", len(self._due_s)), ("never done", len(self._started_s))):
            if number:
                result.failures[reason] += number
        for exchange in (*self._idle, *self._started_s):
            exchange.tls.close()
        self._selector.close()
        return result

    def _begin(self, due_s: float) -> None:
        try:
            exchange = self._idle.pop() if self._idle else self._make()
        except OSError as error:
            self._fail(error)
            return
        self._started_s[exchange] = due_s
        try:
            self._watch(exchange, exchange.begin())
        except OSError as error:
            self._drop(exchange)
            self._fail(error)

    def _wait(self, until_s: float) -> None:
        left_s = max(0.0, until_s - time.perf_counter())
        if self._load.rate is not None:
            # epoll_wait rounds up to milliseconds; select() on epoll's own descriptor does not.
            select.select([self._selector], [], [], left_s)
            left_s = 0.0
        for key, _ in self._selector.select(left_s):
            exchange: Exchange = key.data
            try:
                events = exchange.advance()
            except OSError as error:
                self._drop(exchange)
                self._fail(error)
                continue
            if events:
                self._watch(exchange, events)
            else:
                self._done(exchange)

    def _done(self, exchange: Exchange) -> None:
        result = self._result
        result.completed += 1
        exchange.add_to(result)
        result.latencies.record(exchange.done_s - self._started_s[exchange])
        if self._reusable:
            del self._started_s[exchange]
            self._idle.append(exchange)
        else:
            self._drop(exchange)

    def _watch(self, exchange: Exchange, events: int) -> None:
        known = self._registered.get(exchange)
        if known is None:
            self._selector.register(exchange.tls, events, exchange)
        elif known != events:
            self._selector.modify(exchange.tls, events, exchange)
        self._registered[exchange] = events

    def _drop(self, exchange: Exchange) -> None:
        del self._started_s[exchange]
        if self._registered.pop(exchange, None) is not None:
            self._selector.unregister(exchange.tls)
        exchange.tls.close()

    def _fail(self, error: OSError) -> None:
        self._result.failures[getattr(error, "reason", None) or type(error).__name__] += 1


def drive(load: Load, make: Callable[[], Exchange], ready: Callable[[], None], *, reusable: bool) -> LoadResult:
    """Carry out a load in this process.

    `make` makes an Exchange, for every time or, if they are `reusable`, for as often as it goes well. `ready` is called
    when all is prepared, and returns when it may begin.
    """
    return _Driver(load, make, reusable=reusable).run(ready)
