"""What happened lately, from counters that only grow: rates and quantiles over the last minute."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tlsproxy import metrics

SAMPLE_INTERVAL_S = 5.0
_SAMPLES = 13
"""The oldest is a minute old."""

Counts = Mapping[str, Mapping[tuple[str, ...], tuple[float, ...]]]
"""As `metrics.merge_stores` returns them."""
COUNTED = {
    family.name: family for family in (metrics.HANDSHAKES, metrics.HANDSHAKE_DURATION, metrics.HANDSHAKE_PHASE_DURATION)
}
"""The families a sample holds."""


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


class Window:
    """The samples of the last minute."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, Counts]] = deque(maxlen=_SAMPLES)

    def add(self, now_s: float, counts: Counts) -> None:
        """Take a sample; `now_s` is monotonic."""
        self._samples.append((now_s, counts))

    def lately(self, now_s: float, counts: Counts) -> Lately:
        """Return what has happened between the oldest sample and now, when `counts` stand."""
        then_s, before = self._samples[0] if self._samples else (now_s, {})
        window_s = now_s - then_s

        def grown(family: str) -> dict[tuple[str, ...], list[float]]:
            old = before.get(family, {})
            return {
                labels: [new - past for new, past in zip(values, old.get(labels, (0.0,) * len(values)), strict=True)]
                for labels, values in counts[family].items()
            }

        results = {True: 0.0, False: 0.0}
        for (_, result, *_), (count,) in grown(metrics.HANDSHAKES.name).items():
            results[result == "ok"] += count
        durations = grown(metrics.HANDSHAKE_DURATION.name).values()
        whole = [sum(column) for column in zip(*durations, strict=True)]
        phases = {
            phase: quantiles
            for (phase,), values in grown(metrics.HANDSHAKE_PHASE_DURATION.name).items()
            if (quantiles := _quantiles(metrics.HANDSHAKE_PHASE_DURATION.buckets, values)) is not None
        }
        return Lately(
            window_s=window_s,
            per_s=results[True] / window_s if window_s else 0.0,
            failed_per_s=results[False] / window_s if window_s else 0.0,
            duration=_quantiles(metrics.HANDSHAKE_DURATION.buckets, whole) if whole else None,
            phases=phases,
        )


def _quantiles(bounds: Sequence[float], values: Sequence[float]) -> Quantiles | None:
    """`values` are a histogram's counts by bucket, with that of +Inf, and then the sum."""
    counts = values[:-1]
    total = sum(counts)
    if total <= 0:
        return None
    return Quantiles(quantile(0.5, bounds, counts, total), quantile(0.99, bounds, counts, total))


def quantile(share: float, bounds: Sequence[float], counts: Sequence[float], total: float) -> float:
    """Interpolate within the bucket, as Prometheus' histogram_quantile does; beyond the last bound, return that."""
    rank = share * total
    lower = 0.0
    for bound, count in zip(bounds, counts, strict=False):
        if count and rank <= count:
            return lower + (bound - lower) * rank / count
        rank -= count
        lower = bound
    return lower
