"""What may come between two steps of an upstream connection's life, in every order there is."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.backends import BackendConnection, backend, ok
from tests.dataplane import data_plane, until

GET = "GET / HTTP/1.1\nHost: a"
PLAIN_GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


async def test_a_request_refused_in_the_step_that_began_it_leaves_its_servers_place_free() -> None:
    async with backend() as server, data_plane(server.port, servers={"max_connections": 1}) as running:
        bad = await running.connect()
        response = await bad.request("POST / HTTP/1.1\nHost: a\nTransfer-Encoding: chunked", b"nonsense\r\n")
        assert response.status == 400
        assert (await (await running.connect()).request(GET)).status == 200


@pytest.mark.parametrize("steps", range(12))
async def test_a_client_that_leaves_while_its_connection_is_opened_leaves_its_servers_place_free(
    steps: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Its exchange lets go so many steps of the loop after it has asked, the connection being made meanwhile."""
    async with (
        backend() as server,
        data_plane(server.port, tls=False, servers={"max_connections": 1}) as running,
    ):
        client = await running.connect_plain()
        await client.send(PLAIN_GET)
        (connection,) = running.runtime._open
        while connection._exchange is None:  # noqa: ASYNC110 - to the very step
            await asyncio.sleep(0)
        for _ in range(steps):
            await asyncio.sleep(0)
        connection.abort()
        other = await running.connect_plain()
        assert (await other.request(GET)).status == 200
        assert not caplog.records
        (app,) = running.upstreams.values()
        assert len(app._open) == 1


async def test_an_upload_on_a_kept_connection_may_last_longer_than_connections_are_kept() -> None:
    async def takes_three(connection: BackendConnection) -> None:
        assert await connection.head()
        await connection.send(ok())
        assert await connection.head()
        await connection.exactly(3)
        await connection.send(ok(b"taken"))

    async with backend(takes_three) as server, data_plane(server.port, upstream_timeouts={"idle_s": 0.0}) as running:
        client = await running.connect()
        assert (await client.request(GET)).status == 200
        await client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\na")
        await until(lambda: b"POST" in server.received)
        running.sweep()
        await client.send(b"bc")
        assert (await client.response()).body == b"taken"


async def test_an_idle_connection_that_becomes_a_requests_within_a_sweep_does_not_expire_in_it() -> None:
    stuck: list[int] = []
    asked = asyncio.Event()

    async def answers_unless_stuck(connection: BackendConnection) -> None:
        while await connection.head():
            await asked.wait()
            if connection.writer.get_extra_info("peername")[1] not in stuck:
                await connection.send(ok())

    async with (
        backend(answers_unless_stuck) as server,
        data_plane(server.port, tls=False, upstream_timeouts={"response_s": 0.0, "idle_s": 0.0}) as running,
    ):
        clients = {}
        for _ in range(2):
            client = await running.connect_plain()
            await client.send(PLAIN_GET)
            clients[client.writer.get_extra_info("sockname")[1]] = client
        (app,) = running.upstreams.values()
        await until(lambda: len(app._open) == len(server.connections) == 2)
        # The sweep comes to the connection that is never answered first, then to the one that is idle by then.
        never_answered, idle = app._open
        stuck.append(never_answered._transport.get_extra_info("sockname")[1])
        exchange = never_answered.owner
        pipelining = clients.pop(exchange._client.peer.port)
        await pipelining.send(PLAIN_GET)
        asked.set()
        (other,) = clients.values()
        assert (await other.response()).status == 200
        await until(lambda: exchange._client._reader.buffered_bytes and idle.owner is None)
        app.sweep(time.monotonic())
        assert [(await pipelining.response()).status for _ in range(2)] == [504, 200]
