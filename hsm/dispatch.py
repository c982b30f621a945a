"""Where each request goes: to a worker at once, to the waiting room, or back with an error.

No event loop and no timer: told of requests and of what workers do, and of the time by a clock that tests replace.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from time import monotonic_ns

from hsm import metrics
from hsm.errors import DeadlineExceeded, HsmError, KeyNotFound, Overloaded, SignerUnavailable
from hsm.hedging import HedgePolicy
from hsm.messages import SignReply, Status
from hsm.metricstore import Family, MetricStore
from hsm.pool_connection import Answer, WorkerConnection
from hsm.pool_request import CANCELLED, RESULTS, Request, Signature, SigningKey, error_of
from hsm.pool_token import PoolToken
from hsm.token_load import is_worth_waiting
from hsm.waiting import WaitingRoom

RESTART_WINDOW_NS = 1_000_000_000
"""How long after a token's last worker went its requests may wait for the next one; later they fail at once."""
_MAX_SENDS = 5
"""A request that has been turned away, or has seen its worker die, this often is given up."""

_ASK_ANOTHER = frozenset({Status.RETRY, Status.NO_KEY, Status.BUSY})

_log = logging.getLogger(__name__)


class Dispatcher:
    """Every request that is not yet answered, and the rules that move it. The owner of all WorkerConnections."""

    def __init__(
        self, tokens: Sequence[PoolToken], store: MetricStore, max_pending: int, clock: Callable[[], int] = monotonic_ns
    ) -> None:
        self.tokens = tokens
        self.live: set[Request] = set()
        self.waiting = WaitingRoom()
        self.hedging = HedgePolicy()
        self.on_change: list[Callable[[], None]] = []
        self._store = store
        self._max_pending = max_pending
        self._clock = clock
        self._sends = 0
        self._retries_slot = store.counter(metrics.RETRIES)
        self._failovers_slot = store.counter(metrics.FAILOVERS)
        for reason in metrics.SHED_REASONS:
            store.counter(metrics.SHED, (reason,))
        for outcome in metrics.HEDGE_OUTCOMES:
            store.counter(metrics.HEDGES, (outcome,))

    # Requests in.

    def accept(self, request: Request) -> None:
        """Take on a new request: its future is settled now or later."""
        self.live.add(request)
        if len(self.live) > self._max_pending:
            self._shed(request, "queue_full", Overloaded(f"{self._max_pending} signatures are pending already"))
            return
        if not request.key.waiting:
            connection = self.choose(request)
            if connection is not None:
                self.send(request, connection, request.submitted_ns)
                return
        self._wait(request)

    def choose(self, request: Request, besides: WorkerConnection | None = None) -> WorkerConnection | None:
        """Return the worker to send `request` to, of the token where it costs least; None if none has room."""
        best: WorkerConnection | None = None
        best_cost = 0.0
        tokens = request.key.tokens
        for token in tokens:
            if not token.is_trusted or token in request.tried:
                continue
            connection = token.pick(request.key, besides)
            if connection is None:
                continue
            if len(tokens) == 1:
                return connection
            cost = token.load.cost(self._clock())
            if best is None or cost < best_cost:
                best, best_cost = connection, cost
        return best

    def send(self, request: Request, connection: WorkerConnection, now_ns: int) -> None:
        """Send `request` to a worker that has room for it."""
        info = connection.key_info(request.key)
        assert info is not None
        self._sends += 1
        connection.last_sent = self._sends
        request.last_token = connection.token
        connection.token.load.in_flight += 1
        connection.send(request, info.number, now_ns)

    def resend(self, request: Request) -> None:
        """Send `request` once more, where it is not and has not failed, or let it wait, or fail it."""
        if request.pinned or request.sends >= _MAX_SENDS:
            self.fail(request, request.last_error or SignerUnavailable("every worker that was asked went away"))
            return
        self._store.values[self._retries_slot] += 1.0
        before = request.last_token
        connection = self.choose(request)
        if connection is None:
            self._wait(request)
            return
        self.send(request, connection, self._clock())
        if connection.token is not before:
            self._store.values[self._failovers_slot] += 1.0

    def serve_waiting(self, token: PoolToken) -> None:
        """Send what waits to the workers of `token`, as far as they have room."""
        while token.waiting and token.is_trusted:
            taken = self.waiting.take(token)
            if taken is None:
                return
            request, connection = taken
            if not request.live:
                continue
            if request.future.done():
                self.forget(request)
                continue
            now_ns = self._clock()
            if now_ns + token.load.round_trip_ns > request.deadline_ns:
                self.fail(request, DeadlineExceeded("no time was left when its turn came"))
                continue
            self.send(request, connection, now_ns)

    def refuse_waiting(self) -> None:
        """Fail what waits for tokens of which none is left to wait for."""
        keys = {key for token in self.tokens for key in token.waiting}
        for key in keys:
            self.waiting.purge(key)
            if key.waiting and not self.can_sign(key):
                for request in tuple(key.waiting):
                    refusal = self._refusal(request)
                    if refusal is not None:
                        self.fail(request, refusal)
                self.waiting.purge(key)

    def can_sign(self, key: SigningKey) -> bool:
        """Tell whether a worker is up that has `key`, at a token that is trusted."""
        return any(token.is_trusted and token.can_serve(key) for token in key.tokens)

    def _wait(self, request: Request) -> None:
        refusal = self._refusal(request)
        if refusal is not None:
            if request.sends:
                self.fail(request, refusal)
            else:
                self._shed(request, RESULTS[type(refusal)], refusal)
            return
        self.waiting.add(request, first=request.sends > 0)

    def _refusal(self, request: Request) -> HsmError | None:
        """Return why `request` must not wait, or None if it may."""
        key = request.key
        now_ns = self._clock()
        candidates = [token for token in key.tokens if token not in request.tried]
        able = [token for token in candidates if token.is_trusted and token.can_serve(key)]
        if able:
            ahead = max(token.waiting_requests for token in able)
            left_ns = request.deadline_ns - now_ns
            if request.sends or is_worth_waiting([token.load for token in able], ahead, left_ns):
                return None
            return Overloaded("the signature would not be made before its deadline")
        if any(not token.connections and now_ns - token.last_up_ns < RESTART_WINDOW_NS for token in candidates):
            return None
        if request.last_error is not None:
            return request.last_error
        names = ", ".join(token.name for token in key.tokens)
        up = [token for token in key.tokens if token.connections]
        if up and not any(token.has_key(key) for token in up):
            return KeyNotFound(f"key {key.text!r} is on none of the tokens {names}")
        return SignerUnavailable(f"no worker of {names} is up and trusted")

    # Requests out.

    def fail(self, request: Request, error: HsmError) -> None:
        """Settle `request` with `error`."""
        self._settle(request, RESULTS[type(error)])
        if not request.future.done():
            request.future.set_exception(error)

    def forget(self, request: Request) -> None:
        """Drop a request whose future was cancelled; what a worker still answers is ignored."""
        self._settle(request, CANCELLED)

    def _settle(self, request: Request, result: str) -> None:
        request.live = False
        self.live.discard(request)
        token = request.last_token.name if request.last_token is not None else ""
        self.count(metrics.SIGN_REQUESTS, token, request.scheme.label, result)

    def _shed(self, request: Request, reason: str, error: HsmError) -> None:
        self.count(metrics.SHED, reason)
        self.fail(request, error)

    def count(self, family: Family, *labels: str) -> None:
        """Add one to a counter that is not on the hot path."""
        self._store.values[self._store.counter(family, labels)] += 1.0

    # What workers do.

    def worker_up(self, connection: WorkerConnection) -> None:
        """See WorkerEvents."""
        token = connection.token
        token.add(connection, self._clock())
        assert connection.hello is not None
        _log.info("token %s: worker %d is up", token.name, connection.hello.pid)
        self.changed()
        self.serve_waiting(token)

    def worker_down(self, connection: WorkerConnection) -> None:
        """See WorkerEvents."""
        token = connection.token
        now_ns = self._clock()
        had_work = bool(connection.in_flight)
        stranded = token.remove(connection, now_ns)
        assert connection.hello is not None
        level = logging.WARNING if stranded else logging.INFO
        _log.log(level, "token %s: worker %d is gone; %d asked anew", token.name, connection.hello.pid, len(stranded))
        if had_work:
            self.token_failed(token, "connection lost")
        self.changed()
        for request in stranded:
            self.resend(request)

    def key_mismatch(self, connection: WorkerConnection, key: SigningKey) -> None:
        """See WorkerEvents."""
        token = connection.token.name
        self.count(metrics.KEY_MISMATCHES, token)
        _log.error("token %s: its key %r is not the certificate's key; it will not be used", token, key.text)

    def worker_replied(self, connection: WorkerConnection, answers: list[Answer]) -> None:
        """See WorkerEvents."""
        token = connection.token
        token.load.in_flight -= len(answers)
        now_ns = self._clock()
        if not connection.in_flight:
            connection.stalled = False
        for request, sent_ns, reply in answers:
            request.in_flight -= 1
            if reply.status is Status.OK:
                connection.stalled = False
                connection.last_ok_ns = token.last_ok_ns = now_ns
                token.circuit.succeeded()
                token.load.observe(now_ns - sent_ns, now_ns)
                if request.live:
                    self._deliver(request, connection, sent_ns, reply, now_ns)
            else:
                self._refused(request, token, reply)
        if token.waiting:
            self.serve_waiting(token)

    def token_failed(self, token: PoolToken, failure: str) -> None:
        """Take note that `token` failed a request by its own fault; `failure` is for people."""
        if token.circuit.failed(self._clock(), failure):
            self.circuit_changed(token)

    def circuit_changed(self, token: PoolToken) -> None:
        """Tell all who want to know of a circuit's new state: it has opened, or closed again."""
        circuit = token.circuit
        if token.is_trusted:
            open_s = round((self._clock() - circuit.opened_ns) / 1e9, 3)
            _log.warning("token %s: circuit closed again", token.name, extra={"open_s": open_s})
        else:
            _log.warning("token %s: circuit open", token.name, extra={"reason": circuit.reason})
        self.changed()

    def changed(self) -> None:
        """Tell all who want to know that tokens came or went."""
        for token in self.tokens:
            token.show_state()
        for callback in tuple(self.on_change):
            callback()

    def _deliver(
        self, request: Request, connection: WorkerConnection, sent_ns: int, reply: SignReply, now_ns: int
    ) -> None:
        token = connection.token
        request.live = False
        self.live.discard(request)
        self.hedging.observe(now_ns - sent_ns)
        total_s = (now_ns - request.submitted_ns) / 1e9
        sign_s = min(reply.sign_us / 1e6, total_s)
        token.signed(request.scheme, total_s - sign_s, sign_s)
        if request.hedged_to is not None:
            self.count(metrics.HEDGES, "won" if request.hedged_to is connection else "lost")
        future = request.future
        if not future.done():
            future.set_result(Signature(reply.payload, token.name, total_s - sign_s, sign_s))

    def _refused(self, request: Request, token: PoolToken, reply: SignReply) -> None:
        """Deal with an answer that is no signature."""
        error, token_at_fault = error_of(reply)
        if reply.status is Status.EXPIRED:
            # While it signs for others the token is only busy.
            token_at_fault = token.last_ok_ns < request.submitted_ns
        if token_at_fault:
            self.token_failed(token, str(error))
        if not request.live:
            return
        request.tried += (token,)
        request.last_error = error
        if request.in_flight:
            return
        if reply.status in _ASK_ANOTHER:
            self.resend(request)
        else:
            self.fail(request, error)
