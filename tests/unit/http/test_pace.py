from __future__ import annotations

import pytest

from tlsproxy.http.pace import Pace


def until(pace: Pace, *, rate: float, seconds: int, start: int = 0) -> float | None:
    """Send `rate` bytes each second; return when patience ends, or None if it lasts for `seconds`."""
    for now in range(start, start + seconds):
        deadline = pace.wait(now)
        if deadline < now + 1:
            return deadline
        pace.received(int(rate), now + 1)
    return None


def test_a_pause_is_allowed_up_to_the_idle_time() -> None:
    pace = Pace(20, 100)
    assert pace.wait(1000) == 1020
    assert pace.wait(1010) == 1020
    pace.received(2000, 1019)
    assert pace.wait(1019) == 1039


def test_a_trickle_is_cut_off_soon_after_the_idle_time() -> None:
    assert until(Pace(20, 100), rate=1, seconds=3600) == pytest.approx(20.2)


def test_a_sender_at_the_rate_goes_on_for_ever() -> None:
    assert until(Pace(20, 100), rate=100, seconds=3600) is None


def test_a_fast_start_earns_no_more_than_a_pause() -> None:
    pace = Pace(20, 100)
    pace.wait(0)
    pace.received(10_000_000, 1)
    assert until(pace, rate=1, seconds=3600, start=1) == pytest.approx(21.2)


def test_time_in_which_the_sender_is_stopped_does_not_count() -> None:
    pace = Pace(20, 100)
    pace.wait(0)
    pace.stop(5)
    pace.stop(500)
    assert pace.wait(1000) == 1015


def test_without_a_rate_any_byte_will_do() -> None:
    assert until(Pace(20, 0), rate=1, seconds=3600) is None
