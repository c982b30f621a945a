"""A circuit breaker for one token, as one pool sees it. Pure: it is told the time, and does nothing by itself.

    CLOSED --failures--> OPEN --interval over--> HALF_OPEN --canary verified--> CLOSED
                          ^                          |
                          +------ canary failed -----+     (the next interval is twice as long)

While it is not CLOSED no client's request goes to the token. In HALF_OPEN the pool asks for one signature whose answer
it can judge, the canary, and reports how that went.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Callable

_SAMPLE = 20
"""Outcomes remembered."""
_SAMPLE_MASK = (1 << _SAMPLE) - 1
_MIN_FAILURES = 5
_FIRST_INTERVAL_NS = 250_000_000
_MAX_INTERVAL_NS = 1_000_000_000
"""A token that works again is found within this time; the price of a dead one is a canary a second."""


class CircuitState(str, enum.Enum):
    """Whether requests flow. The values are metric labels."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class CircuitBreaker:
    """Opens once five of the last twenty outcomes, or of all if there are fewer, and half of them, are failures."""

    __slots__ = (
        "_failures",
        "_interval_ns",
        "_jitter",
        "_outcomes",
        "_probe_at_ns",
        "_probe_failure",
        "_seen",
        "opened_ns",
        "reason",
        "state",
    )

    def __init__(self, jitter: Callable[[], float] = random.random) -> None:
        """`jitter` returns 0.0 to 1.0; it spreads the canaries of many proxies over a quarter of the interval."""
        self.state = CircuitState.CLOSED
        self.reason = ""
        """Why it was opened last, for people."""
        self.opened_ns = 0
        """When that was."""
        self._jitter = jitter
        self._interval_ns = _FIRST_INTERVAL_NS
        self._probe_at_ns = 0
        self._probe_failure = ""
        self._outcomes = 0
        self._failures = 0
        self._seen = 0

    def succeeded(self) -> None:
        """A signature came."""
        if self._failures:
            self._record(0)

    def failed(self, now_ns: int, failure: str) -> bool:
        """The token answered with an error of its own, or not at all. Returns True if that opened the circuit.

        `failure` says what happened, for the circuit's `reason`.
        """
        if self.state is not CircuitState.CLOSED:
            return False
        self._record(1)
        if self._failures < _MIN_FAILURES or 2 * self._failures < self._seen:
            return False
        self.trip(now_ns, f"{self._failures} of the last {self._seen} requests failed, the last by: {failure}")
        return True

    def trip(self, now_ns: int, reason: str) -> None:
        """Open the circuit whatever the count: the token is known not to answer."""
        self.reason = reason
        self.opened_ns = now_ns
        self._probe_failure = ""
        self._open(now_ns)

    def probe_due(self, now_ns: int) -> bool:
        """Return True, once, when the interval is over: the circuit is then HALF_OPEN and waits for the canary."""
        if self.state is not CircuitState.OPEN or now_ns < self._probe_at_ns:
            return False
        self.state = CircuitState.HALF_OPEN
        return True

    def probe_failed(self, now_ns: int, failure: str) -> bool:
        """The canary failed, or could not be sent. Returns True if it failed otherwise than the one before."""
        self._interval_ns = min(2 * self._interval_ns, _MAX_INTERVAL_NS)
        self._open(now_ns)
        before, self._probe_failure = self._probe_failure, failure
        return failure != before

    def close(self) -> None:
        """The canary's signature is right."""
        self.state = CircuitState.CLOSED
        self._interval_ns = _FIRST_INTERVAL_NS
        self._forget()

    def _open(self, now_ns: int) -> None:
        self.state = CircuitState.OPEN
        self._forget()
        self._probe_at_ns = now_ns + int(self._interval_ns * (1 + self._jitter() / 4))

    def _record(self, failure: int) -> None:
        self._outcomes = (self._outcomes << 1 | failure) & _SAMPLE_MASK
        self._failures = self._outcomes.bit_count()
        self._seen = min(self._seen + 1, _SAMPLE)

    def _forget(self) -> None:
        self._outcomes = 0
        self._failures = 0
        self._seen = 0
