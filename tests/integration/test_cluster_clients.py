"""Clients of the whole product while its tokens fail: two SoftHSM2 tokens with the same keys, under steady load."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.backends import backend
from tests.fault_module import FaultModule, On
from tests.integration.test_pkcs11_cluster import ERRORS, FAULTS
from tests.integration.test_run_pkcs11 import cluster
from tests.integration.test_supervisor import established, gets_alert, is_ready
from tests.proxy import Proxy, running_proxy
from tests.softhsm import FaultyToken

CLIENTS = 6
LATENCY_S = 0.002


@dataclass
class Site:
    """A running proxy, its tokens, and clients that make one full handshake and one request after the other."""

    proxy: Proxy
    tokens: dict[str, FaultyToken]
    outcomes: Counter[str] = field(default_factory=Counter)

    async def run_client(self) -> None:
        while True:
            outcome = await self._visit()
            self.outcomes[outcome] += 1
            if outcome != "ok":
                await asyncio.sleep(0.01)

    async def _visit(self) -> str:
        try:
            status, body = await self.proxy.get()
        except OSError as error:
            return str(error)
        return "ok" if (status, body) == (200, b"hello") else f"{status} {body!r}"

    async def signed(self, token: str) -> float:
        return await self.proxy.metric("hsm_sign_requests_total", token=token, result="ok")

    async def wait_until_signs(self, token: str) -> None:
        """Wait until the token has made more signatures than it can have had in hand."""
        target = await self.signed(token) + 2 * CLIENTS

        async def reached() -> bool:
            return await self.signed(token) >= target

        await self.proxy.until(reached, f"{token} signs")

    async def wait_until_avoided(self, token: str) -> None:
        async def avoided() -> bool:
            return await self.proxy.metric("hsm_circuit_state", token=token, state="closed") == 0

        await self.proxy.until(avoided, f"the circuit of {token} opens")

    @property
    def faults(self) -> FaultModule:
        return self.tokens["a"].faults


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with backend() as upstream:
        config, tokens = cluster(tmp_path, f"127.0.0.1:{upstream.port}")
        for token in tokens.values():
            token.faults.set_sign_latency(LATENCY_S)
        async with running_proxy(tmp_path, config) as proxy:
            site = Site(proxy, tokens)
            clients = [asyncio.create_task(site.run_client()) for _ in range(CLIENTS)]
            try:
                for name in tokens:
                    await site.wait_until_signs(name)
                yield site
            finally:
                for token in tokens.values():
                    token.faults.recover()
                for client in clients:
                    client.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.gather(*clients)


@pytest.mark.parametrize("fault", FAULTS)
async def test_no_client_sees_a_failed_handshake_while_one_token_is_dead(site: Site, fault: str) -> None:
    inject: Callable[[FaultModule], None] = FAULTS[fault]
    inject(site.faults)
    await site.wait_until_avoided("a")
    await site.wait_until_signs("b")
    site.faults.recover()
    await site.wait_until_signs("a")
    assert set(site.outcomes) == {"ok"}


async def test_no_client_sees_a_failed_handshake_when_an_hsm_worker_is_killed(site: Site) -> None:
    os.kill(site.proxy.hsm_workers[0], signal.SIGKILL)
    await site.proxy.until(lambda: len(site.proxy.hsm_workers) == 2, "the worker replaced")
    for name in site.tokens:
        await site.wait_until_signs(name)
    assert set(site.outcomes) == {"ok"}


async def test_with_both_tokens_dead_clients_get_alerts_at_once_and_it_recovers_by_itself(site: Site) -> None:
    proxy = site.proxy
    async with established(proxy) as request:
        for token in site.tokens.values():
            token.faults.fail(ERRORS["CKR_DEVICE_ERROR"], On.ALL)
        await proxy.until(lambda: is_ready(proxy, 503), "not ready")
        await proxy.until(lambda: gets_alert(proxy), "a handshake refused with an alert")
        assert b"200 OK" in await request(), "an established connection is none of the tokens' business"
        for token in site.tokens.values():
            token.faults.recover()
        await proxy.until(lambda: is_ready(proxy, 200), "ready again")
        for name in site.tokens:
            await site.wait_until_signs(name)
        assert await proxy.get() == (200, b"hello")
        assert b"200 OK" in await request()
    assert await proxy.metric("tlsproxy_worker_restarts_total") == 0
