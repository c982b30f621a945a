"""Which token to ask, and whether waiting for one makes sense. Pure: told the time and what happened.

The cost of a token is its outstanding requests times its round-trip time, an average that forgets: a slow token gets
less, gets something again once its slowness is old news, and the faster of two idle ones is asked first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

_SMOOTHING = 0.1
"""Weight of the newest round trip in the average."""
_INITIAL_NS = 1_000_000.0
_FLOOR_NS = 10_000.0
_DECAY_AFTER_NS = 100_000_000
_DECAY_TIME_NS = 1_000_000_000.0
"""A token that is not asked is forgiven by a factor e in this time."""
_SLOW_START_NS = 1_000_000_000
_SLOW_START_SHARE = 0.1
ADMISSION_MARGIN = 0.8
"""A wait is accepted if it is predicted to end within this part of the time left: a late signature is wasted work."""


class TokenLoad:
    """The work one pool has at one token."""

    __slots__ = ("_observed_ns", "_ramp_from_ns", "capacity", "in_flight", "round_trip_ns")

    def __init__(self) -> None:
        self.in_flight = 0
        """Requests sent and not yet answered."""
        self.capacity = 0
        """How many may be in flight: the windows of its workers' connections, added up."""
        self.round_trip_ns = _INITIAL_NS
        self._observed_ns = 0
        self._ramp_from_ns = 0

    def observe(self, round_trip_ns: int, now_ns: int) -> None:
        """Take in how long a signature took from sending the request to its reply."""
        self.round_trip_ns += _SMOOTHING * (round_trip_ns - self.round_trip_ns)
        self._observed_ns = now_ns

    def begin_slow_start(self, now_ns: int) -> None:
        """The token is back: let its share grow from a tenth to the whole within a second."""
        self._ramp_from_ns = now_ns

    def cost(self, now_ns: int) -> float:
        """Return what one more request costs here; only the order of costs means something."""
        if now_ns - self._observed_ns > _DECAY_AFTER_NS and self.in_flight == 0:
            self._forgive(now_ns)
        cost = (self.in_flight + 1) * self.round_trip_ns
        if self._ramp_from_ns:
            share = (now_ns - self._ramp_from_ns) / _SLOW_START_NS
            if share >= 1:
                self._ramp_from_ns = 0
            else:
                cost /= max(share, _SLOW_START_SHARE)
        return cost

    def _forgive(self, now_ns: int) -> None:
        if self._observed_ns:
            decayed = self.round_trip_ns * math.exp((self._observed_ns - now_ns) / _DECAY_TIME_NS)
            self.round_trip_ns = max(decayed, _FLOOR_NS)
        self._observed_ns = now_ns


def predicted_wait_ns(loads: Iterable[TokenLoad], ahead: int) -> float:
    """Return the time until a new request behind `ahead` waiting ones is signed, given the tokens it may go to.

    A full window gives one place per round trip for each request in it; `inf` if there are no windows.
    """
    places_per_ns = 0.0
    shortest_ns = math.inf
    for load in loads:
        if load.capacity:
            places_per_ns += load.capacity / load.round_trip_ns
            shortest_ns = min(shortest_ns, load.round_trip_ns)
    return (ahead + 1) / places_per_ns + shortest_ns if places_per_ns else math.inf


def is_worth_waiting(loads: Iterable[TokenLoad], ahead: int, left_ns: int) -> bool:
    """Tell whether a new request behind `ahead` others can be signed in the `left_ns` to its deadline."""
    return predicted_wait_ns(loads, ahead) <= ADMISSION_MARGIN * left_ns
