from __future__ import annotations

import pytest

from tlsproxy import metrics
from tlsproxy.serve.rates import Quantiles, Window

BOUNDS = len(metrics.HANDSHAKE_PHASE_DURATION.buckets)


def counts(ok: float, failed: float, phase: dict[int, float]) -> dict[str, dict[tuple[str, ...], tuple[float, ...]]]:
    """Counts with so many handshakes, and so many in each bucket of the phase "sign"."""
    buckets = tuple(phase.get(index, 0.0) for index in range(BOUNDS + 1))
    return {
        metrics.HANDSHAKES.name: {("a", "ok", "false", "TLSv1.3"): (ok,), ("a", "timeout", "false", ""): (failed,)},
        metrics.HANDSHAKE_DURATION.name: {},
        metrics.HANDSHAKE_PHASE_DURATION.name: {("sign",): (*buckets, 1.0)},
    }


def test_rates_are_what_was_counted_since_the_oldest_sample() -> None:
    window = Window()
    for second in range(0, 100, 5):
        window.add(float(second), counts(10.0 * second, 0.0, {}))
    lately = window.lately(100.0, counts(1000.0, 13.0, {}))
    assert lately.window_s == 65.0
    assert lately.per_s == pytest.approx(10.0)
    assert lately.failed_per_s == pytest.approx(0.2)
    assert lately.phases == {}


def test_quantiles_are_interpolated_within_their_bucket() -> None:
    window = Window()
    window.add(0.0, counts(0.0, 0.0, {3: 50.0}))
    low, high = metrics.HANDSHAKE_PHASE_DURATION.buckets[1:3]
    sign = window.lately(10.0, counts(0.0, 0.0, {2: 100.0, 3: 50.0})).phases["sign"]
    assert sign == Quantiles(pytest.approx(low + (high - low) * 0.5), pytest.approx(low + (high - low) * 0.99))


def test_what_is_beyond_the_last_bound_counts_as_that() -> None:
    sign = Window().lately(10.0, counts(0.0, 0.0, {BOUNDS: 1.0})).phases["sign"]
    assert sign.p99_s == metrics.HANDSHAKE_PHASE_DURATION.buckets[-1]


def test_without_a_sample_there_is_no_rate() -> None:
    lately = Window().lately(10.0, counts(5.0, 5.0, {}))
    assert (lately.window_s, lately.per_s, lately.failed_per_s) == (0.0, 0.0, 0.0)
