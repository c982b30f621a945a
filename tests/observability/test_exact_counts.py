"""Counters equal what clients did, exactly: full, resumed, and failed handshakes of every `result`, mixed at random.

`HANDSHAKES=10000` in the environment (make soak) makes more of them.
"""

from __future__ import annotations

import asyncio
import collections
import os
import random
import ssl
from collections.abc import Awaitable, Callable
from time import perf_counter

import pytest

from hsm.errors import DeadlineExceeded, HsmError, Overloaded, PolicyRejected, SignerUnavailable
from hsm.pool_request import Signature
from tests.backends import backend
from tests.dataplane import AUTHORITY, CLIENT_CONTEXT, DataPlane, TlsClient, data_plane, until
from tests.unit.tls.peers import Authority, client_context
from tlsproxy.serve.anatomy import PHASES

HANDSHAKES = int(os.environ.get("HANDSHAKES", "2000"))
TLS12_CONTEXT = client_context(AUTHORITY, tls12=True)
DISTRUSTING_CONTEXT = client_context(Authority())
GET = "GET / HTTP/1.1\nHost: localhost"


class Mix:
    """The kinds of handshakes, each with the labels (result, resumed, tls_version) it is to be counted under."""

    def __init__(self, proxy: DataPlane) -> None:
        self._proxy = proxy
        self._error: HsmError | None = None
        self._sessions: dict[ssl.SSLContext, ssl.SSLSession] = {}
        proxy.pool.answer = self._answer
        self.kinds: dict[Callable[[], Awaitable[None]], tuple[str, str, str]] = {
            lambda: self._full(CLIENT_CONTEXT): ("ok", "false", "TLSv1.3"),
            lambda: self._full(TLS12_CONTEXT): ("ok", "false", "TLSv1.2"),
            lambda: self._resumed(CLIENT_CONTEXT): ("ok", "true", "TLSv1.3"),
            lambda: self._resumed(TLS12_CONTEXT): ("ok", "true", "TLSv1.2"),
            self._closed_by_client: ("client_closed", "false", ""),
            self._refused_by_client: ("tls_alert", "false", ""),
            self._nonsense: ("protocol_error", "false", ""),
            self._silent: ("timeout", "false", ""),
            lambda: self._unsigned(DeadlineExceeded("x")): ("sign_timeout", "false", ""),
            lambda: self._unsigned(Overloaded("x")): ("sign_shed", "false", ""),
            lambda: self._unsigned(SignerUnavailable("x")): ("hsm_unavailable", "false", ""),
            lambda: self._unsigned(PolicyRejected("x")): ("policy_rejected", "false", ""),
        }

    def _answer(self, future: asyncio.Future[Signature], sign: Callable[[], Signature]) -> None:
        """Sign, and tell the truth about how long it took; or fail as told."""
        if self._error is not None:
            future.set_exception(self._error)
            return
        started_s = perf_counter()
        value = sign().value
        future.set_result(Signature(value, "t", 0.0, perf_counter() - started_s))

    async def _open(self, context: ssl.SSLContext, session: ssl.SSLSession | None = None) -> TlsClient:
        client = await self._proxy.open()
        client.tls = type(client.tls)(context, "localhost", session)
        return client

    async def _full(self, context: ssl.SSLContext) -> None:
        client = await self._open(context)
        await client.shake_hands()
        if context not in self._sessions:
            await client.request(GET)
            self._sessions[context] = client.tls.tls.session
        await close(client)

    async def _resumed(self, context: ssl.SSLContext) -> None:
        client = await self._open(context, self._sessions[context])
        await client.shake_hands()
        assert client.tls.tls.session_reused
        await close(client)

    async def _closed_by_client(self) -> None:
        client = await self._open(CLIENT_CONTEXT)
        client.writer.write(client.tls.step()[:100])
        await client.writer.drain()
        client.vanish()

    async def _refused_by_client(self) -> None:
        client = await self._open(DISTRUSTING_CONTEXT)
        with pytest.raises(ssl.SSLCertVerificationError):
            await client.shake_hands()
        client.writer.write(client.tls.pending())
        assert await client.reader.read() == b""

    async def _nonsense(self) -> None:
        client = await self._open(CLIENT_CONTEXT)
        client.writer.write(GET.encode())
        assert await client.reader.read() == b""

    async def _silent(self) -> None:
        await self._open(CLIENT_CONTEXT)

    async def _unsigned(self, error: HsmError) -> None:
        self._error = error
        client = await self._open(CLIENT_CONTEXT)
        with pytest.raises(ssl.SSLError, match=r"(?i)internal.error"):
            await client.shake_hands()
        self._error = None


async def close(client: TlsClient) -> None:
    """Close in order, and wait for the proxy to have done so: it has counted the handshake by then."""
    client.send_close_notify()
    await client.until_end()
    client.vanish()


async def test_counters_equal_what_the_clients_did() -> None:
    async with backend() as app, data_plane(app.port, timeouts={"handshake_s": 1}) as proxy:
        mix = Mix(proxy)
        full, resumed = list(mix.kinds)[:2], list(mix.kinds)[2:4]
        chosen = [*full, *random.Random(1).choices([*full, *full, *resumed, *mix.kinds], k=HANDSHAKES - len(full))]
        for kind in chosen:
            await kind()
        done = collections.Counter(("test", *mix.kinds[kind]) for kind in chosen)
        await until(lambda: sum(proxy.counted("tlsproxy_handshakes_total").values()) == HANDSHAKES)

        assert proxy.counted("tlsproxy_handshakes_total") == done
        assert {("test", *labels) for labels in mix.kinds.values()} == set(
            proxy.counted("tlsproxy_handshakes_total", zeros=True)
        )
        assert proxy.counted("tlsproxy_connections_accepted_total") == {("test",): HANDSHAKES}
        durations = proxy.observed("tlsproxy_handshake_duration_seconds")
        assert {resumed: count for (_, resumed, _), (count, _) in durations.items()} == {
            flag: sum(n for (_, result, resumed, _), n in done.items() if result == "ok" and resumed == flag)
            for flag in ("true", "false")
        }
        negotiated = collections.Counter[tuple[str, bool]]()
        for (tls_version, _, _, scheme), count in proxy.counted("tlsproxy_tls_negotiated_total").items():
            negotiated[tls_version, bool(scheme)] += int(count)
        assert negotiated == {
            (tls_version, resumed == "false"): n
            for (_, result, resumed, tls_version), n in done.items()
            if result == "ok"
        }
        count, total = durations["test", "false", "ecdsa-p256"]
        phases = proxy.observed("tlsproxy_handshake_phase_duration_seconds")
        assert {phase: n for (phase,), (n, _) in phases.items()} == dict.fromkeys(PHASES, count)
        assert sum(seconds for _, seconds in phases.values()) == pytest.approx(total, abs=1e-6)
