"""Connections to the servers behind: chosen, opened, kept for the next request.

An `Upstream` gives its connections to owners (`UpstreamOwner`: an HTTP exchange or a tunnel) and tells them what
happens there. Nothing here knows what the bytes mean.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from time import monotonic
from typing import Protocol, cast

from tlsproxy.config import Address, Balance, UpstreamConfig
from tlsproxy.errors import UpstreamError
from tlsproxy.serve.counting import UpstreamMetrics

WRITE_BUFFER_BYTES = 64 * 1024
"""A transport that holds more than this is full: whoever fills it is paused."""


class UpstreamOwner(Protocol):
    """Whoever uses an upstream connection at the moment."""

    def upstream_ready(self, connection: UpstreamConnection) -> None:
        """Take over the connection asked for."""

    def upstream_failed(self, error: UpstreamError) -> None:
        """No server could be reached."""

    def upstream_data(self, data: bytes) -> None:
        """Bytes from the server."""

    def upstream_eof(self) -> bool:
        """The server will send no more. True keeps the connection for writing."""

    def upstream_lost(self, error: Exception | None) -> None:
        """The connection has ended; `error` (TimeoutError: its `deadline` has passed) unless it was closed in order."""

    def upstream_writable(self, writable: bool) -> None:
        """The connection can take more bytes, or can't for now."""


class Server:
    """One server of an upstream, with its idle connections (the last used is taken first)."""

    __slots__ = ("address", "authority", "idle", "in_use")

    def __init__(self, address: Address) -> None:
        self.address = address
        self.authority = str(address).encode("idna" if not address.host.isascii() else "ascii")
        self.idle: list[UpstreamConnection] = []
        self.in_use = 0
        """Connections that are being opened or have an owner."""


class UpstreamConnection(asyncio.Protocol):
    """One connection to a server. Its owner sets `deadline` (monotonic seconds) as it goes."""

    __slots__ = (
        "_first_owner",
        "_transport",
        "_upstream",
        "deadline",
        "owner",
        "reused",
        "server",
        "was_opened",
        "write_paused",
    )

    def __init__(self, upstream: Upstream, server: Server, first_owner: UpstreamOwner) -> None:
        self._upstream = upstream
        self.server = server
        self._first_owner: UpstreamOwner | None = first_owner
        self._transport: asyncio.Transport | None = None
        self.owner: UpstreamOwner | None = None
        self.deadline = math.inf
        self.reused = False
        """It has carried a request before, so the server may be about to close it."""
        self.write_paused = False
        self.was_opened = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Go to the owner that asked for it."""
        # uvloop's transports are no subclasses of asyncio's.
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        self.was_opened = True
        owner, self._first_owner = self._first_owner, None
        assert owner is not None
        self._upstream.connected(self, owner)

    def data_received(self, data: bytes) -> None:
        """Pass bytes on; a server that speaks unasked loses its connection."""
        if self.owner is not None:
            self.owner.upstream_data(data)
        else:
            self.abort()

    def eof_received(self) -> bool:
        """Pass the end of input on."""
        if self.owner is not None:
            return self.owner.upstream_eof()
        self.abort()
        return False

    def connection_lost(self, error: Exception | None) -> None:
        """Leave the pool, or tell the owner."""
        self._transport = None
        owner = self.owner
        self._upstream.forget(self)
        if owner is not None:
            owner.upstream_lost(error)

    def pause_writing(self) -> None:
        """The transport is full."""
        self.write_paused = True
        if self.owner is not None:
            self.owner.upstream_writable(False)

    def resume_writing(self) -> None:
        """The transport has room again."""
        self.write_paused = False
        if self.owner is not None:
            self.owner.upstream_writable(True)

    def write(self, pieces: Sequence[bytes]) -> None:
        """Send bytes, in one go."""
        if self._transport is None or self._transport.is_closing():
            return
        if len(pieces) == 1:
            self._transport.write(pieces[0])
        else:
            self._transport.writelines(pieces)

    def write_eof(self) -> None:
        """Send no more."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write_eof()

    def pause_reading(self) -> None:
        """Stop reading until resumed. Idempotent."""
        if self._transport is not None and self._transport.is_reading():
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Read again. Idempotent."""
        if self._transport is not None and not self._transport.is_closing() and not self._transport.is_reading():
            self._transport.resume_reading()

    def release(self) -> None:
        """Give the connection back, for another request."""
        self._upstream.keep(self)

    def abort(self) -> None:
        """Close at once; the owner is not told."""
        self._upstream.forget(self)
        if self._transport is not None:
            self._transport.abort()

    def expire(self) -> None:
        """Close, for the deadline has passed."""
        owner = self.owner
        self.abort()
        if owner is not None:
            owner.upstream_lost(TimeoutError())


class Upstream:
    """A group of servers that answer alike, and this process's connections to them."""

    def __init__(self, config: UpstreamConfig, metrics: UpstreamMetrics) -> None:
        self.name = config.name
        self.timeouts = config.timeouts
        self.metrics = metrics
        self._config = config
        self._servers = [Server(server.address) for server in config.servers]
        self._turn = 0
        self._open: set[UpstreamConnection] = set()
        self._connecting: dict[UpstreamOwner, asyncio.Task[None]] = {}

    def acquire(self, owner: UpstreamOwner, *, fresh: bool = False) -> None:
        """Call `owner.upstream_ready` with a connection, before this returns if one is idle and `fresh` is not asked.

        If no server accepts, `owner.upstream_failed` is called, with 502 or 504.
        """
        servers = self._in_order()
        server = servers[0]
        if server.idle and not fresh:
            connection = server.idle.pop()
            self.metrics.values[self.metrics.idle] -= 1.0
            server.in_use += 1
            self._hand_over(connection, owner)
        else:
            task = asyncio.get_running_loop().create_task(self._connect(owner, servers))
            self._connecting[owner] = task
            self.metrics.values[self.metrics.connecting] += 1.0

    def cancel(self, owner: UpstreamOwner) -> None:
        """Stop opening a connection for `owner`, who will hear no more."""
        task = self._connecting.pop(owner, None)
        if task is not None:
            self.metrics.values[self.metrics.connecting] -= 1.0
            task.cancel()

    def sweep(self, now_s: float) -> None:
        """Let every deadline that lies before `now_s` take effect."""
        for connection in [connection for connection in self._open if connection.deadline < now_s]:
            connection.expire()

    def close(self) -> None:
        """Close what is idle or being opened; connections in use are their owners' affair."""
        for task in self._connecting.values():
            task.cancel()
        for connection in [connection for connection in self._open if connection.owner is None]:
            connection.abort()

    def keep(self, connection: UpstreamConnection) -> None:
        """Take a connection back into the pool, or close it if enough are kept."""
        server = connection.server
        if connection not in self._open:
            return
        if len(server.idle) >= self._config.keepalive:
            connection.abort()
            return
        connection.owner = None
        connection.reused = True
        connection.deadline = monotonic() + self.timeouts.idle_s
        server.in_use -= 1
        server.idle.append(connection)
        values = self.metrics.values
        values[self.metrics.active] -= 1.0
        values[self.metrics.idle] += 1.0

    def forget(self, connection: UpstreamConnection) -> None:
        """Take a connection that ends off the books. Idempotent."""
        if connection not in self._open:
            return
        self._open.discard(connection)
        if connection.owner is not None:
            connection.owner = None
            connection.server.in_use -= 1
            self.metrics.values[self.metrics.active] -= 1.0
        else:
            connection.server.idle.remove(connection)
            self.metrics.values[self.metrics.idle] -= 1.0

    def _in_order(self) -> list[Server]:
        """Return the servers, the one to try first at the front."""
        servers = self._servers
        if len(servers) == 1:
            return servers
        self._turn = (self._turn + 1) % len(servers)
        rotated = servers[self._turn :] + servers[: self._turn]
        if self._config.balance is Balance.LEAST_CONNECTIONS:
            rotated.sort(key=lambda server: server.in_use)
        return rotated

    def _hand_over(self, connection: UpstreamConnection, owner: UpstreamOwner) -> None:
        connection.owner = owner
        self.metrics.values[self.metrics.active] += 1.0
        owner.upstream_ready(connection)

    def connected(self, connection: UpstreamConnection, owner: UpstreamOwner) -> None:
        """Hand a connection just opened over, before anything the server says can arrive."""
        self._end_connecting(owner)
        self._open.add(connection)
        self._hand_over(connection, owner)

    async def _connect(self, owner: UpstreamOwner, servers: Sequence[Server]) -> None:
        """Open a connection to the first server that accepts; nothing has been sent, so trying the next is safe."""
        error: UpstreamError | None = None
        for server in servers:
            error = await self._connect_to(server, owner)
            if error is None:
                return
        assert error is not None
        self._end_connecting(owner)
        owner.upstream_failed(error)

    async def _connect_to(self, server: Server, owner: UpstreamOwner) -> UpstreamError | None:
        """Open a connection; it goes to its owner by itself. Return what went wrong."""
        connection = UpstreamConnection(self, server, owner)
        server.in_use += 1
        opening = asyncio.get_running_loop().create_connection(
            lambda: connection, server.address.host, server.address.port
        )
        error = UpstreamError(502, "connect_failed")
        try:
            await asyncio.wait_for(opening, self.timeouts.connect_s)
        except asyncio.TimeoutError:
            error = UpstreamError(504, "connect_timeout")
        except OSError:
            pass
        finally:
            if not connection.was_opened:
                server.in_use -= 1
        return None if connection.was_opened else error

    def _end_connecting(self, owner: UpstreamOwner) -> None:
        del self._connecting[owner]
        self.metrics.values[self.metrics.connecting] -= 1.0
