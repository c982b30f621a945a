"""How a connection ends: close_notify, end of output, and a bounded wait for the client to do the same."""

from __future__ import annotations

import asyncio

import pytest

from tests.backends import BackendConnection, backend, ok
from tests.dataplane import TlsClient, data_plane, until
from tlsproxy.serve import client as client_module
from tlsproxy.serve.client import Phase


@pytest.fixture(autouse=True)
def _no_end_by_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever these tests wait for must happen by itself."""
    monkeypatch.setattr(client_module, "LINGER_S", 1e9)


async def refused(client: TlsClient) -> None:
    """Have a request refused; read up to the proxy's close_notify."""
    await client.send(b"GET / HTTP/9.9\r\n\r\n")
    assert (await client.response()).status == 400
    await client.until_end()
    assert client.end == "close_notify"


async def test_the_end_of_output_follows_close_notify() -> None:
    async with backend() as app, data_plane(app.port) as proxy:
        client = await proxy.connect()
        await refused(client)
        assert await client.reader.read() == b""
        assert proxy.runtime.connections == 1
        client.writer.write_eof()
        await until(lambda: proxy.runtime.connections == 0)


async def test_what_a_client_still_sends_is_thrown_away_without_a_reset() -> None:
    async with backend() as app, data_plane(app.port) as proxy:
        client = await proxy.connect()
        await refused(client)
        for _ in range(20):
            client.writer.write(bytes(50_000))
            await client.writer.drain()
        client.writer.write_eof()
        assert await client.reader.read() == b""
        await until(lambda: proxy.runtime.connections == 0)


async def test_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "LINGER_S", 0.01)
    async with backend() as app, data_plane(app.port) as proxy:
        client = await proxy.connect()
        await refused(client)
        await asyncio.sleep(0.05)
        proxy.sweep()
        await until(lambda: proxy.runtime.connections == 0)


async def test_a_client_that_has_ended_is_not_waited_for() -> None:
    async with backend() as app, data_plane(app.port) as proxy:
        client = await proxy.connect()
        await client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        client.send_close_notify()
        client.writer.write_eof()
        assert (await client.response()).body == b"hello"
        await until(lambda: proxy.runtime.connections == 0)


async def test_nor_is_one_that_has_said_so_in_tls_alone() -> None:
    async with backend() as app, data_plane(app.port) as proxy:
        client = await proxy.connect()
        await client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        client.send_close_notify()
        assert (await client.response()).body == b"hello"
        await client.until_end()
        assert client.end == "close_notify"
        assert await client.reader.read() == b""
        await until(lambda: proxy.runtime.connections == 0)


async def test_but_what_it_does_not_read_is_not_kept_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "LINGER_S", 0.01)

    async def more_than_the_kernel_takes(upstream: BackendConnection) -> None:
        await upstream.head()
        await upstream.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while not connection._transport.get_write_buffer_size():
            await upstream.send(b"2000\r\n" + bytes(0x2000) + b"\r\n")
            await asyncio.sleep(0)
        await upstream.send(b"0\r\n\r\n")

    async with backend(more_than_the_kernel_takes) as app, data_plane(app.port) as proxy:
        client = await proxy.connect()
        (connection,) = proxy.runtime._open
        await client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        client.send_close_notify()
        await until(lambda: connection.phase is Phase.CLOSED)
        assert proxy.runtime.connections == 1
        await asyncio.sleep(0.05)
        proxy.sweep()
        await until(lambda: proxy.runtime.connections == 0)


async def test_a_client_that_was_not_read_is_read_while_closing() -> None:
    async def slow(connection: BackendConnection) -> None:
        await connection.head()
        await go.wait()
        await connection.send(ok())

    go = asyncio.Event()
    async with backend(slow) as app, data_plane(app.port) as proxy:
        client = await proxy.connect()
        await client.send(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n" + bytes(200_000))
        (connection,) = proxy.runtime._open
        await until(lambda: connection.is_paused)
        go.set()
        assert (await client.response()).body == b"hello"
        client.writer.write_eof()
        await until(lambda: proxy.runtime.connections == 0)


async def test_a_fin_without_close_notify_ends_the_request() -> None:
    async def silent(connection: BackendConnection) -> None:
        while await connection.read():
            pass

    async with backend(silent) as app, data_plane(app.port) as proxy:
        client = await proxy.connect()
        await client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        await until(lambda: app.received)
        client.writer.write_eof()
        await until(lambda: app.connections[0].ended.is_set())
        await until(lambda: proxy.runtime.connections == 0)
