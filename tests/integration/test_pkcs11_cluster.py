"""One key on two SoftHSM2 tokens, under load, while one token or both do what HSMs do."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hsm.errors import HsmError, SignerUnavailable
from hsm.keys import is_signature_valid, public_key_der
from hsm.launcher import WorkerGroup
from hsm.messages import SignatureScheme
from hsm.pool import Signature, SignerPool, SigningKey
from tests.fault_module import FaultModule, On
from tests.softhsm import FaultyToken
from tests.tokens import CERTIFICATE_VERIFY

P256 = SignatureScheme.ECDSA_SECP256R1_SHA256
CONCURRENCY = 8
LATENCY_S = 0.002

ERRORS = {
    "CKR_FUNCTION_FAILED": 0x06,
    "CKR_DEVICE_ERROR": 0x30,
    "CKR_DEVICE_REMOVED": 0x32,
    "CKR_KEY_HANDLE_INVALID": 0x60,
    "CKR_OBJECT_HANDLE_INVALID": 0x82,
    "CKR_SESSION_CLOSED": 0xB0,
    "CKR_SESSION_HANDLE_INVALID": 0xB3,
    "CKR_TOKEN_NOT_PRESENT": 0xE0,
    "CKR_USER_NOT_LOGGED_IN": 0x101,
    "the inner code of a busy CloudHSM": 0xBB,
    "a code of the vendor's own": 0x80000123,
}
FAULTS: dict[str, Callable[[FaultModule], None]] = {
    **{name: lambda faults, error=error: faults.fail(error, On.ALL) for name, error in ERRORS.items()},  # type: ignore[misc]
    "C_Sign never returns": FaultModule.hang,
}


@dataclass
class Cluster:
    """Two tokens with the same key, their workers, and a pool of both."""

    tokens: dict[str, FaultyToken]
    groups: dict[str, WorkerGroup]
    pool: SignerPool
    key: SigningKey


@dataclass
class Load:
    """Signs all the time, `CONCURRENCY` at once, and keeps account."""

    cluster: Cluster
    signed_by: dict[str, int] = field(default_factory=lambda: {"a": 0, "b": 0})
    failures: list[HsmError] = field(default_factory=list)

    async def wait_for(self, condition: Callable[[], bool]) -> None:
        async def poll() -> None:
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.005)

        await asyncio.wait_for(poll(), 20)

    async def wait_until_signs(self, token: str) -> None:
        """Wait until the token has made more signatures than it can have had in hand."""
        target = self.signed_by[token] + 2 * CONCURRENCY
        await self.wait_for(lambda: self.signed_by[token] >= target)

    async def run(self) -> None:
        public_key = self.cluster.tokens["a"].private_keys["www"].public_key()
        while True:
            try:
                signature: Signature = await self.cluster.pool.sign(self.cluster.key, P256, CERTIFICATE_VERIFY)
            except HsmError as error:
                self.failures.append(error)
                await asyncio.sleep(0.001)
                continue
            assert is_signature_valid(public_key, P256, CERTIFICATE_VERIFY, signature.value)
            self.signed_by[signature.token] += 1


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    tokens = {name: FaultyToken(tmp_path, name=name) for name in ("a", "b")}
    run = str(tmp_path / "run")
    groups = {name: WorkerGroup(token.launchable(sessions=8), run) for name, token in tokens.items()}
    try:
        for name, group in groups.items():
            tokens[name].faults.set_sign_latency(LATENCY_S)
            group.start()
        for group in groups.values():
            await group.wait_ready(30)
        async with SignerPool([group.endpoints for group in groups.values()]) as pool:
            await pool.wait_ready(30)
            public_key = public_key_der(tokens["a"].private_keys["www"].public_key())
            yield Cluster(tokens, groups, pool, pool.key("www", public_key=public_key))
    finally:
        for token in tokens.values():
            token.faults.recover()
        for group in groups.values():
            await group.stop()


@pytest.fixture
async def load(cluster: Cluster) -> AsyncIterator[Load]:
    load = Load(cluster)
    tasks = [asyncio.create_task(load.run()) for _ in range(CONCURRENCY)]
    await load.wait_until_signs("a")
    await load.wait_until_signs("b")
    yield load
    for task in tasks:
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.gather(*tasks)


@pytest.mark.parametrize("fault", FAULTS)
async def test_no_request_fails_when_one_token_does_and_it_is_used_again_when_it_works(load: Load, fault: str) -> None:
    token = load.cluster.tokens["a"]
    pids = load.cluster.groups["a"].pids
    FAULTS[fault](token.faults)
    await load.wait_until_signs("b")
    await load.wait_for(lambda: not load.cluster.pool.can_sign(load.cluster.pool.key("www", ["a"])))
    token.faults.recover()
    await load.wait_until_signs("a")
    assert load.failures == []
    assert load.cluster.groups["a"].pids == pids, "won back without a new process"


async def test_no_request_fails_when_the_sessions_and_the_login_are_lost(load: Load) -> None:
    for _ in range(5):
        load.cluster.tokens["a"].faults.lose_sessions()
        await load.wait_until_signs("a")
    assert load.failures == []


async def test_no_request_fails_when_a_worker_is_killed(load: Load) -> None:
    (pid,) = load.cluster.groups["a"].pids
    os.kill(pid, signal.SIGKILL)
    await load.wait_until_signs("b")
    await load.wait_until_signs("a")
    assert load.failures == []


async def test_requests_fail_at_once_while_both_tokens_are_away_and_succeed_when_they_are_back(load: Load) -> None:
    for token in load.cluster.tokens.values():
        token.faults.fail(ERRORS["CKR_TOKEN_NOT_PRESENT"], On.ALL)
    await load.wait_for(lambda: not load.cluster.pool.can_sign(load.cluster.key))
    with pytest.raises(SignerUnavailable):
        await load.cluster.pool.sign(load.cluster.key, P256, CERTIFICATE_VERIFY)
    for token in load.cluster.tokens.values():
        token.faults.recover()
    await load.wait_until_signs("a")
    await load.wait_until_signs("b")
