"""The supervisor: starts the HSM workers and the proxy workers, watches over them, ends them in order.

It reads no PIN and holds no key. Nothing a client sends ever reaches it, the admin port's requests excepted.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import platform
import signal
from collections.abc import Callable, Mapping
from datetime import datetime, timezone

from prometheus_client import CollectorRegistry

import tlsproxy
from hsm.metrics import FAMILIES as HSM_FAMILIES
from hsm.metrics import TOKEN_UP
from hsm.metricstore import MetricStore, read_samples
from tlsproxy import metrics
from tlsproxy.config import Config
from tlsproxy.errors import StartupError
from tlsproxy.metrics import StoreCollector, merge_stores
from tlsproxy.serve import sockets
from tlsproxy.serve.admin import AdminServer
from tlsproxy.serve.control import NewTicketKeys, ProxyWorkerSpec
from tlsproxy.serve.materials import Material
from tlsproxy.serve.processes import ProxyWorker
from tlsproxy.serve.snapshot import CertificateView, ListenerView, Snapshot, WorkerView
from tlsproxy.serve.tokens import TokenGroups
from tlsproxy.tls._openssl import LIBRARY_VERSION
from tlsproxy.tls.context import TicketKey

TICKET_KEY_LIFETIME_S = 12 * 3600.0
"""A key encrypts session tickets so long, then decrypts them for twice that."""
_OLD_TICKET_KEYS = 2

_logger = logging.getLogger("tlsproxy.supervisor")


class Supervisor:
    """One running proxy."""

    def __init__(
        self, config: Config, materials: Mapping[str, Material], *, on_ready: Callable[[], None] | None = None
    ) -> None:
        """`materials` are the configuration's certificates; `on_ready` is called once clients are served."""
        self._config = config
        self._materials = materials
        self._on_ready = on_ready
        self._store = MetricStore()
        self._ticket_keys: tuple[TicketKey, ...] = (TicketKey.generate(),)
        self._workers: list[ProxyWorker] = []
        self._tokens: TokenGroups
        self._registry = CollectorRegistry()
        self._registry.register(StoreCollector({**metrics.FAMILIES, **HSM_FAMILIES}, self._store_fds))
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._restarts = self._store.counter(metrics.WORKER_RESTARTS)

    async def run(self) -> None:
        """Start everything, serve until SIGTERM or SIGINT, then let connections finish; a second signal cuts them off.

        Raises ConfigError and StartupError.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end)
        async with contextlib.AsyncExitStack() as stack:
            await self._start(stack)
            _logger.info("ready", extra={"workers": len(self._workers), "version": tlsproxy.__version__})
            if self._on_ready is not None:
                self._on_ready()
            await self._stop.wait()
            _logger.info("draining", extra={"timeout_s": self._config.drain_timeout_s})
            await self._drain()
        _logger.info("stopped")

    async def _start(self, stack: contextlib.AsyncExitStack) -> None:
        config = self._config
        stack.callback(self._store.close)
        self._lock_runtime_dir(stack)
        listening = []
        for listener in config.listeners:
            for_each_worker = sockets.listen(listener.address, config.workers, what=listener.origin.path)
            for sock in for_each_worker:
                stack.callback(sock.close)
            listening.append(for_each_worker)
        admin_socket = None
        if config.admin is not None:
            (admin_socket,) = sockets.listen(config.admin.address, 1, what="admin")
            stack.callback(admin_socket.close)
        self._tokens = await stack.enter_async_context(TokenGroups(config))
        await self._tokens.wait_ready(self._materials)
        self._describe()
        environment = self._worker_environment()
        for index in range(config.workers):
            worker = ProxyWorker(
                index, [group[index] for group in listening], self._spec, environment, self._count_restart
            )
            stack.push_async_callback(worker.close)
            self._workers.append(worker)
        await asyncio.gather(*(worker.wait_started() for worker in self._workers))
        if admin_socket is not None:
            admin = AdminServer(admin_socket, self._registry, self._snapshot)
            await admin.start()
            stack.push_async_callback(admin.close)
        rotation = asyncio.create_task(self._rotate_ticket_keys())
        stack.callback(rotation.cancel)

    def _end(self) -> None:
        (self._hurry if self._stop.is_set() else self._stop).set()

    async def _drain(self) -> None:
        drains = [asyncio.create_task(worker.drain(self._config.drain_timeout_s)) for worker in self._workers]
        hurrying = asyncio.create_task(self._hurry.wait())
        drained = asyncio.create_task(asyncio.wait(drains))
        await asyncio.wait({drained, hurrying}, return_when=asyncio.FIRST_COMPLETED)
        for task in (hurrying, drained, *drains):
            task.cancel()

    def _lock_runtime_dir(self, stack: contextlib.AsyncExitStack) -> None:
        """Make the directory of the sockets ours alone. Raises StartupError."""
        directory = self._config.runtime_dir
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartupError(f"runtime_dir: {directory} is in use by another tlsproxy") from None
        except OSError as error:
            raise StartupError(f"runtime_dir: cannot use {directory}: {error.strerror}") from None

    def _spec(self, worker: ProxyWorker) -> ProxyWorkerSpec:
        return ProxyWorkerSpec(
            index=worker.index,
            config=self._config,
            chains={name: material.pem for name, material in self._materials.items()},
            listener_fds=tuple(listener.fileno() for listener in worker.listeners),
            tokens=self._tokens.endpoints,
            metrics_fd=worker.metrics_fd,
            ticket_keys=self._ticket_keys,
        )

    def _worker_environment(self) -> dict[str, str]:
        """Return the environment without PINs, and without Python looking for modules in the working directory."""
        pins = {token.pin_env for token in self._config.hsm.tokens}
        return {name: value for name, value in os.environ.items() if name not in pins} | {"PYTHONSAFEPATH": "1"}

    def _count_restart(self) -> None:
        self._store.values[self._restarts] += 1.0

    async def _rotate_ticket_keys(self) -> None:
        while True:
            await asyncio.sleep(TICKET_KEY_LIFETIME_S)
            self._ticket_keys = (TicketKey.generate(), *self._ticket_keys[:_OLD_TICKET_KEYS])
            for worker in self._workers:
                worker.send(NewTicketKeys(self._ticket_keys))

    def _describe(self) -> None:
        """Put what doesn't change into the metrics, and warn of certificates that clients will refuse."""
        build = (tlsproxy.__version__, platform.python_version(), LIBRARY_VERSION)
        now = datetime.now(timezone.utc)
        for name, material in self._materials.items():
            certificate = material.certificate
            slot = self._store.gauge(metrics.CERTIFICATE_NOT_AFTER, (name,))
            self._store.values[slot] = certificate.not_after.timestamp()
            if not certificate.is_valid_at(now):
                period = {"not_before": certificate.not_before, "not_after": certificate.not_after}
                _logger.warning("certificate is not valid now", extra={"certificate": name, **period})
        self._store.values[self._store.gauge(metrics.BUILD_INFO, build)] = 1.0

    def _store_fds(self) -> list[int]:
        slot = self._store.gauge(metrics.WORKERS_READY)
        self._store.values[slot] = sum(worker.ready for worker in self._workers)
        return [self._store.fd, *(worker.metrics_fd for worker in self._workers), *self._tokens.metrics_fds]

    def _snapshot(self) -> Snapshot:
        handshakes = merge_stores(
            (worker.metrics_fd for worker in self._workers),
            {family.name: family for family in (metrics.HANDSHAKES, metrics.CONNECTIONS)},
        )
        return Snapshot(
            version=tlsproxy.__version__,
            workers=tuple(WorkerView(worker.index, worker.pid, worker.ready) for worker in self._workers),
            tokens=self._tokens_up(),
            certificates=tuple(
                CertificateView(
                    name,
                    material.certificate.dns_names,
                    material.certificate.key_type.value,
                    material.config.tokens,
                    material.certificate.not_after,
                )
                for name, material in self._materials.items()
            ),
            listeners=tuple(_listener_view(str(listener.address), handshakes) for listener in self._config.listeners),
        )

    def _tokens_up(self) -> dict[str, bool]:
        """A worker that is being replaced reaches no token: only those that serve clients are asked."""
        up = {token.name: False for token in self._config.hsm.tokens}
        for worker in self._workers:
            if worker.ready:
                for sample in read_samples(worker.metrics_fd, {TOKEN_UP.name: TOKEN_UP}):
                    if sample.labels[0] in up and sample.values[0] >= 1.0:
                        up[sample.labels[0]] = True
        return up


def _listener_view(address: str, merged: Mapping[str, Mapping[tuple[str, ...], tuple[float, ...]]]) -> ListenerView:
    results = {True: 0.0, False: 0.0}
    for (listener, result, *_), (count,) in merged[metrics.HANDSHAKES.name].items():
        if listener == address:
            results[result == "ok"] += count
    (open_connections,) = merged[metrics.CONNECTIONS.name].get((address,), (0.0,))
    return ListenerView(address, int(open_connections), int(results[True]), int(results[False]))
