"""The proxy's metrics, and how those of all processes become one page.

Every process counts in a MetricStore of its own (hsm.metricstore); `StoreCollector` sums over the stores when
Prometheus asks. Where the values of a label are known, their counters are there before the first event: rate() and
increase() do not see the step from nothing to one. Names and labels are a contract with dashboards and alerts: add, but
don't rename. No label holds a client's address or an SNI that isn't configured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final, TypeAlias

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from hsm.metricstore import Family, Kind, Merge, Sample, read_samples

_FINE_BUCKETS: Final = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075)
_HANDSHAKE_BUCKETS: Final = (*_FINE_BUCKETS, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0)
_PHASE_BUCKETS: Final = (0.00001, 0.000025, 0.00005, 0.0001, 0.00025, *_HANDSHAKE_BUCKETS)
_REQUEST_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_LAG_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)

# TLS

HANDSHAKES = Family(
    "tlsproxy_handshakes_total",
    Kind.COUNTER,
    "TLS handshakes that have ended, by result: ok, client_closed, timeout, tls_alert, protocol_error, sign_timeout, "
    "sign_shed, hsm_unavailable or policy_rejected.",
    ("listener", "result", "resumed", "tls_version"),
    max_label_sets=1024,
)
HANDSHAKE_FAILURES: Final = (
    "client_closed",
    "timeout",
    "tls_alert",
    "protocol_error",
    "sign_timeout",
    "sign_shed",
    "hsm_unavailable",
    "policy_rejected",
)
"""Values of `result`, besides ok."""
HANDSHAKE_DURATION = Family(
    "tlsproxy_handshake_duration_seconds",
    Kind.HISTOGRAM,
    "From accepting the connection to the end of its handshake, for handshakes that succeeded.",
    ("listener", "resumed", "key_type"),
    _HANDSHAKE_BUCKETS,
)
HANDSHAKE_PHASE_DURATION = Family(
    "tlsproxy_handshake_phase_duration_seconds",
    Kind.HISTOGRAM,
    "Where full handshakes spend their time: client_hello (reading it, up to the request for a signature), certificate "
    "(choosing it), queue (for the HSM), sign (in the HSM), client (waiting for it), finish (the rest). They add up to "
    "the whole.",
    ("phase",),
    _PHASE_BUCKETS,
)
HANDSHAKES_IN_FLIGHT = Family("tlsproxy_handshakes_in_flight", Kind.GAUGE, "TLS handshakes under way.", ("listener",))
TLS_NEGOTIATED = Family(
    "tlsproxy_tls_negotiated_total",
    Kind.COUNTER,
    "What completed handshakes agreed on; group and scheme are empty where a resumed session has none.",
    ("tls_version", "cipher", "group", "scheme"),
)
CERTIFICATE_NOT_AFTER = Family(
    "tlsproxy_certificate_not_after_timestamp_seconds",
    Kind.GAUGE,
    "When a certificate expires, in seconds since the epoch.",
    ("certificate",),
    merge=Merge.MIN,
)
CLIENT_CERTIFICATES = Family(
    "tlsproxy_client_certificates_total",
    Kind.COUNTER,
    "Handshakes that asked for the client's certificate, by what came: verified (resumed sessions included), missing "
    "or refused.",
    ("listener", "result"),
)
CLIENT_CA_NOT_AFTER = Family(
    "tlsproxy_client_ca_not_after_timestamp_seconds",
    Kind.GAUGE,
    "When the first of the CAs expires that a listener verifies its clients by, in seconds since the epoch.",
    ("listener",),
    merge=Merge.MIN,
)
CLIENT_CRL_NEXT_UPDATE = Family(
    "tlsproxy_client_crl_next_update_timestamp_seconds",
    Kind.GAUGE,
    "When the first of a listener's CRLs expires, in seconds since the epoch: from then on clients are refused.",
    ("listener",),
    merge=Merge.MIN,
)

# Connections

CONNECTIONS = Family("tlsproxy_connections", Kind.GAUGE, "Client connections that are open.", ("listener",))
CONNECTIONS_ACCEPTED = Family(
    "tlsproxy_connections_accepted_total", Kind.COUNTER, "Client connections accepted.", ("listener",)
)
CONNECTIONS_REFUSED = Family(
    "tlsproxy_connections_refused_total",
    Kind.COUNTER,
    "Client connections closed at once because a limit was reached (connections, connections_per_client, "
    "handshakes, or descriptors: the process's own), or because their PROXY protocol header was not as it must be "
    "(proxy_protocol).",
    ("listener", "limit"),
    max_label_sets=1024,
)
BYTES = Family(
    "tlsproxy_bytes_total",
    Kind.COUNTER,
    "Plaintext bytes received from (in) and sent to (out) clients.",
    ("listener", "direction"),
)

# HTTP

HTTP_REQUESTS = Family(
    "tlsproxy_http_requests_total",
    Kind.COUNTER,
    "Requests answered, by an upstream or, with upstream empty, by the proxy itself; code 499 is a client that left "
    "before.",
    ("listener", "upstream", "method", "code"),
    max_label_sets=1024,
)
HTTP_REQUEST_DURATION = Family(
    "tlsproxy_http_request_duration_seconds",
    Kind.HISTOGRAM,
    "From a request's first byte to its response's last.",
    ("upstream", "code_class"),
    _REQUEST_BUCKETS,
)
HTTP_REJECTED = Family(
    "tlsproxy_http_rejected_total", Kind.COUNTER, "Requests and responses refused, by the rule they broke.", ("reason",)
)
UPSTREAM_CONNECTIONS = Family(
    "tlsproxy_upstream_connections",
    Kind.GAUGE,
    "Connections to servers of an upstream: connecting, active or idle.",
    ("upstream", "state"),
)
UPSTREAM_ERRORS = Family(
    "tlsproxy_upstream_errors_total",
    Kind.COUNTER,
    "Requests an upstream failed to answer.",
    ("upstream", "reason"),
    max_label_sets=1024,
)
UPSTREAM_FAILURES: Final = (
    "connect_failed",
    "connect_timeout",
    "tls_failed",
    "response_timeout",
    "closed_before_response",
    "connection_lost",
    "no_server",
    "queue_full",
    "queue_timeout",
)
"""Values of `reason`, besides the rules of HTTP that a response can break."""
UPSTREAM_RETRIES = Family(
    "tlsproxy_upstream_retries_total",
    Kind.COUNTER,
    "Requests sent again: a kept-alive connection had been closed under them, or their server had failed.",
    ("upstream",),
)
UPSTREAM_WAITING = Family(
    "tlsproxy_upstream_waiting",
    Kind.GAUGE,
    "Requests in the queue because every server has as many connections as it may.",
    ("upstream",),
)
UPSTREAM_SERVER_UP = Family(
    "tlsproxy_upstream_server_up",
    Kind.GAUGE,
    "1 while a server gets requests from every proxy worker; 0 while one has it down or ejected, or has no address.",
    ("upstream", "server"),
    merge=Merge.MIN,
)
UPSTREAM_EJECTIONS = Family(
    "tlsproxy_upstream_ejections_total",
    Kind.COUNTER,
    "Times a server got no more requests for a while because those it had had failed.",
    ("upstream", "server"),
)

# Traces

TRACE_SPANS = Family(
    "tlsproxy_trace_spans_total", Kind.COUNTER, "Spans recorded. What is never exported was pushed out by later ones."
)
TRACE_SPANS_EXPORTED = Family(
    "tlsproxy_trace_spans_exported_total",
    Kind.COUNTER,
    "Spans sent to the collector, by result: ok, or failed and lost.",
    ("result",),
)

# Processes

EVENT_LOOP_LAG = Family(
    "tlsproxy_event_loop_lag_seconds",
    Kind.HISTOGRAM,
    "How much later than asked for a proxy worker's event loop runs a timer.",
    (),
    _LAG_BUCKETS,
)
WORKERS_READY = Family("tlsproxy_workers_ready", Kind.GAUGE, "Proxy workers that accept connections.")
WORKER_RESTARTS = Family(
    "tlsproxy_worker_restarts_total", Kind.COUNTER, "Proxy workers started in place of one that had ended."
)
CONFIG_RELOADS = Family(
    "tlsproxy_config_reloads_total",
    Kind.COUNTER,
    "Reloads of the configuration or of certificates: success, or failure and the old state serves on.",
    ("result",),
)
TICKET_KEY_CREATED = Family(
    "tlsproxy_session_ticket_key_created_timestamp_seconds",
    Kind.GAUGE,
    "When the key was made that encrypts session tickets now, in seconds since the epoch.",
)
BUILD_INFO = Family("tlsproxy_build_info", Kind.GAUGE, "Always 1.", ("version", "python", "openssl"), merge=Merge.MAX)

FAMILIES: Final[Mapping[str, Family]] = {
    family.name: family
    for family in (
        HANDSHAKES,
        HANDSHAKE_DURATION,
        HANDSHAKE_PHASE_DURATION,
        HANDSHAKES_IN_FLIGHT,
        TLS_NEGOTIATED,
        CERTIFICATE_NOT_AFTER,
        CLIENT_CERTIFICATES,
        CLIENT_CA_NOT_AFTER,
        CLIENT_CRL_NEXT_UPDATE,
        CONNECTIONS,
        CONNECTIONS_ACCEPTED,
        CONNECTIONS_REFUSED,
        BYTES,
        HTTP_REQUESTS,
        HTTP_REQUEST_DURATION,
        HTTP_REJECTED,
        UPSTREAM_CONNECTIONS,
        UPSTREAM_ERRORS,
        UPSTREAM_RETRIES,
        UPSTREAM_WAITING,
        UPSTREAM_SERVER_UP,
        UPSTREAM_EJECTIONS,
        TRACE_SPANS,
        TRACE_SPANS_EXPORTED,
        EVENT_LOOP_LAG,
        WORKERS_READY,
        WORKER_RESTARTS,
        CONFIG_RELOADS,
        TICKET_KEY_CREATED,
        BUILD_INFO,
    )
}


Merged: TypeAlias = Mapping[str, Mapping[tuple[str, ...], tuple[float, ...]]]
"""Family name -> label values -> values (as in `Sample`)."""


def merge_stores(fds: Iterable[int], families: Mapping[str, Family]) -> Merged:
    """Return what is in the stores behind `fds`, merged."""
    merged: dict[str, dict[tuple[str, ...], tuple[float, ...]]] = {name: {} for name in families}
    for fd in fds:
        for sample in read_samples(fd, families):
            label_sets = merged[sample.family.name]
            present = label_sets.get(sample.labels)
            label_sets[sample.labels] = sample.values if present is None else _merge(sample, present)
    return merged


def _merge(sample: Sample, present: tuple[float, ...]) -> tuple[float, ...]:
    if sample.family.kind is Kind.GAUGE and sample.family.merge is not Merge.SUM:
        choose = min if sample.family.merge is Merge.MIN else max
        return tuple(map(choose, present, sample.values))
    return tuple(a + b for a, b in zip(present, sample.values, strict=True))


class StoreCollector(Collector):
    """Exports `families` from the stores whose descriptors `fds()` gives at the time of asking."""

    def __init__(self, families: Mapping[str, Family], fds: Callable[[], Iterable[int]]) -> None:
        self._families = families
        self._fds = fds

    def describe(self) -> Iterator[Metric]:
        """Name the metrics without reading any store."""
        for family in self._families.values():
            yield _export(family, {})

    def collect(self) -> Iterator[Metric]:
        """Read all stores."""
        for name, label_sets in merge_stores(self._fds(), self._families).items():
            yield _export(self._families[name], label_sets)


def _export(family: Family, label_sets: Mapping[tuple[str, ...], tuple[float, ...]]) -> Metric:
    if family.kind is Kind.HISTOGRAM:
        histogram = HistogramMetricFamily(family.name, family.help, labels=family.label_names)
        for labels, values in sorted(label_sets.items()):
            *counts, total = values
            cumulative = 0.0
            buckets = []
            for bound, count in zip((*map(str, family.buckets), "+Inf"), counts, strict=True):
                cumulative += count
                buckets.append((bound, cumulative))
            histogram.add_metric(labels, buckets, total)
        return histogram
    simple: CounterMetricFamily | GaugeMetricFamily
    if family.kind is Kind.COUNTER:
        simple = CounterMetricFamily(family.name, family.help, labels=family.label_names)
    else:
        simple = GaugeMetricFamily(family.name, family.help, labels=family.label_names)
    for labels, (value,) in sorted(label_sets.items()):
        simple.add_metric(labels, value)
    return simple
