"""The dispatcher and the sweep, with connections that go nowhere and a clock that stands still."""

from __future__ import annotations

import asyncio

import pytest

from hsm import metrics
from hsm.dispatch import RESTART_WINDOW_NS, Dispatcher
from hsm.errors import DeadlineExceeded, KeyNotFound, Overloaded, SignerUnavailable, TokenError
from hsm.messages import (
    Hello,
    KeyInfo,
    KeyType,
    SignatureScheme,
    SignReply,
    Status,
    decode_requests,
    encode_hello,
    encode_reply,
)
from hsm.metricstore import MetricStore, read_samples
from hsm.pool_connection import WorkerConnection
from hsm.pool_request import Request, SigningKey
from hsm.pool_token import PoolToken, TokenEndpoints
from hsm.sweep import Sweep

MS = 1_000_000
SECOND = 1000 * MS
SCHEME = SignatureScheme.ECDSA_SECP256R1_SHA256
DEADLINE_NS = 2 * SECOND


class Transport(asyncio.Transport):
    """Takes what is written; replies are the test's."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.aborted = False

    def write(self, data) -> None:
        self.written += data

    def abort(self) -> None:
        self.aborted = True


class Rig:
    """A dispatcher of some tokens, at a time of day that only tests move on."""

    def __init__(self, *names: str, max_pending: int = 1000) -> None:
        self.now_ns = 100 * SECOND
        self.store = MetricStore()
        self.tokens = [PoolToken(TokenEndpoints(name, ()), self.store, self.now_ns) for name in names]
        self.dispatcher = Dispatcher(self.tokens, self.store, max_pending, lambda: self.now_ns)
        self.sweep = Sweep(self.dispatcher, DEADLINE_NS, lambda: self.now_ns)
        self.key = self.make_key("www")
        self.transports: dict[WorkerConnection, Transport] = {}

    def make_key(self, label: str) -> SigningKey:
        return SigningKey(label, tuple(self.tokens), None)

    def worker(self, token: int, *, window: int = 4, labels: tuple[str, ...] = ("www",)) -> WorkerConnection:
        connection = WorkerConnection(self.tokens[token], self.dispatcher)
        self.transports[connection] = Transport()
        connection.connection_made(self.transports[connection])
        keys = tuple(KeyInfo(n, label, KeyType.ECDSA_P256, b"spki") for n, label in enumerate(labels))
        connection.data_received(encode_hello(Hello("t", 1, window, keys)))
        # Slow start is over.
        self.now_ns += 2 * SECOND
        return connection

    def ask(self, count: int = 1, key: SigningKey | None = None, deadline_ns: int = DEADLINE_NS) -> list[Request]:
        requests = []
        for _ in range(count):
            future = asyncio.get_running_loop().create_future()
            request = Request(future, key or self.key, SCHEME, b"tbs", self.now_ns, self.now_ns + deadline_ns)
            self.dispatcher.accept(request)
            requests.append(request)
        return requests

    def sent(self, connection: WorkerConnection) -> list[int]:
        """Ids of the requests on their way, oldest first; forgets them."""
        requests, used = decode_requests(self.transports[connection].written)
        self.transports[connection].written = self.transports[connection].written[used:]
        return [request.id for request in requests]

    def answer(self, connection: WorkerConnection, *ids: int, status: Status = Status.OK, payload=b"signature") -> None:
        connection.data_received(b"".join(encode_reply(SignReply(id_, status, payload, 0, 0)) for id_ in ids))

    def sweep_twice(self) -> None:
        """Sweep, and again after all that has come would have been read."""
        self.sweep.run()
        self.now_ns += MS
        self.sweep.run()

    def results(self, token: str) -> dict[str, float]:
        samples = read_samples(self.store.fd, {metrics.SIGN_REQUESTS.name: metrics.SIGN_REQUESTS})
        return {s.labels[2]: s.values[0] for s in samples if s.labels[:2] == (token, SCHEME.label)}

    def count(self, family, *labels: str) -> float:
        samples = read_samples(self.store.fd, metrics.FAMILIES)
        return sum(s.values[0] for s in samples if s.family is family and s.labels[: len(labels)] == labels)


@pytest.fixture
def rig():
    rigs = []

    def make(*names: str, **options) -> Rig:
        rigs.append(Rig(*names, **options))
        return rigs[-1]

    yield make
    for made in rigs:
        made.store.close()


def reasons(caplog, event: str) -> list[str]:
    """Return the reasons that the log gives for `event`."""
    return [record.reason for record in caplog.records if record.getMessage() == event]


def error_of(request: Request) -> BaseException | None:
    return request.future.exception() if request.future.done() else None


async def test_what_exceeds_the_window_waits_and_is_served_in_order(rig):
    rig = rig("a")
    worker = rig.worker(0, window=2)
    requests = rig.ask(5)
    first, second = rig.sent(worker)
    assert len(rig.dispatcher.waiting) == 3
    rig.answer(worker, second, first)
    assert [request.in_flight for request in requests] == [0, 0, 1, 1, 0]
    for id_ in (*rig.sent(worker), 5):
        rig.answer(worker, id_)
    assert all(request.future.result().value == b"signature" for request in requests)
    assert rig.tokens[0].load.in_flight == 0
    assert not rig.dispatcher.live


async def test_keys_take_turns_for_a_worker(rig):
    rig = rig("a")
    worker = rig.worker(0, window=1, labels=("www", "quiet"))
    rig.ask(10)
    rig.sent(worker)
    (quiet,) = rig.ask(1, rig.make_key("quiet"))
    rig.answer(worker, 1)
    rig.answer(worker, 2)
    assert quiet.in_flight == 1


async def test_a_key_that_only_one_token_has_does_not_wait_for_the_other(rig):
    rig = rig("a", "b")
    both, only = rig.worker(0, window=1), rig.worker(1, window=1, labels=("other",))
    rig.ask(3)
    (other,) = rig.ask(1, rig.make_key("other"))
    assert other.in_flight == 1
    assert len(rig.sent(both)) == len(rig.sent(only)) == 1


async def test_equal_workers_take_turns_even_when_idle(rig):
    rig = rig("a")
    workers = [rig.worker(0), rig.worker(0)]
    counts = [0, 0]
    for _ in range(10):
        rig.ask()
        for n, worker in enumerate(workers):
            for id_ in rig.sent(worker):
                counts[n] += 1
                rig.answer(worker, id_)
    assert counts == [5, 5]


async def test_a_failure_moves_the_request_to_the_other_token_and_counts_a_failover(rig):
    rig = rig("a", "b")
    workers = [rig.worker(0), rig.worker(1)]
    (request,) = rig.ask()
    first = next(worker for worker in workers if worker.in_flight)
    (second,) = (worker for worker in workers if worker is not first)
    rig.answer(first, 1, status=Status.RETRY, payload=b"CKR_DEVICE_ERROR")
    rig.answer(second, *rig.sent(second))
    assert request.future.result().token == second.token.name
    assert rig.count(metrics.FAILOVERS) == rig.count(metrics.RETRIES) == 1


async def test_what_a_token_failed_waits_for_another_and_does_not_go_back_to_it(rig):
    rig = rig("a", "b")
    workers = [rig.worker(0, window=2), rig.worker(1, window=1)]
    requests = rig.ask(3)
    first, second = rig.sent(workers[0])
    rig.answer(workers[0], first, status=Status.RETRY, payload=b"CKR_DEVICE_ERROR")
    rig.answer(workers[0], second)
    assert rig.sent(workers[0]) == []
    rig.answer(workers[1], *rig.sent(workers[1]))
    rig.answer(workers[1], *rig.sent(workers[1]))
    assert sorted(request.future.result().token for request in requests) == ["a", "b", "b"]


async def test_another_worker_of_the_same_token_is_no_failover(rig):
    rig = rig("a")
    rig.worker(0)
    rig.ask()
    second = rig.worker(0)
    rig.tokens[0].connections[0].connection_lost(None)
    assert len(rig.sent(second)) == 1
    assert (rig.count(metrics.RETRIES), rig.count(metrics.FAILOVERS)) == (1, 0)


async def test_a_token_whose_workers_die_over_their_work_is_not_trusted(rig):
    rig = rig("a")
    for _ in range(5):
        assert rig.tokens[0].is_trusted
        worker = rig.worker(0)
        rig.ask(deadline_ns=60 * SECOND)
        worker.connection_lost(None)
    assert not rig.tokens[0].is_trusted


async def test_a_request_that_keeps_losing_its_worker_is_given_up(rig):
    rig = rig("a")
    (request,) = rig.ask(deadline_ns=60 * SECOND)
    for _ in range(5):
        assert error_of(request) is None
        worker = rig.worker(0)
        assert rig.sent(worker) == [1]
        worker.connection_lost(None)
    assert isinstance(error_of(request), SignerUnavailable)


async def test_a_lost_worker_leaves_no_trace_in_the_books(rig):
    rig = rig("a")
    first, second = rig.worker(0), rig.worker(0)
    requests = rig.ask(6)
    first.connection_lost(None)
    assert rig.tokens[0].load.capacity == second.window
    assert rig.tokens[0].load.in_flight == len(second.in_flight) == 4
    rig.answer(second, *rig.sent(second))
    rig.answer(second, *rig.sent(second))
    assert all(request.future.result() for request in requests)
    assert rig.tokens[0].load.in_flight == 0


async def test_a_restart_is_waited_for_but_not_for_long(rig):
    rig = rig("a")
    worker = rig.worker(0)
    worker.connection_lost(None)
    (waiting,) = rig.ask()
    rig.now_ns += RESTART_WINDOW_NS - 1
    rig.sweep.run()
    assert error_of(waiting) is None
    rig.now_ns += 1
    rig.sweep.run()
    assert isinstance(error_of(waiting), SignerUnavailable)
    (late,) = rig.ask()
    assert isinstance(error_of(late), SignerUnavailable)
    assert rig.count(metrics.SHED, "unavailable") == 1


async def test_a_key_on_no_token_is_refused_even_while_another_waits(rig):
    rig = rig("a")
    rig.worker(0, window=1)
    rig.ask(2)
    (request,) = rig.ask(1, rig.make_key("nope"))
    assert isinstance(error_of(request), KeyNotFound)


async def test_what_cannot_be_signed_in_time_is_refused_at_once(rig):
    rig = rig("a")
    worker = rig.worker(0, window=1)
    for _ in range(100):
        rig.ask()
        rig.now_ns += 100 * MS
        rig.answer(worker, *rig.sent(worker))
    requests = rig.ask(40)
    refused = [request for request in requests if isinstance(error_of(request), Overloaded)]
    assert 24 <= len(refused) <= 28
    assert refused == requests[-len(refused) :]
    assert rig.count(metrics.SHED, "overloaded") == len(refused)


async def test_what_has_no_time_left_when_its_turn_comes_is_not_sent(rig):
    rig = rig("a")
    worker = rig.worker(0, window=1)
    rig.ask()
    (waiting,) = rig.ask(1, deadline_ns=10 * MS)
    rig.now_ns += 11 * MS
    rig.answer(worker, 1)
    assert isinstance(error_of(waiting), DeadlineExceeded)
    assert len(rig.sent(worker)) == 1


async def test_the_sweep_expires_and_a_late_answer_changes_nothing(rig):
    rig = rig("a")
    worker = rig.worker(0)
    (request,) = rig.ask()
    rig.now_ns += DEADLINE_NS
    rig.sweep.run()
    assert isinstance(error_of(request), DeadlineExceeded)
    assert not rig.sweep.is_needed
    rig.answer(worker, 1)
    assert rig.tokens[0].load.in_flight == 0
    assert rig.count(metrics.SIGN_REQUESTS, "a", SCHEME.label, "expired") == 1


async def test_what_a_token_can_fail_by_is_counted_from_zero_once_it_has_signed(rig):
    rig = rig("a")
    worker = rig.worker(0)
    assert rig.results("a") == {}
    rig.ask()
    rig.answer(worker, 1)
    assert rig.results("a") == {
        "ok": 1,
        **dict.fromkeys(("cancelled", "error", "expired", "no_key", "overloaded", "policy", "unavailable"), 0),
    }


async def test_a_token_that_signs_nothing_until_five_deadlines_pass_is_not_trusted(rig, caplog):
    rig = rig("a")
    rig.worker(0, window=8)
    rig.ask(5)
    rig.now_ns += DEADLINE_NS
    rig.sweep.run()
    assert not rig.tokens[0].is_trusted
    assert reasons(caplog, "token a: circuit open") == [
        "5 of the last 5 requests failed, the last by: no answer before the deadline"
    ]
    assert rig.sweep.is_needed
    rig.now_ns += SECOND
    assert rig.sweep.run() == rig.tokens
    assert rig.sweep.run() == []


async def test_expired_answers_of_a_token_that_signs_for_others_do_not_count_against_it(rig):
    rig = rig("a")
    worker = rig.worker(0, window=20)
    rig.ask(20)
    rig.now_ns += MS
    rig.answer(worker, 1)
    rig.answer(worker, *range(2, 20), status=Status.EXPIRED, payload=b"")
    assert rig.tokens[0].is_trusted


async def test_what_a_stalled_worker_owes_is_asked_elsewhere(rig, caplog):
    rig = rig("a", "b")
    workers = [rig.worker(0), rig.worker(1)]
    requests = rig.ask(4)
    ids = [rig.sent(worker) for worker in workers]
    assert [len(sent) for sent in ids] == [2, 2]
    rig.now_ns += DEADLINE_NS // 2 + 1
    rig.answer(workers[1], *ids[1])
    rig.sweep_twice()
    assert workers[0].stalled
    assert not rig.tokens[0].is_trusted
    assert reasons(caplog, "token a: circuit open") == ["stalled: 2 unanswered, the oldest for 1001 ms"]
    rig.answer(workers[1], *rig.sent(workers[1]))
    assert all(request.future.result().token == "b" for request in requests)
    rig.answer(workers[0], *ids[0])
    assert not workers[0].stalled
    assert rig.tokens[0].load.in_flight == 0


async def test_workers_that_die_at_work_open_the_circuit_and_the_log_says_so(rig, caplog):
    rig = rig("a", "b")
    rig.worker(1)
    for _ in range(5):
        worker = rig.worker(0)
        rig.ask(2)
        worker.connection_lost(None)
    assert reasons(caplog, "token a: circuit open") == ["5 of the last 5 requests failed, the last by: connection lost"]


async def test_answers_that_a_busy_event_loop_has_not_read_yet_are_not_missing(rig):
    rig = rig("a", "b")
    workers = [rig.worker(0), rig.worker(1)]
    for _ in range(3):
        requests = rig.ask(4)
        rig.now_ns += DEADLINE_NS // 2 + 1  # the loop takes this long over what it does
        rig.sweep.run()
        for worker in workers:
            rig.answer(worker, *rig.sent(worker))
        assert all(request.future.result() for request in requests)
    assert rig.count(metrics.RETRIES) == rig.count(metrics.HEDGES) == 0
    assert all(token.is_trusted for token in rig.tokens)


async def test_a_worker_that_has_signed_between_two_sweeps_is_given_its_time_again(rig):
    rig = rig("a")
    worker, other = rig.worker(0), rig.worker(0)
    for _ in range(2):
        rig.ask()
        rig.now_ns += MS
        for connection in (worker, other):
            rig.answer(connection, *rig.sent(connection))
    rig.ask(4)
    first, _ = rig.sent(worker)
    rig.now_ns += 101 * MS
    rig.sweep.run()
    rig.answer(other, *rig.sent(other))
    rig.answer(worker, first)
    rig.now_ns += 400 * MS
    rig.sweep.run()
    assert not worker.stalled
    rig.now_ns += MS
    rig.sweep.run()
    assert worker.stalled


async def test_a_worker_that_lets_all_it_owes_expire_gets_work_again(rig):
    rig = rig("a")
    workers = [rig.worker(0), rig.worker(0)]
    rig.ask(2)
    rig.now_ns += DEADLINE_NS // 2 + 1
    rig.answer(workers[1], 1)
    rig.sweep_twice()
    assert workers[0].stalled
    rig.answer(workers[0], 1, status=Status.EXPIRED, payload=b"")
    assert not workers[0].stalled


async def test_with_nowhere_else_to_ask_a_stalled_worker_is_waited_for(rig):
    rig = rig("a")
    worker = rig.worker(0)
    (request,) = rig.ask()
    rig.now_ns += DEADLINE_NS - 1
    rig.sweep.run()
    assert not worker.stalled
    assert rig.tokens[0].is_trusted
    rig.answer(worker, 1)
    assert request.future.result()


async def test_one_stalled_worker_of_two_does_not_discredit_the_token(rig):
    rig = rig("a")
    workers = [rig.worker(0), rig.worker(0)]
    rig.ask(2)
    rig.now_ns += DEADLINE_NS // 2 + 1
    rig.answer(workers[1], 1)
    rig.sweep_twice()
    assert workers[0].stalled
    assert rig.tokens[0].is_trusted
    rig.answer(workers[0], 1)
    assert not workers[0].stalled


def hedged(rig: Rig) -> tuple[Request, WorkerConnection, WorkerConnection]:
    """Return a request that its worker has not answered for so long that another has got it, and both workers."""
    workers = [rig.worker(0), rig.worker(1)]
    for _ in range(200):  # which earns what a hedge costs
        rig.ask()
        rig.now_ns += MS
        for worker in workers:
            rig.answer(worker, *rig.sent(worker))
    (request,) = rig.ask()
    (slow,) = (worker for worker in workers if worker.in_flight)
    (other,) = (worker for worker in workers if worker is not slow)
    rig.now_ns += 40 * MS
    rig.sweep_twice()
    return request, slow, other


async def test_a_slow_request_is_hedged_once_and_the_first_answer_counts(rig):
    rig = rig("a", "b")
    request, slow, other = hedged(rig)
    rig.sweep.run()
    assert request.in_flight == 2
    rig.answer(other, *rig.sent(other))
    assert request.future.result().token == other.token.name
    rig.answer(slow, *rig.sent(slow))
    assert rig.count(metrics.HEDGES, "won") == 1
    assert not any(token.load.in_flight for token in rig.tokens)


async def test_an_error_of_a_hedged_request_leaves_it_to_the_other_token(rig):
    rig = rig("a", "b")
    request, slow, other = hedged(rig)
    rig.answer(other, *rig.sent(other), status=Status.ERROR, payload=b"CKR_GENERAL_ERROR")
    assert not request.future.done()
    rig.answer(slow, *rig.sent(slow))
    assert request.future.result().token == slow.token.name
    assert rig.count(metrics.HEDGES, "lost") == 1


async def test_a_hedge_without_budget_is_counted_and_not_sent(rig):
    rig = rig("a", "b")
    rig.worker(0), rig.worker(1)
    (request,) = rig.ask()
    rig.now_ns += 40 * MS
    rig.sweep.run()
    rig.sweep.run()
    assert request.in_flight == 1
    assert rig.count(metrics.HEDGES, "no_budget") == 1


async def test_the_error_of_the_last_token_asked_is_the_one_that_is_told(rig):
    rig = rig("a", "b")
    workers = [rig.worker(0), rig.worker(1)]
    (request,) = rig.ask()
    for code in (b"CKR_FIRST", b"CKR_SECOND: it said"):
        (worker,) = (worker for worker in workers if worker.in_flight)
        rig.answer(worker, *rig.sent(worker), status=Status.RETRY, payload=code)
    error = error_of(request)
    assert isinstance(error, TokenError)
    assert (error.code, str(error)) == ("CKR_SECOND", "CKR_SECOND: it said")


async def test_replies_cut_anywhere_are_put_together(rig):
    rig = rig("a")
    worker = rig.worker(0)
    requests = rig.ask(3)
    whole = b"".join(encode_reply(SignReply(id_, Status.OK, b"s%d" % id_, 0, 0)) for id_ in (1, 2, 3))
    for n in range(len(whole)):
        worker.data_received(whole[n : n + 1])
    assert [request.future.result().value for request in requests] == [b"s1", b"s2", b"s3"]


@pytest.mark.parametrize(
    "garbage", [encode_reply(SignReply(9, Status.OK, b"x", 0, 0)), b"\x02\x00\x00\x00\x00\x00\x63" + bytes(9)]
)
async def test_a_worker_that_breaks_the_protocol_is_dropped_and_what_it_owes_is_asked_elsewhere(rig, garbage):
    rig = rig("a")
    bad, good = rig.worker(0), rig.worker(0)
    requests = rig.ask(4)
    bad.data_received(encode_reply(SignReply(1, Status.OK, b"right", 0, 0)) + garbage)
    assert rig.transports[bad].aborted
    rig.answer(good, *rig.sent(good))
    assert all(request.future.result() for request in requests)
    bad.connection_lost(None)
    assert rig.tokens[0].connections == [good]


async def test_ids_wrap_around(rig):
    rig = rig("a")
    worker = rig.worker(0)
    worker._last_id = 0xFFFFFFFE
    requests = rig.ask(3)
    ids = rig.sent(worker)
    assert ids == [0xFFFFFFFF, 0, 1]
    rig.answer(worker, *ids)
    assert all(request.future.result() for request in requests)
