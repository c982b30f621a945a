"""Back ends that do as a test says: asyncio servers that record every byte they get."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

Handler = Callable[["BackendConnection"], Awaitable[None]]


class BackendConnection:
    """One connection the proxy has opened."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.received = bytearray()
        self.ended = asyncio.Event()

    async def read(self, size: int = 65536) -> bytes:
        """Return what comes next; empty at the end."""
        data = await self.reader.read(size)
        self.received += data
        return data

    async def head(self) -> bytes:
        """Return the next request's head, empty if the proxy closes instead."""
        try:
            head = await self.reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return b""
        self.received += head
        return head

    async def exactly(self, size: int) -> bytes:
        """Return the next `size` bytes."""
        data = await self.reader.readexactly(size)
        self.received += data
        return data

    async def send(self, data: bytes) -> None:
        """Send, waiting while the proxy does not read."""
        self.writer.write(data)
        await self.writer.drain()

    def reset(self) -> None:
        """Close with a reset."""
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


@dataclass
class Backend:
    """A running back end."""

    port: int
    connections: list[BackendConnection] = field(default_factory=list)

    @property
    def received(self) -> bytes:
        """Everything that came, connection after connection."""
        return b"".join(bytes(connection.received) for connection in self.connections)


def ok(body: bytes = b"hello") -> bytes:
    """Return a response with a length."""
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


async def answer_each(connection: BackendConnection) -> None:
    """Answer every request without a body with `hello`."""
    while await connection.head():
        await connection.send(ok())


def always(response: bytes, *, close: bool = False) -> Handler:
    """Return a handler that answers every head with the same bytes, and then closes if told to."""

    async def handler(connection: BackendConnection) -> None:
        while await connection.head():
            await connection.send(response)
            if close:
                return

    return handler


@contextlib.asynccontextmanager
async def backend(
    handler: Handler = answer_each,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    unix_path: Path | None = None,
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[Backend]:
    """Run a back end on a port of its own, or on a Unix socket; when a handler returns, its connection is closed."""
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        connection = BackendConnection(reader, writer)
        running.connections.append(connection)
        try:
            with contextlib.suppress(ConnectionError):
                await handler(connection)
        except asyncio.CancelledError:
            pass
        finally:
            connection.ended.set()
            writer.close()
            tasks.discard(task)

    if unix_path is not None:
        server = await asyncio.start_unix_server(serve, unix_path, ssl=tls)
        running = Backend(0)
    else:
        server = await asyncio.start_server(serve, host, port, ssl=tls)
        running = Backend(server.sockets[0].getsockname()[1])
    try:
        yield running
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
