"""HTTP/2 from clients, HTTP/1.1 to the back end (RFC 9113)."""

from __future__ import annotations

import asyncio

import pytest
from h2.errors import ErrorCodes
from h2.settings import SettingCodes

from tests.backends import Backend, BackendConnection, always, backend, ok
from tests.dataplane import DataPlane, big, data_plane, until
from tests.http2_client import CONTEXT, connect
from tests.unit.tls.peers import Client
from tlsproxy.config import HeaderRules, HstsConfig, ListenerMode, RedirectConfig
from tlsproxy.serve import http2_session, http2_stream

HTTP2 = {"http2": True}


async def echo(connection: BackendConnection) -> None:
    """Answer each request with its target and its body."""
    while head := await connection.head():
        body = b""
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                body = await connection.exactly(int(line[15:]))
            elif line == b"transfer-encoding: chunked":
                while size := int((await connection.reader.readline()).strip(), 16):
                    body += (await connection.exactly(size + 2))[:-2]
                connection.received += await connection.reader.readuntil(b"\r\n")
        await connection.send(ok(head.split(b" ")[1] + b" " + body))


async def hang(connection: BackendConnection) -> None:
    """Answer nothing, until the proxy closes."""
    while await connection.read():
        pass


def requests(proxy: DataPlane) -> dict[tuple[str, ...], float]:
    return proxy.counted("tlsproxy_http_requests_total")


def head_of(app: Backend) -> list[bytes]:
    return app.received.partition(b"\r\n\r\n")[0].split(b"\r\n")


async def test_clients_choose_by_alpn() -> None:
    async with backend() as app, data_plane(app.port, listener=HTTP2) as proxy:
        assert (await (await connect(proxy)).get()).body == b"hello"
        old = await proxy.connect()
        assert (await old.request("GET / HTTP/1.1\nHost: localhost")).body == b"hello"
    for options in ({}, {"mode": ListenerMode.TCP}):
        async with backend() as app, data_plane(app.port, **options) as proxy:
            client = await proxy.open()
            client.tls = Client(CONTEXT, "localhost")
            await client.shake_hands()
            assert client.tls.tls.selected_alpn_protocol() != "h2"


async def test_the_back_end_is_asked_in_http_1_1() -> None:
    async with backend() as app, data_plane(app.port, listener=HTTP2) as proxy:
        client = await connect(proxy)
        fields = [(b"user-agent", b"t"), (b"cookie", b"a=1"), (b"cookie", b"b=2"), (b"x-forwarded-for", b"1.1.1.1")]
        response = await client.get("/a?b", fields=fields)
        assert (response.status, response.body, response.fields[1:]) == (200, b"hello", [(b"content-length", b"5")])
        assert head_of(app) == [
            b"GET /a?b HTTP/1.1",
            b"Host: localhost",
            b"user-agent: t",
            b"cookie: a=1; b=2",
            b"X-Forwarded-For: 127.0.0.1",
            b"X-Forwarded-Proto: https",
            b"X-Forwarded-Host: localhost",
            head_of(app)[7],
            b"Via: 2.0 tlsproxy",
        ]
        assert requests(proxy) == {("test", "app", "GET", "200"): 1}


async def test_many_requests_at_once_each_get_their_own_answer() -> None:
    async with backend(echo) as app, data_plane(app.port, listener=HTTP2) as proxy:
        client = await connect(proxy)
        streams = [await client.request(f"/{n}", body=b"%d" % n) for n in range(100)]
        for n, stream in enumerate(streams):
            assert (await client.response(stream)).body == b"/%d %d" % (n, n)
        for n in range(100):
            assert (await client.get(f"/{n}")).body == b"/%d " % n
        assert len(app.connections) <= 100


async def test_a_slow_answer_does_not_hold_up_others() -> None:
    release = asyncio.Event()

    async def app(connection: BackendConnection) -> None:
        while head := await connection.head():
            if head.startswith(b"GET /slow "):
                await release.wait()
            await connection.send(ok())

    async with backend(app) as server, data_plane(server.port, listener=HTTP2) as proxy:
        client = await connect(proxy)
        slow = await client.request("/slow")
        assert (await client.get("/fast")).body == b"hello"
        assert not client.responses[slow].fields
        release.set()
        assert (await client.response(slow)).body == b"hello"


@pytest.mark.parametrize("length", [True, False], ids=["length", "chunked"])
async def test_large_bodies_go_up_and_come_back_untouched(length: bool) -> None:
    body = big(3_000_000)
    fields = [(b"content-length", b"%d" % len(body))] if length else []
    async with backend(echo) as app, data_plane(app.port, listener=HTTP2) as proxy:
        client = await connect(proxy)
        response = await client.get("/", method="PUT", body=body, fields=fields)
        assert response.body == b"/ " + body
        assert (b"Content-Length: 3000000" in head_of(app)) is length
        assert (b"Transfer-Encoding: chunked" in head_of(app)) is not length


async def test_a_response_without_length_and_with_trailers() -> None:
    answer = (
        b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: x-hop\r\nX-Hop: 1\r\nServer: s\r\n\r\n"
        b"5\r\nhello\r\n0\r\nX-Sum: 1\r\nSet-Cookie: a\r\n\r\n"
    )
    async with backend(always(answer)) as app, data_plane(app.port, listener=HTTP2) as proxy:
        response = await (await connect(proxy)).get()
        assert response.interim == [[(b":status", b"103"), (b"link", b"</a>")]]
        assert response.fields == [(b":status", b"200"), (b"server", b"s")]
        assert (response.body, response.trailers) == (b"hello", [(b"x-sum", b"1")])


async def test_trailers_of_a_request_reach_the_back_end() -> None:
    async def app(connection: BackendConnection) -> None:
        await connection.head()
        while not connection.received.endswith(b"x-sum: 1\r\n\r\n"):
            assert await connection.read()
        await connection.send(ok())

    async with backend(app) as server, data_plane(server.port, listener=HTTP2) as proxy:
        client = await connect(proxy)
        stream = await client.request("/", method="POST", fields=[(b"te", b"trailers")], body=b"abc", ended=False)
        client.h2.send_headers(stream, [(b"x-sum", b"1"), (b"host", b"evil")], end_stream=True)
        await client.flush()
        assert (await client.response(stream)).status == 200
        assert server.received.endswith(b"3\r\nabc\r\n0\r\nx-sum: 1\r\n\r\n")
        assert b"TE: trailers" in head_of(server)


@pytest.mark.parametrize(
    ("method", "answer"),
    [
        ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"),
        ("GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n"),
        ("GET", b"HTTP/1.1 204 No Content\r\n\r\n"),
        ("GET", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
    ],
)
async def test_responses_without_a_body(method: str, answer: bytes) -> None:
    async with backend(always(answer)) as app, data_plane(app.port, listener=HTTP2) as proxy:
        client = await connect(proxy)
        for _ in range(2):
            response = await client.get("/", method=method)
            assert (response.complete, response.body, response.status) == (True, b"", int(answer.split(b" ")[1]))
        assert len(app.connections) == 1


@pytest.mark.parametrize("body", [b"", b"abcd"])
async def test_a_body_shorter_than_it_says_never_shares_a_connection(body: bytes) -> None:
    """The server behind would take the next request for the rest of it."""
    async with backend(echo) as app, data_plane(app.port, listener=HTTP2) as proxy:
        client = await connect(proxy)
        fields = [(b"content-length", b"5")]
        stream = await client.request("/", method="POST", fields=fields, body=body, ended=False)
        client.h2.send_headers(stream, [(b"x-sum", b"1")], end_stream=True)
        await client.flush()
        assert (await client.response(stream)).status == 400
        assert (await client.get("/next")).body == b"/next "
        assert not any(
            b"POST" in connection.received and b"GET" in connection.received for connection in app.connections
        )


async def test_a_body_that_ends_with_its_connection_is_complete() -> None:
    answer = b"HTTP/1.1 200 OK\r\n\r\nhello"
    async with backend(always(answer, close=True)) as app, data_plane(app.port, listener=HTTP2) as proxy:
        response = await (await connect(proxy)).get()
        assert (response.complete, response.body) == (True, b"hello")


async def test_a_response_cut_off_is_a_stream_reset() -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhello"
    async with backend(always(answer, close=True)) as app, data_plane(app.port, listener=HTTP2) as proxy:
        client = await connect(proxy)
        response = await client.get()
        assert (response.complete, response.reset) == (False, ErrorCodes.INTERNAL_ERROR)
        assert (await client.get()).status == 200


async def test_the_proxys_own_answers() -> None:
    hsts = HstsConfig(10, False, False)
    routes = [
        {"hsts": hsts},
        {"path": "/old", "upstream": None, "redirect": RedirectConfig("https", "new", None, 308)},
        {"path": "/rules", "response_headers": HeaderRules((("X-Set", "1"),), (), ("Server",))},
    ]
    async with data_plane([], listener=HTTP2, routes=routes) as proxy:
        client = await connect(proxy)
        response = await client.get()
        assert (response.status, response.body) == (503, b"503 Service Unavailable\n")
        assert response.field(b"strict-transport-security") == b"max-age=10"
        response = await client.get("/", method="HEAD")
        assert (response.status, response.body, response.field(b"content-length")) == (503, b"", b"24")
        response = await client.get("/old/a?b", method="POST", body=b"x" * 10)
        assert (response.status, response.field(b"location")) == (308, b"https://new/old/a?b")


async def test_header_rules_apply() -> None:
    answer = b"HTTP/1.1 200 OK\r\nServer: s\r\nContent-Length: 0\r\n\r\n"
    routes = [{"response_headers": HeaderRules((("X-Set", "1"),), (), ("Server",))}]
    async with backend(always(answer)) as app, data_plane(app.port, listener=HTTP2, routes=routes) as proxy:
        response = await (await connect(proxy)).get()
        assert response.fields == [(b":status", b"200"), (b"x-set", b"1"), (b"content-length", b"0")]


@pytest.mark.parametrize("known", [True, False], ids=["length", "chunked"])
async def test_a_body_too_large_is_refused_and_the_connection_goes_on(known: bool) -> None:
    fields = [(b"content-length", b"20000")] if known else []
    async with backend(echo) as app, data_plane(app.port, listener=HTTP2, routes=[{"body_bytes": 10_000}]) as proxy:
        client = await connect(proxy)
        stream = await client.request("/", method="POST", fields=fields, body=big(15_000), ended=False)
        response = await client.response(stream)
        assert (response.status, response.complete) == (413, True)
        await client.send_body(stream, big(5_000))
        assert (await client.get("/a", body=b"b")).body == b"/a b"
        assert response.reset is None


async def test_the_rest_of_a_refused_body_is_taken_for_some_time_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http2_stream, "LINGER_S", 0.1)
    async with backend(echo) as app, data_plane(app.port, listener=HTTP2, routes=[{"body_bytes": 10_000}]) as proxy:
        client = await connect(proxy)
        stream = await client.request("/", method="POST", body=big(15_000), ended=False)
        await client.send_body(stream, big(3_000_000), ended=False)
        response = await client.response(stream)
        assert (response.status, response.complete) == (413, True)
        await asyncio.sleep(0.15)
        proxy.sweep()
        while response.reset is None:
            assert await client.step()
        assert response.reset == ErrorCodes.NO_ERROR
        assert (await client.get("/a", body=b"b")).body == b"/a b"


async def test_an_early_answer_ends_an_upload_and_the_windows_stay_whole() -> None:
    async def refuse(connection: BackendConnection) -> None:
        await connection.head()
        await connection.send(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
        await connection.ended.wait()

    async with backend(refuse) as app, data_plane(app.port, listener=HTTP2) as proxy:
        client = await connect(proxy)
        for _ in range(12):
            stream = await client.request("/", method="POST", body=big(200_000), ended=False)
            assert (await client.response(stream)).status == 403
        assert client.h2.outbound_flow_control_window > 65_535


async def test_a_server_that_does_not_read_holds_up_its_own_upload_only() -> None:
    release = asyncio.Event()

    async def app(connection: BackendConnection) -> None:
        head = await connection.head()
        if head.startswith(b"POST"):
            await release.wait()
            await connection.exactly(30_000_000)
        await connection.send(ok())

    async with backend(app) as server, data_plane(server.port, listener=HTTP2) as proxy:
        client = await connect(proxy)
        fields = [(b"content-length", b"30000000")]
        stream = await client.request("/", method="POST", fields=fields, ended=False)
        upload = asyncio.create_task(client.send_body(stream, bytes(30_000_000)))
        await until(lambda: upload.done() or not client.h2.local_flow_control_window(stream))
        assert not upload.done()
        other = await client.request("/other")
        await until(lambda: client.responses[other].complete)
        release.set()
        await upload
        assert (await client.response(stream)).status == 200


async def test_a_client_that_takes_little_gets_it_all_in_the_end() -> None:
    body = big(600_000)
    async with backend(always(ok(body))) as app, data_plane(app.port, listener=HTTP2) as proxy:
        client = await connect(proxy, window_bytes=1000)
        streams = [await client.request(f"/{n}") for n in range(3)]
        for stream in streams:
            assert (await client.response(stream)).body == body


async def test_the_server_waits_while_the_client_takes_nothing() -> None:
    sent = 0

    async def app(connection: BackendConnection) -> None:
        nonlocal sent
        await connection.head()
        await connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n")
        while sent < 100_000_000:
            await connection.send(bytes(100_000))
            sent += 100_000

    async with backend(app) as server, data_plane(server.port, listener=HTTP2) as proxy:
        client = await connect(proxy, window_bytes=100)
        client.reads = False
        stream = await client.request()
        while len(client.responses[stream].body) < 100:
            assert await client.step()
        before = -1
        while sent != before:
            before = sent
            await asyncio.sleep(0.2)
        assert sent < 50_000_000
        client.h2.reset_stream(stream)
        await client.flush()
        await server.connections[0].ended.wait()


async def test_a_client_that_takes_nothing_is_cut_off(caplog: pytest.LogCaptureFixture) -> None:
    timeouts = {"body_idle_s": 0.2}
    async with (
        backend(always(ok(big(100_000)))) as app,
        data_plane(app.port, listener=HTTP2, timeouts=timeouts) as proxy,
    ):
        client = await connect(proxy, window_bytes=1000)
        client.reads = False
        stream = await client.request()
        while len(client.responses[stream].body) < 1000:
            assert await client.step()
        await asyncio.sleep(0.25)
        proxy.sweep()
        assert (await client.response(stream)).reset == ErrorCodes.CANCEL
        client.reads = True
        client.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 1_000_000})
        assert len((await client.get()).body) == 100_000


async def test_tiny_windows_do_not_put_the_end_off() -> None:
    async with (
        backend(always(ok(big(100_000)))) as app,
        data_plane(app.port, listener=HTTP2, timeouts={"body_idle_s": 0.3}, limits={"body_rate": 10_000}) as proxy,
    ):
        client = await connect(proxy, window_bytes=0)
        stream = await client.request()
        response = client.responses[stream]
        while response.reset is None:
            client.h2.increment_flow_control_window(1, stream)
            await client.flush()
            await asyncio.sleep(0.01)
            proxy.sweep()
            if client.tls.reader._buffer:  # type: ignore[attr-defined]
                assert await client.step()
        assert response.reset == ErrorCodes.CANCEL
        assert len(response.body) < 3000


async def test_a_client_that_lets_its_upload_starve_gets_408() -> None:
    async with (
        backend(echo) as app,
        data_plane(app.port, listener=HTTP2, routes=[{"body_idle_s": 0.2}]) as proxy,
    ):
        client = await connect(proxy)
        stream = await client.request("/", method="POST", body=b"abc", ended=False)
        await until(lambda: app.received.endswith(b"abc\r\n"))
        await asyncio.sleep(0.25)
        proxy.sweep()
        assert (await client.response(stream)).status == 408
        assert (await client.get("/a")).body == b"/a "


async def test_a_stream_that_the_client_resets_lets_its_server_go(caplog: pytest.LogCaptureFixture) -> None:
    async with backend(hang) as app, data_plane(app.port, listener=HTTP2) as proxy:
        client = await connect(proxy)
        stream = await client.request()
        await until(lambda: app.connections)
        client.h2.reset_stream(stream, ErrorCodes.CANCEL)
        await client.flush()
        await until(lambda: requests(proxy))
        assert requests(proxy) == {("test", "app", "GET", "499"): 1}
        assert proxy.runtime.connections == 1


async def test_an_idle_connection_is_closed_in_order() -> None:
    async with backend() as app, data_plane(app.port, listener=HTTP2, timeouts={"idle_s": 0.1}) as proxy:
        client = await connect(proxy)
        await client.get()
        client.h2.ping(b"12345678")
        await client.flush()
        await asyncio.sleep(0.15)
        proxy.sweep()
        assert await client.until_end() == "close_notify"
        assert (client.goaway, client.goaways) == (ErrorCodes.NO_ERROR, [1])


async def test_draining_serves_what_is_under_way_and_what_is_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http2_session, "DRAIN_IDLE_S", 0.1)
    release = asyncio.Event()

    async def app(connection: BackendConnection) -> None:
        while head := await connection.head():
            if head.startswith(b"GET /slow "):
                await release.wait()
            await connection.send(ok())

    async with backend(app) as server, data_plane(server.port, listener=HTTP2) as proxy:
        client = await connect(proxy)
        slow = await client.request("/slow")
        await until(lambda: server.connections)
        proxy.runtime.drain()
        fast = await client.request("/fast")
        assert (await client.response(fast)).status == 200
        while not client.goaways:
            assert await client.step()
        assert (client.goaways, client.goaway) == ([2**31 - 1], ErrorCodes.NO_ERROR)
        release.set()
        assert (await client.response(slow)).status == 200
        await asyncio.sleep(0.15)
        proxy.sweep()
        assert await client.until_end() == "close_notify"
        assert client.goaways == [2**31 - 1, fast]


async def test_a_client_that_says_goodbye_gets_its_answers_first() -> None:
    release = asyncio.Event()

    async def app(connection: BackendConnection) -> None:
        await connection.head()
        await release.wait()
        await connection.send(ok())

    async with backend(app) as server, data_plane(server.port, listener=HTTP2) as proxy:
        client = await connect(proxy)
        stream = await client.request()
        await until(lambda: server.connections)
        await client.tls.send(b"\x00\x00\x08\x07\x00" + bytes(12))
        release.set()
        response = await client.response(stream)
        assert (response.status, response.body) == (200, b"hello")
        assert await client.until_end() == "close_notify"


async def test_close_notify_ends_input_but_not_the_answers() -> None:
    async with backend() as app, data_plane(app.port, listener=HTTP2) as proxy:
        client = await connect(proxy)
        whole = await client.request()
        partial = await client.request("/", method="POST", body=b"abc", ended=False)
        client.tls.send_close_notify()
        await until(lambda: requests(proxy).keys() >= {("test", "app", "GET", "200")})
        await until(lambda: proxy.runtime.connections == 0 or client.tls.reader.at_eof())
        assert requests(proxy)[("test", "app", "GET", "200")] == 1
        assert (whole, partial) == (1, 3)


async def test_nothing_is_left_when_a_client_vanishes_amid_many_streams() -> None:
    async with backend(hang) as app, data_plane(app.port, listener=HTTP2) as proxy:
        client = await connect(proxy)
        for n in range(20):
            await client.request(f"/{n}", method="POST", body=big(1000), ended=n % 2 == 0)
        await until(lambda: len(app.connections) == 20)
        client.tls.vanish()
        await until(lambda: proxy.runtime.connections == 0)
        for connection in app.connections:
            await connection.ended.wait()
        assert requests(proxy) == {("test", "app", "POST", "499"): 20}
