"""aiohttp, its WebSocket client too: PORT CA_FILE."""

from __future__ import annotations

import asyncio
import ssl
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

import aiohttp
import cases

BASE = f"https://localhost:{sys.argv[1]}"
context = ssl.create_default_context(cafile=sys.argv[2])
loop = asyncio.new_event_loop()


async def opened() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(ssl=context), timeout=aiohttp.ClientTimeout(total=30), max_field_size=1 << 20
    )


session = loop.run_until_complete(opened())


async def streamed(pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


async def asking(
    method: str, path: str, body: bytes | Iterator[bytes] | None, headers: Mapping[str, str] | None
) -> dict[str, Any]:
    data = body if body is None or isinstance(body, bytes) else streamed(body)
    async with session.request(method, BASE + path, data=data, headers=headers) as response:
        return cases.outcome(response.status, await response.read())


def ask(
    method: str, path: str, *, body: bytes | Iterator[bytes] | None = None, headers: Mapping[str, str] | None = None
) -> dict[str, Any]:
    return loop.run_until_complete(asking(method, path, body, headers))


async def upgrading() -> dict[str, Any]:
    async with session.ws_connect(BASE + "/ws") as socket:
        await socket.send_bytes(cases.BODY[:300_000])
        return cases.outcome(101, await socket.receive_bytes())


cases.run(cases.http_cases(ask) | {"upgrade": lambda: loop.run_until_complete(upgrading())})
loop.run_until_complete(session.close())
