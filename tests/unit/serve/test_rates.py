from __future__ import annotations

import pytest

from hsm.metricstore import Family
from tlsproxy import metrics
from tlsproxy.metrics import Merged
from tlsproxy.serve.rates import SAMPLED, Quantiles, Reading, Span, handshakes_lately

DURATION = metrics.HANDSHAKE_DURATION
SHARES = (0.5, 0.95, 0.99)
LabelSets = dict[tuple[str, ...], tuple[float, ...]]


def merged(family: Family, label_sets: LabelSets) -> Merged:
    return {**{name: {} for name in SAMPLED}, family.name: label_sets}


def handshakes(**counts: float) -> Merged:
    return merged(metrics.HANDSHAKES, {("a:1", result, "false", ""): (count,) for result, count in counts.items()})


def observed(family: Family, labels: tuple[str, ...], values: list[float]) -> Merged:
    counts = [0.0] * family.slots
    for value in values:
        counts[sum(bound < value for bound in family.buckets)] += 1
        counts[-1] += value
    return merged(family, {labels: tuple(counts)})


def span(seconds: float, before: Merged, now: Merged) -> Span:
    return Span(Reading(10.0, before), Reading(10.0 + seconds, now))


def durations(before: list[float], now: list[float]) -> Span:
    labels = ("a:1", "false", "rsa-2048")
    return span(10, observed(DURATION, labels, before), observed(DURATION, labels, now))


def test_a_rate_is_the_increase_by_the_time() -> None:
    half_second = span(0.5, handshakes(ok=150), handshakes(ok=170, timeout=5))
    assert half_second.rate(metrics.HANDSHAKES, result="ok") == 40
    assert half_second.rate(metrics.HANDSHAKES, result="timeout") == 10
    assert half_second.rate(metrics.HANDSHAKES) == 50
    assert half_second.rate(metrics.HANDSHAKES, result="none") == 0


def test_in_no_time_nothing_happens() -> None:
    assert span(0, handshakes(ok=100), handshakes(ok=100)).rate(metrics.HANDSHAKES) == 0


def test_a_counter_that_is_lost_is_no_negative_rate() -> None:
    assert span(1, handshakes(ok=100), handshakes(ok=1)).rate(metrics.HANDSHAKES) == 0


def test_increases_are_by_label_set_and_new_ones_begin_at_nothing() -> None:
    labels = ("app", "10.0.0.1:80"), ("app", "10.0.0.2:80")
    family = metrics.UPSTREAM_EJECTIONS
    minute = span(60, merged(family, {labels[0]: (2.0,)}), merged(family, {labels[0]: (5.0,), labels[1]: (1.0,)}))
    assert minute.increases(family) == {labels[0]: (3.0,), labels[1]: (1.0,)}
    assert minute.increases(family, server="10.0.0.2:80") == {labels[1]: (1.0,)}


def test_a_gauge_is_what_it_is_at_the_end() -> None:
    family = metrics.CONNECTIONS
    assert (
        span(1, merged(family, {("a",): (7.0,)}), merged(family, {("a",): (3.0,), ("b",): (2.0,)})).gauge(family) == 5
    )


def test_quantiles_are_interpolated_within_their_bucket() -> None:
    made = durations([1.0], [1.0] + [0.0025] * 50 + [0.15] * 50)
    assert made.quantiles(SHARES, DURATION) == pytest.approx([0.003, 0.145, 0.149])


def test_what_is_beyond_the_last_bound_counts_as_that() -> None:
    assert durations([], [99.0]).quantiles(SHARES, DURATION) == [10.0] * 3


def test_there_are_no_quantiles_of_nothing() -> None:
    assert durations([0.1], [0.1]).quantiles(SHARES, DURATION) is None
    assert span(1, merged(DURATION, {}), merged(DURATION, {})).quantiles(SHARES, DURATION) is None


def test_label_values_come_in_order_without_those_of_what_never_happened() -> None:
    assert span(1, handshakes(), handshakes(timeout=1, tls_alert=0, ok=1)).label_values(
        metrics.HANDSHAKES, "result"
    ) == [
        "ok",
        "timeout",
    ]


def test_handshakes_lately_are_rates_and_quantiles_by_phase() -> None:
    family = metrics.HANDSHAKE_PHASE_DURATION
    phases = observed(family, ("sign",), [0.0009] * 100)
    lately = handshakes_lately(
        span(65, handshakes(ok=350), {**handshakes(ok=1000, timeout=13), family.name: phases[family.name]})
    )
    assert (lately.window_s, lately.per_s, lately.failed_per_s) == (65.0, 10.0, pytest.approx(0.2))
    assert lately.duration is None
    assert lately.phases == {"sign": Quantiles(pytest.approx(0.00075), pytest.approx(0.000995))}
