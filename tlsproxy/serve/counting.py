"""The data plane's metrics with their labels bound: on the hot path a dict lookup and an addition."""

from __future__ import annotations

from itertools import product
from time import time
from typing import NamedTuple

from hsm.errors import DeadlineExceeded, Overloaded, PolicyRejected
from hsm.metricstore import Histogram, MetricStore
from tlsproxy import metrics
from tlsproxy.serve.anatomy import PHASES, HandshakePhases, SlowestHandshakes, SlowHandshake
from tlsproxy.tls.client_certificates import ClientResult
from tlsproxy.tls.events import HandshakeComplete

_KNOWN_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"))


class _HandshakeKind(NamedTuple):
    """The metrics of handshakes that agreed on the same."""

    handshakes: int
    negotiated: int
    duration: Histogram


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

    def __init__(self, store: MetricStore, listener: str, *, tls: bool, asks_for_certificates: bool = False) -> None:
        """Register them in `store`, with the address of the listener as label; `tls`: it has handshakes."""
        self._store = store
        self._listener = listener
        self.values = store.values
        label = (listener,)
        self.connections = store.gauge(metrics.CONNECTIONS, label)
        self.accepted = store.counter(metrics.CONNECTIONS_ACCEPTED, label)
        self.handshakes_in_flight = store.gauge(metrics.HANDSHAKES_IN_FLIGHT, label)
        self.bytes_in = store.counter(metrics.BYTES, (listener, "in"))
        self.bytes_out = store.counter(metrics.BYTES, (listener, "out"))
        self._phases = tuple(store.histogram(metrics.HANDSHAKE_PHASE_DURATION, (phase,)) for phase in PHASES)
        self.slowest = SlowestHandshakes()
        self._kinds: dict[tuple[object, ...], _HandshakeKind] = {}
        self._requests: dict[tuple[str, bytes, int], tuple[int, Histogram]] = {}
        self._clients = {
            result: store.counter(metrics.CLIENT_CERTIFICATES, (listener, result.value))
            for result in (ClientResult if asks_for_certificates else ())
        }
        self._register_events(tls=tls)

    def _register_events(self, *, tls: bool) -> None:
        """Have counters at 0 of what has not happened yet."""
        limits = ("connections", "connections_per_client", "descriptors", "proxy_protocol")
        for limit in (*limits, *(("handshakes",) if tls else ())):
            self._store.counter(metrics.CONNECTIONS_REFUSED, (self._listener, limit))
        if tls:
            for result in metrics.HANDSHAKE_FAILURES:
                self._store.counter(metrics.HANDSHAKES, (self._listener, result, "false", ""))
            for version, resumed in product(("TLSv1.2", "TLSv1.3"), ("false", "true")):
                self._store.counter(metrics.HANDSHAKES, (self._listener, "ok", resumed, version))

    def count_refused(self, limit: str) -> None:
        """Count a connection closed at once because `limit` was reached."""
        self.values[self._store.counter(metrics.CONNECTIONS_REFUSED, (self._listener, limit))] += 1.0

    def count_client_certificate(self, result: ClientResult) -> None:
        """Count what became of a client's certificate, where clients are asked for one."""
        self.values[self._clients[result]] += 1.0

    def count_failed_handshake(self, result: str) -> None:
        """Count a handshake that ended without success."""
        self.values[self._store.counter(metrics.HANDSHAKES, (self._listener, result, "false", ""))] += 1.0

    def observe_handshake(self, complete: HandshakeComplete, duration_s: float) -> None:
        """Count a handshake that succeeded."""
        key = (complete.tls_version, complete.cipher, complete.group, complete.scheme, complete.certificate.key_type)
        kind = self._kinds.get(key) or self._register_kind(key, complete)
        values = self.values
        values[kind.handshakes] += 1.0
        values[kind.negotiated] += 1.0
        kind.duration.observe(duration_s)
        if self._clients:
            verified = complete.client_certificate is not None
            self.count_client_certificate(ClientResult.VERIFIED if verified else ClientResult.MISSING)

    def observe_phases(
        self, complete: HandshakeComplete, duration_s: float, phases: HandshakePhases, token: str
    ) -> None:
        """Take note of where the time of a full handshake went, `token` having signed."""
        for histogram, seconds in zip(self._phases, phases):  # noqa: B905 - a strict zip costs three times as much
            histogram.observe(seconds)
        if duration_s > self.slowest.floor_s:
            self.slowest.add(
                SlowHandshake(
                    time(),
                    self._listener,
                    complete.tls_version,
                    complete.cipher,
                    complete.certificate.key_type.value,
                    token,
                    "" if complete.scheme is None else complete.scheme.label,
                    duration_s,
                    phases,
                )
            )

    def _register_kind(self, key: tuple[object, ...], complete: HandshakeComplete) -> _HandshakeKind:
        store = self._store
        resumed = str(complete.resumed).lower()
        scheme = "" if complete.scheme is None else complete.scheme.label
        negotiated = (complete.tls_version, complete.cipher, complete.group or "", scheme)
        duration = (self._listener, resumed, complete.certificate.key_type.value)
        kind = self._kinds[key] = _HandshakeKind(
            store.counter(metrics.HANDSHAKES, (self._listener, "ok", resumed, complete.tls_version)),
            store.counter(metrics.TLS_NEGOTIATED, negotiated),
            store.histogram(metrics.HANDSHAKE_DURATION, duration),
        )
        return kind

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
        self.waiting = store.gauge(metrics.UPSTREAM_WAITING, (upstream,))
        self.retries = store.counter(metrics.UPSTREAM_RETRIES, (upstream,))
        for reason in metrics.UPSTREAM_FAILURES:
            store.counter(metrics.UPSTREAM_ERRORS, (upstream, reason))

    def add_server(self, server: str) -> None:
        """Have the counter at 0 of a server's ejections."""
        self._store.counter(metrics.UPSTREAM_EJECTIONS, (self._upstream, server))

    def count_error(self, reason: str) -> None:
        """Count a request that the upstream failed to answer."""
        self.values[self._store.counter(metrics.UPSTREAM_ERRORS, (self._upstream, reason))] += 1.0

    def count_ejection(self, server: str) -> None:
        """Count that a server was ejected."""
        self.values[self._store.counter(metrics.UPSTREAM_EJECTIONS, (self._upstream, server))] += 1.0

    def set_server_up(self, server: str, up: bool) -> None:
        """Say whether a server gets requests."""
        self.values[self._store.gauge(metrics.UPSTREAM_SERVER_UP, (self._upstream, server))] = float(up)
