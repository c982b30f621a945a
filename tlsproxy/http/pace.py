"""How slowly a body may come."""

from __future__ import annotations


class Pace:
    """The patience with one sender, as an account of seconds.

    It starts full, with `idle_s`. Waiting spends it; every received byte earns 1/`rate` seconds, up to a full account.
    So a sender may pause for `idle_s`, and in the long run is to send `rate` bytes a second. With a rate of 0 any byte
    fills the account. Times are monotonic seconds.
    """

    __slots__ = ("_idle_s", "_left_s", "_rate", "_waiting_since_s")

    def __init__(self, idle_s: float, rate: int) -> None:
        self._idle_s = idle_s
        self._rate = rate
        self._left_s = idle_s
        self._waiting_since_s: float | None = None

    def wait(self, now_s: float) -> float:
        """Begin to wait, or go on waiting; return until when."""
        if self._waiting_since_s is None:
            self._waiting_since_s = now_s
        return self._waiting_since_s + self._left_s

    def stop(self, now_s: float) -> None:
        """Wait no longer: the sender is kept from sending."""
        if self._waiting_since_s is not None:
            self._left_s -= now_s - self._waiting_since_s
            self._waiting_since_s = None

    def received(self, size: int, now_s: float) -> None:
        """Take `size` bytes into account, of which there is at least one."""
        self.stop(now_s)
        self._left_s = min(self._idle_s, self._left_s + size / self._rate) if self._rate else self._idle_s
