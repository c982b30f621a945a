"""What routes and listeners are configured to do with requests: redirects, header rules, limits, whom to believe."""

from __future__ import annotations

import asyncio
import ipaddress

from tests.backends import BackendConnection, always, backend, ok
from tests.dataplane import data_plane, until
from tlsproxy.config import HeaderRules, HstsConfig, ListenerMode, RedirectConfig

REDIRECT = {"upstream": None, "redirect": RedirectConfig("https", None, None, 301)}
LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"),)


async def test_a_plain_listener_sends_clients_to_https() -> None:
    async with data_plane(1, tls=False, routes=[REDIRECT]) as running:
        client = await running.connect_plain()
        for _ in range(2):
            response = await client.request("GET /a?b=c HTTP/1.1\nHost: www.example.com:8080")
            assert (response.status, response.body) == (301, b"")
            assert response.field("location") == "https://www.example.com/a?b=c"
        await client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n")
        response = await client.response()
        assert (response.status, response.field("connection")) == (301, "close")
        await client.until_end()
        assert running.counted("tlsproxy_http_requests_total") == {
            ("test", "", "GET", "301"): 2,
            ("test", "", "POST", "301"): 1,
        }
        assert not running.counted("tlsproxy_handshakes_in_flight")


async def test_a_redirect_to_nowhere_is_a_bad_request() -> None:
    async with data_plane(1, tls=False, routes=[REDIRECT]) as running:
        response = await (await running.connect_plain()).request("GET / HTTP/1.0")
        assert response.status == 400


async def test_a_path_that_a_server_may_read_as_another_routes_never_reaches_one() -> None:
    async with backend() as server, data_plane(server.port, routes=[{}, {**REDIRECT, "path": "/admin"}]) as running:
        for target in ("/x/..;/admin", "/admin/../x"):
            response = await (await running.connect()).request(f"GET {target} HTTP/1.1\nHost: a")
            assert (response.status, response.field("connection")) == (400, "close")
        assert server.received == b""
        assert running.counted("tlsproxy_http_rejected_total") == {("ambiguous_path",): 2}
        assert (await (await running.connect()).request("GET /x HTTP/1.1\nHost: a")).status == 200


async def test_a_redirect_has_the_routes_header_fields() -> None:
    rules = HeaderRules((("X-Set", "1"),), (), ())
    route = {**REDIRECT, "response_headers": rules, "hsts": HstsConfig(60, False, False)}
    async with data_plane(1, routes=[route]) as running:
        response = await (await running.connect()).request("GET / HTTP/1.1\nHost: a")
        assert (response.field("x-set"), response.field("strict-transport-security")) == ("1", "max-age=60")


async def test_a_plain_listener_can_proxy_too() -> None:
    async with backend() as server, data_plane(server.port, tls=False) as running:
        client = await running.connect_plain()
        assert (await client.request("GET / HTTP/1.1\nHost: a")).body == b"hello"
        assert b"\r\nX-Forwarded-Proto: http\r\n" in server.received


async def test_a_plain_client_that_says_it_sends_no_more_still_gets_its_answer() -> None:
    async with backend() as server, data_plane(server.port, tls=False) as running:
        client = await running.connect_plain()
        await client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        client.writer.write_eof()
        assert (await client.response()).body == b"hello"
        assert await client.until_end() == b""


async def test_a_plain_tunnel_passes_both_directions_and_their_ends() -> None:
    async def echo_backwards(connection: BackendConnection) -> None:
        while await connection.read():
            pass
        await connection.send(bytes(connection.received)[::-1])

    async with (
        backend(echo_backwards) as server,
        data_plane(server.port, tls=False, mode=ListenerMode.TCP) as running,
    ):
        client = await running.connect_plain()
        await client.send(b"abc")
        client.writer.write_eof()
        assert await client.until_end() == b"cba"


async def test_header_rules_are_obeyed_in_both_directions() -> None:
    route = {
        "request_headers": HeaderRules((("Host", "inside"), ("X-Set", "new")), (("X-Add", "2"),), ("Cookie",)),
        "response_headers": HeaderRules((("Server", "s"),), (("X-Add", "3"),), ("X-Powered-By",)),
    }
    answer = b"HTTP/1.1 200 OK\r\nServer: x\r\nX-Powered-By: y\r\nContent-Length: 0\r\n\r\n"
    async with backend(always(answer)) as server, data_plane(server.port, routes=[route]) as running:
        response = await (await running.connect()).request("GET / HTTP/1.1\nHost: a\nX-Set: old\nCookie: c")
        assert (response.field("server"), response.field("x-add")) == ("s", "3")
        assert response.field("x-powered-by") is None
        head = server.received
        assert b"\r\nHost: inside\r\n" in head
        assert b"\r\nX-Set: new\r\nX-Add: 2\r\n" in head
        assert b"old" not in head
        assert b"Cookie" not in head


async def test_hsts_is_sent_with_answers_and_errors_alike() -> None:
    async with backend() as server:
        routes = [
            {"hsts": HstsConfig(31536000, True, False)},
            {"path": "/dead", "upstream": "dead", "hsts": HstsConfig(31536000, True, False)},
        ]
        async with data_plane({"app": [server.port], "dead": [1]}, routes=routes) as running:
            client = await running.connect()
            for path, status in (("/", 200), ("/dead", 502)):
                response = await client.request(f"GET {path} HTTP/1.1\nHost: a")
                assert response.status == status
                assert response.field("strict-transport-security") == "max-age=31536000; includeSubDomains"


async def test_limits_and_timeouts_of_a_route_override_the_listeners() -> None:
    async with backend(silent) as server, backend(always(ok())) as quick:
        routes = [
            {"path": "/upload", "body_bytes": 0},
            {"path": "/slow", "upstream": "silent", "response_s": 0.0},
            {"path": "/trickle", "upstream": "silent", "body_idle_s": 0.0, "body_bytes": 0},
        ]
        ports = {"app": [quick.port], "silent": [server.port]}
        async with data_plane(ports, routes=[{}, *routes], limits={"body_bytes": 4}) as running:
            client = await running.connect()
            assert (await client.request("POST / HTTP/1.1\nHost: a\nContent-Length: 5", b"12345")).status == 413
            client = await running.connect()
            await client.send(b"POST /upload HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n")
            assert (await client.response()).status == 200
            client = await running.connect()
            await client.send(b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n")
            await until(lambda: server.connections and server.connections[0].received)
            running.sweep()
            assert (await client.response()).status == 504
            client = await running.connect()
            await client.send(b"POST /trickle HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n1")
            await until(lambda: len(server.connections) == 2 and server.connections[1].received.endswith(b"1"))
            running.sweep()
            assert (await client.response()).status == 408


async def silent(connection: BackendConnection) -> None:
    await connection.head()
    while await connection.read():
        pass


async def test_a_body_that_trickles_is_cut_off_though_it_never_pauses() -> None:
    async with (
        backend(silent) as server,
        data_plane(server.port, timeouts={"body_idle_s": 0.3}, limits={"body_rate": 1 << 20}) as running,
    ):
        client = await running.connect()
        await client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n")
        answer = asyncio.create_task(client.response())
        while not answer.done():
            await client.send(b"x")
            await asyncio.sleep(0.02)
            running.sweep()
        assert answer.result().status == 408
        assert running.counted("tlsproxy_http_rejected_total") == {("body_timeout",): 1}


async def test_only_a_trusted_proxy_is_believed() -> None:
    head = "GET / HTTP/1.1\nHost: a\nX-Forwarded-For: 198.51.100.1\nX-Forwarded-Proto: ftp\nX-Request-ID: theirs"
    for listener, expected in [
        ({}, b"X-Forwarded-For: 127.0.0.1\r\nX-Forwarded-Proto: https\r\n"),
        (
            {"trusted_proxies": LOOPBACK},
            b"198.51.100.1, 127.0.0.1\r\nX-Forwarded-Proto: ftp\r\nX-Forwarded-Host: a\r\nX-Request-ID: theirs\r\n",
        ),
        ({"forwarded": True}, b"\r\nForwarded: for=127.0.0.1;host=a;proto=https\r\n"),
    ]:
        async with backend() as server, data_plane(server.port, listener=listener) as running:
            assert (await (await running.connect()).request(head)).status == 200
            assert expected in server.received
