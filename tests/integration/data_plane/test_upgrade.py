"""Upgrade (RFC 9110 section 7.8): a 101 that was asked for turns the connection into a tunnel, nothing else does."""

from __future__ import annotations

import asyncio

import pytest

from tests.backends import BackendConnection, Handler, always, answer_each, backend
from tests.dataplane import data_plane, until

ASK = b"GET /chat HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nX: y\r\n\r\n"
SWITCH = (
    b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: WebSocket\r\nSec-WebSocket-Accept: y\r\n\r\n"
)


def switching(first: bytes = b"") -> Handler:
    async def handler(connection: BackendConnection) -> None:
        await connection.head()
        await connection.send(SWITCH + first)
        while data := await connection.read():
            await connection.send(data)

    return handler


async def test_bytes_pass_both_ways_after_101() -> None:
    async with backend(switching(b"first")) as app, data_plane(app.port) as proxy:
        client = await proxy.connect()
        await client.send(ASK)
        response = await client.response()
        assert response.status == 101
        assert response.field("connection") == "Upgrade"
        assert response.field("upgrade") == "WebSocket"
        assert response.field("sec-websocket-accept") == "y"
        assert b"\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n" in app.received
        await client.send(b"GET /not-http HTTP/1.1\r\n\r\n")
        while client.buffer != b"firstGET /not-http HTTP/1.1\r\n\r\n":
            assert await client.more()
        assert proxy.counted("tlsproxy_http_requests_total") == {("test", "app", "GET", "101"): 1}
        client.send_close_notify()
        await client.until_end()
        assert client.end == "close_notify"


async def test_what_the_client_sends_before_the_answer_waits_for_it() -> None:
    async with backend(switching()) as app, data_plane(app.port) as proxy:
        client = await proxy.connect()
        await client.send(ASK + b"early")
        assert (await client.response()).status == 101
        while client.buffer != b"early":
            assert await client.more()


async def test_a_server_that_declines_is_asked_the_next_request() -> None:
    async with backend(answer_each) as app, data_plane(app.port) as proxy:
        client = await proxy.connect()
        await client.send(ASK + b"GET /next HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await client.response()).status == 200
        assert (await client.response()).status == 200
        assert b"GET /next HTTP/1.1\r\n" in app.received


@pytest.mark.parametrize(
    "ask",
    [
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: chat\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n\r\n",
    ],
)
async def test_a_101_nobody_asked_for_is_502(ask: bytes) -> None:
    async with backend(always(SWITCH)) as app, data_plane(app.port) as proxy:
        client = await proxy.connect()
        await client.send(ask)
        assert (await client.response()).status == 502
        assert b"h2c" not in app.received
        assert proxy.counted("tlsproxy_http_rejected_total") == {("unexpected_upgrade",): 1}


async def test_a_server_that_ends_first_and_a_client_that_goes_on() -> None:
    async def speak_then_listen(connection: BackendConnection) -> None:
        await connection.head()
        await connection.send(SWITCH + b"bye")
        connection.writer.write_eof()
        while await connection.read():
            pass

    async with backend(speak_then_listen) as app, data_plane(app.port) as proxy:
        client = await proxy.connect()
        await client.send(ASK)
        assert (await client.response()).status == 101
        assert await client.until_end() == b"bye"
        assert client.end == "close_notify"
        await client.send(b"still here")
        await until(lambda: app.received.endswith(b"still here"))
        client.send_close_notify()
        await until(lambda: app.connections[0].ended.is_set())


async def test_an_idle_tunnel_is_closed_by_its_own_timeout() -> None:
    timeouts = {"tunnel_idle_s": 0.05, "idle_s": 60, "header_s": 60}
    async with backend(switching()) as app, data_plane(app.port, timeouts=timeouts) as proxy:
        client = await proxy.connect()
        await client.send(ASK)
        assert (await client.response()).status == 101
        await asyncio.sleep(0.1)
        proxy.sweep()
        await client.until_end()
        assert client.end == "close_notify"
        await until(lambda: app.connections[0].ended.is_set())


async def test_a_tunnel_outlives_the_timeouts_of_requests() -> None:
    timeouts = {"idle_s": 0.05, "header_s": 0.05, "body_idle_s": 0.05}
    async with (
        backend(switching()) as app,
        data_plane(app.port, timeouts=timeouts, upstream_timeouts={"response_s": 0.05}) as proxy,
    ):
        client = await proxy.connect()
        await client.send(ASK)
        assert (await client.response()).status == 101
        await asyncio.sleep(0.1)
        proxy.sweep()
        await client.send(b"x")
        while client.buffer != b"x":
            assert await client.more()


async def test_a_client_that_vanishes_ends_the_tunnel() -> None:
    async with backend(switching()) as app, data_plane(app.port) as proxy:
        client = await proxy.connect()
        await client.send(ASK)
        assert (await client.response()).status == 101
        client.vanish()
        await until(lambda: app.connections[0].ended.is_set())


async def test_a_slow_reader_stops_the_server() -> None:
    total = 100_000_000
    sent = 0

    async def flood(connection: BackendConnection) -> None:
        nonlocal sent
        await connection.head()
        await connection.send(SWITCH)
        while sent < total:
            await connection.send(bytes(100_000))
            sent += 100_000

    async with backend(flood) as app, data_plane(app.port) as proxy:
        client = await proxy.connect()
        await client.send(ASK)
        assert (await client.response()).status == 101
        before = -1
        while sent != before:
            before = sent
            await asyncio.sleep(0.2)
        # Socket buffers hold up to some 40 MB on their own.
        assert 0 < sent < 60_000_000
        received = len(client.buffer)
        while received < total:
            client.buffer = b""
            assert await client.more(), f"{client.end} after {received} bytes"
            received += len(client.buffer)


async def test_draining_leaves_tunnels_alone() -> None:
    async with backend(switching()) as app, data_plane(app.port) as proxy:
        client = await proxy.connect()
        await client.send(ASK)
        assert (await client.response()).status == 101
        proxy.runtime.drain()
        await client.send(b"x")
        while client.buffer != b"x":
            assert await client.more()
