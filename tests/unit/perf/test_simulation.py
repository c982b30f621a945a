"""The simulation against what queueing theory and common sense say."""

from __future__ import annotations

import argparse

import pytest

from perf import capacity
from perf.simulation import HsmModel, Scenario, simulate

HSM = HsmModel(units=4, service_s=[0.010], round_trip_s=0.001, sessions=8)


def scenario(load: float, *, hsms=(HSM,), proxies: int = 1, requests: int = 2000, **fields) -> Scenario:
    rate = load * sum(hsm.signatures_per_second for hsm in hsms)
    return Scenario(hsms, proxies, rate, requests, **fields)


def test_an_idle_hsm_takes_its_service_and_round_trip_time():
    outcome = simulate(scenario(0.02))
    assert outcome.latencies.quantile_s(0.5) == pytest.approx(0.011, rel=0.02)
    assert outcome.signed_share == 1


def test_the_same_scenario_has_the_same_outcome():
    first, second = simulate(scenario(0.8)), simulate(scenario(0.8))
    assert list(first.latencies.cumulative()) == list(second.latencies.cumulative())


def test_waiting_grows_with_load():
    p99 = [simulate(scenario(load)).latencies.quantile_s(0.99) for load in (0.3, 0.7, 0.95)]
    assert p99 == sorted(p99)
    assert p99[2] > 1.5 * p99[0]


def test_overload_signs_what_the_hsm_can_and_fails_the_rest_in_time():
    outcome = simulate(scenario(3.0, requests=6000, deadline_s=0.5))
    assert outcome.signed_share == pytest.approx(1 / 3, rel=0.15)
    assert outcome.latencies.max_s <= 0.5
    assert sum(outcome.failures.values()) == 6000 - outcome.latencies.count


def test_a_second_hsm_doubles_what_is_signed():
    alone = simulate(scenario(2.0, requests=4000, deadline_s=0.5)).latencies.count
    both = simulate(Scenario([HSM, HSM], 1, 2 * HSM.signatures_per_second, 4000, deadline_s=0.5)).latencies.count
    assert both == pytest.approx(2 * alone, rel=0.15)


def test_too_few_sessions_are_the_limit():
    few = HsmModel(units=4, service_s=[0.010], round_trip_s=0.010, sessions=2)
    assert few.signatures_per_second == pytest.approx(100)
    outcome = simulate(Scenario([few], 1, 300, 3000, deadline_s=0.5))
    assert outcome.signed_share == pytest.approx(1 / 3, rel=0.15)


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    capacity.add_arguments(parser)
    return parser.parse_args(words)


def test_a_plan_scales_with_the_rate_and_what_is_resumed(monkeypatch):
    monkeypatch.setattr(capacity, "sustainable_rate", lambda model, slo_s: 2000.0)
    (part,) = capacity.measure(
        arguments(
            *("--hsm-rate", "1100", "--rate", "100000", "--resumption", "0", "--resumption", "0.9"),
            *("--utilisation", "1", "--cpu-us-full", "400", "--cpu-us-resumed", "100", "--hsm-price", "2"),
        )
    )
    # 1,000 signatures/s each: 100 and 10 to spare; 40 cores. 220 an hour for 360 million.
    # 10,000 full ones: 10 and 1; 10,000 x 400 us and 90,000 x 100 us. 22 an hour.
    assert part.table.rows == [
        ("100000", "0%", "110 (single)", "40", "220.00", "0.6111"),
        ("100000", "90%", "11 (single)", "13", "22.00", "0.0611"),
    ]


def test_the_kind_of_cluster_that_needs_the_fewest_hsms_is_taken(monkeypatch):
    monkeypatch.setattr(capacity, "sustainable_rate", lambda model, slo_s: 2 * model.signatures_per_second)
    (part,) = capacity.measure(arguments("--rate", "12000", "--resumption", "0"))
    # Clusters of 2 sign 3,000/s: 4 and 1 to spare; of 3, 4,500: 3 and 1; of 6, 7,000: 2 and 1.
    assert part.table.rows == [("12000", "0%", "10 (clusters of 2)", "9")]


def test_an_objective_below_the_round_trip_is_out_of_reach():
    with pytest.raises(RuntimeError, match="within 5 ms"):
        list(capacity.measure(arguments("--slo-ms", "5", "--round-trip-ms", "10")))


def test_a_key_without_published_figures_is_refused():
    with pytest.raises(RuntimeError, match="--hsm-rate"):
        list(capacity.measure(arguments("--key-type", "ecdsa-p384")))
