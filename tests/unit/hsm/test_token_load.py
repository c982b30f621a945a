from __future__ import annotations

import math

from hsm.token_load import TokenLoad, is_worth_waiting, predicted_wait_ns

MS = 1_000_000
SECOND = 1000 * MS


def load_with(round_trip_ns: int, *, capacity: int = 0, now_ns: int = SECOND) -> TokenLoad:
    load = TokenLoad()
    load.capacity = capacity
    for _ in range(200):
        load.observe(round_trip_ns, now_ns)
    return load


def dispatch(loads: list[TokenLoad], count: int, now_ns: int = SECOND) -> list[int]:
    """Send `count` requests and answer none; return how many went to each."""
    for _ in range(count):
        min(loads, key=lambda load: load.cost(now_ns)).in_flight += 1
    return [load.in_flight for load in loads]


def test_equal_tokens_share_equally():
    assert dispatch([load_with(5 * MS), load_with(5 * MS)], 100) == [50, 50]


def test_a_token_four_times_as_slow_gets_a_fifth():
    fast, slow = dispatch([load_with(5 * MS), load_with(20 * MS)], 100)
    assert fast == 80
    assert slow == 20


def test_an_idle_slow_token_is_forgiven_in_seconds():
    load = load_with(500 * MS)
    before = load.cost(SECOND)
    for seconds in range(2, 8):
        load.cost(seconds * SECOND)
    assert load.cost(7 * SECOND) < before / 300


def test_a_slow_token_with_work_in_flight_is_not_forgiven():
    load = load_with(500 * MS)
    load.in_flight = 1
    before = load.cost(SECOND)
    assert load.cost(9 * SECOND) == before


def test_forgiveness_has_a_floor():
    load = load_with(5 * MS)
    assert load.cost(10_000 * SECOND) > 0


def test_a_token_that_is_back_gets_a_tenth_at_first_and_its_share_after_a_second():
    loads = [load_with(5 * MS), load_with(5 * MS)]
    loads[1].begin_slow_start(SECOND)
    assert dispatch(loads, 110) == [100, 10]
    loads = [load_with(5 * MS, now_ns=2 * SECOND), load_with(5 * MS, now_ns=2 * SECOND)]
    loads[1].begin_slow_start(SECOND)
    assert dispatch(loads, 110, 2 * SECOND) == [55, 55]


def test_predicted_wait_is_the_queue_over_the_rate_plus_one_round_trip():
    wait = predicted_wait_ns([load_with(20 * MS, capacity=64), load_with(20 * MS, capacity=64)], ahead=639)
    assert math.isclose(wait, 640 / 128 * 20 * MS + 20 * MS, rel_tol=0.01)


def test_without_a_window_the_wait_is_endless():
    assert predicted_wait_ns([load_with(20 * MS)], 0) == math.inf
    assert not is_worth_waiting([], 0, SECOND)


def test_a_wait_is_accepted_only_with_a_margin():
    loads = [load_with(10 * MS, capacity=10)]
    assert is_worth_waiting(loads, 69, 100 * MS)
    assert not is_worth_waiting(loads, 71, 100 * MS)
