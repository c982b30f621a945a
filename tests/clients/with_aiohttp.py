"""aiohttp, its WebSocket client too: PORT CA_FILE."""

from __future__ import annotations

import asyncio
import ssl
import sys
from collections.abc import AsyncIterator
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


async def pieces() -> AsyncIterator[bytes]:
    for piece in cases.pieces():
        yield piece


async def asking(method: str, path: str, **options: Any) -> dict[str, Any]:
    async with session.request(method, BASE + path, **options) as response:
        return cases.outcome(response.status, await response.read())


def ask(method: str, path: str, **options: Any) -> dict[str, Any]:
    return loop.run_until_complete(asking(method, path, **options))


async def upgrading() -> dict[str, Any]:
    async with session.ws_connect(BASE + "/ws") as socket:
        await socket.send_bytes(cases.BODY[:300_000])
        return cases.outcome(101, await socket.receive_bytes())


cases.run(
    {
        "get": lambda: ask("GET", "/hello"),
        "reuse": lambda: ask("GET", "/hello"),
        "post": lambda: ask("POST", "/echo", data=cases.BODY),
        "chunked": lambda: ask("POST", "/echo", data=pieces()),
        "head": lambda: ask("HEAD", "/hello"),
        "no_content": lambda: ask("GET", "/204"),
        "not_modified": lambda: ask("GET", "/304"),
        "early_hints": lambda: ask("GET", "/hints"),
        "big_header": lambda: ask("GET", "/hello", headers={"X-Big": cases.BIG_HEADER}),
        "slow_body": lambda: ask("GET", "/slow-body"),
        "early_response": lambda: ask("POST", "/early", data=cases.BODY),
        "dead": lambda: ask("GET", "/dead"),
        "slow": lambda: ask("GET", "/never"),
        "cut_length": lambda: ask("GET", "/cut-length"),
        "cut_chunked": lambda: ask("GET", "/cut-chunked"),
        "upgrade": lambda: loop.run_until_complete(upgrading()),
    }
)
loop.run_until_complete(session.close())
