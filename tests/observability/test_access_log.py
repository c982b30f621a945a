from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from hsm.messages import KeyType
from tests.backends import BackendConnection, always, backend, ok
from tests.proxy import Proxy, make_site, running_proxy, site_config

KEYS = {"www": KeyType.ECDSA_P256}


@contextlib.asynccontextmanager
async def asking(proxy: Proxy, request: bytes) -> AsyncIterator[asyncio.StreamReader]:
    """Send a request; the client leaves when the context ends, with or without the response."""
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", proxy.port, ssl=proxy.client_context(), server_hostname="localhost"
    )
    try:
        writer.write(request)
        yield reader
    finally:
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def logged(proxy: Proxy, requests: int = 1) -> list[dict[str, Any]]:
    """Wait for the lines of so many requests."""

    def lines() -> list[dict[str, Any]]:
        return [json.loads(line) for line in proxy.log.splitlines() if '"event": "request"' in line]

    await proxy.until(lambda: len(lines()) == requests, f"{requests} requests in the log")
    return lines()


async def test_a_client_that_leaves_before_its_response_is_a_499(tmp_path: Path) -> None:
    make_site(tmp_path, KEYS)

    async def say_nothing(connection: BackendConnection) -> None:
        await connection.head()
        await connection.read()

    async with contextlib.AsyncExitStack() as stack:
        app = await stack.enter_async_context(backend(say_nothing))
        config = site_config(tmp_path, KEYS, f"127.0.0.1:{app.port}")
        proxy = await stack.enter_async_context(running_proxy(tmp_path, config))
        async with asking(proxy, b"GET /slow HTTP/1.1\r\nHost: localhost\r\n\r\n"):
            await proxy.until(lambda: b"/slow" in app.received, "the request at the server")
        (line,) = await logged(proxy)
        assert await proxy.metric("tlsproxy_http_requests_total", upstream="app", code="499") == 1
    assert (line["status"], line["reason"], line["upstream"]) == (499, "client_closed", "app")
    assert line["server"] == f"127.0.0.1:{app.port}"


async def test_a_response_that_is_cut_off_says_by_whom(tmp_path: Path) -> None:
    make_site(tmp_path, KEYS)

    async def give_half(connection: BackendConnection) -> None:
        head = await connection.head()
        await connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
        if b"/waits" in head:
            await connection.read()

    async with contextlib.AsyncExitStack() as stack:
        app = await stack.enter_async_context(backend(give_half))
        config = site_config(tmp_path, KEYS, f"127.0.0.1:{app.port}")
        proxy = await stack.enter_async_context(running_proxy(tmp_path, config))
        async with asking(proxy, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"):
            (by_server,) = await logged(proxy)
        async with asking(proxy, b"GET /waits HTTP/1.1\r\nHost: localhost\r\n\r\n") as reader:
            await reader.readuntil(b"half")
        by_client = (await logged(proxy, 2))[1]
    assert (by_server["status"], by_server["reason"]) == (200, "truncated_body")
    assert (by_client["status"], by_client["reason"]) == (200, "client_closed")


async def test_a_line_has_the_request_id_that_the_server_has_too(tmp_path: Path) -> None:
    make_site(tmp_path, KEYS)
    async with backend(always(ok())) as app:
        config = site_config(tmp_path, KEYS, f"127.0.0.1:{app.port}")
        request = b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Request-ID: of-the-client\r\n\r\n"
        async with running_proxy(tmp_path, config) as proxy, asking(proxy, request):
            (line,) = await logged(proxy)
    said = re.findall(rb"X-Request-ID: (\S+)", app.received)
    assert [line["request_id"].encode()] == said
    assert "reason" not in line
    assert "of-the-client" not in line["request_id"]


async def test_what_a_trusted_proxy_calls_a_request_is_what_the_line_calls_it(tmp_path: Path) -> None:
    make_site(tmp_path, KEYS)
    async with backend(always(ok())) as app:
        config = site_config(tmp_path, KEYS, f"127.0.0.1:{app.port}")
        config["listeners"][0]["trusted_proxies"] = ["127.0.0.1"]
        request = b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Request-ID: theirs\r\n\r\n"
        async with running_proxy(tmp_path, config) as proxy, asking(proxy, request):
            (line,) = await logged(proxy)
    assert line["request_id"] == "theirs"
    assert b"X-Request-ID: theirs" in app.received
