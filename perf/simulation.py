"""The pool's own code against HSMs that exist only on paper.

hsm.dispatch.Dispatcher, hsm.sweep.Sweep and hsm.pool_connection.WorkerConnection run as they do in a proxy, told the
time by a simulated clock; only sockets, workers and HSMs are models. A worker's model follows hsm.serving_threaded: a
queue for each proxy, served in turn, a PKCS#11 session for each signature under way. An HSM's model is a number of
units that sign one at a time, first come, first served, behind a network.
"""

from __future__ import annotations

import asyncio
import functools
import heapq
import itertools
import random
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from hsm.dispatch import Dispatcher
from hsm.messages import (
    Hello,
    KeyInfo,
    KeyType,
    SignatureScheme,
    SignReply,
    SignRequest,
    Status,
    decode_requests,
    encode_hello,
    encode_reply,
)
from hsm.metricstore import MetricStore
from hsm.pool_connection import WorkerConnection
from hsm.pool_request import Request, Signature, SigningKey
from hsm.pool_token import PoolToken, TokenEndpoints
from hsm.sweep import Sweep
from perf.histogram import Histogram

_SECOND_NS = 1_000_000_000
_BEGIN_NS = 1000 * _SECOND_NS
WARM_UP_S = 1.2
"""Tokens that have just come up get less for a second (hsm.token_load): what is asked then does not count."""
_SCHEME = SignatureScheme.ECDSA_SECP256R1_SHA256
_WINDOW_PER_SESSION = 2
_MAX_WINDOW = 128


@dataclass(frozen=True, slots=True)
class HsmModel:
    """One token: an HSM, or a cluster that acts as one."""

    units: int
    """Signatures it makes at the same time."""
    service_s: Sequence[float]
    """How long one takes: a value of these, at random."""
    round_trip_s: float
    """What comes on top, to the HSM and back."""
    sessions: int
    """PKCS#11 sessions of its worker: signatures asked of it at the same time."""

    @property
    def signatures_per_second(self) -> float:
        """What it can do at most, if the worker asks for enough at a time."""
        mean_s = sum(self.service_s) / len(self.service_s)
        return min(self.units / mean_s, self.sessions / (mean_s + self.round_trip_s))


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is simulated."""

    hsms: Sequence[HsmModel]
    """Each holds the key."""
    proxies: int
    """Proxy processes, each with a pool of its own, asking at random."""
    rate: float
    """Signatures asked for each second, Poisson arrivals."""
    requests: int
    """How many count."""
    deadline_s: float = 2.0
    seed: int = 1


def arrivals(rate: float, seed: int) -> Iterator[float]:
    """Seconds from one Poisson arrival to the next, `rate` of them in a second."""
    randomness = random.Random(seed)
    while True:
        yield randomness.expovariate(rate)


@dataclass(slots=True)
class Outcome:
    """What came of it."""

    latencies: Histogram = field(default_factory=Histogram)
    """From asking to the signature."""
    failures: Counter[str] = field(default_factory=Counter)
    """Requests that got none, by the error's name."""

    @property
    def signed_share(self) -> float:
        """The part of all requests that were signed in time."""
        total = self.latencies.count + self.failures.total()
        return self.latencies.count / total if total else 0.0


class _Clock:
    """Simulated time, and what is to happen in it."""

    def __init__(self) -> None:
        self.now_ns = _BEGIN_NS
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        """Call it then."""
        heapq.heappush(self._events, (self.now_ns + int(seconds * _SECOND_NS), next(self._numbers), call))

    def run_while(self, wanted: Callable[[], bool]) -> None:
        """Let time pass."""
        while self._events and wanted():
            self.now_ns, _, call = heapq.heappop(self._events)
            call()


class _Transport(asyncio.Transport):
    """Hands what the pool writes to a worker's model, in no time."""

    def __init__(self, receive: Callable[[list[SignRequest]], None]) -> None:
        super().__init__()
        self._receive = receive

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._receive(decode_requests(bytes(data))[0])

    def abort(self) -> None:
        raise RuntimeError("the pool gave up a connection that the model keeps alive")


class _Worker:
    """One token's worker process and the HSM behind it."""

    def __init__(self, clock: _Clock, model: HsmModel, randomness: random.Random) -> None:
        self._clock = clock
        self._model = model
        self._random = randomness
        self._free_sessions = model.sessions
        self._units_free_ns = [0] * model.units
        self._queues: dict[WorkerConnection, deque[tuple[SignRequest, int]]] = {}
        self._turn: deque[WorkerConnection] = deque()

    def connect(self, token: PoolToken, dispatcher: Dispatcher, number: int) -> None:
        """Be connected to a proxy's pool."""
        connection = WorkerConnection(token, dispatcher)
        self._queues[connection] = deque()
        connection.connection_made(_Transport(lambda requests: self._receive(connection, requests)))
        key = KeyInfo(0, "key", KeyType.ECDSA_P256, b"")
        window = min(_MAX_WINDOW, _WINDOW_PER_SESSION * self._model.sessions)
        connection.data_received(encode_hello(Hello(token.name, number, window, (key,))))

    def _receive(self, connection: WorkerConnection, requests: list[SignRequest]) -> None:
        queue = self._queues[connection]
        if not queue:
            self._turn.append(connection)
        queue.extend((request, self._clock.now_ns) for request in requests)
        self._serve()

    def _serve(self) -> None:
        while self._free_sessions and self._turn:
            connection = self._turn.popleft()
            queue = self._queues[connection]
            request, received_ns = queue.popleft()
            if queue:
                self._turn.append(connection)
            queue_us = (self._clock.now_ns - received_ns) // 1000
            if request.deadline_ns <= self._clock.now_ns:
                # Later, not now: a pool is not called back while it sends.
                frame = encode_reply(SignReply(request.id, Status.EXPIRED, b"", queue_us, 0))
                self._clock.after(0, functools.partial(connection.data_received, frame))
                continue
            self._free_sessions -= 1
            self._sign(connection, request, queue_us)

    def _sign(self, connection: WorkerConnection, request: SignRequest, queue_us: int) -> None:
        now_ns = self._clock.now_ns
        way_ns = int(self._model.round_trip_s / 2 * _SECOND_NS)
        begun_ns = max(now_ns + way_ns, heapq.heappop(self._units_free_ns))
        done_ns = begun_ns + int(self._random.choice(self._model.service_s) * _SECOND_NS)
        heapq.heappush(self._units_free_ns, done_ns)
        took_ns = done_ns + way_ns - now_ns
        reply = SignReply(request.id, Status.OK, b"signature", queue_us, took_ns // 1000)

        def answer() -> None:
            self._free_sessions += 1
            connection.data_received(encode_reply(reply))
            self._serve()

        self._clock.after(took_ns / _SECOND_NS, answer)


class _Awaited(asyncio.Future[Signature]):
    """What a request of the simulation waits on: notes the outcome at the moment it is settled."""

    def __init__(self, note: Callable[[BaseException | None], None]) -> None:
        super().__init__()
        self._note = note

    def set_result(self, result: Signature) -> None:
        super().set_result(result)
        self._note(None)

    def set_exception(self, exception: type[BaseException] | BaseException) -> None:
        super().set_exception(exception)
        self._note(self.exception())


class _Simulation:
    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._clock = _Clock()
        self._random = random.Random(scenario.seed)
        self._arrivals = arrivals(scenario.rate, scenario.seed)
        self._store = MetricStore()
        self._outcome = Outcome()
        self._asked = 0
        workers = [_Worker(self._clock, model, self._random) for model in scenario.hsms]
        self._pools = [self._make_pool(workers) for _ in range(scenario.proxies)]

    def _make_pool(self, workers: Sequence[_Worker]) -> tuple[Dispatcher, SigningKey]:
        names = [f"hsm-{number}" for number in range(len(workers))]
        tokens = [PoolToken(TokenEndpoints(name, ()), self._store, self._clock.now_ns) for name in names]
        dispatcher = Dispatcher(tokens, self._store, 1 << 20, lambda: self._clock.now_ns)
        deadline_ns = int(self._scenario.deadline_s * _SECOND_NS)
        sweep = Sweep(dispatcher, deadline_ns, lambda: self._clock.now_ns)
        for number, (worker, token) in enumerate(zip(workers, tokens, strict=True)):
            worker.connect(token, dispatcher, number)

        def run_sweep() -> None:
            if sweep.run():
                raise RuntimeError("a token lost the pool's trust: the model has no canary")
            self._clock.after(sweep.interval_s, run_sweep)

        run_sweep()
        return dispatcher, SigningKey("key", tuple(tokens), None)

    def run(self) -> Outcome:
        """Ask until enough has been asked, then wait for all that is pending."""
        try:
            self._ask()
            self._clock.run_while(lambda: self._is_asking or any(pool.live for pool, _ in self._pools))
        finally:
            self._store.close()
        return self._outcome

    @property
    def _is_asking(self) -> bool:
        return self._asked < self._scenario.requests

    def _ask(self) -> None:
        now_ns = self._clock.now_ns
        counts = now_ns - _BEGIN_NS >= WARM_UP_S * _SECOND_NS
        self._asked += counts

        def note(error: BaseException | None) -> None:
            if not counts:
                return
            if error is None:
                self._outcome.latencies.record((self._clock.now_ns - now_ns) / _SECOND_NS)
            else:
                self._outcome.failures[type(error).__name__] += 1

        dispatcher, key = self._random.choice(self._pools)
        deadline_ns = now_ns + int(self._scenario.deadline_s * _SECOND_NS)
        dispatcher.accept(Request(_Awaited(note), key, _SCHEME, b"tbs", now_ns, deadline_ns))
        if self._is_asking:
            self._clock.after(next(self._arrivals), self._ask)


def simulate(scenario: Scenario) -> Outcome:
    """Run a scenario; the same scenario gives the same outcome."""

    async def inside_a_loop() -> Outcome:
        # The pool's objects want a running loop to make futures of; nothing is ever scheduled on it.
        return _Simulation(scenario).run()

    return asyncio.run(inside_a_loop())
