"""What the live status page and `tlsproxy top` show once a second: one JSON document, made of the last readings."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from time import time
from typing import Any, Final

from hsm import metrics as hsm_metrics
from hsm.metricstore import Family
from tlsproxy import metrics
from tlsproxy.metrics import Merged
from tlsproxy.serve.anatomy import PHASES, SlowHandshake
from tlsproxy.serve.rates import quantile
from tlsproxy.serve.snapshot import Snapshot

QUANTILES: Final = (0.5, 0.95, 0.99)
SLOWEST_SHOWN = 20
_QUANTILE_READINGS = 10
"""Quantiles are over so many seconds, rates over one."""

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
        hsm_metrics.SIGN_REQUESTS,
        hsm_metrics.SIGN_DURATION,
        hsm_metrics.QUEUE_DURATION,
        hsm_metrics.PENDING,
        hsm_metrics.CIRCUIT_STATE,
    )
}
"""What a reading must hold."""

Document = dict[str, Any]
Values = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Reading:
    """The metrics of all processes at one moment."""

    at_s: float
    """Monotonic."""
    merged: Merged


class Readings:
    """The readings of the last seconds."""

    def __init__(self) -> None:
        self._readings: deque[Reading] = deque(maxlen=_QUANTILE_READINGS + 1)

    def add(self, reading: Reading) -> None:
        """Add the newest."""
        self._readings.append(reading)

    def gauge(self, family: Family, **labels: str) -> float:
        """Return the present sum over the label sets that have `labels`."""
        return sum(values[0] for values in _selected(family, self._readings[-1].merged, labels))

    def rate(self, family: Family, **labels: str) -> float:
        """Return a counter's increase per second since the reading before."""
        before = self._readings[-2] if len(self._readings) > 1 else self._readings[-1]
        (increase,) = self._increase(family, before, labels)
        return increase / ((self._readings[-1].at_s - before.at_s) or 1.0)

    def quantiles(self, family: Family, **labels: str) -> list[float] | None:
        """Return a histogram's QUANTILES over the last seconds; None if nothing was observed."""
        counts = self._increase(family, self._readings[0], labels)[:-1]
        total = sum(counts)
        return [quantile(share, family.buckets, counts, total) for share in QUANTILES] if total >= 1 else None

    def label_values(self, family: Family, name: str) -> list[str]:
        """Return the values that label `name` has."""
        index = family.label_names.index(name)
        return sorted({labels[index] for labels in self._readings[-1].merged[family.name]})

    def _increase(self, family: Family, before: Reading, labels: Mapping[str, str]) -> Values:
        new = _total(family, _selected(family, self._readings[-1].merged, labels))
        old = _total(family, _selected(family, before.merged, labels))
        # What is counted can get less: a worker that spoilt its store has lost it.
        return tuple(max(0.0, a - b) for a, b in zip(new, old, strict=True))


def _selected(family: Family, merged: Merged, wanted: Mapping[str, str]) -> Iterable[Values]:
    indexed = [(family.label_names.index(name), value) for name, value in wanted.items()]
    for labels, values in merged[family.name].items():
        if all(labels[index] == value for index, value in indexed):
            yield values


def _total(family: Family, label_sets: Iterable[Values]) -> Values:
    return tuple(map(sum, zip(*label_sets, strict=True))) or (0.0,) * family.slots


def describe(readings: Readings, snapshot: Snapshot, slowest: Sequence[SlowHandshake]) -> Document:
    """Return the document. Times are in seconds, rates per second, quantiles in the order of QUANTILES."""
    return {
        "time": time(),
        "version": snapshot.version,
        "ready": snapshot.ready,
        "handshakes": _handshakes(readings),
        "phases": {phase: readings.quantiles(metrics.HANDSHAKE_PHASE_DURATION, phase=phase) for phase in PHASES},
        "requests": readings.rate(metrics.HTTP_REQUESTS),
        "connections": readings.gauge(metrics.CONNECTIONS),
        "tokens": [_token(readings, name, up) for name, up in snapshot.tokens.items()],
        "upstreams": [
            _upstream(readings, name) for name in readings.label_values(metrics.UPSTREAM_CONNECTIONS, "upstream")
        ],
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
                "ok": readings.rate(metrics.HANDSHAKES, listener=listener.address, result="ok"),
                "handshakes": listener.handshakes,
                "failed": listener.handshakes_failed,
            }
            for listener in snapshot.listeners
        ],
        "workers": [{"index": worker.index, "pid": worker.pid, "ready": worker.ready} for worker in snapshot.workers],
        "slowest": [handshake.to_document() for handshake in slowest[:SLOWEST_SHOWN]],
    }


def _handshakes(readings: Readings) -> Document:
    failures = {
        result: readings.rate(metrics.HANDSHAKES, result=result)
        for result in readings.label_values(metrics.HANDSHAKES, "result")
        if result != "ok"
    }
    return {
        "full": readings.rate(metrics.HANDSHAKES, result="ok", resumed="false"),
        "resumed": readings.rate(metrics.HANDSHAKES, result="ok", resumed="true"),
        "failed": sum(failures.values()),
        "failures": failures,
        "in_flight": readings.gauge(metrics.HANDSHAKES_IN_FLIGHT),
        "duration": readings.quantiles(metrics.HANDSHAKE_DURATION, resumed="false"),
    }


def _token(readings: Readings, name: str, up: bool) -> Document:
    ok = readings.rate(hsm_metrics.SIGN_REQUESTS, token=name, result="ok")
    circuit = [
        state
        for state in readings.label_values(hsm_metrics.CIRCUIT_STATE, "state")
        if readings.gauge(hsm_metrics.CIRCUIT_STATE, token=name, state=state)
    ]
    return {
        "name": name,
        "up": up,
        "circuit": circuit,
        "pending": readings.gauge(hsm_metrics.PENDING, token=name),
        "signatures": ok,
        "errors": readings.rate(hsm_metrics.SIGN_REQUESTS, token=name) - ok,
        "sign": readings.quantiles(hsm_metrics.SIGN_DURATION, token=name),
        "queue": readings.quantiles(hsm_metrics.QUEUE_DURATION, token=name),
    }


def _upstream(readings: Readings, name: str) -> Document:
    return {
        "name": name,
        "requests": readings.rate(metrics.HTTP_REQUESTS, upstream=name),
        "errors": readings.rate(metrics.UPSTREAM_ERRORS, upstream=name),
        **{
            state: readings.gauge(metrics.UPSTREAM_CONNECTIONS, upstream=name, state=state)
            for state in ("active", "idle")
        },
    }
