"""Bytes both ways, whatever they mean: all of a connection in `mode: tcp`, or what follows a 101 in HTTP.

Each direction ends on its own (close_notify on the client's side, FIN on the upstream's), and each is paused while the
other side is full.
"""

from __future__ import annotations

import math
from time import monotonic
from typing import TYPE_CHECKING

from tlsproxy.config import HashConfig, ProxyProtocol
from tlsproxy.errors import UpstreamError
from tlsproxy.serve.client import ClientConnection, PauseReason
from tlsproxy.serve.upstream import Upstream
from tlsproxy.serve.upstream_connection import UpstreamConnection

if TYPE_CHECKING:
    from tlsproxy.serve.handshake import HandshakeSummary
    from tlsproxy.serve.listener import ListenerRuntime


class Tunnel:
    """Passes bytes between a client and an upstream connection, which it owns once there is one."""

    __slots__ = ("_client", "_connection", "_from_client_ended", "_from_upstream_ended", "_pending", "_upstream")

    def __init__(self, client: ClientConnection, upstream: Upstream) -> None:
        self._client = client
        self._upstream = upstream
        self._connection: UpstreamConnection | None = None
        self._pending: list[bytes] = []
        self._from_client_ended = False
        self._from_upstream_ended = False

    def connect(self) -> None:
        """Ask for a connection; until it is there the client is not read."""
        self._client.deadline = math.inf
        self._client.pause(PauseReason.UPSTREAM)
        self._upstream.acquire(self, fresh=True)

    def close(self) -> None:
        """The client is gone: let go of the upstream."""
        if self._connection is not None:
            self._connection.abort()
            self._connection = None
        else:
            self._upstream.cancel(self)

    # What the client's connection calls.

    def client_data(self, data: bytes) -> None:
        """Pass on."""
        if self._connection is None:
            self._pending.append(data)
        else:
            self._connection.write((data,))
            self._touch()

    def client_ended(self) -> None:
        """Pass the end on, and close once both directions have ended."""
        self._from_client_ended = True
        if self._from_upstream_ended:
            self._client.finish()
        elif self._connection is not None:
            self._connection.write_eof()

    def client_writable(self, writable: bool) -> None:
        """Stop or resume the upstream."""
        if self._connection is not None:
            if writable:
                self._connection.resume_reading()
            else:
                self._connection.pause_reading()

    def idle_timeout(self, now_s: float) -> None:
        """Close if nothing has passed in either direction for too long."""
        client = self._client
        if not client.write_paused or not client.output_progressed(now_s):
            client.finish()

    def drain(self) -> None:
        """Go on: only the protocol inside knows when it may end."""

    # What the upstream calls.

    def hash_key(self, source: HashConfig) -> bytes:  # noqa: ARG002 - of the bytes inside nothing is known
        """Return what decides about the server: the client's address."""
        return self._client.client_ip.encode("ascii")

    def proxy_header(self, version: ProxyProtocol) -> bytes:
        """Return what tells a server who the client is."""
        return self._client.proxy_header(version)

    def upstream_ready(self, connection: UpstreamConnection) -> None:
        """Begin to pass bytes."""
        self._connection = connection
        connection.succeeded()
        connection.owner = self
        connection.deadline = math.inf
        if self._pending:
            connection.write(self._pending)
            self._pending.clear()
        if self._from_client_ended:
            connection.write_eof()
        if self._client.write_paused:
            connection.pause_reading()
        self._touch()
        self._client.resume(PauseReason.UPSTREAM)

    def upstream_failed(self, error: UpstreamError) -> None:
        """Close: there is no one to talk to."""
        self._upstream.metrics.count_error(error.reason)
        self._client.abort()

    def upstream_data(self, data: bytes) -> None:
        """Pass on."""
        self._client.send(data)
        self._touch()

    def upstream_eof(self) -> bool:
        """Pass the end on, and close once both directions have ended."""
        self._from_upstream_ended = True
        if self._from_client_ended:
            self._client.finish()
            return False
        self._client.end_output()
        return True

    def upstream_lost(self, error: Exception | None) -> None:
        """Close; after an error without close_notify, for something is missing."""
        self._connection = None
        if error is None:
            self._client.finish()
        else:
            self._upstream.metrics.count_error("connection_lost")
            self._client.abort()

    def upstream_writable(self, writable: bool) -> None:
        """Let the client go on sending, or not."""
        if writable:
            self._client.resume(PauseReason.UPSTREAM)
        else:
            self._client.pause(PauseReason.UPSTREAM)

    def _touch(self) -> None:
        client = self._client
        client.deadline = monotonic() + client.runtime.config.timeouts.tunnel_idle_s


class TunnelConnection(ClientConnection):
    """A client in `mode: tcp`."""

    __slots__ = ("_tunnel",)

    def __init__(self, runtime: ListenerRuntime) -> None:
        super().__init__(runtime)
        assert runtime.config.upstream is not None
        self._tunnel = Tunnel(self, runtime.upstreams[runtime.config.upstream])

    def established(self, handshake: HandshakeSummary | None) -> None:  # noqa: ARG002
        """Connect to the upstream."""
        self._tunnel.connect()

    def plaintext_received(self, data: bytes) -> None:
        """Pass on."""
        self._tunnel.client_data(data)

    def input_ended(self) -> None:
        """Pass on."""
        self._tunnel.client_ended()

    def output_writable(self, writable: bool) -> None:
        """Stop or resume the upstream."""
        self._tunnel.client_writable(writable)

    def open_timeout(self, now_s: float) -> None:
        """Close if idle."""
        self._tunnel.idle_timeout(now_s)

    def ended(self) -> None:
        """Let go of the upstream."""
        self._tunnel.close()

    def drain(self) -> None:
        """Go on."""
        self._tunnel.drain()
