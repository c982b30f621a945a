from __future__ import annotations

import json
import math
import random

import pytest

from perf.histogram import Histogram


def of(*seconds: float) -> Histogram:
    histogram = Histogram()
    for value in seconds:
        histogram.record(value)
    return histogram


def test_quantiles_are_told_to_a_sixtieth_or_a_microsecond_over_seven_decades():
    randomness = random.Random(1)
    values = sorted(10 ** randomness.uniform(-5, 2) for _ in range(5000))
    histogram = of(*values)
    for q in (0.001, 0.1, 0.5, 0.9, 0.99, 0.999):
        exact = values[math.ceil(q * len(values)) - 1]
        assert histogram.quantile_s(q) == pytest.approx(exact, rel=0.016, abs=1e-6)


def test_small_values_are_exact_to_the_microsecond():
    histogram = of(*(number / 1e6 for number in range(128)))
    assert [seen for _, seen in histogram.cumulative()] == list(range(1, 129))


def test_a_quantile_never_exceeds_the_maximum():
    assert of(0.0123).quantile_s(0.99) == 0.0123


def test_nothing_has_no_quantile():
    assert math.isnan(Histogram().quantile_s(0.5))


def test_the_sum_of_two_is_the_histogram_of_all():
    first, second, both = of(0.001, 0.5), of(0.002, 0.5, 3.0), of(0.001, 0.5, 0.002, 0.5, 3.0)
    first.add(second)
    assert list(first.cumulative()) == list(both.cumulative())
    assert (first.count, first.max_s) == (5, 3.0)


def test_json_keeps_everything():
    histogram = of(0.001, 0.5, 0.5)
    read = Histogram.from_json(json.loads(json.dumps(histogram.as_json())))
    assert list(read.cumulative()) == list(histogram.cumulative())


def test_json_of_another_shape_is_refused():
    with pytest.raises(TypeError):
        Histogram.from_json({"counts": [1, 2], "max_s": 1.0})
