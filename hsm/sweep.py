"""What the pool looks after a few dozen times a second while anything is pending: time that has run out.

One sweep over what is in flight costs less than a timer for each request. An event loop that is busy for long looks at
the time before it reads what has come; so nothing is held against a worker before a second sweep, between which and the
first the loop has read what there was.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic_ns

from hsm import metrics
from hsm.dispatch import Dispatcher
from hsm.errors import DeadlineExceeded
from hsm.pool_token import PoolToken

_MIN_INTERVAL_S = 0.005
_MAX_INTERVAL_S = 0.02


class Sweep:
    """Expires requests, asks elsewhere when a worker stalls or is slow, and finds out whose canary is due."""

    def __init__(self, dispatcher: Dispatcher, sign_deadline_ns: int, clock: Callable[[], int] = monotonic_ns) -> None:
        self._dispatcher = dispatcher
        self._stall_limit_ns = sign_deadline_ns // 2
        self._clock = clock
        self._last_run_ns = 0

    @property
    def interval_s(self) -> float:
        """Time to the next sweep: short where requests are hedged after a few milliseconds."""
        if not self._has_choice():
            return _MAX_INTERVAL_S
        return min(max(self._dispatcher.hedging.delay_ns / 2e9, _MIN_INTERVAL_S), _MAX_INTERVAL_S)

    @property
    def is_needed(self) -> bool:
        """False while nothing is pending and every token is trusted."""
        return bool(self._dispatcher.live) or not all(token.is_trusted for token in self._dispatcher.tokens)

    def run(self) -> list[PoolToken]:
        """Do it all once; return the tokens that are to prove themselves with a canary now."""
        now_ns = self._clock()
        dispatcher = self._dispatcher
        self._expire(now_ns)
        for token in dispatcher.tokens:
            if token.is_trusted and token.load.in_flight:
                self._rescue(token, now_ns)
        if self._has_choice() and not dispatcher.waiting:
            self._hedge(now_ns)
        if dispatcher.waiting:
            dispatcher.refuse_waiting()
            for token in dispatcher.tokens:
                dispatcher.serve_waiting(token)
        self._last_run_ns = now_ns
        for token in dispatcher.tokens:
            token.show_pending()
        return [token for token in dispatcher.tokens if token.circuit.probe_due(now_ns)]

    def _has_choice(self) -> bool:
        return sum(len(token.connections) for token in self._dispatcher.tokens) > 1

    def _expire(self, now_ns: int) -> None:
        dispatcher = self._dispatcher
        for request in tuple(dispatcher.live):
            if request.future.done():
                dispatcher.forget(request)
            elif request.deadline_ns <= now_ns:
                token = request.last_token
                if token is not None and request.in_flight and token.last_ok_ns < request.submitted_ns:
                    dispatcher.token_failed(token, "no answer before the deadline")
                dispatcher.fail(request, DeadlineExceeded("no signature came before the deadline"))

    def _rescue(self, token: PoolToken, now_ns: int) -> None:
        """Ask elsewhere for what stalled workers owe; with nowhere else to ask, go on waiting."""
        dispatcher = self._dispatcher
        for connection in token.overdue(now_ns, self._stall_limit_ns):
            connection.stalled = True
            owed = [request for request, _ in connection.in_flight.values() if request.live and not request.pinned]
            rescued = [request for request in owed if dispatcher.can_sign(request.key)]
            if not rescued:
                connection.stalled = False
                continue
            for request in rescued:
                dispatcher.resend(request)
        if token.connections and all(connection.stalled for connection in token.connections):
            token.circuit.trip(now_ns, token.stall(now_ns))
            dispatcher.circuit_changed(token)

    def _hedge(self, now_ns: int) -> None:
        dispatcher = self._dispatcher
        delay_ns = dispatcher.hedging.delay_ns
        for token in dispatcher.tokens:
            for request, connection in token.sent_before(min(now_ns - delay_ns, self._last_run_ns)):
                other = dispatcher.choose(request, connection)
                if other is None:
                    continue
                request.hedged = True
                if not dispatcher.hedging.take():
                    dispatcher.count(metrics.HEDGES, "no_budget")
                    continue
                request.hedged_to = other
                dispatcher.send(request, other, now_ns)
