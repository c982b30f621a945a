"""One token as the pool sees it: its workers, the work it has, whether it is trusted, and its metrics."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from hsm import metrics
from hsm.circuit import CircuitBreaker, CircuitState
from hsm.messages import SignatureScheme
from hsm.metricstore import Histogram, MetricStore
from hsm.pool_connection import WorkerConnection
from hsm.pool_request import CANCELLED, RESULTS, Request, SigningKey
from hsm.token_load import TokenLoad

_MIN_STALL_NS = 100_000_000
_STALL_ROUND_TRIPS = 8

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TokenEndpoints:
    """A token and where its workers listen: one Unix socket path for each."""

    name: str
    sockets: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _SchemeMetrics:
    signed_slot: int
    duration: Histogram


class PoolToken:
    """The state of one token. The pool decides; this keeps the books."""

    __slots__ = (
        "_queue_duration",
        "_schemes",
        "_store",
        "circuit",
        "connections",
        "last_ok_ns",
        "last_up_ns",
        "load",
        "name",
        "sockets",
        "waiting",
        "waiting_requests",
    )

    def __init__(self, endpoints: TokenEndpoints, store: MetricStore, now_ns: int) -> None:
        self.name = endpoints.name
        self.sockets = endpoints.sockets
        self.load = TokenLoad()
        self.circuit = CircuitBreaker()
        self.connections: list[WorkerConnection] = []
        """Those that are up."""
        self.waiting: dict[SigningKey, None] = {}
        """Keys on this token with requests in the WaitingRoom, the next to be served first."""
        self.waiting_requests = 0
        self.last_up_ns = now_ns
        """When its last worker went away; at first, when the pool began to look for one."""
        self.last_ok_ns = 0
        """When it last signed."""
        self._store = store
        self._schemes: dict[SignatureScheme, _SchemeMetrics] = {}
        self._queue_duration = store.histogram(metrics.QUEUE_DURATION, (self.name,))
        store.counter(metrics.KEY_MISMATCHES, (self.name,))
        self.show_state()

    @property
    def is_trusted(self) -> bool:
        """True while the circuit is closed."""
        return self.circuit.state is CircuitState.CLOSED

    def pick(self, key: SigningKey, besides: WorkerConnection | None = None) -> WorkerConnection | None:
        """Return the least busy worker that has `key` and room, of equals the one that has rested longest."""
        best: WorkerConnection | None = None
        best_load = 0
        for connection in self.connections:
            load = len(connection.in_flight)
            if load >= connection.window or connection.stalled or connection is besides:
                continue
            if best is not None and (load, connection.last_sent) >= (best_load, best.last_sent):
                continue
            if connection.key_info(key) is not None:
                best, best_load = connection, load
        return best

    def can_serve(self, key: SigningKey) -> bool:
        """Tell whether a worker that is up and not stalled has `key`."""
        return any(not connection.stalled and connection.key_info(key) is not None for connection in self.connections)

    def has_key(self, key: SigningKey) -> bool:
        """Tell whether a worker that is up has `key`."""
        return any(connection.key_info(key) is not None for connection in self.connections)

    def add(self, connection: WorkerConnection, now_ns: int) -> None:
        """Take in a worker that has come up."""
        if not self.connections:
            self.load.begin_slow_start(now_ns)
        self.connections.append(connection)
        self.load.capacity += connection.window
        self.show_state()

    def remove(self, connection: WorkerConnection, now_ns: int) -> list[Request]:
        """Take out a worker that has gone; return what it leaves unanswered and nobody else has."""
        self.connections.remove(connection)
        self.load.capacity -= connection.window
        self.load.in_flight -= len(connection.in_flight)
        self.last_up_ns = now_ns
        stranded = [request for request, _ in connection.in_flight.values()]
        connection.in_flight.clear()
        for request in stranded:
            request.in_flight -= 1
        self.show_state()
        return [request for request in stranded if request.live and not request.in_flight]

    def overdue(self, now_ns: int, limit_ns: int) -> list[WorkerConnection]:
        """Return the workers that have owed an answer for eight times the usual, and have signed nothing since.

        A worker is found twice before it counts, lest an answer is missed that is only not read yet (see hsm.sweep).
        """
        allowed_ns = limit_ns
        if self.last_ok_ns:
            allowed_ns = min(max(_MIN_STALL_NS, int(_STALL_ROUND_TRIPS * self.load.round_trip_ns)), limit_ns)
        late: list[WorkerConnection] = []
        for connection in self.connections:
            if connection.stalled or not connection.in_flight:
                continue
            _, oldest_ns = next(iter(connection.in_flight.values()))
            if now_ns - max(oldest_ns, connection.last_ok_ns) <= allowed_ns:
                connection.overdue_since_ns = 0
            elif connection.overdue_since_ns > max(oldest_ns, connection.last_ok_ns):
                late.append(connection)
            else:
                connection.overdue_since_ns = now_ns
        return late

    def stall(self, now_ns: int) -> str:
        """Return what workers that have all stalled owe, for people."""
        oldest_ns = min(next(iter(connection.in_flight.values()))[1] for connection in self.connections)
        return f"stalled: {self.load.in_flight} unanswered, the oldest for {(now_ns - oldest_ns) // 1_000_000} ms"

    def sent_before(self, time_ns: float) -> list[tuple[Request, WorkerConnection]]:
        """Return the requests that were sent before that time and could be hedged."""
        slow: list[tuple[Request, WorkerConnection]] = []
        for connection in self.connections:
            for request, sent_ns in connection.in_flight.values():
                if sent_ns >= time_ns:
                    break
                if request.live and request.in_flight == 1 and not request.hedged and not request.pinned:
                    slow.append((request, connection))
        return slow

    def signed(self, scheme: SignatureScheme, queue_s: float, sign_s: float) -> None:
        """Count one signature delivered."""
        try:
            counts = self._schemes[scheme]
        except KeyError:
            counts = self._schemes[scheme] = self._register_scheme(scheme)
        self._store.values[counts.signed_slot] += 1.0
        counts.duration.observe(sign_s)
        self._queue_duration.observe(queue_s)

    def _register_scheme(self, scheme: SignatureScheme) -> _SchemeMetrics:
        for result in (*RESULTS.values(), CANCELLED):
            self._store.counter(metrics.SIGN_REQUESTS, (self.name, scheme.label, result))
        return _SchemeMetrics(
            self._store.counter(metrics.SIGN_REQUESTS, (self.name, scheme.label, "ok")),
            self._store.histogram(metrics.SIGN_DURATION, (self.name, scheme.label)),
        )

    def show_state(self) -> None:
        """Set the gauges of what does not change with each request."""
        values = self._store.values
        values[self._store.gauge(metrics.TOKEN_UP, (self.name,))] = float(bool(self.connections) and self.is_trusted)
        for state in CircuitState:
            value = float(self.circuit.state is state)
            values[self._store.gauge(metrics.CIRCUIT_STATE, (self.name, state.value))] = value

    def show_pending(self) -> None:
        """Set the gauge of requests in flight."""
        self._store.values[self._store.gauge(metrics.PENDING, (self.name,))] = float(self.load.in_flight)
