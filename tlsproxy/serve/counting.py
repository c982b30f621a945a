"""The data plane's metrics with their labels bound: on the hot path a dict lookup and an addition."""

from __future__ import annotations

from typing import NamedTuple

from hsm.errors import DeadlineExceeded, Overloaded, PolicyRejected
from hsm.metricstore import Histogram, MetricStore
from tlsproxy import metrics

_KNOWN_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"))


class HandshakePhases(NamedTuple):
    """Where a full handshake's time went, in seconds; the parts add up to its duration."""

    client_hello_s: float
    queue_s: float
    sign_s: float
    finish_s: float


class Negotiated(NamedTuple):
    """What a handshake agreed on; empty strings where a resumed session has none."""

    tls_version: str
    cipher: str
    group: str
    scheme: str


def sign_failure_result(error: BaseException) -> str:
    """Return the `result` label of a handshake that ended because it got no signature."""
    if isinstance(error, DeadlineExceeded):
        return "sign_timeout"
    if isinstance(error, Overloaded):
        return "sign_shed"
    if isinstance(error, PolicyRejected):
        return "policy_rejected"
    return "hsm_unavailable"


class ListenerMetrics:
    """The metrics of one listener in this process."""

    def __init__(self, store: MetricStore, listener: str) -> None:
        """Register them in `store`, with the address of the listener as label."""
        self._store = store
        self._listener = listener
        self.values = store.values
        label = (listener,)
        self.connections = store.gauge(metrics.CONNECTIONS, label)
        self.accepted = store.counter(metrics.CONNECTIONS_ACCEPTED, label)
        self.handshakes_in_flight = store.gauge(metrics.HANDSHAKES_IN_FLIGHT, label)
        self.bytes_in = store.counter(metrics.BYTES, (listener, "in"))
        self.bytes_out = store.counter(metrics.BYTES, (listener, "out"))
        self._phases = tuple(
            store.histogram(metrics.HANDSHAKE_PHASE_DURATION, (phase,))
            for phase in ("client_hello", "queue", "sign", "finish")
        )
        self._handshakes: dict[tuple[str, bool, str], int] = {}
        self._durations: dict[tuple[bool, str], Histogram] = {}
        self._negotiated: dict[Negotiated, int] = {}
        self._requests: dict[tuple[str, bytes, int], tuple[int, Histogram]] = {}

    def count_refused(self, limit: str) -> None:
        """Count a connection closed at once because `limit` was reached."""
        self.values[self._store.counter(metrics.CONNECTIONS_REFUSED, (self._listener, limit))] += 1.0

    def count_handshake(self, result: str, *, resumed: bool = False, tls_version: str = "") -> None:
        """Count a handshake that has ended."""
        key = (result, resumed, tls_version)
        slot = self._handshakes.get(key)
        if slot is None:
            labels = (self._listener, result, str(resumed).lower(), tls_version)
            slot = self._handshakes[key] = self._store.counter(metrics.HANDSHAKES, labels)
        self.values[slot] += 1.0

    def observe_handshake(
        self, negotiated: Negotiated, duration_s: float, *, key_type: str, phases: HandshakePhases | None
    ) -> None:
        """Count a handshake that succeeded; `phases` is None for a resumed one."""
        resumed = phases is None
        self.count_handshake("ok", resumed=resumed, tls_version=negotiated.tls_version)
        slot = self._negotiated.get(negotiated)
        if slot is None:
            slot = self._negotiated[negotiated] = self._store.counter(metrics.TLS_NEGOTIATED, tuple(negotiated))
        self.values[slot] += 1.0
        duration = self._durations.get((resumed, key_type))
        if duration is None:
            labels = (self._listener, str(resumed).lower(), key_type)
            duration = self._durations[resumed, key_type] = self._store.histogram(metrics.HANDSHAKE_DURATION, labels)
        duration.observe(duration_s)
        if phases is not None:
            for histogram, seconds in zip(self._phases, phases, strict=True):
                histogram.observe(max(seconds, 0.0))

    def count_request(self, upstream: str, method: bytes, status: int, duration_s: float) -> None:
        """Count a request that was answered, by `upstream` or, if that is empty, by the proxy itself."""
        key = (upstream, method, status)
        bound = self._requests.get(key)
        if bound is None:
            name = method.decode("ascii")
            name = name if name in _KNOWN_METHODS else "_other"
            bound = (
                self._store.counter(metrics.HTTP_REQUESTS, (self._listener, upstream, name, str(status))),
                self._store.histogram(metrics.HTTP_REQUEST_DURATION, (upstream, f"{status // 100}xx")),
            )
            if name != "_other":
                self._requests[key] = bound
        slot, duration = bound
        self.values[slot] += 1.0
        duration.observe(duration_s)

    def count_rejected(self, reason: str) -> None:
        """Count a request or response that broke a rule."""
        self.values[self._store.counter(metrics.HTTP_REJECTED, (reason,))] += 1.0


class UpstreamMetrics:
    """The metrics of one upstream in this process."""

    def __init__(self, store: MetricStore, upstream: str) -> None:
        self._store = store
        self._upstream = upstream
        self.values = store.values
        self.connecting, self.active, self.idle = (
            store.gauge(metrics.UPSTREAM_CONNECTIONS, (upstream, state)) for state in ("connecting", "active", "idle")
        )
        self.retries = store.counter(metrics.UPSTREAM_RETRIES, (upstream,))

    def count_error(self, reason: str) -> None:
        """Count a request that the upstream failed to answer."""
        self.values[self._store.counter(metrics.UPSTREAM_ERRORS, (self._upstream, reason))] += 1.0
