"""Handshakes whose signature comes late, never, or wrong; clients that do not wait for it."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable

import pytest

from hsm.errors import (
    DeadlineExceeded,
    HsmError,
    KeyNotFound,
    Overloaded,
    PolicyRejected,
    SignerUnavailable,
    TokenError,
)
from hsm.pool_request import Signature
from tests.backends import backend
from tests.dataplane import data_plane, until
from tlsproxy.tls.engine import live_jobs

GET = "GET / HTTP/1.1\nHost: localhost"
HANDSHAKES = "tlsproxy_handshakes_total"
Sign = Callable[[], Signature]
Waiting = asyncio.Future[Signature]


def as_long_as_said(future: Waiting, sign: Sign) -> None:
    """Sign no sooner than after the 3 ms that the signature claims to have taken."""
    asyncio.get_running_loop().call_later(0.004, lambda: future.set_result(sign()))


async def test_the_phases_of_a_handshake_add_up_to_its_duration() -> None:
    async with backend() as app, data_plane(app.port) as proxy:
        proxy.pool.answer = as_long_as_said
        await proxy.connect()
        await until(lambda: proxy.counted(HANDSHAKES) == {("test", "ok", "false", "TLSv1.3"): 1})
        ((labels, (count, total)),) = proxy.observed("tlsproxy_handshake_duration_seconds").items()
        assert (labels, count) == (("test", "false", "ecdsa-p256"), 1)
        phases = proxy.observed("tlsproxy_handshake_phase_duration_seconds")
        assert {labels: count for labels, (count, _) in phases.items()} == {
            (name,): 1 for name in ("client_hello", "certificate", "queue", "sign", "client", "finish")
        }
        assert phases["queue",][1] == 0.001
        assert phases["sign",][1] == 0.002
        assert sum(seconds for _, seconds in phases.values()) == pytest.approx(total, abs=1e-9)


async def test_time_spent_waiting_for_the_client_is_a_phase_of_its_own() -> None:
    async with backend() as app, data_plane(app.port) as proxy:
        proxy.pool.answer = as_long_as_said
        client = await proxy.open()
        hello = client.tls.step()
        client.writer.write(hello[:100])
        await asyncio.sleep(0.05)
        client.writer.write(hello[100:])
        answer = await client.reader.read(65536)
        while not client.tls.connected:
            finished = client.tls.step(answer)
            if not client.tls.connected:
                answer = await client.reader.read(65536)
        await asyncio.sleep(0.05)
        client.writer.write(finished)
        await until(lambda: proxy.counted(HANDSHAKES))
        phases = proxy.observed("tlsproxy_handshake_phase_duration_seconds")
        ((_, total),) = proxy.observed("tlsproxy_handshake_duration_seconds").values()
        assert phases["client",][1] >= 0.1
        assert sum(seconds for _, seconds in phases.values()) == pytest.approx(total, abs=1e-9)


async def test_connections_go_on_while_others_wait_for_their_signature() -> None:
    async with backend() as app, data_plane(app.port) as proxy:
        established = await proxy.connect()
        held: list[tuple[Waiting, Sign]] = []
        proxy.pool.answer = lambda future, sign: held.append((future, sign))
        waiting = [asyncio.create_task(proxy.connect()) for _ in range(50)]
        await until(lambda: len(held) == 50)
        for _ in range(20):
            assert (await established.request(GET)).status == 200
        for future, sign in reversed(held):
            future.set_result(sign())
        for client in await asyncio.gather(*waiting):
            assert (await client.request(GET)).status == 200


@pytest.mark.parametrize(
    ("error", "result"),
    [
        (SignerUnavailable("x"), "hsm_unavailable"),
        (KeyNotFound("x"), "hsm_unavailable"),
        (TokenError("CKR_DEVICE_ERROR"), "hsm_unavailable"),
        (DeadlineExceeded("x"), "sign_timeout"),
        (Overloaded("x"), "sign_shed"),
        (PolicyRejected("x"), "policy_rejected"),
    ],
)
async def test_no_signature_is_a_clean_alert(error: HsmError, result: str) -> None:
    async with backend() as app, data_plane(app.port) as proxy:
        proxy.pool.answer = lambda future, _: future.set_exception(error)
        with pytest.raises(ssl.SSLError, match=r"(?i)internal.error"):
            await proxy.connect()
        assert proxy.counted(HANDSHAKES) == {("test", result, "false", ""): 1}


@pytest.mark.parametrize("value", [b"", bytes(500)])
async def test_a_signature_of_an_impossible_length_is_a_clean_alert(value: bytes) -> None:
    async with backend() as app, data_plane(app.port) as proxy:
        proxy.pool.answer = lambda future, _: future.set_result(Signature(value, "t", 0, 0))
        with pytest.raises(ssl.SSLError, match=r"(?i)internal.error"):
            await proxy.connect()
        assert proxy.counted(HANDSHAKES) == {("test", "hsm_unavailable", "false", ""): 1}


async def test_a_wrong_signature_is_what_the_client_refuses() -> None:
    async with backend() as app, data_plane(app.port) as proxy:

        def wrong(future: Waiting, sign: Sign) -> None:
            value = bytearray(sign().value)
            value[-1] ^= 1
            future.set_result(Signature(bytes(value), "t", 0, 0))

        proxy.pool.answer = wrong
        client = await proxy.open()
        with pytest.raises(ssl.SSLError):
            await client.shake_hands()
        client.writer.write(client.tls.pending())
        await until(lambda: proxy.counted(HANDSHAKES))
        assert proxy.counted(HANDSHAKES) == {("test", "tls_alert", "false", ""): 1}


@pytest.mark.parametrize("how", ["reset", "fin", "extra bytes"])
async def test_clients_that_vanish_while_a_signature_is_made_leave_nothing_behind(how: str) -> None:
    async with backend() as app, data_plane(app.port) as proxy:
        proxy.pool.answer = lambda future, sign: None
        clients = []
        for _ in range(100):
            client = await proxy.open()
            client.writer.write(client.tls.step())
            clients.append(client)
        await until(lambda: len(proxy.pool.futures) == 100)
        assert live_jobs() == 100
        for client in clients:
            if how == "fin":
                client.writer.write_eof()
            elif how == "extra bytes":
                client.writer.write(bytes(100_000))
            else:
                client.vanish()
        await until(lambda: proxy.counted(HANDSHAKES))
        await until(lambda: live_jobs() == 0)
        assert all(future.cancelled() for future in proxy.pool.futures)
        await until(lambda: sum(proxy.counted(HANDSHAKES).values()) == 100)


async def test_a_handshake_that_takes_too_long_is_cut_off() -> None:
    async with backend() as app, data_plane(app.port, timeouts={"handshake_s": 0.05}) as proxy:
        proxy.pool.answer = lambda future, sign: None
        silent = await proxy.open()
        waiting = await proxy.open()
        waiting.writer.write(waiting.tls.step())
        await until(lambda: proxy.pool.futures)
        await asyncio.sleep(0.1)
        proxy.runtime.sweep()
        await until(lambda: proxy.runtime.connections == 0)
        await silent.until_end()
        assert proxy.counted(HANDSHAKES) == {("test", "timeout", "false", ""): 2}
        assert proxy.pool.futures[0].cancelled()


@pytest.mark.parametrize(
    ("data", "answer"),
    [
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", b""),
        (b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00", b"\x15"),
    ],
)
async def test_what_is_no_client_hello_is_refused(data: bytes, answer: bytes) -> None:
    async with backend() as app, data_plane(app.port) as proxy:
        client = await proxy.open()
        client.writer.write(data)
        assert (await client.reader.read())[:1] == answer
        assert proxy.counted(HANDSHAKES) == {("test", "protocol_error", "false", ""): 1}
