"""When to ask a second token because the first is slow. Pure.

A request that is still unanswered after the time that 95 % of requests take is sent once more, elsewhere; the first
answer counts (Dean and Barroso, "The Tail at Scale", 2013). A budget keeps the extra work at 5 % of all requests, so
that slowness everywhere does not double the load.
"""

from __future__ import annotations

_QUANTILE = 0.95
_STEP = 0.05
_RISE = 1 + _STEP * _QUANTILE
_FALL = 1 - _STEP * (1 - _QUANTILE)
_INITIAL_NS = 20_000_000.0
MIN_DELAY_NS = 1_000_000.0
BUDGET = 0.05
_MAX_SAVED = 10.0
"""Hedges that may follow each other at once after a quiet time."""


class HedgePolicy:
    """Tracks the 95th percentile of round trips and the budget."""

    __slots__ = ("_budget", "_quantile_ns")

    def __init__(self) -> None:
        self._quantile_ns = _INITIAL_NS
        self._budget = 0.0

    @property
    def delay_ns(self) -> float:
        """How long a request may be unanswered before it is hedged."""
        return self._quantile_ns

    def observe(self, round_trip_ns: int) -> None:
        """Take in one request and how long it took from sending to the first answer.

        The estimate moves 19 times further up for a slower one than down for a faster one, so it settles where one in
        twenty is slower, and follows a change of any size in some tens of requests.
        """
        if round_trip_ns > self._quantile_ns:
            self._quantile_ns *= _RISE
        elif self._quantile_ns > MIN_DELAY_NS:
            self._quantile_ns *= _FALL
        if self._budget < _MAX_SAVED:
            self._budget += BUDGET

    def take(self) -> bool:
        """Take one hedge from the budget; False if there is none."""
        if self._budget < 1:
            return False
        self._budget -= 1
        return True
