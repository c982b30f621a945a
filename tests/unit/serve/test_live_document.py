from __future__ import annotations

import pytest

from tlsproxy import metrics
from tlsproxy.serve.live_document import FAMILIES, Reading, Readings

DURATION = metrics.HANDSHAKE_DURATION
LABELS = ("a:1", "false", "rsa-2048")


def counted(**values: float) -> dict[tuple[str, ...], tuple[float, ...]]:
    return {("a:1", result, "false", ""): (value,) for result, value in values.items()}


def readings(*seconds: tuple[float, dict[tuple[str, ...], tuple[float, ...]]]) -> Readings:
    made = Readings()
    for at_s, handshakes in seconds:
        made.add(Reading(at_s, {**{name: {} for name in FAMILIES}, metrics.HANDSHAKES.name: handshakes}))
    return made


def durations(*each_second: list[float]) -> Readings:
    """Readings a second apart, of a histogram that was given these values in all."""
    made = Readings()
    counts = [0.0] * DURATION.slots
    for at_s, values in enumerate(each_second):
        for value in values:
            index = sum(bound < value for bound in DURATION.buckets)
            counts[index] += 1
            counts[-1] += value
        made.add(Reading(at_s, {**{name: {} for name in FAMILIES}, DURATION.name: {LABELS: tuple(counts)}}))
    return made


def test_a_rate_is_the_increase_since_the_reading_before() -> None:
    made = readings((10.0, counted(ok=100)), (11.0, counted(ok=150)), (11.5, counted(ok=170, timeout=5)))
    assert made.rate(metrics.HANDSHAKES, result="ok") == 40
    assert made.rate(metrics.HANDSHAKES, result="timeout") == 10
    assert made.rate(metrics.HANDSHAKES) == 50
    assert made.rate(metrics.HANDSHAKES, result="none") == 0


def test_the_first_reading_has_no_rates() -> None:
    made = readings((10.0, counted(ok=100)))
    assert made.rate(metrics.HANDSHAKES) == 0
    assert made.quantiles(DURATION) is None


def test_a_counter_that_is_lost_is_no_negative_rate() -> None:
    assert readings((1.0, counted(ok=100)), (2.0, counted(ok=1))).rate(metrics.HANDSHAKES) == 0


def test_quantiles_are_interpolated_in_their_bucket() -> None:
    made = durations([], [0.0025] * 50 + [0.15] * 50)
    assert made.quantiles(DURATION) == pytest.approx([0.003, 0.145, 0.149])


def test_quantiles_beyond_the_last_bucket_are_its_bound() -> None:
    assert durations([], [99.0]).quantiles(DURATION) == [10.0] * 3


def test_quantiles_forget() -> None:
    assert durations([], [0.1], *([[]] * 10)).quantiles(DURATION) is None


def test_label_values_come_in_order() -> None:
    assert readings((1.0, counted(timeout=1, ok=1))).label_values(metrics.HANDSHAKES, "result") == ["ok", "timeout"]
