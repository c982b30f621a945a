from __future__ import annotations

from hsm.circuit import CircuitBreaker, CircuitState

MS = 1_000_000


def breaker() -> CircuitBreaker:
    return CircuitBreaker(jitter=lambda: 0.0)


def open_breaker(now_ns: int = 0) -> CircuitBreaker:
    circuit = breaker()
    circuit.trip(now_ns, "why")
    return circuit


def test_opens_at_the_fifth_failure_in_a_row():
    circuit = breaker()
    assert [circuit.failed(0, "") for _ in range(5)] == [False] * 4 + [True]
    assert circuit.state is CircuitState.OPEN


def test_successes_before_the_first_failure_do_not_delay_it():
    circuit = breaker()
    for _ in range(1000):
        circuit.succeeded()
    assert [circuit.failed(0, "") for _ in range(5)][-1]


def test_stays_closed_while_most_succeed():
    circuit = breaker()
    for _ in range(100):
        assert not circuit.failed(0, "")
        circuit.succeeded()
        circuit.succeeded()
    assert circuit.state is CircuitState.CLOSED


def test_opens_when_half_of_many_fail():
    circuit = breaker()
    outcomes = []
    for _ in range(10):
        outcomes.append(circuit.failed(0, ""))
        circuit.succeeded()
    assert any(outcomes)


def test_probes_once_per_interval_and_waits_longer_after_each_failure():
    circuit = open_breaker()
    now = 0
    for interval in (250 * MS, 500 * MS, 1000 * MS, 1000 * MS):
        assert not circuit.probe_due(now + interval - 1)
        now += interval
        assert circuit.probe_due(now)
        assert circuit.state is CircuitState.HALF_OPEN
        assert not circuit.probe_due(now + 10 * interval)
        circuit.probe_failed(now, "")
        assert circuit.state is CircuitState.OPEN


def test_a_verified_canary_closes_it_and_resets_the_interval():
    circuit = open_breaker()
    circuit.probe_due(250 * MS)
    circuit.probe_failed(250 * MS, "")
    circuit.probe_due(750 * MS)
    circuit.close()
    assert circuit.state is CircuitState.CLOSED
    circuit.trip(0, "why")
    assert circuit.probe_due(250 * MS)


def test_failures_of_what_was_sent_before_it_opened_change_nothing():
    circuit = open_breaker()
    circuit.probe_due(250 * MS)
    assert not circuit.failed(250 * MS, "")
    assert circuit.state is CircuitState.HALF_OPEN


def test_jitter_spreads_the_probes_over_a_quarter_of_the_interval():
    circuit = CircuitBreaker(jitter=lambda: 1.0)
    circuit.trip(0, "why")
    assert not circuit.probe_due(312 * MS)
    assert circuit.probe_due(313 * MS)


def test_it_says_why_and_when_it_was_opened():
    circuit = breaker()
    circuit.succeeded()
    for second in range(4):
        circuit.failed(second, "CKR_DEVICE_ERROR")
        circuit.succeeded()
    assert circuit.failed(4, "connection lost")
    assert circuit.reason == "5 of the last 9 requests failed, the last by: connection lost"
    circuit.probe_due(250 * MS + 4)
    circuit.probe_failed(250 * MS + 4, "its signature is wrong")
    assert circuit.opened_ns == 4
    assert circuit.reason.endswith("connection lost")


def test_a_canary_that_fails_as_the_one_before_is_no_news():
    circuit = open_breaker()
    assert [circuit.probe_failed(0, failure) for failure in ("a", "a", "b", "a")] == [True, False, True, True]
    circuit.close()
    circuit.trip(0, "why")
    assert circuit.probe_failed(0, "a")
