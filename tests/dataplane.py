"""The data plane in the test's own process and loop: a ListenerRuntime on a real port, a signer that does as told."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, cast

from hsm.messages import KeyType, SignatureScheme
from hsm.metricstore import MetricStore, read_samples
from hsm.pool import SignerPool
from hsm.pool_request import Signature, SigningKey
from tests.routes import route
from tests.unit.tls.peers import Authority, Client, Signer, client_context
from tlsproxy import metrics
from tlsproxy.config import (
    Address,
    Balance,
    EjectionConfig,
    HashConfig,
    HashSource,
    ListenerConfig,
    ListenerLimits,
    ListenerMode,
    ListenerTimeouts,
    Origin,
    ServerConfig,
    TlsProfile,
    UpstreamConfig,
    UpstreamTimeouts,
)
from tlsproxy.serve.counting import ListenerMetrics, UpstreamMetrics
from tlsproxy.serve.listener import ListenerRuntime
from tlsproxy.serve.upstream import Upstream
from tlsproxy.tls.client_certificates import ClientVerification
from tlsproxy.tls.context import TlsContext
from tlsproxy.tls.events import SignatureNeeded

ORIGIN = Origin("test.yaml", 1, 1, "test")
AUTHORITY = Authority()
SIGNER = Signer(AUTHORITY)
CERTIFICATE = SIGNER.certificate(KeyType.ECDSA_P256, "localhost", name="www")
CLIENT_CONTEXT = client_context(AUTHORITY)
TIMEOUTS = ListenerTimeouts(handshake_s=10, header_s=10, body_idle_s=30, idle_s=60, tunnel_idle_s=3600)
LIMITS = ListenerLimits(
    header_bytes=65536, body_bytes=0, body_rate=0, connections=0, connections_per_client=0, handshakes=0, streams=100
)
UPSTREAM_TIMEOUTS = UpstreamTimeouts(connect_s=2, response_s=30, idle_s=60, queue_s=5)


class TestPool:
    """Signs at once, unless `answer` says otherwise: it is given the future to settle, now, later or never."""

    __test__ = False

    def __init__(self) -> None:
        self.answer: Callable[[asyncio.Future[Signature], Callable[[], Signature]], None] | None = None
        self.futures: list[asyncio.Future[Signature]] = []

    def submit(self, key: object, scheme: SignatureScheme, tbs: bytes) -> asyncio.Future[Signature]:
        """Return the future of a signature, as SignerPool does."""
        assert key is CERTIFICATE
        future: asyncio.Future[Signature] = asyncio.get_running_loop().create_future()
        self.futures.append(future)

        def sign() -> Signature:
            return Signature(SIGNER.sign(SignatureNeeded(CERTIFICATE, scheme, tbs)), "t", 0.001, 0.002)

        if self.answer is None:
            future.set_result(sign())
        else:
            self.answer(future, sign)
        return future


@dataclasses.dataclass
class DataPlane:
    """A running listener."""

    port: int
    runtime: ListenerRuntime
    pool: TestPool
    store: MetricStore
    upstreams: Mapping[str, Upstream]
    clients: list[TlsClient] = dataclasses.field(default_factory=list)

    def counted(self, family: str, *, zeros: bool = False) -> dict[tuple[str, ...], float]:
        """Return the values of a counter or gauge by labels, leaving out the zeros unless asked for."""
        samples = read_samples(self.store.fd, metrics.FAMILIES)
        return {
            sample.labels: sample.values[0]
            for sample in samples
            if sample.family.name == family and (zeros or sample.values[0])
        }

    def observed(self, family: str) -> dict[tuple[str, ...], tuple[float, float]]:
        """Return a histogram's (count, sum) by labels."""
        samples = read_samples(self.store.fd, metrics.FAMILIES)
        return {s.labels: (sum(s.values[:-1]), s.values[-1]) for s in samples if s.family.name == family}

    def sweep(self) -> None:
        """Let all deadlines take effect now, rather than within a second."""
        for upstream in self.upstreams.values():
            upstream.sweep(time.monotonic())
        self.runtime.sweep()

    async def connect(self) -> TlsClient:
        """Return a client whose handshake is complete."""
        client = await self.open()
        await client.shake_hands()
        return client

    async def connect_plain(self) -> TlsClient:
        """Return a client that speaks without TLS."""
        client = await self.open()
        client.tls = _Plain()
        return client

    async def open(self) -> TlsClient:
        """Return a client that has not begun its handshake."""
        client = TlsClient(*await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 20))
        self.clients.append(client)
        return client


def upstream_config(
    name: str, ports: Sequence[int], server_settings: Mapping[str, Any], **changes: Any
) -> UpstreamConfig:
    """Return an upstream of servers at `ports` of 127.0.0.1, with `changes`."""
    plain = UpstreamConfig(
        name=name,
        servers=tuple(
            ServerConfig(
                **{
                    "address": Address("127.0.0.1", port),
                    "weight": 1,
                    "max_connections": 0,
                    **{key: value[i] if isinstance(value, list) else value for key, value in server_settings.items()},
                }
            )
            for i, port in enumerate(ports)
        ),
        balance=Balance.ROUND_ROBIN,
        hash=HashConfig(HashSource.CLIENT_ADDRESS, ""),
        keepalive=32,
        queue=128,
        retries=1,
        resolve_interval_s=30,
        timeouts=UPSTREAM_TIMEOUTS,
        health=None,
        ejection=EjectionConfig(5, 10),
        tls=None,
        proxy_protocol=None,
        origin=ORIGIN,
    )
    return dataclasses.replace(plain, **changes)


@contextlib.asynccontextmanager
async def data_plane(
    ports: int | Sequence[int] | Mapping[str, Sequence[int]],
    *,
    mode: ListenerMode = ListenerMode.HTTP,
    tls: bool = True,
    routes: Sequence[Mapping[str, Any]] = ({},),
    listener: Mapping[str, Any] | None = None,
    limits: Mapping[str, int] | None = None,
    timeouts: Mapping[str, float] | None = None,
    upstream_timeouts: Mapping[str, float] | None = None,
    upstream: Mapping[str, Any] | None = None,
    servers: Mapping[str, Any] | None = None,
    client_verification: ClientVerification | None = None,
) -> AsyncIterator[DataPlane]:
    """Run a listener before the back ends at `ports`: of the upstream `app`, or of several by name.

    `routes`, `listener`, `upstream` and `servers` say what differs from a route of everything to `app` and from plain
    settings; settings of a server may be a list, for each server in turn.
    """
    by_name = ports if isinstance(ports, Mapping) else {"app": [ports] if isinstance(ports, int) else ports}
    store = MetricStore()
    upstreams = {
        name: Upstream(
            upstream_config(
                name,
                server_ports,
                servers or {},
                timeouts=dataclasses.replace(UPSTREAM_TIMEOUTS, **(upstream_timeouts or {})),
                **(upstream or {}),
            ),
            UpstreamMetrics(store, name),
        )
        for name, server_ports in by_name.items()
    }
    listener_timeouts = dataclasses.replace(TIMEOUTS, **(timeouts or {}))
    listener_limits = dataclasses.replace(LIMITS, **(limits or {}))
    inherited = {"body_bytes": listener_limits.body_bytes, "body_idle_s": listener_timeouts.body_idle_s}
    config = ListenerConfig(
        address=Address("127.0.0.1", 0),
        mode=mode,
        certificates=("www",),
        profile=TlsProfile.INTERMEDIATE if tls else None,
        client_certificates=None,
        timeouts=listener_timeouts,
        limits=listener_limits,
        proxy_protocol_from=(),
        trusted_proxies=(),
        forwarded=False,
        http2=False,
        routes=tuple(route(**{**inherited, **changes}) for changes in routes),
        upstream="app" if mode is ListenerMode.TCP else None,
        origin=ORIGIN,
    )
    config = dataclasses.replace(config, **(listener or {}))
    pool = TestPool()
    runtime = ListenerRuntime(
        config,
        tls=TlsContext([CERTIFICATE], alpn_protocols=config.alpn_protocols, client_verification=client_verification)
        if tls
        else None,
        signing_keys=cast("Mapping[str, SigningKey]", {"www": CERTIFICATE}),
        pool=cast("SignerPool", pool),
        upstreams=upstreams,
        metrics=ListenerMetrics(store, "test", tls=tls, asks_for_certificates=client_verification is not None),
    )
    for item in upstreams.values():
        await item.start()
    server = await asyncio.get_running_loop().create_server(runtime, "127.0.0.1", 0)
    runtime.start()
    running = DataPlane(server.sockets[0].getsockname()[1], runtime, pool, store, upstreams)
    try:
        yield running
    finally:
        server.close()
        for client in running.clients:
            client.vanish()
        runtime.close()
        for upstream in upstreams.values():
            upstream.close()
        await until(lambda: runtime.connections == 0)
        # What is kept after the last connection has gone would be a leak.
        for family in (metrics.CONNECTIONS, metrics.HANDSHAKES_IN_FLIGHT, metrics.UPSTREAM_CONNECTIONS):
            await until(lambda family=family: not _values(store, family.name))


def _values(store: MetricStore, family: str) -> list[float]:
    return [s.values[0] for s in read_samples(store.fd, metrics.FAMILIES) if s.family.name == family and s.values[0]]


async def until(condition: Callable[[], Any]) -> None:
    """Wait until `condition` holds; the test's own time limit is what fails."""
    for _ in range(3000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the condition never came to hold")


@dataclasses.dataclass
class Response:
    """A response as the client reads it."""

    status: int
    head: bytes
    body: bytes
    complete: bool

    def field(self, name: str) -> str | None:
        """Return the value of a header field."""
        for line in self.head.split(b"\r\n")[1:]:
            found, _, value = line.partition(b":")
            if found.lower() == name.lower().encode():
                return value.strip().decode()
        return None


class _Plain:
    """What `Client` does, without TLS."""

    closed = False

    def send(self, data: bytes) -> bytes:
        """Return the bytes to send."""
        return data

    def read(self, received: bytes) -> bytes:
        """Take the server's bytes."""
        return received


class TlsClient:
    """A TLS client over a raw socket, so that a test decides about every record and FIN."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.tls: Any = Client(CLIENT_CONTEXT, "localhost")
        self.buffer = b""
        self.end = ""
        """How the proxy has ended the connection: `close_notify`, `fin` (without one) or `reset`."""

    async def shake_hands(self) -> None:
        """Do the handshake. Raises ssl.SSLError or ConnectionError."""
        self.writer.write(self.tls.step())
        while not self.tls.connected:
            data = await self.reader.read(65536)
            if not data:
                raise ConnectionError("the proxy closed during the handshake")
            self.writer.write(self.tls.step(data))
        self.buffer = self.tls.read(b"")

    async def send(self, data: bytes) -> None:
        """Encrypt and send."""
        for start in range(0, len(data), 1 << 16):
            self.writer.write(self.tls.send(data[start : start + (1 << 16)]))
            await self.writer.drain()

    def send_close_notify(self) -> None:
        """Say that no more data will come."""
        self.writer.write(self.tls.close())

    def vanish(self) -> None:
        """Close with a reset."""
        self.writer.transport.abort()

    async def more(self) -> bool:
        """Read and decrypt something; False at the end."""
        if self.end:
            return False
        try:
            data = await asyncio.wait_for(self.reader.read(1 << 18), 30)
        except ConnectionError:
            self.end = "reset"
            return False
        if not data:
            self.end = "fin"
            return False
        self.buffer += self.tls.read(data)
        if self.tls.closed:
            self.end = "close_notify"
        return True

    async def until_end(self) -> bytes:
        """Return everything up to the end."""
        while await self.more():
            pass
        data, self.buffer = self.buffer, b""
        return data

    async def response(self, method: str = "GET") -> Response:
        """Read one response; `complete` tells whether its body came whole."""
        while b"\r\n\r\n" not in self.buffer:
            if not await self.more():
                raise ConnectionError(f"no response; the connection ended with {self.end}")
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        response = Response(int(head.split(b" ")[1]), head, b"", True)
        if method == "HEAD" or response.status < 200 or response.status in (204, 304):
            return response
        length = response.field("content-length")
        if length is not None:
            response.body, response.complete = await self._take(int(length))
        elif response.field("transfer-encoding") == "chunked":
            response.body, response.complete = await self._take_chunks()
        else:
            response.body = await self.until_end()
            response.complete = self.end == "close_notify"
        return response

    async def request(self, head: str, body: bytes = b"", method: str = "GET") -> Response:
        """Send a request and read its response."""
        await self.send(head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)
        return await self.response(method)

    async def _take(self, size: int) -> tuple[bytes, bool]:
        pieces = []
        while size > len(self.buffer):
            size -= len(self.buffer)
            pieces.append(self.buffer)
            self.buffer = b""
            if not await self.more():
                return b"".join(pieces), False
        pieces.append(self.buffer[:size])
        self.buffer = self.buffer[size:]
        return b"".join(pieces), True

    async def _take_chunks(self) -> tuple[bytes, bool]:
        body = []
        while True:
            while b"\r\n" not in self.buffer:
                if not await self.more():
                    return b"".join(body), False
            line, _, self.buffer = self.buffer.partition(b"\r\n")
            data, whole = await self._take(int(line, 16) + 2)
            if not whole:
                return b"".join(body), False
            assert data.endswith(b"\r\n")
            if len(data) == 2:
                return b"".join(body), True
            body.append(data[:-2])


def big(size: int) -> bytes:
    """Return bytes that don't repeat."""
    return os.urandom(size)
