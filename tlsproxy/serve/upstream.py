"""The servers behind: one is chosen for each request, and connections to it are opened, lent and kept.

An `Upstream` gives its connections to owners (`UpstreamOwner`: an HTTP exchange or a tunnel). Everything here belongs
to one process: limits, health and ejections are not shared with the others.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Collection, Sequence
from time import monotonic
from typing import NamedTuple

from tlsproxy.config import Address, Balance, ServerConfig, UpstreamConfig
from tlsproxy.errors import UpstreamError
from tlsproxy.proxy_protocol import own_header
from tlsproxy.serve.counting import UpstreamMetrics
from tlsproxy.serve.dialing import Dialer
from tlsproxy.serve.health import HealthChecker
from tlsproxy.serve.resolving import Resolver
from tlsproxy.serve.servers import Server, make_balancer
from tlsproxy.serve.upstream_connection import UpstreamConnection, UpstreamOwner

_log = logging.getLogger("tlsproxy.upstream")


class _Waiting(NamedTuple):
    """An owner in the queue for a connection."""

    deadline_s: float
    fresh: bool
    tried: Collection[Server]


class Upstream:
    """A group of servers that answer alike, and this process's connections to them."""

    def __init__(self, config: UpstreamConfig, metrics: UpstreamMetrics) -> None:
        self.name = config.name
        self.timeouts = config.timeouts
        self.retries = config.retries
        self.metrics = metrics
        self._config = config
        self._proxy_protocol = config.proxy_protocol
        self._dialer = Dialer(config.tls, config.timeouts.connect_s)
        self._balancer = make_balancer(config.balance)
        self._hash = config.hash if config.balance is Balance.CONSISTENT_HASH else None
        self._limited = any(server.max_connections for server in config.servers)
        self._servers: dict[ServerConfig, list[Server]] = {}
        """By what is configured; a name stands for none until it is resolved."""
        self._resolvers: list[Resolver] = []
        for server in config.servers:
            self._add(server)
        self._usable: list[Server] = []
        """Those that get requests now."""
        self._next_return_s = 0.0
        """When the first ejection that counts is over; 0 if there is none."""
        self._open: set[UpstreamConnection] = set()
        self._connecting: dict[UpstreamOwner, asyncio.Task[None] | asyncio.Handle] = {}
        self._opening: dict[UpstreamOwner, UpstreamConnection] = {}
        """What those of them wait for that are not about to fail: each has its place at a server already."""
        self._waiting: dict[UpstreamOwner, _Waiting] = {}
        self._checks: dict[Server, asyncio.Task[None]] = {}
        self._resolving: list[asyncio.Task[None]] = []
        self._started = False
        self._review()

    def _add(self, server: ServerConfig) -> None:
        address = server.address
        self.metrics.add_server(str(address))
        if isinstance(address, Address) and not address.is_ip:
            self._servers[server] = []
            interval_s = self._config.resolve_interval_s
            self._resolvers.append(
                Resolver(address, interval_s, lambda found: self._resolved(server, found), self.name)
            )
        else:
            self._servers[server] = [Server(server, address)]

    # Its life.

    async def start(self) -> None:
        """Resolve names for the first time, and begin with what goes on in the background."""
        self._started = True
        if self._resolvers:
            self._resolving = [asyncio.create_task(resolver.resolve()) for resolver in self._resolvers]
            await asyncio.wait(self._resolving, timeout=self.timeouts.connect_s)
            self._resolving += [asyncio.create_task(resolver.run()) for resolver in self._resolvers]
        self._watch_health()

    def sweep(self, now_s: float) -> None:
        """Let every deadline that lies before `now_s` take effect."""
        for connection in [connection for connection in self._open if connection.deadline < now_s]:
            # An idle one may have become the next request's, of a client whose request before has just expired.
            if connection.deadline < now_s:
                connection.expire()
        for owner in [owner for owner, waiting in self._waiting.items() if waiting.deadline_s < now_s]:
            self._end_waiting(owner)
            owner.upstream_failed(UpstreamError(503, "queue_timeout"))
        if self._next_return_s and self._next_return_s <= now_s:
            self._review()

    def close(self) -> None:
        """Close what is idle or being opened; connections in use are their owners' affair."""
        for owner in list(self._connecting):
            self.cancel(owner)
        for task in (*self._checks.values(), *self._resolving):
            task.cancel()
        for connection in [connection for connection in self._open if connection.owner is None]:
            connection.abort()

    # For owners.

    def acquire(self, owner: UpstreamOwner, *, fresh: bool = False, tried: Collection[Server] = ()) -> None:
        """Call `owner.upstream_ready` with a connection, before this returns if one is idle and `fresh` is not asked.

        Servers in `tried` are left out. If no server accepts, `owner.upstream_failed` is called, with 502, 503 or 504.
        """
        try:
            server = self._choose(owner, tried)
        except UpstreamError as error:
            self._fail_soon(owner, error)
            return
        if server is None:
            self._wait(owner, _Waiting(monotonic() + self.timeouts.queue_s, fresh, tried))
        elif server.idle and not fresh:
            connection = server.idle.pop()
            self.metrics.values[self.metrics.idle] -= 1.0
            server.in_use += 1
            self._hand_over(connection, owner)
        else:
            work = self._connect(owner, self._begin_opening(owner, server), tried)
            self._connecting[owner] = asyncio.get_running_loop().create_task(work)
            self.metrics.values[self.metrics.connecting] += 1.0

    def has_others(self, tried: Collection[Server]) -> bool:
        """Tell whether there is a server left to try."""
        return any(server not in tried for server in self._usable)

    def cancel(self, owner: UpstreamOwner) -> None:
        """Stop opening a connection for `owner`, who will hear no more."""
        if owner in self._connecting:
            self._connecting[owner].cancel()
            self._end_connecting(owner)
            if owner in self._opening:
                # Not left to the task: one that is cancelled before its first step does nothing at all.
                self._end_opening(owner)
        elif owner in self._waiting:
            self._end_waiting(owner)

    # For connections.

    def connected(self, connection: UpstreamConnection, owner: UpstreamOwner) -> None:
        """Hand a connection just opened over, before anything the server says can arrive.

        If `owner` has let go of it a moment ago, the connection is closed.
        """
        if self._opening.get(owner) is not connection:
            connection.abort()
            return
        del self._opening[owner]
        self._end_connecting(owner)
        self._open.add(connection)
        self._hand_over(connection, owner)

    def keep(self, connection: UpstreamConnection) -> None:
        """Take a connection back into the pool, or close it if enough are kept."""
        server = connection.server
        if connection not in self._open:
            return
        if len(server.idle) >= self._config.keepalive or server not in self._servers[server.config]:
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
        if self._waiting:
            self._serve_waiting()

    def forget(self, connection: UpstreamConnection) -> None:
        """Take a connection that ends off the books. Idempotent."""
        if connection not in self._open:
            return
        self._open.discard(connection)
        if connection.owner is not None:
            connection.owner = None
            connection.server.in_use -= 1
            self.metrics.values[self.metrics.active] -= 1.0
            if self._waiting:
                asyncio.get_running_loop().call_soon(self._serve_waiting)
        else:
            connection.server.idle.remove(connection)
            self.metrics.values[self.metrics.idle] -= 1.0

    def server_failed(self, server: Server) -> None:
        """Count a request that `server` failed to answer; too many in a row eject it."""
        now_s = monotonic()
        if server.failed(self._config.ejection, now_s):
            # A server that stays away is told of once: one of a name's addresses may never answer at all.
            _log.log(
                logging.WARNING if server.ejections == 1 else logging.DEBUG,
                "server ejected",
                extra=self._names(server)
                | {"failures": server.failures, "seconds": round(server.ejected_until_s - now_s, 1)},
            )
            self.metrics.count_ejection(str(server.config.address))
            self._review()

    def server_answered(self, server: Server) -> None:
        """Take note that `server` answers, after a request that it failed to answer."""
        if server.succeeded():
            _log.info("server answers again", extra=self._names(server))

    def _names(self, server: Server) -> dict[str, object]:
        """What a line of the log says of a server: as it is configured, and which of its name's addresses it is."""
        address = None if server.address == server.config.address else str(server.address)
        return {"upstream": self.name, "server": str(server.config.address), "address": address}

    # Choosing.

    def _choose(self, owner: UpstreamOwner, tried: Collection[Server]) -> Server | None:
        """Return the server to use, or None while all have as many connections as they may. Raises UpstreamError."""
        servers = self._usable
        if tried:
            servers = [server for server in servers if server not in tried]
        if not servers:
            raise UpstreamError(503, "no_server")
        if self._limited:
            servers = [server for server in servers if server.has_room]
            if not servers:
                return None
        if len(servers) == 1:
            return servers[0]
        return self._balancer.pick(servers, b"" if self._hash is None else owner.hash_key(self._hash))

    def _review(self) -> None:
        """Find out again which servers get requests, after something about them has changed."""
        now_s = monotonic()
        healthy = [server for servers in self._servers.values() for server in servers if server.healthy]
        # Ejection is a guess. With nothing else left, ejected servers are better than none.
        self._usable = [server for server in healthy if server.ejected_until_s <= now_s] or healthy
        self._next_return_s = min((s.ejected_until_s for s in healthy if s.ejected_until_s > now_s), default=0.0)
        for config, servers in self._servers.items():
            up = any(server.healthy and server.ejected_until_s <= now_s for server in servers)
            self.metrics.set_server_up(str(config.address), up)
        if self._waiting:
            self._serve_waiting()

    # Waiting.

    def _wait(self, owner: UpstreamOwner, waiting: _Waiting) -> None:
        if len(self._waiting) >= self._config.queue:
            self._fail_soon(owner, UpstreamError(503, "queue_full"))
            return
        self._waiting[owner] = waiting
        self.metrics.values[self.metrics.waiting] += 1.0

    def _end_waiting(self, owner: UpstreamOwner) -> _Waiting:
        self.metrics.values[self.metrics.waiting] -= 1.0
        return self._waiting.pop(owner)

    def _serve_waiting(self) -> None:
        """Give those who have waited longest what has become free."""
        while any(server.has_room for server in self._usable):
            owner = next((owner for owner, waiting in self._waiting.items() if self._has_room_for(waiting)), None)
            if owner is None:
                return
            waiting = self._end_waiting(owner)
            self.acquire(owner, fresh=waiting.fresh, tried=waiting.tried)

    def _has_room_for(self, waiting: _Waiting) -> bool:
        return any(server.has_room and server not in waiting.tried for server in self._usable)

    # Opening.

    def _hand_over(self, connection: UpstreamConnection, owner: UpstreamOwner) -> None:
        connection.owner = owner
        # Until now it was for how long it is kept.
        connection.deadline = math.inf
        self.metrics.values[self.metrics.active] += 1.0
        owner.upstream_ready(connection)

    def _begin_opening(self, owner: UpstreamOwner, server: Server) -> UpstreamConnection:
        """Take a place at `server` for a connection that is to be opened."""
        server.in_use += 1
        connection = self._opening[owner] = UpstreamConnection(self, server, owner)
        return connection

    def _end_opening(self, owner: UpstreamOwner) -> None:
        """Give the place back: there will be no connection."""
        self._opening.pop(owner).server.in_use -= 1
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._serve_waiting)

    async def _connect(self, owner: UpstreamOwner, connection: UpstreamConnection, tried: Collection[Server]) -> None:
        """Open a connection, or one to another server: nothing has been sent, so trying the next is safe."""
        tried = set(tried)
        while (error := await self._connect_to(connection, owner)) is not None:
            self.server_failed(connection.server)
            tried.add(connection.server)
            try:
                other = self._choose(owner, tried)
            except UpstreamError:
                other = None
            if other is None:
                self._fail(owner, error)
                return
            connection = self._begin_opening(owner, other)

    async def _connect_to(self, connection: UpstreamConnection, owner: UpstreamOwner) -> UpstreamError | None:
        """Open a connection; it goes to its owner by itself. Return what went wrong."""
        try:
            preamble = b"" if self._proxy_protocol is None else owner.proxy_header(self._proxy_protocol)
            await self._dialer.open(lambda: connection, connection.server, preamble)
        except UpstreamError as error:
            if self._opening.get(owner) is connection:
                self._end_opening(owner)
                return error
        return None

    def _fail_soon(self, owner: UpstreamOwner, error: UpstreamError) -> None:
        """Tell `owner`, once it has left off asking."""
        self._connecting[owner] = asyncio.get_running_loop().call_soon(self._fail, owner, error)
        self.metrics.values[self.metrics.connecting] += 1.0

    def _fail(self, owner: UpstreamOwner, error: UpstreamError) -> None:
        self._end_connecting(owner)
        owner.upstream_failed(error)

    def _end_connecting(self, owner: UpstreamOwner) -> None:
        del self._connecting[owner]
        self.metrics.values[self.metrics.connecting] -= 1.0

    # Names and health.

    def _resolved(self, config: ServerConfig, addresses: Sequence[Address]) -> None:
        """Take the addresses a name has now: those that stay keep their connections and their state."""
        known = {server.address: server for server in self._servers[config]}
        self._servers[config] = [known.get(address) or Server(config, address) for address in addresses]
        for server in set(known.values()).difference(self._servers[config]):
            for connection in list(server.idle):
                connection.abort()
        _log.info(
            "name resolved",
            extra={"upstream": self.name, "server": str(config.address), "addresses": [str(a) for a in addresses]},
        )
        self._watch_health()
        self._review()

    def _watch_health(self) -> None:
        """Check just those servers that there are."""
        health = self._config.health
        if health is None or not self._started:
            return
        preamble = b"" if self._proxy_protocol is None else own_header(self._proxy_protocol)
        servers = {server for servers in self._servers.values() for server in servers}
        for server in self._checks.keys() - servers:
            self._checks.pop(server).cancel()
        for server in servers - self._checks.keys():
            checker = HealthChecker(health, self._dialer, server, preamble, self._health_changed)
            self._checks[server] = asyncio.get_running_loop().create_task(checker.run())

    def _health_changed(self, server: Server) -> None:
        if server.healthy:
            server.succeeded()
            server.ejected_until_s = 0.0
            _log.info("server is back", extra=self._names(server))
        else:
            _log.warning("server is down", extra=self._names(server))
        self._review()
