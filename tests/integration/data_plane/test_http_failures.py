"""What happens when a client, a back end or the signer does not do its part."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
from collections.abc import Iterator

import pytest

from tests.backends import BackendConnection, always, answer_each, backend, ok
from tests.dataplane import big, data_plane, until

GET = "GET / HTTP/1.1\nHost: localhost"
RETRIES = "tlsproxy_upstream_retries_total"


def closed_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])


async def silent(connection: BackendConnection) -> None:
    """Read and say nothing."""
    while await connection.read():
        pass


async def test_no_back_end_is_502_and_the_connection_lives_on() -> None:
    async with data_plane(closed_port()) as proxy:
        client = await proxy.connect()
        for _ in range(2):
            response = await client.request(GET)
            assert (response.status, response.body) == (502, b"502 Bad Gateway\n")
        assert proxy.counted("tlsproxy_upstream_errors_total") == {("app", "connect_failed"): 2}
        assert proxy.counted("tlsproxy_http_requests_total") == {("test", "", "GET", "502"): 2}


async def test_another_server_is_tried_when_one_refuses() -> None:
    async with backend() as app, data_plane([closed_port(), app.port]) as proxy:
        client = await proxy.connect()
        for _ in range(4):
            assert (await client.request(GET)).status == 200


@contextlib.contextmanager
def full_port() -> Iterator[int]:
    """Give a port that neither accepts nor refuses: its backlog is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


async def test_a_server_that_does_not_accept_is_504() -> None:
    with full_port() as port:
        async with data_plane(port, upstream_timeouts={"connect_s": 0.05}) as proxy:
            client = await proxy.connect()
            assert (await client.request(GET)).status == 504
            assert proxy.counted("tlsproxy_upstream_errors_total") == {("app", "connect_timeout"): 1}


async def test_nobody_goes_on_connecting_for_a_client_that_has_left() -> None:
    with full_port() as port:
        async with data_plane(port, upstream_timeouts={"connect_s": 1e6}) as proxy:
            client = await proxy.connect()
            await client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            connecting = {("app", "connecting"): 1}
            await until(lambda: proxy.counted("tlsproxy_upstream_connections") == connecting)
            before = len(asyncio.all_tasks())
            client.vanish()
            await until(lambda: not proxy.counted("tlsproxy_upstream_connections"))
            await until(lambda: len(asyncio.all_tasks()) < before)


async def test_a_back_end_that_does_not_answer_is_504() -> None:
    async with backend(silent) as app, data_plane(app.port, upstream_timeouts={"response_s": 0.05}) as proxy:
        client = await proxy.connect()
        task = asyncio.create_task(client.request(GET))
        await until(lambda: app.received)
        await asyncio.sleep(0.1)
        proxy.sweep()
        response = await task
        assert (response.status, response.body) == (504, b"504 Gateway Timeout\n")
        await until(lambda: app.connections[0].ended.is_set())


@pytest.mark.parametrize(
    "response",
    [
        b"HTTP/1.1 200 OK\nContent-Length: 0\n\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70000,
    ],
)
async def test_a_response_that_breaks_a_rule_is_502(response: bytes) -> None:
    async with backend(always(response)) as app, data_plane(app.port) as proxy:
        client = await proxy.connect()
        assert (await client.request(GET)).status == 502
        assert proxy.counted("tlsproxy_http_rejected_total")
        await until(lambda: app.connections[0].ended.is_set())


@pytest.mark.parametrize("framing", [b"Content-Length: 1000", b"Transfer-Encoding: chunked"])
async def test_a_response_cut_short_never_looks_complete(framing: bytes) -> None:
    async with backend(
        always(b"HTTP/1.1 200 OK\r\n" + framing + b"\r\n\r\n3\r\nabc\r\n", close=True)
    ) as app, data_plane(app.port) as proxy:  # fmt: skip
        client = await proxy.connect()
        response = await client.request(GET)
        assert not response.complete
        assert client.end in ("fin", "reset")


async def test_a_reset_cuts_a_response_that_would_end_with_the_connection() -> None:
    async def reset(connection: BackendConnection) -> None:
        await connection.head()
        await connection.send(b"HTTP/1.1 200 OK\r\n\r\nabc")
        await go.wait()
        connection.reset()

    go = asyncio.Event()
    async with backend(reset) as app, data_plane(app.port) as proxy:
        client = await proxy.connect()
        await client.send(b"GET / HTTP/1.0\r\n\r\n")
        while b"abc" not in client.buffer:
            await client.more()
        go.set()
        await client.until_end()
        assert client.end in ("fin", "reset")


async def test_a_kept_connection_closed_by_the_server_is_not_the_clients_problem() -> None:
    async def one_request(connection: BackendConnection) -> None:
        await connection.head()
        await connection.send(ok())
        if len(app.connections) == 1:
            # The proxy has reused the connection before it can know that it is closed.
            await connection.head()

    async with backend(one_request) as app, data_plane(app.port) as proxy:
        client = await proxy.connect()
        assert (await client.request(GET)).status == 200
        assert (await client.request(GET)).status == 200
        assert proxy.counted(RETRIES) == {("app",): 1}
        assert len(app.connections) == 2


async def closes_at_the_second(connection: BackendConnection) -> None:
    """Answer one request, and close when another has come."""
    await connection.head()
    await connection.send(ok())
    await connection.head()


async def test_a_post_is_never_sent_twice() -> None:
    async with backend(closes_at_the_second) as app, data_plane(app.port) as proxy:
        client = await proxy.connect()
        assert (await client.request(GET)).status == 200
        assert (await client.request("POST / HTTP/1.1\nHost: a\nContent-Length: 0")).status == 502
        assert app.received.count(b"POST") == 1


async def test_a_body_is_never_sent_twice() -> None:
    async with backend(closes_at_the_second) as app, data_plane(app.port) as proxy:
        client = await proxy.connect()
        assert (await client.request(GET)).status == 200
        assert (await client.request("PUT / HTTP/1.1\nHost: a\nContent-Length: 1", b"x")).status == 502
        assert app.received.count(b"PUT") == 1
        assert not proxy.counted(RETRIES)


async def test_an_idle_connection_on_which_the_server_speaks_is_not_used_again() -> None:
    async def talkative(connection: BackendConnection) -> None:
        await connection.head()
        await connection.send(ok())
        if len(app.connections) == 1:
            await go.wait()
            await connection.send(ok(b"smuggled"))
        await connection.head()
        await connection.send(ok())

    go = asyncio.Event()
    async with backend(talkative) as app, data_plane(app.port) as proxy:
        client = await proxy.connect()
        assert (await client.request(GET)).body == b"hello"
        go.set()
        await until(lambda: app.connections[0].ended.is_set())
        assert (await client.request(GET)).body == b"hello"


async def test_a_response_longer_than_it_said_does_not_reach_the_next_request() -> None:
    async with backend(always(ok() + ok(b"smuggled"))) as app, data_plane(app.port) as proxy:
        client = await proxy.connect()
        assert (await client.request(GET)).body == b"hello"
        assert (await client.request(GET)).body == b"hello"
        assert len(app.connections) == 2


async def test_an_early_response_to_a_large_upload_reaches_the_client() -> None:
    async def refuse(connection: BackendConnection) -> None:
        await connection.head()
        await connection.send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno")
        await over.wait()

    over = asyncio.Event()
    async with backend(refuse) as app, data_plane(app.port) as proxy:
        client = await proxy.connect()
        head = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4000000\r\n\r\n"
        sending = asyncio.create_task(client.send(head + bytes(3_000_000)))
        response = await client.response()
        assert (response.status, response.body, response.field("connection")) == (413, b"no", "close")
        await sending
        await client.until_end()
        assert client.end == "close_notify"
        over.set()


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET / HTTP/1.1\nHost: a\n\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"GET /" + b"a" * 9000, 414),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 9000, 431),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1001\r\n\r\n", 413),
        (b"CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n", 400),
        (b"TRACE / HTTP/1.1\r\nHost: a\r\n\r\n", 501),
        (b"\x16\x03\x01\x00\x05hello", 400),
    ],
)
async def test_a_request_that_breaks_a_rule_is_refused_and_nothing_after_it_is_read(head: bytes, status: int) -> None:
    limits = {"header_bytes": 8192, "body_bytes": 1000}
    async with backend() as app, data_plane(app.port, limits=limits) as proxy:
        client = await proxy.connect()
        await client.send(head + b"\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n")
        response = await client.response()
        assert response.status == status
        assert response.field("connection") == "close"
        assert await client.until_end() == b""
        assert client.end == "close_notify"
        assert app.received == b""


async def test_a_chunked_body_over_the_limit_is_413() -> None:
    head = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with backend(silent) as app, data_plane(app.port, limits={"body_bytes": 1000}) as proxy:
        client = await proxy.connect()
        await client.send(head + b"3e8\r\n" + bytes(1000) + b"\r\n")
        await until(lambda: len(app.received) > 1000)
        await client.send(b"1\r\nx\r\n0\r\n\r\n")
        assert (await client.response()).status == 413
        await until(lambda: app.connections[0].ended.is_set())
        assert b"1\r\nx" not in app.received


async def test_a_client_that_leaves_ends_its_upstream_request() -> None:
    async with backend(silent) as app, data_plane(app.port) as proxy:
        client = await proxy.connect()
        await client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        await until(lambda: app.received)
        client.vanish()
        await until(lambda: app.connections[0].ended.is_set())


async def test_an_upload_that_ends_without_its_rest_is_not_passed_off_as_whole() -> None:
    async with backend(silent) as app, data_plane(app.port) as proxy:
        client = await proxy.connect()
        await client.send(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
        await until(lambda: b"abc" in app.received)
        client.send_close_notify()
        await client.until_end()
        await until(lambda: app.connections[0].ended.is_set())
        assert b"0\r\n\r\n" not in app.received


async def test_a_slow_reader_stops_the_back_end_and_then_gets_everything() -> None:
    sent = 0

    async def flood(connection: BackendConnection) -> None:
        nonlocal sent
        await connection.head()
        await connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body))
        for start in range(0, len(body), 100_000):
            await connection.send(body[start : start + 100_000])
            sent = start + 100_000

    body = big(1_000_000) * 100
    async with backend(flood) as app, data_plane(app.port) as proxy:
        client = await proxy.connect()
        await client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        before = -1
        while sent != before:
            before = sent
            await asyncio.sleep(0.2)
        # Socket buffers hold up to some 40 MB on their own.
        assert sent < 60_000_000
        response = await client.response()
        assert response.complete
        assert response.body == body


async def test_a_back_end_that_does_not_read_stops_the_client() -> None:
    async def sluggish(connection: BackendConnection) -> None:
        await connection.head()
        await go.wait()
        await connection.exactly(100_000_000)
        await connection.send(ok())

    go = asyncio.Event()
    async with backend(sluggish) as app, data_plane(app.port) as proxy:
        client = await proxy.connect()
        await client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100000000\r\n\r\n")
        sending = asyncio.create_task(client.send(bytes(100_000_000)))
        await until(lambda: client.writer.transport.get_write_buffer_size() > 0 and not sending.done())
        await asyncio.sleep(0.3)
        assert not sending.done()
        go.set()
        await sending
        assert (await client.response()).body == b"hello"


@pytest.mark.parametrize(
    ("timeout", "data", "status"),
    [
        ("header_s", b"", None),
        ("header_s", b"GET / HTTP/1.1\r\nHos", 408),
        ("body_idle_s", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nabc", 408),
    ],
)
async def test_a_client_that_stops_is_timed_out(timeout: str, data: bytes, status: int | None) -> None:
    async with backend(silent) as app, data_plane(app.port, timeouts={timeout: 0.05}) as proxy:
        client = await proxy.connect()
        if data:
            await client.send(data)
        await asyncio.sleep(0.1)
        proxy.sweep()
        if status is not None:
            assert (await client.response()).status == status
        assert await client.until_end() == b""
        assert client.end == "close_notify"


async def test_idle_connections_on_both_sides_expire() -> None:
    async with (
        backend() as app,
        data_plane(app.port, timeouts={"idle_s": 0.05}, upstream_timeouts={"idle_s": 0.05}) as proxy,
    ):
        client = await proxy.connect()
        assert (await client.request(GET)).status == 200
        await asyncio.sleep(0.1)
        proxy.sweep()
        assert await client.until_end() == b""
        assert client.end == "close_notify"
        await until(lambda: app.connections[0].ended.is_set())


async def flood(connection: BackendConnection) -> None:
    """Answer without end."""
    await connection.head()
    await connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n")
    while True:
        await connection.send(bytes(100_000))


async def test_a_client_that_never_reads_is_cut_off() -> None:
    async with backend(flood) as app, data_plane(app.port, timeouts={"body_idle_s": 0.05}) as proxy:
        client = await proxy.connect()
        await client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        await until(lambda: any(connection.write_paused for connection in proxy.runtime._open))
        for _ in range(3):
            await asyncio.sleep(0.1)
            proxy.sweep()
        await until(lambda: proxy.runtime.connections == 0)
        await until(lambda: app.connections[0].ended.is_set())


async def test_a_client_that_reads_slowly_but_reads_is_not_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    # Deadlines are looked at only when the client has just read.
    monkeypatch.setattr("tlsproxy.serve.listener.SWEEP_S", 1e9)
    async with backend(flood) as app, data_plane(app.port, timeouts={"body_idle_s": 0.05}) as proxy:
        client = await proxy.connect()
        await client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        await until(lambda: any(connection.write_paused for connection in proxy.runtime._open))
        for _ in range(6):
            await asyncio.sleep(0.1)
            # The kernel holds so much more that the transport may have nothing to do for a long time.
            for _ in range(6):
                await client.more()
                client.buffer = b""
            await asyncio.sleep(0.02)
            proxy.sweep()
            assert proxy.runtime.connections == 1


async def test_limits_on_connections_are_counted() -> None:
    async with backend() as app, data_plane(app.port, limits={"connections": 2}) as proxy:
        first, second = await proxy.connect(), await proxy.connect()
        with pytest.raises(ConnectionError):
            await proxy.connect()
        assert proxy.counted("tlsproxy_connections_refused_total") == {("test", "connections"): 1}
        second.vanish()
        await until(lambda: proxy.runtime.connections == 1)
        assert (await (await proxy.connect()).request(GET)).status == 200
        assert (await first.request(GET)).status == 200


async def test_clients_leave_some_descriptors_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    in_use = max(int(name) for name in os.listdir("/proc/self/fd"))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (int((in_use + 12) / 0.75), 1 << 20))
    async with backend() as app, data_plane(app.port) as proxy:
        first = await proxy.connect()
        with contextlib.suppress(ConnectionError):
            for _ in range(in_use + 12):
                await proxy.connect()
        assert proxy.counted("tlsproxy_connections_refused_total") == {("test", "descriptors"): 1}
        assert (await first.request(GET)).status == 200
        for client in proxy.clients[1:]:
            client.vanish()
        await until(lambda: proxy.runtime.connections == 1)
        assert (await (await proxy.connect()).request(GET)).status == 200


@pytest.mark.parametrize("limit", ["connections_per_client", "handshakes"])
async def test_other_limits(limit: str) -> None:
    async with backend(answer_each) as app, data_plane(app.port, limits={limit: 1}) as proxy:
        waiting = await proxy.open()
        await until(lambda: proxy.runtime.connections == 1)
        with pytest.raises(ConnectionError):
            await proxy.connect()
        assert proxy.counted("tlsproxy_connections_refused_total") == {("test", limit): 1}
        with contextlib.suppress(ConnectionError):
            await waiting.shake_hands()
        assert (await waiting.request(GET)).status == 200
        waiting.vanish()
        await until(lambda: proxy.runtime.connections == 0)
        assert (await (await proxy.connect()).request(GET)).status == 200
