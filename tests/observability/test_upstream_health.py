"""What the live figures tell of the servers of an upstream, of real ones behind a real proxy."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import signal
from pathlib import Path

from hsm.messages import KeyType
from tests.backends import BackendConnection, always, answer_each, backend, ok
from tests.proxy import Proxy, free_port, make_site, running_proxy, site_config, write_config

KEYS = {"www": KeyType.ECDSA_P256}


async def until_servers(proxy: Proxy, *expected: tuple[str, str, int]) -> None:
    """Watch until the servers of `app` are these: address, state and ejections."""
    found: list[tuple[str, str, int]] = []
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.admin_port)
    with contextlib.closing(writer):
        writer.write(b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n")
        for _ in range(30):
            await reader.readuntil(b"data: ")
            document = json.loads(await reader.readuntil(b"\n\n"))
            (app,) = (upstream for upstream in document["upstreams"] if upstream["name"] == "app")
            found = [(server["address"], server["state"], server["ejections"]) for server in app["servers"]]
            if found == list(expected):
                return
    raise AssertionError(f"never {expected}; {found}")


def get_twice(proxy: Proxy) -> list[int]:
    """Return the statuses of two requests on one connection, which is one worker's."""
    connection = http.client.HTTPSConnection("localhost", proxy.port, timeout=30, context=proxy.client_context())
    statuses = []
    for _ in range(2):
        connection.request("GET", "/")
        response = connection.getresponse()
        response.read()
        statuses.append(response.status)
    connection.close()
    return statuses


async def test_a_server_that_one_worker_has_ejected_is_down_in_that_one(tmp_path: Path) -> None:
    make_site(tmp_path, KEYS)
    dead = f"127.0.0.1:{free_port()}"
    async with backend() as app:
        upstream = {
            "name": "app",
            "servers": [{"address": dead}, {"address": f"127.0.0.1:{app.port}"}],
            "ejection": {"failures": 1, "duration": "1h"},
        }
        config = site_config(tmp_path, KEYS, "", upstreams=[upstream], workers=2)
        async with running_proxy(tmp_path, config) as proxy:
            await until_servers(proxy, (dead, "up", 0), (f"127.0.0.1:{app.port}", "up", 0))
            assert await asyncio.to_thread(get_twice, proxy) == [200, 200]
            await until_servers(proxy, (dead, "down in 1 of 2 workers", 1), (f"127.0.0.1:{app.port}", "up", 0))


async def test_workers_that_drain_have_no_say(tmp_path: Path) -> None:
    make_site(tmp_path, KEYS)
    release = asyncio.Event()

    async def answer_late(connection: BackendConnection) -> None:
        await connection.head()
        await release.wait()
        await connection.send(ok())

    refusal = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n"
    async with backend(always(refusal)) as app, backend(answer_late) as slow, backend(answer_each) as other:
        strict = {
            "name": "app",
            "servers": [{"address": f"127.0.0.1:{app.port}"}, {"address": f"127.0.0.1:{other.port}"}],
            "health": {"path": "/", "interval": "200ms", "fall": 1},
        }
        late = {"name": "slow", "servers": [{"address": f"127.0.0.1:{slow.port}"}]}
        config = site_config(tmp_path, KEYS, "", upstreams=[strict, late], drain_timeout="60s")
        config["listeners"][0]["routes"].insert(0, {"path": "/slow", "upstream": "slow"})
        async with running_proxy(tmp_path, config) as proxy:
            await until_servers(proxy, (f"127.0.0.1:{app.port}", "down", 0), (f"127.0.0.1:{other.port}", "up", 0))
            request = asyncio.create_task(proxy.get("/slow"))
            await proxy.until(lambda: slow.received, "a request that keeps the worker")
            lenient = {"name": "app", "servers": strict["servers"][:1]}
            write_config(tmp_path, config | {"upstreams": [lenient, late]})
            proxy.process.send_signal(signal.SIGHUP)
            await until_servers(proxy, (f"127.0.0.1:{app.port}", "up", 0))
            assert len(proxy.proxy_workers) == 2
            assert await proxy.metric("tlsproxy_upstream_server_up", server=f"127.0.0.1:{app.port}") == 0
            release.set()
            assert (await request)[0] == 200
