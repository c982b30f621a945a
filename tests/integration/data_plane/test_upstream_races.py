"""What may come between two steps of an upstream connection's life, in every order there is."""

from __future__ import annotations

import asyncio

import pytest

from tests.backends import backend
from tests.dataplane import data_plane

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
