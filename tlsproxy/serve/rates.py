"""What happened between two readings of the metrics: increases, rates and quantiles, from counters that only grow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from hsm.metricstore import Family
from tlsproxy import metrics
from tlsproxy.metrics import Merged
from tlsproxy.serve.anatomy import PHASES

SAMPLE_INTERVAL_S = 5.0
SAMPLES = 13
"""The oldest is a minute old."""
SAMPLED = {
    family.name: family
    for family in (
        metrics.HANDSHAKES,
        metrics.HANDSHAKE_DURATION,
        metrics.HANDSHAKE_PHASE_DURATION,
        metrics.CONNECTIONS,
        metrics.UPSTREAM_EJECTIONS,
    )
}
"""The families a sample of the last minute holds."""

Values = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Reading:
    """The metrics of all processes at one moment."""

    at_s: float
    """Monotonic."""
    merged: Merged


@dataclass(frozen=True, slots=True)
class Span:
    """The time between two readings. `wanted` are the labels that what is asked for must have."""

    before: Reading
    now: Reading

    @property
    def seconds(self) -> float:
        """How long it was."""
        return self.now.at_s - self.before.at_s

    def gauge(self, family: Family, **wanted: str) -> float:
        """Return the sum at its end."""
        return sum(values[0] for _, values in self._selected(family, wanted))

    def increases(self, family: Family, **wanted: str) -> dict[tuple[str, ...], Values]:
        """Return by how much each label set has grown; a histogram's values are its buckets and then the sum."""
        old = self.before.merged.get(family.name, {})
        zeros = (0.0,) * family.slots
        # What is counted can get less: a worker that spoilt its store has lost it.
        return {
            labels: tuple(max(0.0, a - b) for a, b in zip(values, old.get(labels, zeros), strict=True))
            for labels, values in self._selected(family, wanted)
        }

    def rate(self, family: Family, **wanted: str) -> float:
        """Return a counter's increase per second."""
        return sum(value for (value,) in self.increases(family, **wanted).values()) / (self.seconds or 1.0)

    def quantiles(self, shares: Sequence[float], family: Family, **wanted: str) -> list[float] | None:
        """Return a histogram's quantiles; None if nothing was observed."""
        counts = [sum(column) for column in zip(*self.increases(family, **wanted).values(), strict=True)][:-1]
        total = sum(counts)
        return [_quantile(share, family.buckets, counts, total) for share in shares] if total >= 1 else None

    def label_values(self, family: Family, name: str) -> list[str]:
        """Return the values that label `name` has at its end where anything was counted."""
        index = family.label_names.index(name)
        return sorted({labels[index] for labels, values in self.now.merged[family.name].items() if any(values)})

    def _selected(self, family: Family, wanted: Mapping[str, str]) -> Iterator[tuple[tuple[str, ...], Values]]:
        indexed = [(family.label_names.index(name), value) for name, value in wanted.items()]
        for labels, values in self.now.merged[family.name].items():
            if all(labels[index] == value for index, value in indexed):
                yield labels, values


def _quantile(share: float, bounds: Sequence[float], counts: Sequence[float], total: float) -> float:
    """Interpolate within the bucket, as Prometheus' histogram_quantile does; beyond the last bound, return that."""
    rank = share * total
    lower = 0.0
    for bound, count in zip(bounds, counts, strict=False):
        if count and rank <= count:
            return lower + (bound - lower) * rank / count
        rank -= count
        lower = bound
    return lower


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Of a duration, in seconds."""

    p50_s: float
    p99_s: float


@dataclass(frozen=True, slots=True)
class Lately:
    """Handshakes of the last `window_s` seconds. There are no quantiles where nothing happened."""

    window_s: float
    per_s: float
    failed_per_s: float
    duration: Quantiles | None
    phases: Mapping[str, Quantiles]


def handshakes_lately(span: Span) -> Lately:
    """Return what the handshakes of `span` were like."""

    def quantiles(family: Family, **wanted: str) -> Quantiles | None:
        found = span.quantiles((0.5, 0.99), family, **wanted)
        return None if found is None else Quantiles(*found)

    ok = span.rate(metrics.HANDSHAKES, result="ok")
    phases = {phase: quantiles(metrics.HANDSHAKE_PHASE_DURATION, phase=phase) for phase in PHASES}
    return Lately(
        window_s=span.seconds,
        per_s=ok,
        failed_per_s=span.rate(metrics.HANDSHAKES) - ok,
        duration=quantiles(metrics.HANDSHAKE_DURATION),
        phases={phase: values for phase, values in phases.items() if values is not None},
    )
