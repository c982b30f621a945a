"""What the connections of one listener share: configuration, limits, routes, and the sweep over their deadlines."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import resource
from collections.abc import Mapping, Sequence
from time import monotonic
from typing import TYPE_CHECKING

from hsm.pool import SignerPool
from hsm.pool_request import SigningKey
from tlsproxy.config import ListenerConfig, ListenerMode, Network
from tlsproxy.http.routing import Router
from tlsproxy.serve.client import ClientConnection, Phase
from tlsproxy.serve.counting import ListenerMetrics
from tlsproxy.serve.http_connection import HttpConnection
from tlsproxy.serve.tunnel import TunnelConnection
from tlsproxy.serve.upstream import Upstream
from tlsproxy.tls.context import TlsContext

if TYPE_CHECKING:
    from tlsproxy.serve.tracing import Tracing

_SPARE_DESCRIPTORS = 0.25
"""The part of a process's descriptors that client connections leave to others.

With the last one gone libuv can accept no connection, nor refuse it: it tries without end.
"""
SWEEP_S = 1.0
"""How often deadlines are looked at, and so how late they may take effect."""


class ListenerRuntime:
    """One listener in one process. It is the protocol factory for `loop.create_server`.

    `tls` is None where the listener has `tls: off`. `signing_keys` by certificate name, `upstreams` by name. Belongs to
    one event loop.
    """

    def __init__(
        self,
        config: ListenerConfig,
        *,
        tls: TlsContext | None,
        signing_keys: Mapping[str, SigningKey],
        pool: SignerPool,
        upstreams: Mapping[str, Upstream],
        metrics: ListenerMetrics,
        tracing: Tracing | None = None,
    ) -> None:
        self.config = config
        self.name = str(config.address)
        self.tls = tls
        self.signing_keys = signing_keys
        self.pool = pool
        self.upstreams = upstreams
        self.metrics = metrics
        self.tracing = tracing
        self.proto = b"http" if tls is None else b"https"
        self.router = Router(config.routes)
        self.draining = False
        self._connection_class: type[ClientConnection] = (
            HttpConnection if config.mode is ListenerMode.HTTP else TunnelConnection
        )
        self._max_descriptor = int(resource.getrlimit(resource.RLIMIT_NOFILE)[0] * (1 - _SPARE_DESCRIPTORS))
        self._open: set[ClientConnection] = set()
        self._per_client: dict[str | bytes, int] = {}
        self._handshakes = 0
        self._request_id_prefix = os.urandom(8).hex().encode()
        self._requests = 0
        self._sweep_timer: asyncio.TimerHandle | None = None

    def __call__(self) -> ClientConnection:
        """Return the protocol for a connection just accepted."""
        return self._connection_class(self)

    @property
    def connections(self) -> int:
        """Client connections that are open."""
        return len(self._open)

    def start(self) -> None:
        """Start looking at deadlines. Needs a running loop."""
        self._sweep_timer = asyncio.get_running_loop().call_later(SWEEP_S, self._sweep_and_rearm)

    def sweep(self) -> None:
        """End what takes too long."""
        now_s = monotonic()
        for connection in [connection for connection in self._open if connection.deadline < now_s]:
            connection.on_timeout(now_s)

    def drain(self) -> None:
        """Let requests under way end, and every connection with its last one; nothing new is to be accepted."""
        self.draining = True
        for connection in list(self._open):
            if connection.phase is Phase.OPEN:
                connection.drain()

    def close(self) -> None:
        """Cut off what is left, and stop looking at deadlines."""
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
        for connection in list(self._open):
            connection.abort()

    # What connections call.

    def admit(self, connection: ClientConnection, descriptor: int) -> bool:
        """Take a new connection on, or count that there are too many. Its client need not be known yet.

        The kernel gives the lowest `descriptor` that is free: it tells how many are in use.
        """
        metrics = self.metrics
        metrics.values[metrics.accepted] += 1.0
        limit = self.config.limits.connections
        if limit and len(self._open) >= limit:
            metrics.count_refused("connections")
            return False
        if descriptor > self._max_descriptor:
            metrics.count_refused("descriptors")
            return False
        self._open.add(connection)
        metrics.values[metrics.connections] += 1.0
        return True

    def admit_client(self, connection: ClientConnection) -> bool:
        """Let a connection go on now that its client is known, or count that a limit refuses it."""
        limits = self.config.limits
        metrics = self.metrics
        client = _counted_as(connection.client_ip)
        of_client = self._per_client.get(client, 0) + 1
        self._per_client[client] = of_client
        if limits.connections_per_client and of_client > limits.connections_per_client:
            metrics.count_refused("connections_per_client")
            return False
        if self.tls is not None:
            if limits.handshakes and self._handshakes >= limits.handshakes:
                metrics.count_refused("handshakes")
                return False
            self._handshakes += 1
            metrics.values[metrics.handshakes_in_flight] += 1.0
        return True

    def handshake_ended(self) -> None:
        """Count a handshake less under way."""
        self._handshakes -= 1
        self.metrics.values[self.metrics.handshakes_in_flight] -= 1.0

    def release(self, connection: ClientConnection) -> None:
        """Take a connection that is gone off the books."""
        self._open.remove(connection)
        if connection.client_ip:
            client = _counted_as(connection.client_ip)
            left = self._per_client.pop(client) - 1
            if left:
                self._per_client[client] = left
        self.metrics.values[self.metrics.connections] -= 1.0

    def is_trusted(self, ip: str) -> bool:
        """Tell whether `ip` is one of trusted_proxies."""
        return _is_in(self.config.trusted_proxies, ip)

    def expects_proxy_header(self, ip: str) -> bool:
        """Tell whether the peer at `ip` begins with a PROXY protocol header."""
        return _is_in(self.config.proxy_protocol_from, ip)

    def next_request_id(self) -> bytes:
        """Return an id that no other request to this listener has."""
        self._requests += 1
        return b"%b-%x" % (self._request_id_prefix, self._requests)

    def _sweep_and_rearm(self) -> None:
        self._sweep_timer = asyncio.get_running_loop().call_later(SWEEP_S, self._sweep_and_rearm)
        self.sweep()


def _is_in(networks: Sequence[Network], ip: str) -> bool:
    return bool(networks) and any(ipaddress.ip_address(ip) in network for network in networks)


def _counted_as(ip: str) -> str | bytes:
    """Return what stands for a client's address in its limit: all of a /64 for IPv6, as one client has so many."""
    return ipaddress.IPv6Address(ip).packed[:8] if ":" in ip else ip
