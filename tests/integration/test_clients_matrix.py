"""Real clients x what HTTP can come to, in both versions, through the whole product."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from hsm.messages import KeyType
from tests.backends import BackendConnection, backend, ok
from tests.clients.cases import BODY
from tests.proxy import Proxy, free_port, make_site, running_proxy, site_config

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROGRAMS = Path(__file__).parents[1] / "clients"
PYTHON = (sys.executable, "-W", "ignore::ResourceWarning")
CLIENTS: dict[str, tuple[str, ...]] = {
    "curl": (*PYTHON, "with_curl.py"),
    "requests": (*PYTHON, "with_requests.py"),
    "httpx": (*PYTHON, "with_httpx.py"),
    "aiohttp": (*PYTHON, "with_aiohttp.py"),
    "websockets": (*PYTHON, "with_websockets.py"),
    "node": ("node", "node.mjs"),
    "java": ("java", "-XX:TieredStopAtLevel=1", "Client.java"),
    "curl, HTTP/2": (*PYTHON, "with_curl.py"),
    "httpx, HTTP/2": (*PYTHON, "with_httpx.py"),
    "node, HTTP/2": ("node", "http2.mjs"),
    "java, HTTP/2": ("java", "-XX:TieredStopAtLevel=1", "Client.java"),
}
HELLO = {"status": 200, "length": 5}
ECHOED = {"status": 200, "length": len(BODY), "sha256": hashlib.sha256(BODY).hexdigest()}
CASES: dict[str, dict[str, Any]] = {
    "get": HELLO,
    "reuse": HELLO,
    "post": ECHOED,
    "chunked": ECHOED,
    "head": {"status": 200, "length": 0},
    "no_content": {"status": 204, "length": 0},
    "not_modified": {"status": 304, "length": 0},
    "early_hints": HELLO,
    "big_header": {"status": 431},
    "slow_body": {"status": 200, "length": 500},
    "early_response": {"status": 413, "length": 3},
    "dead": {"status": 502},
    "slow": {"status": 504},
}
CUT = ("cut_length", "cut_chunked")
SWITCHED = {"status": 101, "length": 8}
TALKED = {"status": 101, "length": 300_000, "sha256": hashlib.sha256(BODY[:300_000]).hexdigest()}
UPGRADED = {"curl": SWITCHED, "node": SWITCHED, "aiohttp": TALKED, "websockets": TALKED, "java": TALKED}
HTTP_CLIENTS = [client for client in CLIENTS if client != "websockets"]


async def application(connection: BackendConnection) -> None:
    """A web application that has a path for each case."""
    while head := await connection.head():
        method, path, _ = head.split(b" ", 2)
        match path:
            case b"/echo":
                await echo(connection, head)
            case b"/204":
                await connection.send(b"HTTP/1.1 204 No Content\r\n\r\n")
            case b"/304":
                await connection.send(b'HTTP/1.1 304 Not Modified\r\nETag: "x"\r\nContent-Length: 5\r\n\r\n')
            case b"/hints":
                await connection.send(b"HTTP/1.1 103 Early Hints\r\nLink: </a>; rel=preload\r\n\r\n" + ok())
            case b"/slow-body":
                await connection.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                for _ in range(5):
                    await asyncio.sleep(0.05)
                    await connection.send(b"64\r\n" + b"x" * 100 + b"\r\n")
                await connection.send(b"0\r\n\r\n")
            case b"/early":
                await connection.send(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 3\r\n\r\nno\n")
                while await connection.read():
                    pass
            case b"/large":
                await connection.send(ok(BODY))
            case b"/trailers":
                while not connection.received.endswith(b"x-sum: 1\r\n\r\n"):
                    if not await connection.read():
                        return
                await connection.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX-Sum: 2\r\n\r\n")
            case b"/never":
                await connection.read()
                return
            case b"/cut-length":
                await connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b"x" * 500)
                return
            case b"/cut-chunked":
                await connection.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
                return
            case b"/upgrade":
                await connection.send(
                    b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n"
                )
                await connection.send(b"switched")
                return
            case _:
                await connection.send(ok() if method == b"GET" else b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n")


async def echo(connection: BackendConnection, head: bytes) -> None:
    """Send the request's body back once it is there, framed as it came: some clients don't read while they send."""
    reader = connection.reader
    if b"Expect: 100-continue" in head:
        await connection.send(b"HTTP/1.1 100 Continue\r\n\r\n")
    lengths = [line[16:] for line in head.split(b"\r\n") if line.startswith(b"Content-Length: ")]
    if lengths:
        body = await reader.readexactly(int(lengths[0]))
        await connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: %b\r\n\r\n" % lengths[0])
        await connection.send(body)
        return
    chunks = []
    size = -1
    while size:
        line = await reader.readuntil(b"\r\n")
        size = int(line, 16)
        chunks += [line, await reader.readexactly(size + 2)]
    await connection.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"".join(chunks))


async def talk(socket: ServerConnection) -> None:
    with contextlib.suppress(ConnectionClosed):
        async for message in socket:
            await socket.send(message)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def proxy(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Proxy]:
    directory = tmp_path_factory.mktemp("matrix")
    keys = {"p256": KeyType.ECDSA_P256, "rsa": KeyType.RSA_2048}
    make_site(directory, keys)
    async with contextlib.AsyncExitStack() as stack:
        upstream = await stack.enter_async_context(backend(application))
        sockets = await stack.enter_async_context(serve(talk, "127.0.0.1", 0))
        ws_port = next(iter(sockets.sockets)).getsockname()[1]
        config = site_config(directory, keys, f"127.0.0.1:{upstream.port}")
        config["upstreams"][0]["timeouts"] = {"response": "2s"}
        config["upstreams"] += [
            {"name": "dead", "servers": [{"address": f"127.0.0.1:{free_port()}"}]},
            {"name": "ws", "servers": [{"address": f"127.0.0.1:{ws_port}"}]},
        ]
        listener = config["listeners"][0]
        listener["http2"] = True
        # nghttp2, in curl and Node, sends no head larger than 64 KiB.
        listener["limits"] = {"header_bytes": "32KiB"}
        listener["routes"] += [{"path": "/dead", "upstream": "dead"}, {"path": "/ws", "upstream": "ws"}]
        yield await stack.enter_async_context(running_proxy(directory, config))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def seen(proxy: Proxy) -> dict[str, dict[str, dict[str, Any]]]:
    """What each client saw in each case."""
    return {name: await run_client(proxy, name, *command) for name, command in CLIENTS.items()}


async def run_client(proxy: Proxy, name: str, *command: str) -> dict[str, dict[str, Any]]:
    assert shutil.which(command[0]), f"{command[0]} expected: see tests/system-packages.txt"
    accepted = await proxy.metric("tlsproxy_connections_accepted_total")
    process = await asyncio.create_subprocess_exec(
        *command,
        str(proxy.port),
        str(proxy.directory / "ca.pem"),
        "2" if name.endswith("HTTP/2") else "1.1",
        cwd=PROGRAMS,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await asyncio.wait_for(process.communicate(), 120)
    assert process.returncode == 0, errors.decode()
    lines = [json.loads(line) for line in output.splitlines()]
    results = {line.pop("case"): line for line in lines}
    results["connections"] = {"accepted": await proxy.metric("tlsproxy_connections_accepted_total") - accepted}
    return results


@pytest.mark.parametrize("client", HTTP_CLIENTS)
@pytest.mark.parametrize("case", list(CASES))
async def test_case(seen: dict[str, dict[str, dict[str, Any]]], client: str, case: str) -> None:
    expected = CASES[case]
    if (client.partition(",")[0], case) == ("curl", "reuse"):
        # One process for each case: the second request of this one, of which the first has been written as well.
        expected = {"status": 200, "length": 10, "connects": 0}
    if (client, case) == ("requests", "early_hints"):
        # Python's http.client knows no interim response but 100, and takes this one for the answer.
        expected = {"status": 103}
    got = seen[client][case]
    assert {key: got.get(key) for key in expected} == expected, got


@pytest.mark.parametrize("client", HTTP_CLIENTS)
@pytest.mark.parametrize("case", CUT)
async def test_a_body_cut_short_is_an_error(seen: dict[str, dict[str, dict[str, Any]]], client: str, case: str) -> None:
    assert seen[client][case].get("error"), seen[client][case]


@pytest.mark.parametrize("client", list(UPGRADED))
async def test_upgrade(seen: dict[str, dict[str, dict[str, Any]]], client: str) -> None:
    got = seen[client]["upgrade"]
    assert {key: got.get(key) for key in UPGRADED[client]} == UPGRADED[client], got


@pytest.mark.parametrize("client", [client for client in HTTP_CLIENTS if not client.startswith("curl")])
async def test_connections_are_reused(seen: dict[str, dict[str, dict[str, Any]]], client: str) -> None:
    # Refused headers, early responses, cut bodies and upgrades end their connections, as they must. In HTTP/2 nothing
    # does; Java opens another one for its WebSocket.
    most = {"java, HTTP/2": 2}.get(client, 1 if client.endswith("HTTP/2") else 7)
    assert seen[client]["connections"]["accepted"] <= most


async def test_many_streams_share_one_connection(seen: dict[str, dict[str, dict[str, Any]]]) -> None:
    got = seen["node, HTTP/2"]
    assert got["many"] == {"status": "200", "length": 90 * 5}
    assert got["uploads"] == {"status": "200", "length": 8 * len(BODY)}
    assert got["trailers"]["trailers"] == {"x-sum": "2"}
    assert got["cancelled"]["status"] == 200


async def test_interim_responses_reach_who_listens(seen: dict[str, dict[str, dict[str, Any]]]) -> None:
    for client in ("node", "node, HTTP/2"):
        assert seen[client]["early_hints"]["informed"] == [103]
