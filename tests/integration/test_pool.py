"""SignerPool against scripted workers over real Unix sockets."""

from __future__ import annotations

import asyncio
import contextlib
from time import monotonic_ns

import pytest

from hsm import metrics
from hsm.errors import (
    DeadlineExceeded,
    KeyNotFound,
    Overloaded,
    PolicyRejected,
    SignerUnavailable,
    TokenError,
)
from hsm.keys import is_signature_valid, public_key_der
from hsm.messages import KeyType, SignatureScheme, Status
from hsm.metricstore import read_samples
from hsm.pool import SignerPool, TokenEndpoints
from tests.fake_worker import (
    FakeWorker,
    answers_bytes,
    delayed,
    held_until,
    in_turn,
    never_answers,
    refuses,
    signs,
    signs_with_another_key,
)
from tests.tokens import CERTIFICATE_VERIFY, private_key

EVENT_LOOPS = ("asyncio", "uvloop")
SCHEME = SignatureScheme.ECDSA_SECP256R1_SHA256
KEY = private_key(KeyType.ECDSA_P256, "www")


class Cluster:
    """Scripted workers, each of a token of its own unless told, and a pool of them all."""

    def __init__(self, stack: contextlib.AsyncExitStack, directory) -> None:
        self._stack = stack
        self._directory = directory
        self.workers: list[FakeWorker] = []

    async def worker(self, token: str, *, up: bool = True, **options) -> FakeWorker:
        path = self._directory / f"{len(self.workers)}.sock"
        worker = FakeWorker(path, options.pop("keys", {"www": KEY}), token=token, **options)
        self.workers.append(worker)
        self._stack.push_async_callback(worker.stop)
        if up:
            await worker.start()
        return worker

    async def pool(self, *, wait: bool = True, **options) -> SignerPool:
        sockets: dict[str, list[str]] = {}
        for worker in self.workers:
            sockets.setdefault(worker.hello.token, []).append(str(worker.path))
        tokens = [TokenEndpoints(name, tuple(paths)) for name, paths in sockets.items()]
        pool = await self._stack.enter_async_context(SignerPool(tokens, **options))
        if wait:
            await until(lambda: sum(len(worker.connections) for worker in self.workers) == len(self.workers))
            await pool.wait_ready(10)
            await until(lambda: sum(len(token.connections) for token in pool._tokens.values()) == len(self.workers))
        return pool


@pytest.fixture
async def cluster(tmp_path):
    async with contextlib.AsyncExitStack() as stack:
        yield Cluster(stack, tmp_path)


async def until(condition) -> None:
    async def poll() -> None:
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)

    await asyncio.wait_for(poll(), 20)


def counted(pool: SignerPool, family, *labels: str) -> float:
    samples = read_samples(pool._dispatcher._store.fd, metrics.FAMILIES)
    matching = [s for s in samples if s.family is family and s.labels[: len(labels)] == labels]
    return sum(sample.values[0] for sample in matching)


def is_right(signature) -> bool:
    return is_signature_valid(KEY.public_key(), SCHEME, CERTIFICATE_VERIFY, signature.value)


async def sign_many(pool: SignerPool, count: int):
    return await asyncio.gather(*(pool.sign("www", SCHEME, CERTIFICATE_VERIFY) for _ in range(count)))


async def test_signs_and_tells_where_the_time_went(cluster):
    await cluster.worker("a", behaviour=delayed(0.03))
    pool = await cluster.pool()
    signature = await pool.sign("www", SCHEME, CERTIFICATE_VERIFY)
    assert is_right(signature)
    assert signature.token == "a"
    assert signature.sign_s == 20e-6
    assert signature.queue_s > 0.02
    assert counted(pool, metrics.SIGN_REQUESTS, "a", SCHEME.label, "ok") == 1
    assert pool.pending == 0


async def test_many_at_a_time_are_not_mixed_up(cluster):
    await cluster.worker("a", window=8, behaviour=delayed(0.001))
    await cluster.worker("a", window=8)
    pool = await cluster.pool(sign_deadline_s=20)
    contents = [CERTIFICATE_VERIFY[:-2] + n.to_bytes(2, "big") for n in range(400)]
    signatures = await asyncio.gather(*(pool.sign("www", SCHEME, content) for content in contents))
    for content, signature in zip(contents, signatures, strict=True):
        assert is_signature_valid(KEY.public_key(), SCHEME, content, signature.value)


async def test_keeps_to_the_window_of_the_hello(cluster):
    release = asyncio.Event()
    worker = await cluster.worker("a", window=4, behaviour=held_until(release))
    pool = await cluster.pool(sign_deadline_s=20)
    work = asyncio.ensure_future(sign_many(pool, 20))
    await worker.received(4)
    await asyncio.sleep(0.05)
    assert len(worker.requests) == 4
    assert pool.pending == 20
    release.set()
    assert all(map(is_right, await work))


async def test_a_worker_that_dies_with_requests_in_hand_fails_none_of_them(cluster):
    first = await cluster.worker("a", behaviour=never_answers)
    second = await cluster.worker("b")
    pool = await cluster.pool()
    second.behaviour = never_answers
    work = asyncio.ensure_future(sign_many(pool, 40))
    await first.received(20)
    second.behaviour = signs
    for connection in tuple(second.connections):
        connection.close()
    await first.stop()
    assert all(map(is_right, await work))
    assert counted(pool, metrics.RETRIES) >= 40


async def test_requests_wait_for_a_worker_that_is_being_restarted(cluster):
    worker = await cluster.worker("a", behaviour=never_answers)
    pool = await cluster.pool(sign_deadline_s=10)
    before = asyncio.ensure_future(sign_many(pool, 3))
    await worker.received(3)
    await worker.stop()
    await until(lambda: not pool.tokens_up())
    after = asyncio.ensure_future(sign_many(pool, 3))
    worker.behaviour = signs
    await worker.start()
    assert all(map(is_right, await before + await after))


async def test_with_no_worker_for_longer_than_a_restart_takes_requests_fail_at_once(cluster):
    await cluster.worker("a", up=False)
    pool = await cluster.pool(wait=False, sign_deadline_s=60)
    waited = asyncio.ensure_future(pool.sign("www", SCHEME, CERTIFICATE_VERIFY))
    with pytest.raises(SignerUnavailable, match="no worker of a is up"):
        await asyncio.wait_for(waited, 20)
    at_once = pool.submit(pool.key("www"), SCHEME, CERTIFICATE_VERIFY)
    assert isinstance(at_once.exception(), SignerUnavailable)
    assert counted(pool, metrics.SHED, "unavailable") == 1


async def test_a_connection_without_hello_is_no_worker(cluster):
    worker = await cluster.worker("a")
    worker.hello_bytes = b""
    pool = await cluster.pool(wait=False)
    await until(lambda: worker.connections)
    with pytest.raises(SignerUnavailable, match="no worker is up of token a"):
        await pool.wait_ready(0.05)
    assert pool.tokens_up() == set()


async def test_fails_at_its_deadline_and_drops_the_late_answer(cluster):
    release = asyncio.Event()
    worker = await cluster.worker("a", behaviour=held_until(release))
    pool = await cluster.pool(sign_deadline_s=20)
    with pytest.raises(DeadlineExceeded):
        await pool.submit(pool.key("www"), SCHEME, CERTIFICATE_VERIFY, monotonic_ns() + 50_000_000)
    assert pool.pending == 0
    release.set()
    worker.behaviour = signs
    assert is_right(await pool.sign("www", SCHEME, CERTIFICATE_VERIFY))


async def test_a_cancelled_request_is_forgotten(cluster):
    release = asyncio.Event()
    worker = await cluster.worker("a", window=2, behaviour=held_until(release))
    pool = await cluster.pool(sign_deadline_s=30)
    futures = [pool.submit(pool.key("www"), SCHEME, CERTIFICATE_VERIFY) for _ in range(3000 // 2)]
    for future in futures:
        future.cancel()
    await until(lambda: pool.pending == 0)
    assert len(pool._dispatcher.waiting) == 0
    release.set()
    assert is_right(await pool.sign("www", SCHEME, CERTIFICATE_VERIFY))
    assert len(worker.requests) == 3


async def test_beyond_max_pending_new_requests_are_refused_at_once(cluster):
    await cluster.worker("a", behaviour=never_answers)
    pool = await cluster.pool(max_pending=5)
    futures = [pool.submit(pool.key("www"), SCHEME, CERTIFICATE_VERIFY) for _ in range(7)]
    assert [isinstance(f.exception() if f.done() else None, Overloaded) for f in futures] == [False] * 5 + [True] * 2
    assert counted(pool, metrics.SHED, "queue_full") == 2
    for future in futures[:5]:
        future.cancel()


@pytest.mark.parametrize(
    "garbage", [b"\xff" * 64, b"\x09\x00\x00\x00" + b"\x00" * 12, b"\x01\x00\x00\x00\x00\x00\x63" + b"\x00" * 9]
)
async def test_garbage_from_a_worker_costs_its_connection_and_no_request(cluster, garbage):
    await cluster.worker("a", behaviour=in_turn(answers_bytes(garbage), signs))
    await cluster.worker("b", behaviour=delayed(0.01))
    pool = await cluster.pool()
    assert all(map(is_right, await sign_many(pool, 10)))
    assert pool.pending == 0


@pytest.mark.parametrize("hello", [b"\xff\xff\xff\xff", b"\x02\x00\x00\x00{}", b"\x05\x00\x00\x00[[[[["])
async def test_a_malformed_hello_is_no_worker(cluster, caplog, hello):
    worker = await cluster.worker("a")
    worker.hello_bytes = hello
    pool = await cluster.pool(wait=False)
    await until(lambda: "token a: a worker broke the protocol" in caplog.text)
    assert pool.tokens_up() == set()
    worker.hello_bytes = FakeWorker(worker.path, {"www": KEY}).hello_bytes
    await pool.wait_ready(10)


async def test_an_error_of_one_token_goes_once_to_each_other_and_then_to_the_caller(cluster):
    first = await cluster.worker("a", behaviour=refuses(Status.RETRY, "CKR_DEVICE_ERROR: the token is on fire"))
    second = await cluster.worker("b")
    pool = await cluster.pool()
    assert all(map(is_right, await sign_many(pool, 4)))
    second.behaviour = refuses(Status.RETRY, "CKR_TOKEN_NOT_PRESENT")
    first_before, second_before = len(first.requests), len(second.requests)
    with pytest.raises(TokenError, match=r"CKR_\w+") as caught:
        await pool.sign("www", SCHEME, CERTIFICATE_VERIFY)
    assert caught.value.retryable
    assert (len(first.requests) - first_before, len(second.requests) - second_before) == (1, 1)


@pytest.mark.parametrize(
    ("status", "reason", "error", "message"),
    [
        (Status.ERROR, "CKR_MECHANISM_INVALID: no PSS", TokenError, "CKR_MECHANISM_INVALID: no PSS"),
        (Status.POLICY, "tls13-length", PolicyRejected, "tls13-length"),
        (Status.EXPIRED, "", DeadlineExceeded, "before the deadline"),
        (Status.ERROR, "A\nB: \x1b[0m", TokenError, r"A\?B: \?\[0m"),
    ],
)
async def test_what_no_other_token_would_change_is_final(cluster, status, reason, error, message):
    await cluster.worker("a", behaviour=refuses(status, reason))
    await cluster.worker("b", behaviour=refuses(status, reason))
    pool = await cluster.pool()
    with pytest.raises(error, match=message):
        await pool.sign("www", SCHEME, CERTIFICATE_VERIFY)
    assert sum(len(worker.requests) for worker in cluster.workers) == 1


@pytest.mark.parametrize(("status", "error"), [(Status.NO_KEY, KeyNotFound), (Status.BUSY, Overloaded)])
async def test_what_only_this_token_lacks_another_is_asked_for(cluster, status, error):
    first = await cluster.worker("a", behaviour=refuses(status))
    second = await cluster.worker("b")
    pool = await cluster.pool()
    assert all(map(is_right, await sign_many(pool, 4)))
    assert first.requests
    second.behaviour = refuses(status)
    with pytest.raises(error):
        await pool.sign("www", SCHEME, CERTIFICATE_VERIFY)


async def test_an_unknown_key_is_refused_at_once(cluster):
    worker = await cluster.worker("a")
    pool = await cluster.pool()
    with pytest.raises(KeyNotFound, match="'nope' is on none of the tokens a"):
        await pool.sign("nope", SCHEME, CERTIFICATE_VERIFY)
    assert not pool.can_sign(pool.key("nope"))
    assert pool.can_sign(pool.key("pkcs11:object=www"))
    assert not worker.requests


async def test_a_worker_whose_key_is_not_the_certificates_key_is_not_used(cluster):
    wrong = await cluster.worker("a", keys={"www": private_key(KeyType.ECDSA_P256, "other")})
    await cluster.worker("b")
    pool = await cluster.pool()
    key = pool.key("www", public_key=public_key_der(KEY.public_key()))
    for _ in range(5):
        assert is_right(await pool.submit(key, SCHEME, CERTIFICATE_VERIFY))
    assert not wrong.requests
    assert counted(pool, metrics.KEY_MISMATCHES, "a") == 1
    assert not pool.can_sign(pool.key("www", ["a"], public_key_der(KEY.public_key())))


async def test_a_hung_token_costs_no_request_and_comes_back_only_after_a_right_canary(cluster, caplog):
    hung = await cluster.worker("a")
    await cluster.worker("b")
    pool = await cluster.pool(sign_deadline_s=5)
    await sign_many(pool, 50)
    hung.behaviour = never_answers
    assert all(map(is_right, await sign_many(pool, 100)))
    assert counted(pool, metrics.CIRCUIT_STATE, "a", "closed") == 0
    assert not pool.can_sign(pool.key("www", ["a"]))
    hung.behaviour = signs_with_another_key
    before = len(hung.requests)
    await until(lambda: len(hung.requests) > before + 1 or pool.can_sign(pool.key("www", ["a"])))
    assert not pool.can_sign(pool.key("www", ["a"]))
    failed = [record for record in caplog.records if "canary failed" in record.getMessage()]
    assert failed[-1].reason == "its signature is wrong"
    hung.behaviour = signs
    await until(lambda: pool.can_sign(pool.key("www", ["a"])))
    assert counted(pool, metrics.CIRCUIT_STATE, "a", "closed") == 1
    before = len(hung.requests)
    await sign_many(pool, 200)
    assert len(hung.requests) > before


async def test_a_lone_token_that_fails_always_is_not_asked_until_it_works_again(cluster, caplog):
    worker = await cluster.worker("a", behaviour=refuses(Status.RETRY, "CKR_DEVICE_ERROR"))
    pool = await cluster.pool()
    changes: list[bool] = []
    pool.on_change.append(lambda: changes.append(pool.can_sign(pool.key("www"))))
    for _ in range(5):
        with pytest.raises(TokenError, match="CKR_DEVICE_ERROR"):
            await pool.sign("www", SCHEME, CERTIFICATE_VERIFY)
    with pytest.raises(SignerUnavailable, match="up and trusted"):
        await pool.sign("www", SCHEME, CERTIFICATE_VERIFY)
    assert len(worker.requests) == 5
    (opened,) = [record for record in caplog.records if record.getMessage() == "token a: circuit open"]
    assert opened.reason == "5 of the last 5 requests failed, the last by: CKR_DEVICE_ERROR"
    worker.behaviour = signs
    await until(lambda: pool.can_sign(pool.key("www")))
    (closed,) = [record for record in caplog.records if record.getMessage() == "token a: circuit closed again"]
    assert closed.open_s >= 0.25
    assert is_right(await pool.sign("www", SCHEME, CERTIFICATE_VERIFY))
    assert changes == [False, True]


async def test_a_slow_answer_is_hedged_within_the_budget(cluster):
    first = await cluster.worker("a")
    await cluster.worker("b")
    pool = await cluster.pool(sign_deadline_s=60)
    for _ in range(10):
        await sign_many(pool, 20)
    release = asyncio.Event()
    first.behaviour = in_turn(held_until(release), signs)
    assert all(map(is_right, await sign_many(pool, 4)))
    assert counted(pool, metrics.HEDGES, "won") == 1
    release.set()
    await until(lambda: pool._tokens["a"].load.in_flight == 0)
    assert pool.pending == 0


async def test_overload_sheds_what_would_be_late_and_serves_the_rest_in_time(cluster):
    """A token of 4 at a time and 10 ms each makes 400 a second; 2,000 in half a second are asked for."""
    worker = await cluster.worker("a", window=8)
    turn = asyncio.Semaphore(4)

    async def in_fours(connection, request):
        async with turn:
            await asyncio.sleep(0.01)
        await signs(connection, request)

    worker.behaviour = in_fours
    pool = await cluster.pool(sign_deadline_s=0.3)
    await sign_many(pool, 40)
    futures = []
    for _ in range(100):
        futures += [pool.submit(pool.key("www"), SCHEME, CERTIFICATE_VERIFY) for _ in range(20)]
        await asyncio.sleep(0.005)
    outcomes = [type(o).__name__ for o in await asyncio.gather(*futures, return_exceptions=True)]
    served, shed = outcomes.count("Signature"), outcomes.count("Overloaded")
    # Without admission some 1,700 would wait until they are late. A machine that stalls makes the prediction wrong for
    # some; what the two figures come to is measured by `python -m perf cluster`.
    assert served + shed > 0.9 * len(outcomes), {name: outcomes.count(name) for name in set(outcomes)}
    assert shed > 1000
    assert len(worker.requests) - 40 <= 1.5 * served


async def test_close_fails_what_is_pending(cluster):
    await cluster.worker("a", behaviour=never_answers)
    pool = await cluster.pool()
    future = pool.submit(pool.key("www"), SCHEME, CERTIFICATE_VERIFY)
    await pool.close()
    assert isinstance(future.exception(), SignerUnavailable)
    with pytest.raises(RuntimeError, match="not open"):
        pool.submit(pool.key("www"), SCHEME, CERTIFICATE_VERIFY)


async def test_misuse_is_named(cluster):
    await cluster.worker("a")
    pool = await cluster.pool()
    with pytest.raises(ValueError, match="expected tokens out of a; got z"):
        pool.key("www", ["z"])
    with pytest.raises(ValueError, match="expected tokens out of a; got none"):
        pool.key("www", [])
    with pytest.raises(ValueError, match="at most 1024 bytes"):
        await pool.sign("www", SCHEME, bytes(1025))
