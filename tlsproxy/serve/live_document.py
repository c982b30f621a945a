"""What the live status page and `tlsproxy top` show once a second: one JSON document, made of the last readings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import time
from typing import Any, Final

from hsm import metrics as hsm_metrics
from hsm.metricstore import Family
from tlsproxy import metrics
from tlsproxy.serve.anatomy import PHASES, SlowHandshake
from tlsproxy.serve.rates import Reading, Span
from tlsproxy.serve.snapshot import ServerView, Snapshot, UpstreamView

QUANTILES: Final = (0.5, 0.95, 0.99)
SLOWEST_SHOWN = 20
READINGS = 11
"""Taken each second. Rates are over the last second, quantiles over ten."""

FAMILIES: Final[Mapping[str, Family]] = {
    family.name: family
    for family in (
        metrics.HANDSHAKES,
        metrics.HANDSHAKE_DURATION,
        metrics.HANDSHAKE_PHASE_DURATION,
        metrics.HANDSHAKES_IN_FLIGHT,
        metrics.CONNECTIONS,
        metrics.HTTP_REQUESTS,
        metrics.UPSTREAM_CONNECTIONS,
        metrics.UPSTREAM_ERRORS,
        metrics.UPSTREAM_RETRIES,
        metrics.UPSTREAM_WAITING,
        hsm_metrics.SIGN_REQUESTS,
        hsm_metrics.SIGN_DURATION,
        hsm_metrics.QUEUE_DURATION,
        hsm_metrics.PENDING,
        hsm_metrics.CIRCUIT_STATE,
    )
}
"""What a reading must hold."""

Document = dict[str, Any]


def describe(readings: Sequence[Reading], snapshot: Snapshot, slowest: Sequence[SlowHandshake]) -> Document:
    """Return the document, of the last READINGS or as many as there are.

    Times are in seconds, rates per second, quantiles in the order of QUANTILES.
    """
    second = Span(readings[max(0, len(readings) - 2)], readings[-1])
    lately = Span(readings[0], readings[-1])
    return {
        "time": time(),
        "version": snapshot.version,
        "ready": snapshot.ready,
        "handshakes": _handshakes(second, lately),
        "phases": {
            phase: lately.quantiles(QUANTILES, metrics.HANDSHAKE_PHASE_DURATION, phase=phase) for phase in PHASES
        },
        "requests": second.rate(metrics.HTTP_REQUESTS),
        "connections": second.gauge(metrics.CONNECTIONS),
        "tokens": [_token(second, lately, name, up) for name, up in snapshot.tokens.items()],
        "upstreams": [_upstream(second, upstream) for upstream in snapshot.upstreams],
        "certificates": [
            {
                "name": certificate.name,
                "names": certificate.names,
                "key_type": certificate.key_type,
                "tokens": certificate.tokens,
                "days_left": int((certificate.not_after.timestamp() - time()) // 86400),
            }
            for certificate in snapshot.certificates
        ],
        "listeners": [
            {
                "address": listener.address,
                "connections": listener.connections,
                "ok": second.rate(metrics.HANDSHAKES, listener=listener.address, result="ok"),
                "handshakes": listener.handshakes,
                "failed": listener.handshakes_failed,
            }
            for listener in snapshot.listeners
        ],
        "workers": [{"index": worker.index, "pid": worker.pid, "ready": worker.ready} for worker in snapshot.workers],
        "slowest": [handshake.to_document() for handshake in slowest[:SLOWEST_SHOWN]],
    }


def _handshakes(second: Span, lately: Span) -> Document:
    failures = {
        result: second.rate(metrics.HANDSHAKES, result=result)
        for result in second.label_values(metrics.HANDSHAKES, "result")
        if result != "ok"
    }
    return {
        "full": second.rate(metrics.HANDSHAKES, result="ok", resumed="false"),
        "resumed": second.rate(metrics.HANDSHAKES, result="ok", resumed="true"),
        "failed": sum(failures.values()),
        "failures": failures,
        "in_flight": second.gauge(metrics.HANDSHAKES_IN_FLIGHT),
        "duration": lately.quantiles(QUANTILES, metrics.HANDSHAKE_DURATION, resumed="false"),
    }


def _token(second: Span, lately: Span, name: str, up: bool) -> Document:
    ok = second.rate(hsm_metrics.SIGN_REQUESTS, token=name, result="ok")
    circuit = [
        state
        for state in second.label_values(hsm_metrics.CIRCUIT_STATE, "state")
        if second.gauge(hsm_metrics.CIRCUIT_STATE, token=name, state=state)
    ]
    return {
        "name": name,
        "up": up,
        "circuit": circuit,
        "pending": second.gauge(hsm_metrics.PENDING, token=name),
        "signatures": ok,
        "errors": second.rate(hsm_metrics.SIGN_REQUESTS, token=name) - ok,
        "sign": lately.quantiles(QUANTILES, hsm_metrics.SIGN_DURATION, token=name),
        "queue": lately.quantiles(QUANTILES, hsm_metrics.QUEUE_DURATION, token=name),
    }


def _upstream(second: Span, upstream: UpstreamView) -> Document:
    name = upstream.name
    return {
        "name": name,
        "servers": [_server(server) for server in upstream.servers],
        "requests": second.rate(metrics.HTTP_REQUESTS, upstream=name),
        "errors": second.rate(metrics.UPSTREAM_ERRORS, upstream=name),
        "retries": second.rate(metrics.UPSTREAM_RETRIES, upstream=name),
        "waiting": second.gauge(metrics.UPSTREAM_WAITING, upstream=name),
        **{
            state: second.gauge(metrics.UPSTREAM_CONNECTIONS, upstream=name, state=state)
            for state in ("active", "idle")
        },
    }


def _server(server: ServerView) -> Document:
    """`ejections` counts those of the last minute."""
    state = server.state
    return {"address": server.address, "up": state == "up", "state": state, "ejections": server.ejections}
