from __future__ import annotations

import random

import pytest

from hsm.hedging import MIN_DELAY_NS, HedgePolicy

MS = 1_000_000


@pytest.mark.parametrize("scale_ns", [3 * MS, 20 * MS, 300 * MS])
def test_the_delay_settles_where_one_in_twenty_is_slower(scale_ns):
    rng = random.Random(1)
    policy = HedgePolicy()
    slower = 0
    for n in range(20_000):
        round_trip = int(rng.expovariate(1 / scale_ns))
        slower += n >= 10_000 and round_trip > policy.delay_ns
        policy.observe(round_trip)
    assert 0.04 < slower / 10_000 < 0.06


def test_the_delay_follows_a_slower_token_within_a_hundred_requests():
    policy = HedgePolicy()
    for _ in range(100):
        policy.observe(200 * MS)
    assert policy.delay_ns > 190 * MS


def test_the_delay_has_a_floor():
    policy = HedgePolicy()
    for _ in range(10_000):
        policy.observe(10)
    assert policy.delay_ns > 0.99 * MIN_DELAY_NS


def test_hedges_are_at_most_five_in_a_hundred_requests():
    policy = HedgePolicy()
    taken = 0
    for _ in range(10_000):
        policy.observe(MS)
        taken += policy.take()
    assert 490 <= taken <= 500


def test_a_quiet_time_saves_ten_hedges_at_most():
    policy = HedgePolicy()
    for _ in range(10_000):
        policy.observe(MS)
    assert sum(policy.take() for _ in range(100)) == 10


def test_there_is_no_hedge_before_the_first_twenty_requests():
    assert not HedgePolicy().take()
