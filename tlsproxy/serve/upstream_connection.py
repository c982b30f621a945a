"""One connection to a server, and what whoever uses it is told. Nothing here knows what the bytes mean."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, cast

from tlsproxy.config import HashConfig, ProxyProtocol
from tlsproxy.errors import UpstreamError
from tlsproxy.serve.servers import Server

if TYPE_CHECKING:
    from tlsproxy.serve.upstream import Upstream

WRITE_BUFFER_BYTES = 64 * 1024
"""A transport that holds more than this is full: whoever fills it is paused."""


class UpstreamOwner(Protocol):
    """Whoever uses an upstream connection at the moment."""

    def hash_key(self, source: HashConfig) -> bytes:
        """Return what decides about the server, where that is by consistent hash."""

    def proxy_header(self, version: ProxyProtocol) -> bytes:
        """Return what tells a server who the client is."""

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

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Go to the owner that asked for it."""
        # uvloop's transports are no subclasses of asyncio's.
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
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
        """Pass the end of input on. asyncio's TLS ends with it, whatever the owner says."""
        if self.owner is not None:
            transport = self._transport
            return self.owner.upstream_eof() and transport is not None and transport.can_write_eof()
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
        """Send no more. asyncio's TLS can't be closed in one direction: there, nothing more is received either."""
        if self._transport is not None and not self._transport.is_closing():
            if self._transport.can_write_eof():
                self._transport.write_eof()
            else:
                self._transport.close()

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

    def succeeded(self) -> None:
        """Say that the server has answered as it should."""
        if self.server.failures:
            self._upstream.server_answered(self.server)

    def failed(self) -> None:
        """Say that the server has not answered as it should."""
        self._upstream.server_failed(self.server)

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
