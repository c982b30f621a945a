"""Requests through TLS to a back end and back."""

from __future__ import annotations

import asyncio

import pytest

from tests.backends import BackendConnection, always, answer_each, backend, ok
from tests.dataplane import big, data_plane, until
from tlsproxy.config import Balance

GET = "GET / HTTP/1.1\nHost: localhost"


async def test_a_request_reaches_the_back_end_and_its_response_the_client() -> None:
    async with backend() as app, data_plane(app.port) as proxy:
        client = await proxy.connect()
        response = await client.request("GET /a?b HTTP/1.1\nHost: localhost:8443\nX-Mine: 1\nConnection: x-mine")
        assert (response.status, response.body) == (200, b"hello")
        lines = app.received.split(b"\r\n")
        assert lines[:2] == [b"GET /a?b HTTP/1.1", b"Host: localhost:8443"]
        assert b"X-Forwarded-For: 127.0.0.1" in lines
        assert b"X-Forwarded-Proto: https" in lines
        assert not any(b"X-Mine" in line for line in lines)


async def test_one_upstream_connection_serves_many_requests_of_many_clients() -> None:
    async with backend() as app, data_plane(app.port) as proxy:
        for _ in range(3):
            client = await proxy.connect()
            for _ in range(3):
                assert (await client.request(GET)).body == b"hello"
            client.vanish()
        assert len(app.connections) == 1
        assert app.received.count(b"GET / HTTP/1.1") == 9
        assert proxy.counted("tlsproxy_http_requests_total") == {("test", "app", "GET", "200"): 9}
        ids = [line for line in app.received.split(b"\r\n") if line.startswith(b"X-Request-ID")]
        assert len(set(ids)) == 9


async def test_pipelined_requests_are_answered_in_order() -> None:
    async def echo_target(connection: BackendConnection) -> None:
        while head := await connection.head():
            await connection.send(ok(head.split(b" ")[1]))

    async with backend(echo_target) as app, data_plane(app.port) as proxy:
        client = await proxy.connect()
        filler = b"x" * 1000
        requests = [b"GET /%d HTTP/1.1\r\nHost: a\r\nX: %b\r\n\r\n" % (n, filler) for n in range(1000)]
        sending = asyncio.create_task(client.send(b"".join(requests)))
        for n in range(1000):
            assert (await client.response()).body == b"/%d" % n
        await sending


@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_a_large_body_goes_up_and_comes_back_untouched(framing: str) -> None:
    async def echo(connection: BackendConnection) -> None:
        head = await connection.head()
        if b"Transfer-Encoding: chunked" in head:
            await connection.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            data = b""
            while not data.endswith(b"0\r\n\r\n"):
                data = data[-8:] if len(data) > 8 else data
                new = await connection.read()
                await connection.send(new)
                data += new
        else:
            await connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5000000\r\n\r\n")
            left = 5000000
            while left:
                data = await connection.read()
                left -= len(data)
                await connection.send(data)

    body = big(5_000_000)
    async with backend(echo) as app, data_plane(app.port) as proxy:
        client = await proxy.connect()
        if framing == "length":
            head, sent = b"Content-Length: 5000000", body
        else:
            head = b"Transfer-Encoding: chunked"
            pieces = [body[start : start + 70_001] for start in range(0, len(body), 70_001)]
            sent = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
        sending = asyncio.create_task(client.send(b"POST / HTTP/1.1\r\nHost: a\r\n" + head + b"\r\n\r\n" + sent))
        response = await client.response()
        await sending
        assert response.complete
        assert response.body == body


async def test_a_chunked_response_is_chunked_again() -> None:
    async def chunks(connection: BackendConnection) -> None:
        await connection.head()
        await connection.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n")
        await connection.send(b"2\r\nde\r\n0\r\nTrailer: x\r\n\r\n")

    async with backend(chunks) as app, data_plane(app.port) as proxy:
        client = await proxy.connect()
        response = await client.request(GET)
        assert (response.body, response.complete) == (b"abcde", True)
        assert response.field("transfer-encoding") == "chunked"


async def test_http_1_0_clients_get_no_chunks() -> None:
    response = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    async with backend(always(response)) as app, data_plane(app.port) as proxy:
        client = await proxy.connect()
        answer = await client.request("GET / HTTP/1.0\nConnection: keep-alive")
        assert answer.body == b"abc"
        assert answer.field("transfer-encoding") is None
        assert answer.field("connection") == "close"
        assert client.end == "close_notify"


async def test_a_response_until_close_becomes_chunked() -> None:
    async with backend(always(b"HTTP/1.1 200 OK\r\n\r\nabc", close=True)) as app, data_plane(app.port) as proxy:
        client = await proxy.connect()
        response = await client.request(GET)
        assert (response.body, response.complete) == (b"abc", True)
        assert (await client.request(GET)).body == b"abc"
        assert len(app.connections) == 2


async def test_head_and_not_modified_have_no_body() -> None:
    async def handler(connection: BackendConnection) -> None:
        while head := await connection.head():
            status = b"304 Not Modified" if b"/304" in head else b"204 No Content" if b"/204" in head else b"200 OK"
            length = b"" if b"/204" in head else b"Content-Length: 5\r\n"
            await connection.send(b"HTTP/1.1 " + status + b"\r\n" + length + b"\r\n")

    async with backend(handler) as app, data_plane(app.port) as proxy:
        client = await proxy.connect()
        for _ in range(2):
            response = await client.request("HEAD / HTTP/1.1\nHost: a", method="HEAD")
            assert (response.status, response.field("content-length")) == (200, "5")
            assert (await client.request("GET /304 HTTP/1.1\nHost: a")).status == 304
            assert (await client.request("GET /204 HTTP/1.1\nHost: a")).status == 204
        assert len(app.connections) == 1


async def test_interim_responses_pass() -> None:
    async def continue_then_answer(connection: BackendConnection) -> None:
        await connection.head()
        await connection.send(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n")
        assert await connection.exactly(4) == b"body"
        await connection.send(ok())

    async with backend(continue_then_answer) as app, data_plane(app.port) as proxy:
        client = await proxy.connect()
        hints = await client.request("POST / HTTP/1.1\nHost: a\nContent-Length: 4\nExpect: 100-continue")
        assert (hints.status, hints.field("link")) == (103, "</a>")
        assert (await client.response()).status == 100
        await client.send(b"body")
        assert (await client.response()).body == b"hello"


async def test_requests_go_where_their_route_says() -> None:
    async with (
        backend(always(ok(b"one"))) as one,
        backend(always(ok(b"two"))) as two,
        data_plane(
            {"one": [one.port], "two": [two.port]},
            routes=[
                {"upstream": "one"},
                {"host": "b.example", "upstream": "two"},
                {"path": "/two", "upstream": "two"},
                {"host": "c.example", "path": "/x", "upstream": "one"},
            ],
        ) as proxy,
    ):
        client = await proxy.connect()
        assert (await client.request("GET / HTTP/1.1\nHost: a")).body == b"one"
        assert (await client.request("GET / HTTP/1.1\nHost: B.example:8443")).body == b"two"
        assert (await client.request("GET /%74wo HTTP/1.1\nHost: a")).body == b"two"
        missing = await client.request("GET / HTTP/1.1\nHost: c.example")
        assert (missing.status, missing.body) == (404, b"404 Not Found\n")
        assert (await client.request("GET /x HTTP/1.1\nHost: c.example")).body == b"one"


async def test_servers_take_turns() -> None:
    async with (
        backend(always(ok(b"1"))) as one,
        backend(always(ok(b"2"))) as two,
        data_plane([one.port, two.port]) as proxy,
    ):
        client = await proxy.connect()
        answers = [(await client.request(GET)).body for _ in range(6)]
        assert sorted(answers) == [b"1"] * 3 + [b"2"] * 3


async def test_the_server_with_fewer_requests_under_way_is_asked() -> None:
    async def slow(connection: BackendConnection) -> None:
        while await connection.head():
            await waiting.wait()
            await connection.send(ok(b"slow"))

    waiting = asyncio.Event()
    async with (
        backend(slow) as one,
        backend(always(ok(b"fast"))) as two,
        data_plane([one.port, two.port], upstream={"balance": Balance.LEAST_CONNECTIONS}) as proxy,
    ):
        first, second = await proxy.connect(), await proxy.connect()

        def slow_has_one() -> bool:
            return bool(one.received)

        # Ties are broken in turn: of two requests one after the other the slow server gets the first or the second.
        busy = asyncio.create_task(first.request(GET))
        await until(lambda: slow_has_one() or busy.done())
        if not slow_has_one():
            busy = asyncio.create_task(first.request(GET))
            await until(slow_has_one)
        for _ in range(5):
            assert (await second.request(GET)).body == b"fast"
        waiting.set()
        assert (await busy).body == b"slow"


async def test_no_more_connections_are_kept_than_configured() -> None:
    async def slow(connection: BackendConnection) -> None:
        while await connection.head():
            await waiting.wait()
            await connection.send(ok())

    waiting = asyncio.Event()
    async with backend(slow) as app, data_plane(app.port, upstream={"keepalive": 1}) as proxy:
        clients = [await proxy.connect() for _ in range(3)]
        requests = [asyncio.create_task(client.request(GET)) for client in clients]
        await until(lambda: app.received.count(b"GET") == 3)
        assert proxy.counted("tlsproxy_upstream_connections") == {("app", "active"): 3}
        waiting.set()
        await asyncio.gather(*requests)
        await until(lambda: proxy.counted("tlsproxy_upstream_connections") == {("app", "idle"): 1})


async def test_close_notify_after_a_request_still_gets_the_answer() -> None:
    waiting = asyncio.Event()

    async def slow(connection: BackendConnection) -> None:
        await connection.head()
        await waiting.wait()
        await connection.send(ok())

    async with backend(slow) as app, data_plane(app.port) as proxy:
        client = await proxy.connect()
        await client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        client.send_close_notify()
        client.writer.write_eof()
        await until(lambda: app.received)
        waiting.set()
        assert (await client.response()).body == b"hello"
        assert await client.until_end() == b""
        assert client.end == "close_notify"


async def test_a_client_that_asks_to_close_is_closed() -> None:
    async with backend() as app, data_plane(app.port) as proxy:
        client = await proxy.connect()
        response = await client.request("GET / HTTP/1.1\nHost: a\nConnection: close")
        assert response.field("connection") == "close"
        assert await client.until_end() == b""
        assert client.end == "close_notify"


async def test_draining_ends_idle_connections_and_lets_requests_finish() -> None:
    waiting = asyncio.Event()

    async def slow(connection: BackendConnection) -> None:
        await connection.head()
        await waiting.wait()
        await connection.send(ok())

    async with backend(slow) as app, data_plane(app.port, timeouts={"header_s": 1e9}) as proxy:
        idle, busy = await proxy.connect(), await proxy.connect()
        await busy.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        await until(lambda: app.received)
        proxy.runtime.drain()
        assert await idle.until_end() == b""
        assert idle.end == "close_notify"
        waiting.set()
        response = await busy.response()
        assert (response.body, response.field("connection")) == (b"hello", "close")
        assert await busy.until_end() == b""


async def test_answers_each_is_what_the_other_tests_think() -> None:
    async with backend(answer_each) as app, data_plane(app.port) as proxy:
        client = await proxy.connect()
        assert (await client.request("OPTIONS * HTTP/1.1\nHost: a")).body == b"hello"
        assert app.received.startswith(b"OPTIONS * HTTP/1.1\r\n")
