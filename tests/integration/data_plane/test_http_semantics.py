"""Interim responses, Expect, trailers, and turns: what HTTP/1.1 has beside a request and a response."""

from __future__ import annotations

import asyncio

import pytest

from tests.backends import BackendConnection, always, answer_each, backend, ok
from tests.dataplane import data_plane, until
from tlsproxy.serve.exchange import MAX_INTERIM_RESPONSES

HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\n\r\n"
CHUNKED_POST = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"


async def until_received(app: object, end: bytes) -> None:
    await until(lambda: app.received.endswith(end))  # type: ignore[attr-defined]


async def test_a_client_that_expects_100_is_told_by_the_server() -> None:
    async def careful(connection: BackendConnection) -> None:
        assert b"Expect: 100-continue" in await connection.head()
        await go.wait()
        await connection.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        await connection.send(ok(await connection.exactly(5)))

    go = asyncio.Event()
    async with backend(careful) as app, data_plane(app.port) as proxy:
        client = await proxy.connect()
        await client.send(b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
        await until_received(app, b"\r\n\r\n")
        assert client.buffer == b""
        go.set()
        assert (await client.response()).status == 100
        await client.send(b"hello")
        assert (await client.response()).body == b"hello"


async def test_a_server_may_refuse_the_body_that_a_client_announces() -> None:
    async with (
        backend(always(b"HTTP/1.1 417 Expectation Failed\r\nContent-Length: 0\r\n\r\n")) as app,
        data_plane(app.port) as proxy,
    ):
        client = await proxy.connect()
        await client.send(b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
        response = await client.response()
        assert (response.status, response.field("connection")) == (417, "close")
        await client.until_end()
        assert client.end == "close_notify"
        await until(lambda: app.connections[0].ended.is_set())


async def test_early_hints_pass_at_once_but_not_to_http_1_0() -> None:
    async def hint(connection: BackendConnection) -> None:
        while await connection.head():
            await connection.send(HINTS)
            await go.wait()
            await connection.send(ok())

    go = asyncio.Event()
    async with backend(hint) as app, data_plane(app.port) as proxy:
        client = await proxy.connect()
        await client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        hints = await client.response()
        assert (hints.status, hints.field("link")) == (103, "</a.css>; rel=preload")
        go.set()
        assert (await client.response()).status == 200
        assert (await client.request("GET / HTTP/1.0\nHost: a")).status == 200


async def test_a_response_that_is_only_interim_is_504() -> None:
    async def stall(connection: BackendConnection) -> None:
        await connection.head()
        await connection.send(HINTS)
        await connection.read()

    async with backend(stall) as app, data_plane(app.port, upstream_timeouts={"response_s": 0.05}) as proxy:
        client = await proxy.connect()
        await client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await client.response()).status == 103
        await asyncio.sleep(0.1)
        proxy.sweep()
        assert (await client.response()).status == 504


async def test_interim_responses_without_end_are_502() -> None:
    async with backend(always(HINTS * (MAX_INTERIM_RESPONSES + 1))) as app, data_plane(app.port) as proxy:
        client = await proxy.connect()
        await client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await client.response()).status == 502
        assert proxy.counted("tlsproxy_http_rejected_total") == {("too_many_interim_responses",): 1}


async def test_a_request_half_answered_is_not_sent_again() -> None:
    async def hint_and_leave(connection: BackendConnection) -> None:
        await connection.head()
        await connection.send(ok())
        await connection.head()
        await connection.send(HINTS)

    async with backend(hint_and_leave) as app, data_plane(app.port) as proxy:
        client = await proxy.connect()
        assert (await client.request("GET / HTTP/1.1\nHost: a")).status == 200
        assert (await client.request("GET / HTTP/1.1\nHost: a")).status == 103
        assert (await client.response()).status == 502
        assert len(app.connections) == 1


async def test_trailers_go_up() -> None:
    async with backend(always(ok())) as app, data_plane(app.port) as proxy:
        client = await proxy.connect()
        await client.send(CHUNKED_POST.replace(b"Host", b"TE: trailers\r\nTrailer: Digest\r\nHost"))
        await client.send(b"3\r\nabc\r\n0\r\nDigest: x\r\nX-Forwarded-For: 1.2.3.4\r\n\r\n")
        assert (await client.response()).status == 200
        assert b"\r\nTrailer: Digest\r\n" in app.received
        assert b"\r\nConnection: TE\r\nTE: trailers\r\n" in app.received


async def test_trailers_go_both_ways_without_what_belongs_in_a_header() -> None:
    async def echo(connection: BackendConnection) -> None:
        await connection.head()
        while not connection.received.endswith(b"Digest: x\r\n\r\n"):
            await connection.read()
        await connection.send(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: Digest\r\n\r\n"
            b"3\r\nabc\r\n0\r\nSet-Cookie: a=b\r\nDigest: y\r\n\r\n"
        )

    async with backend(echo) as app, data_plane(app.port) as proxy:
        client = await proxy.connect()
        await client.send(CHUNKED_POST + b"3\r\nabc\r\n0\r\nX-Forwarded-For: 1.2.3.4\r\nDigest: x\r\n\r\n")
        while not client.buffer.endswith(b"\r\n0\r\nDigest: y\r\n\r\n"):
            assert await client.more(), client.buffer
        assert b"\r\nTrailer: Digest\r\n" in client.buffer
        assert b"Set-Cookie" not in client.buffer
        assert app.received.endswith(b"3\r\nabc\r\n0\r\nDigest: x\r\n\r\n")


async def test_a_broken_response_of_which_nothing_was_sent_is_502() -> None:
    broken = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nnot a chunk\r\n"
    async with backend(always(broken)) as app, data_plane(app.port) as proxy:
        client = await proxy.connect()
        assert (await client.request("GET / HTTP/1.1\nHost: a")).status == 502


async def test_requests_without_end_that_the_proxy_answers_leave_others_their_turn() -> None:
    async with backend(answer_each) as app, data_plane(app.port, routes=[{"host": "a"}]) as proxy:
        greedy, other = await proxy.connect(), await proxy.connect()
        await greedy.send(b"GET / HTTP/1.1\r\nHost: nowhere\r\n\r\n" * 2000)
        await other.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await other.response()).status == 200
        answered = proxy.counted("tlsproxy_http_requests_total")[("test", "", "GET", "404")]
        assert answered < 2000
        for _ in range(2000):
            assert (await greedy.response()).status == 404


async def read_all_then_answer(connection: BackendConnection) -> None:
    await connection.head()
    while not connection.received.endswith(b"\r\n0\r\n\r\n"):
        if not await connection.read():
            return
    await connection.send(ok())


@pytest.mark.parametrize("end", ["close_notify", "goes on"])
async def test_tiny_chunks_arrive_whole(end: str) -> None:
    async with backend(read_all_then_answer) as app, data_plane(app.port) as proxy:
        client = await proxy.connect()
        await client.send(CHUNKED_POST + b"1\r\nx\r\n" * 20_000 + b"0\r\n\r\n")
        if end == "close_notify":
            client.send_close_notify()
        assert (await client.response()).status == 200
        assert app.received.count(b"x") >= 20_000


async def test_tiny_chunks_that_end_too_early_are_not_passed_off_as_whole() -> None:
    async with backend(read_all_then_answer) as app, data_plane(app.port) as proxy:
        client = await proxy.connect()
        await client.send(CHUNKED_POST + b"1\r\nx\r\n" * 20_000)
        client.send_close_notify()
        await until(lambda: app.connections and app.connections[0].ended.is_set())
        assert not app.received.endswith(b"0\r\n\r\n")


async def test_tiny_chunks_of_a_response_arrive_whole() -> None:
    response = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 20_000 + b"0\r\n\r\n"
    async with backend(always(response)) as app, data_plane(app.port) as proxy:
        client = await proxy.connect()
        for _ in range(2):
            got = await client.request("GET / HTTP/1.1\nHost: a")
            assert (got.body, got.complete) == (b"x" * 20_000, True)
