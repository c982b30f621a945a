"""mode: tcp."""

from __future__ import annotations

import asyncio

from tests.backends import BackendConnection, backend
from tests.dataplane import big, data_plane, until
from tlsproxy.config import ListenerMode

TCP = ListenerMode.TCP
TOTAL = 100_000_000


async def echo(connection: BackendConnection) -> None:
    while data := await connection.read():
        await connection.send(data)


async def test_bytes_pass_both_ways_and_each_end_ends_its_direction() -> None:
    async with backend(echo) as app, data_plane(app.port, mode=TCP) as proxy:
        client = await proxy.connect()
        body = big(3_000_000)
        sending = asyncio.create_task(client.send(body))
        while len(client.buffer) < len(body):
            assert await client.more()
        await sending
        client.send_close_notify()
        assert await client.until_end() == body
        assert client.end == "close_notify"


async def test_the_back_end_may_end_first() -> None:
    async def speak_then_listen(connection: BackendConnection) -> None:
        await connection.send(b"220 ready\r\n")
        connection.writer.write_eof()
        while await connection.read():
            pass

    async with backend(speak_then_listen) as app, data_plane(app.port, mode=TCP) as proxy:
        client = await proxy.connect()
        assert await client.until_end() == b"220 ready\r\n"
        assert client.end == "close_notify"
        await client.send(b"still here")
        await until(lambda: app.received == b"still here")
        client.send_close_notify()
        await until(lambda: app.connections[0].ended.is_set())


async def test_a_back_end_that_resets_is_not_taken_for_an_orderly_end() -> None:
    async def reset(connection: BackendConnection) -> None:
        await connection.read()
        connection.reset()

    async with backend(reset) as app, data_plane(app.port, mode=TCP) as proxy:
        client = await proxy.connect()
        await client.send(b"x")
        await client.until_end()
        assert client.end in ("fin", "reset")


async def test_a_client_that_resets_ends_the_tunnel() -> None:
    async with backend(echo) as app, data_plane(app.port, mode=TCP) as proxy:
        client = await proxy.connect()
        await client.send(b"x")
        await until(lambda: app.received)
        client.vanish()
        await until(lambda: app.connections[0].ended.is_set())


async def test_an_idle_tunnel_is_closed() -> None:
    async with backend(echo) as app, data_plane(app.port, mode=TCP, timeouts={"tunnel_idle_s": 0.05}) as proxy:
        client = await proxy.connect()
        await client.send(b"x")
        await client.more()
        await asyncio.sleep(0.1)
        proxy.runtime.sweep()
        assert await client.until_end() == b"x"
        assert client.end == "close_notify"


async def test_a_back_end_that_does_not_read_stops_the_client() -> None:
    async def sluggish(connection: BackendConnection) -> None:
        await go.wait()
        await connection.exactly(TOTAL)
        await connection.send(b"done")

    go = asyncio.Event()
    async with backend(sluggish) as app, data_plane(app.port, mode=TCP) as proxy:
        client = await proxy.connect()
        sending = asyncio.create_task(client.send(bytes(TOTAL)))
        (connection,) = proxy.runtime._open
        await until(lambda: connection.is_paused)
        await asyncio.sleep(0.2)
        assert not sending.done()
        go.set()
        await sending
        while client.buffer != b"done":
            assert await client.more()


async def test_a_slow_reader_stops_the_back_end() -> None:
    sent = 0

    async def flood(connection: BackendConnection) -> None:
        nonlocal sent
        while sent < TOTAL:
            await connection.send(bytes(100_000))
            sent += 100_000

    async with backend(flood) as app, data_plane(app.port, mode=TCP) as proxy:
        client = await proxy.connect()
        before = -1
        while sent != before:
            before = sent
            await asyncio.sleep(0.2)
        # Socket buffers hold up to some 40 MB on their own.
        assert 0 < sent < 60_000_000
        received = 0
        while received < TOTAL:
            assert await client.more(), f"{client.end} after {received} bytes"
            received += len(client.buffer)
            client.buffer = b""
        client.send_close_notify()
        await client.until_end()
        assert client.end == "close_notify"
