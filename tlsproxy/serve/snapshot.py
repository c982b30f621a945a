"""The state of the whole at one moment, for the admin port."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WorkerView:
    """A proxy worker process."""

    index: int
    pid: int | None
    ready: bool


@dataclass(frozen=True, slots=True)
class CertificateView:
    """A certificate that is served."""

    name: str
    names: tuple[str, ...]
    key_type: str
    tokens: tuple[str, ...]
    not_after: datetime.datetime


@dataclass(frozen=True, slots=True)
class ListenerView:
    """A listener, and what all workers have counted on it."""

    address: str
    connections: int
    handshakes: int
    """Handshakes that succeeded."""
    handshakes_failed: int


@dataclass(frozen=True, slots=True)
class ServerView:
    """A server of an upstream."""

    address: str
    """As configured: a name may stand for several, of which one that gets requests is enough."""
    workers: int
    """Proxy workers that are ready and say whether they send it requests."""
    workers_up: int
    """Those that do."""
    ejections: int
    """In the last minute, by all workers."""

    @property
    def state(self) -> str:
        """`up` (in every worker), `down`, what lies between in words, or `unknown`."""
        if self.workers_up == self.workers:
            return "up" if self.workers else "unknown"
        if self.workers_up:
            return f"down in {self.workers - self.workers_up} of {self.workers} workers"
        return "down"


@dataclass(frozen=True, slots=True)
class UpstreamView:
    """An upstream of the configuration in force."""

    name: str
    servers: tuple[ServerView, ...]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything the admin port shows besides the metrics."""

    version: str
    workers: tuple[WorkerView, ...]
    tokens: Mapping[str, bool]
    """By name: a proxy worker that is ready reaches a worker of this token."""
    certificates: tuple[CertificateView, ...]
    listeners: tuple[ListenerView, ...]
    upstreams: tuple[UpstreamView, ...]

    @property
    def workers_ready(self) -> int:
        """Proxy workers that accept connections."""
        return sum(worker.ready for worker in self.workers)

    @property
    def healthy(self) -> bool:
        """At least one proxy worker accepts connections."""
        return self.workers_ready > 0

    @property
    def ready(self) -> bool:
        """A new client can be served: a worker accepts connections and reaches a token that signs."""
        return self.healthy and any(self.tokens.values())
