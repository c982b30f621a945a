"""The servers of an upstream, as one process sees them, and which one is next."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from tlsproxy.config import Address, Balance, EjectionConfig, ServerConfig, UnixAddress

if TYPE_CHECKING:
    from tlsproxy.serve.upstream_connection import UpstreamConnection

_MAX_DOUBLINGS = 3
"""A server that goes on failing is tried less and less often, down to an eighth of how often it is at first."""


class Server:
    """One address that answers, with its idle connections (the last used is taken first)."""

    __slots__ = (
        "_hash",
        "address",
        "authority",
        "config",
        "ejected_until_s",
        "ejections",
        "failures",
        "healthy",
        "idle",
        "in_use",
        "smooth_weight",
        "weight",
    )

    def __init__(self, config: ServerConfig, address: Address | UnixAddress) -> None:
        """`address` is what to connect to: the configured one, or one that its name stands for."""
        self.config = config
        self.address = address
        self.authority = b"localhost" if isinstance(config.address, UnixAddress) else str(config.address).encode()
        """What Host says if the client sent none."""
        self.weight = config.weight
        self.idle: list[UpstreamConnection] = []
        self.in_use = 0
        """Connections that are being opened or have an owner."""
        self.healthy = True
        """As the health checks say."""
        self.failures = 0
        """Requests in a row that it failed to answer."""
        self.ejected_until_s = 0.0
        self.ejections = 0
        """In a row: it has answered none of the requests in between."""
        self.smooth_weight = 0
        self._hash = hashlib.blake2b(str(address).encode() + b"\0", digest_size=8)

    @property
    def has_room(self) -> bool:
        """It may get one more connection."""
        limit = self.config.max_connections
        return not limit or self.in_use < limit

    def failed(self, ejection: EjectionConfig, now_s: float) -> bool:
        """Take note of a request that failed; return whether that ejects the server."""
        self.failures += 1
        if not ejection.failures or self.failures < ejection.failures or self.ejected_until_s > now_s:
            return False
        # It keeps its failures: when it comes back, the first one more ejects it again, for longer.
        self.ejected_until_s = now_s + ejection.duration_s * 2 ** min(self.ejections, _MAX_DOUBLINGS)
        self.ejections += 1
        return True

    def succeeded(self) -> bool:
        """Take note of a request that it answered; return whether it had been ejected since the last one."""
        was_ejected = self.ejections > 0
        self.failures = self.ejections = 0
        return was_ejected

    def score(self, key: bytes) -> float:
        """Return how much `key` wants to go here, for weighted rendezvous hashing."""
        state = self._hash.copy()
        state.update(key)
        fraction = (int.from_bytes(state.digest(), "big") + 1) / (1 << 64)
        return self.weight / -math.log(fraction) if fraction < 1 else math.inf


class Balancer(Protocol):
    """Chooses a server."""

    def pick(self, servers: Sequence[Server], key: bytes) -> Server:
        """Return one of `servers`, which are at least one; `key` is what requests that belong together share."""


class RoundRobin:
    """Servers take turns, those with more weight more often, and spread evenly between the others' turns."""

    def pick(self, servers: Sequence[Server], key: bytes) -> Server:  # noqa: ARG002 - a Balancer
        """Return the next in turn."""
        best = servers[0]
        total = 0
        for server in servers:
            total += server.weight
            server.smooth_weight += server.weight
            if server.smooth_weight > best.smooth_weight:
                best = server
        best.smooth_weight -= total
        return best


class LeastConnections:
    """The server with the fewest connections in use for its weight; among equals they take turns."""

    def __init__(self) -> None:
        self._turn = 0

    def pick(self, servers: Sequence[Server], key: bytes) -> Server:  # noqa: ARG002 - a Balancer
        """Return the least busy."""
        self._turn += 1
        start = self._turn % len(servers)
        return min((*servers[start:], *servers[:start]), key=lambda server: server.in_use / server.weight)


class ConsistentHash:
    """Rendezvous hashing: while a server stays, what went to it still does, whatever happens to the others."""

    def pick(self, servers: Sequence[Server], key: bytes) -> Server:
        """Return the server that `key` belongs to."""
        return max(servers, key=lambda server: server.score(key))


_BALANCERS: Mapping[Balance, Callable[[], Balancer]] = {
    Balance.ROUND_ROBIN: RoundRobin,
    Balance.LEAST_CONNECTIONS: LeastConnections,
    Balance.CONSISTENT_HASH: ConsistentHash,
}


def make_balancer(balance: Balance) -> Balancer:
    """Return the balancer of that name."""
    return _BALANCERS[balance]()
