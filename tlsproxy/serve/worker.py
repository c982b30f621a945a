"""A proxy worker: `python -m tlsproxy.serve.worker FD`, the process that serves clients. It holds no private key.

FD is its end of the supervisor's control socket (serve.control). What it serves is told there, once; it ends when it
is told to drain, on SIGTERM, or when the supervisor is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import signal
import socket
import sys
from collections.abc import Sequence
from time import monotonic
from typing import TYPE_CHECKING

import uvloop

from hsm import logs
from hsm.metricstore import MetricStore
from hsm.pool import SignerPool
from hsm.seal import become, forbid_new_privileges, leave_terminal
from tlsproxy import metrics
from tlsproxy.config import ClientVerify, ListenerConfig
from tlsproxy.serve.anatomy import SlowHandshake
from tlsproxy.serve.control import (
    HEARTBEAT_S,
    Drain,
    NewTicketKeys,
    ProxyWorkerSpec,
    State,
    Status,
    decode_commands,
    slow_handshake_line,
)
from tlsproxy.serve.counting import ListenerMetrics, UpstreamMetrics
from tlsproxy.serve.handshake import HANDSHAKE_LOG
from tlsproxy.serve.listener import ListenerRuntime
from tlsproxy.serve.responder import ACCESS_LOG
from tlsproxy.serve.sandbox import confine
from tlsproxy.serve.sockets import BACKLOG
from tlsproxy.serve.upstream import Upstream
from tlsproxy.tls.certificates import Certificate, load_chain
from tlsproxy.tls.client_certificates import ClientVerification
from tlsproxy.tls.context import TlsContext, TlsProfile

if TYPE_CHECKING:
    from tlsproxy.serve.span_export import SpanExport

ORPHAN_DRAIN_S = 5.0
"""How long connections may take to finish once the supervisor is gone: nobody else will end this process."""
_DRAIN_POLL_S = 0.05
_LAG_INTERVAL_S = 0.25
_SPANS_DRAIN_S = 2.0
_TOKENS_TIMEOUT_S = 3.0
"""Even while a certificate's tokens are all away, resumed sessions and other certificates work."""
_UPSTREAM_SWEEP_S = 1.0
_MAX_SPEC_READ = 1 << 16

_logger = logging.getLogger("tlsproxy.worker")


class Worker:
    """Everything one process serves."""

    def __init__(self, spec: ProxyWorkerSpec) -> None:
        """Build it all; nothing is accepted yet. Raises CertificateError."""
        self._spec = spec
        config = spec.config
        self._store = MetricStore(spec.metrics_fd)
        self.pool = SignerPool(
            spec.tokens,
            sign_deadline_s=config.hsm.sign_deadline_s,
            max_pending=config.hsm.max_pending,
            metrics=self._store,
        )
        self._span_export: SpanExport | None = None
        tracing = None
        if config.tracing is not None:
            # Its packages are optional, and large.
            from tlsproxy.serve.span_export import SpanExport
            from tlsproxy.serve.tracing import Tracing

            self._span_export = SpanExport(config.tracing, self._store)
            tracing = Tracing(self._span_export.provider, config.tracing.sample)
        self._upstreams = {
            upstream.name: Upstream(upstream, UpstreamMetrics(self._store, upstream.name))
            for upstream in config.upstreams
        }
        certificates = {
            item.name: load_chain(item.name, spec.chains[item.name], str(item.chain_file))
            for item in config.certificates
        }
        signing_keys = {
            item.name: self.pool.key(item.key, item.tokens, certificates[item.name].public_key)
            for item in config.certificates
        }
        self._listeners = []
        for listener in config.listeners:
            tls = None
            if listener.profile is not None:
                tls = self._tls_context(
                    listener,
                    [certificates[name] for name in listener.certificates],
                    TlsProfile(listener.profile.value),
                )
            self._listeners.append(
                ListenerRuntime(
                    listener,
                    tls=tls,
                    signing_keys={name: signing_keys[name] for name in listener.certificates},
                    pool=self.pool,
                    upstreams=self._upstreams,
                    metrics=ListenerMetrics(
                        self._store,
                        str(listener.address),
                        tls=tls is not None,
                        asks_for_certificates=listener.client_certificates is not None,
                    ),
                    tracing=tracing,
                )
            )
        self._lag = self._store.histogram(metrics.EVENT_LOOP_LAG)
        self._accepting: list[tuple[ListenerRuntime, socket.socket, asyncio.Server]] = []
        self._periodic: list[asyncio.Task[None]] = []

    def _tls_context(
        self, listener: ListenerConfig, certificates: Sequence[Certificate], profile: TlsProfile
    ) -> TlsContext:
        context = TlsContext(
            certificates,
            profile=profile,
            alpn_protocols=listener.alpn_protocols,
            client_verification=self._client_verification(listener),
        )
        context.set_ticket_keys(self._spec.ticket_keys)
        return context

    def _client_verification(self, listener: ListenerConfig) -> ClientVerification | None:
        clients = listener.client_certificates
        if clients is None:
            return None
        authorities = self._spec.client_authorities[listener.address]
        return ClientVerification(authorities, clients.verify is ClientVerify.REQUIRED, clients.depth)

    async def start(self) -> None:
        """Accept connections, on the sockets inherited, once tokens are reached or _TOKENS_TIMEOUT_S is over."""
        await self.pool.start()
        try:
            await asyncio.wait_for(self._reach_tokens(), _TOKENS_TIMEOUT_S)
        except asyncio.TimeoutError:
            _logger.warning("serving with tokens away", extra={"tokens_up": sorted(self.pool.tokens_up())})
        await asyncio.gather(*(upstream.start() for upstream in self._upstreams.values()))
        loop = asyncio.get_running_loop()
        for runtime, fds in zip(self._listeners, self._spec.listener_fds, strict=True):
            runtime.start()
            for fd in fds:
                listening = socket.socket(fileno=fd)
                server = await loop.create_server(runtime, sock=listening.dup(), backlog=BACKLOG)
                self._accepting.append((runtime, listening, server))
        self._periodic = [asyncio.create_task(self._measure_lag()), asyncio.create_task(self._sweep_upstreams())]

    async def _reach_tokens(self) -> None:
        """Wait until one of each certificate's tokens is up."""
        changed = asyncio.Event()
        self.pool.on_change.append(changed.set)
        try:
            while not all(self.pool.tokens_up() & set(item.tokens) for item in self._spec.config.certificates):
                await changed.wait()
                changed.clear()
        finally:
            self.pool.on_change.remove(changed.set)

    def set_ticket_keys(self, command: NewTicketKeys) -> None:
        """Use other session ticket keys on every listener."""
        for runtime in self._listeners:
            if runtime.tls is not None:
                runtime.tls.set_ticket_keys(command.keys)

    async def drain(self, deadline_s: float) -> None:
        """Accept no more, let what is under way finish for `deadline_s` at most, cut off the rest."""
        for runtime, listening, server in self._accepting:
            server.close()
            await _take_backlog(listening, runtime)
            listening.close()
        # A connection just accepted is counted when the loop has told its protocol, which is one step later.
        await asyncio.sleep(0)
        for runtime in self._listeners:
            runtime.drain()
        deadline = monotonic() + deadline_s
        # Polled: this happens once, whereas an event would be paid for by every connection that closes.
        while (left := sum(runtime.connections for runtime in self._listeners)) and monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(_DRAIN_POLL_S)
        if left:
            _logger.warning("drain timed out, connections cut off", extra={"connections": left})
        for task in self._periodic:
            task.cancel()
        for runtime in self._listeners:
            runtime.close()
        for upstream in self._upstreams.values():
            upstream.close()
        await self.pool.close()
        if self._span_export is not None:
            await self._span_export.close(_SPANS_DRAIN_S)

    def take_slow_handshakes(self) -> list[SlowHandshake]:
        """Return the slowest handshakes that no earlier call has returned."""
        found = []
        for runtime in self._listeners:
            runtime.metrics.slowest.rotate()
            found += runtime.metrics.slowest.take_new()
        return found

    async def _measure_lag(self) -> None:
        while True:
            expected = monotonic() + _LAG_INTERVAL_S
            await asyncio.sleep(_LAG_INTERVAL_S)
            self._lag.observe(max(0.0, monotonic() - expected))

    async def _sweep_upstreams(self) -> None:
        while True:
            await asyncio.sleep(_UPSTREAM_SWEEP_S)
            for upstream in self._upstreams.values():
                upstream.sweep(monotonic())


async def _take_backlog(listening: socket.socket, runtime: ListenerRuntime) -> None:
    """Accept the clients that wait: when the last copy of the socket is closed, the kernel resets them."""
    loop = asyncio.get_running_loop()
    listening.setblocking(False)
    for _ in range(BACKLOG):
        try:
            connection, _ = listening.accept()
        except OSError:
            return
        with contextlib.suppress(OSError):
            await loop.connect_accepted_socket(runtime, connection)


async def _serve(spec: ProxyWorkerSpec, control: socket.socket, received: bytearray) -> None:
    worker = Worker(spec)
    await worker.start()
    reader, writer = await asyncio.open_connection(sock=control)
    heartbeat = asyncio.create_task(_tell_supervisor(worker, writer))
    deadline_s = await wait_for_drain(worker, reader, received, spec.config.drain_timeout_s)
    heartbeat.cancel()
    writer.write(Status(State.DRAINING).to_line())
    await worker.drain(deadline_s)
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


async def _tell_supervisor(worker: Worker, writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(Status(State.READY).to_line())
        writer.writelines(slow_handshake_line(handshake) for handshake in worker.take_slow_handshakes())
        await asyncio.sleep(HEARTBEAT_S)


async def wait_for_drain(
    worker: Worker, reader: asyncio.StreamReader, received: bytearray, own_deadline_s: float
) -> float:
    """Obey the supervisor until it is time to end; return how long connections may take to finish."""
    drain: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    def end_within(seconds: float) -> None:
        if not drain.done():
            drain.set_result(seconds)

    async def obey() -> None:
        data = b""
        while True:
            received.extend(data)
            for command in decode_commands(received):
                if isinstance(command, NewTicketKeys):
                    worker.set_ticket_keys(command)
                elif isinstance(command, Drain):
                    end_within(command.deadline_s)
            try:
                data = await reader.read(_MAX_SPEC_READ)
            except ConnectionError:
                # It was killed before it had read all that we had said.
                data = b""
            if not data:
                end_within(ORPHAN_DRAIN_S)
                return

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, end_within, own_deadline_s)
    obeying = asyncio.create_task(obey())
    try:
        return await drain
    finally:
        obeying.cancel()


def _receive_spec(control: socket.socket) -> tuple[ProxyWorkerSpec, bytearray]:
    """Return the specification, and what has come after it. Raises EOFError if the supervisor is gone."""
    received = bytearray()
    while True:
        data = control.recv(_MAX_SPEC_READ)
        if not data:
            raise EOFError
        received += data
        for command in decode_commands(received):
            assert isinstance(command, ProxyWorkerSpec)
            return command, received


def _configure_log(spec: ProxyWorkerSpec) -> None:
    log = spec.config.log
    logs.configure(log.level.value, log.format.value, f"proxy-{spec.index}", sample_above=log.sample_above)
    for wanted, logger in ((log.access, ACCESS_LOG), (log.handshakes, HANDSHAKE_LOG)):
        if not wanted:
            logging.getLogger(logger).setLevel(logging.WARNING)


def main(arguments: Sequence[str]) -> int:
    """Run the worker; return its exit code."""
    # When a worker ends is for the supervisor to decide, not for who interrupts all that belongs together.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control = socket.socket(fileno=int(arguments[0]))
    try:
        spec, received = _receive_spec(control)
    except (EOFError, OSError):
        return 1
    _configure_log(spec)
    try:
        leave_terminal()
        become(spec.run_as)
        forbid_new_privileges()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        _, descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))
        abi = confine(spec.config)
        _logger.info("confined" if abi else "not confined: this kernel has no Landlock", extra={"landlock": abi})
        uvloop.run(_serve(spec, control, received))
    except Exception as error:
        _logger.exception("proxy worker failed")
        with contextlib.suppress(OSError):
            control.sendall(Status(State.FAILED, f"{type(error).__name__}: {error}").to_line())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
