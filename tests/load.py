"""A steady load of clients, each of whose requests must be answered: what operations are tested under."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

_REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
_PAUSE_S = 0.005


@dataclass
class Load:
    """What the clients have seen so far."""

    port: int
    context: ssl.SSLContext
    answered: int = 0
    connections: int = 0
    failures: list[tuple[int, str]] = field(default_factory=list)
    """The client's port and what went wrong."""
    stopping: bool = False
    stopped_accepting: bool = False
    """The proxy is to end: that it takes no more connections is no failure."""

    async def keep_requesting(self, requests_per_connection: float) -> None:
        """Connect, make requests until there have been enough of them or the proxy ends the connection; again."""
        while not self.stopping:
            stage = "connect"
            connection = socket.socket()
            connection.setblocking(False)
            connection.bind(("127.0.0.1", 0))
            port = connection.getsockname()[1]
            try:
                await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", self.port))
                async with self._connected(connection) as (reader, writer):
                    for number in range(1 << 30):
                        if number >= requests_per_connection or self.stopping:
                            break
                        stage = f"request {number}"
                        if not await self._request(reader, writer):
                            break
                        await asyncio.sleep(_PAUSE_S)
            except (OSError, ssl.SSLError, asyncio.IncompleteReadError, AssertionError) as error:
                connection.close()
                if self.stopped_accepting and stage == "connect":
                    return
                self.failures.append((port, f"{stage}: {error!r}"))

    @contextlib.asynccontextmanager
    async def _connected(
        self, connection: socket.socket
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await asyncio.open_connection(sock=connection, ssl=self.context, server_hostname="localhost")
        self.connections += 1
        try:
            yield reader, writer
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Make one request; tell whether the connection can carry another."""
        writer.write(_REQUEST)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        assert head.startswith(b"http/1.1 200 "), head
        assert await reader.readexactly(5) == b"hello"
        self.answered += 1
        return b"connection: close" not in head

    async def until_answered(self, more: int) -> None:
        """Wait until so many more requests have been answered."""
        enough = self.answered + more
        while self.answered < enough:  # noqa: ASYNC110 - an event would need setting at every answer
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def steady_load(port: int, context: Callable[[], ssl.SSLContext]) -> AsyncIterator[Load]:
    """Two clients that make a handshake for every request and two that keep their connections, while it lasts."""
    load = Load(port, context())
    clients = [asyncio.create_task(load.keep_requesting(count)) for count in (1, 1, 1e9, 1e9)]
    try:
        await load.until_answered(10)
        yield load
        if not load.stopped_accepting:
            await load.until_answered(20)
    finally:
        load.stopping = True
        await asyncio.gather(*clients)
