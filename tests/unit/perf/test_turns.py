from __future__ import annotations

import math

import pytest

from perf.histogram import Histogram
from perf.turns import Case, Series, Turn, interleave

A, B = Case("a"), Case("b", 0.020)


def turn(**fields) -> Turn:
    defaults = {"operations": 10, "per_second": 5.0, "cpu_s": {"proxy": 0.1, "hsm": 0.05}, "latencies": Histogram()}
    return Turn(**{**defaults, "failures": {}, "client_busy": 0.1, **fields})


def test_cases_take_turns_and_the_first_round_does_not_count():
    order = []

    def take(name):
        order.append(name)
        return turn(operations=len(order))

    results = interleave({A: lambda: take("a"), B: lambda: take("b")}, 2, "test")
    assert order == ["a", "b", "a", "b", "a", "b"]
    assert [taken.operations for taken in results[A]] == [3, 5]
    assert not results.interrupted


def test_control_c_leaves_the_turns_until_then():
    takes = iter([turn(), turn(), turn(operations=1)])

    def take():
        try:
            return next(takes)
        except StopIteration:
            raise KeyboardInterrupt from None

    results = interleave({A: take, B: take}, 5, "test")
    assert results.interrupted
    assert [len(results[A]), len(results[B])] == [1, 0]


def test_cpu_is_for_one_operation_of_the_roles_asked_for():
    series = Series([turn(), turn(operations=20), turn(operations=40)])
    assert series.cpu_s("proxy") == pytest.approx(0.1 / 20)
    assert series.cpu_s() == pytest.approx(0.15 / 20)
    assert series.proxy_cpu_s(1e6) == (pytest.approx(5000), (pytest.approx(2500), pytest.approx(10_000)))


def test_cpu_of_processes_out_of_reach_is_not_nothing():
    series = Series([turn(cpu_s={})])
    assert math.isnan(series.cpu_s())
    assert math.isnan(series.cpu_s("proxy"))


def test_failures_of_all_turns_add_up():
    series = Series([turn(failures={"reset": 1}), turn(failures={"reset": 2, "timeout": 1})])
    assert series.failures == {"reset": 3, "timeout": 1}


@pytest.mark.parametrize(("busy", "bound"), [(0.5, False), (0.95, True)])
def test_a_client_without_cpu_to_spare_is_told(busy, bound):
    assert Series([turn(client_busy=busy)]).is_client_bound is bound


def test_case_names():
    assert (str(A), str(B)) == ("a", "b at 20 ms")
