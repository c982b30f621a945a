"""Health checks: each server is asked from time to time, and whether it gets requests depends on the answers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import cast

from tlsproxy.config import HealthConfig
from tlsproxy.errors import UpstreamError
from tlsproxy.http.codec import ResponseReader
from tlsproxy.serve.dialing import Dialer
from tlsproxy.serve.servers import Server


class HealthChecker:
    """Checks one server until cancelled."""

    def __init__(
        self,
        config: HealthConfig,
        dialer: Dialer,
        server: Server,
        preamble: bytes,
        on_change: Callable[[Server], None],
    ) -> None:
        """`preamble` is what connections begin with, before TLS and all.

        `on_change` is called after `server.healthy` has become another.
        """
        self._config = config
        self._dialer = dialer
        self._server = server
        self._preamble = preamble
        self._on_change = on_change
        self._against = 0
        """Results in a row that speak against what is held to be true."""

    async def run(self) -> None:
        """Check, at once and then at intervals that vary a little, so that processes don't ask all at the same time."""
        while True:
            self._count(await self._is_healthy())
            await asyncio.sleep(self._config.interval_s * random.uniform(0.9, 1.1))  # noqa: S311 - no secret

    def _count(self, healthy: bool) -> None:
        server = self._server
        if healthy is server.healthy:
            self._against = 0
            return
        self._against += 1
        if self._against >= (self._config.rise if healthy else self._config.fall):
            self._against = 0
            server.healthy = healthy
            self._on_change(server)

    async def _is_healthy(self) -> bool:
        config = self._config
        host = self._server.authority if config.host is None else config.host.encode("ascii")
        request = b"" if config.path is None else _request(config.path, host)
        probe = _Probe(request)
        try:
            return await asyncio.wait_for(self._ask(probe), config.timeout_s)
        except (UpstreamError, asyncio.TimeoutError):
            return False
        finally:
            if probe.transport is not None:
                probe.transport.abort()

    async def _ask(self, probe: _Probe) -> bool:
        await self._dialer.open(lambda: probe, self._server, self._preamble)
        return await probe.result


def _request(path: str, host: bytes) -> bytes:
    return b"GET %b HTTP/1.1\r\nHost: %b\r\nUser-Agent: tlsproxy-health\r\nAccept: */*\r\nConnection: close\r\n\r\n" % (
        path.encode("ascii"),
        host,
    )


class _Probe(asyncio.Protocol):
    """Sends one request, if it is not empty, and judges the head of the answer."""

    def __init__(self, request: bytes) -> None:
        self.result: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.transport: asyncio.Transport | None = None
        self._request = request
        self._reader = ResponseReader()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclasses of asyncio's.
        self.transport = cast("asyncio.Transport", transport)
        if self._request:
            self.transport.write(self._request)
        else:
            self._settle(True)

    def data_received(self, data: bytes) -> None:
        self._reader.receive(data)
        try:
            head = self._reader.read_head(b"GET")
            while head is not None and head.status < 200:
                head = self._reader.read_head(b"GET")
        except UpstreamError:
            self._settle(False)
            return
        if head is not None:
            self._settle(head.status < 400)

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        self._settle(False)

    def _settle(self, healthy: bool) -> None:
        if not self.result.done():
            self.result.set_result(healthy)
