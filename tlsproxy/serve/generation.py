"""One configuration in force: its listening sockets, its tokens' workers, its proxy workers.

A reload makes a second generation beside the first. What both need alike, sockets and tokens' workers, they share;
proxy workers are always new, so that none of them ever mixes two configurations.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

from hsm.metricstore import MetricStore
from tlsproxy import metrics
from tlsproxy.config import Config
from tlsproxy.errors import StartupError
from tlsproxy.serve.control import Command, ProxyWorkerSpec
from tlsproxy.serve.materials import Materials
from tlsproxy.serve.processes import ProxyWorker
from tlsproxy.serve.sockets import ListeningSockets, open_sockets
from tlsproxy.serve.tokens import TokenGroups
from tlsproxy.serve.users import identity
from tlsproxy.tls.client_authorities import ClientAuthorities
from tlsproxy.tls.context import TicketKey

_STORE_SLOTS = 2048
_INHERITED = re.compile(
    "PATH|LANG|LANGUAGE|TZ|TMPDIR|GLIBC_TUNABLES|RES_OPTIONS|LOCALDOMAIN|PYTHON.*|(LC|LD|MALLOC|OPENSSL|SSL_CERT|OTEL)_.*"
)
"""The variables that proxy workers get. Others may hold credentials for what signs: AWS's, a PKCS#11 library's."""

_logger = logging.getLogger("tlsproxy.supervisor")


@dataclass(frozen=True, slots=True)
class Host:
    """What the supervisor gives every generation."""

    ticket_keys: Callable[[], tuple[TicketKey, ...]]
    on_restart: Callable[[], None]
    """Called for each proxy worker started in place of another."""
    absorb: Callable[[int], None]
    """Keeps what is counted in a metric store that is about to be closed."""


class Generation:
    """One configuration in force."""

    def __init__(
        self,
        config: Config,
        materials: Materials,
        sockets: ListeningSockets,
        tokens: TokenGroups,
        host: Host,
    ) -> None:
        self.config = config
        self.materials = materials
        self.sockets = sockets
        self.tokens = tokens
        self.workers: list[ProxyWorker] = []
        self._host = host
        self._run_as = identity(config.user, "user")
        self._store = MetricStore(slots=_STORE_SLOTS)
        self._describe_certificates()

    async def start_workers(self) -> None:
        """Start the proxy workers and wait until they accept connections. Raises StartupError."""
        config = self.config
        environment = _worker_environment(config)
        for index in range(config.workers):
            listeners = [
                self.sockets.for_worker(listener.address, index, config.workers) for listener in config.listeners
            ]
            self.workers.append(
                ProxyWorker(index, listeners, self._spec, environment, self._host.on_restart, config.hang_timeout_s)
            )
        await asyncio.gather(*(worker.wait_started() for worker in self.workers))

    def send(self, command: Command) -> None:
        """Send a command to every proxy worker."""
        for worker in self.workers:
            worker.send(command)

    async def drain(self) -> None:
        """Let the proxy workers finish what is under way, for `drain_timeout` at most, and end."""
        await asyncio.gather(*(worker.drain(self.config.drain_timeout_s) for worker in self.workers))

    async def close(self, keep: Sequence[Generation] = ()) -> None:
        """End at once what is still running and does not belong to one of `keep` too."""
        await asyncio.gather(*(worker.close(self._host.absorb) for worker in self.workers))
        await self.tokens.stop([other.tokens for other in keep], self._host.absorb)
        self._store.close()

    @property
    def own_metrics_fd(self) -> int:
        """Where the facts of this configuration are that only count while it is in force."""
        return self._store.fd

    def _spec(self, worker: ProxyWorker) -> ProxyWorkerSpec:
        return ProxyWorkerSpec(
            index=worker.index,
            config=self.config,
            chains={name: material.pem for name, material in self.materials.certificates.items()},
            client_authorities=self.materials.client_authorities,
            listener_fds=tuple(tuple(sock.fileno() for sock in sockets) for sockets in worker.listeners),
            tokens=self.tokens.endpoints,
            metrics_fd=worker.metrics_fd,
            run_as=self._run_as,
            ticket_keys=self._host.ticket_keys(),
        )

    def _describe_certificates(self) -> None:
        """Put into the metrics when certificates expire, and warn of those that clients will refuse."""
        now = datetime.now(timezone.utc)
        for name, material in self.materials.certificates.items():
            certificate = material.certificate
            slot = self._store.gauge(metrics.CERTIFICATE_NOT_AFTER, (name,))
            self._store.values[slot] = certificate.not_after.timestamp()
            if not certificate.is_valid_at(now):
                period = {"not_before": certificate.not_before, "not_after": certificate.not_after}
                _logger.warning("certificate is not valid now", extra={"certificate": name, **period})
        for address, found in self.materials.client_authorities.items():
            self._describe_authorities(str(address), found, now)

    def _describe_authorities(self, listener: str, found: ClientAuthorities, now: datetime) -> None:
        """Do the same for what a listener's clients are verified by: once that has expired, they are refused."""
        self._store.values[self._store.gauge(metrics.CLIENT_CA_NOT_AFTER, (listener,))] = found.not_after.timestamp()
        if found.next_update is not None:
            slot = self._store.gauge(metrics.CLIENT_CRL_NEXT_UPDATE, (listener,))
            self._store.values[slot] = found.next_update.timestamp()
        if not found.cas_are_valid_at(now):
            extra = {"listener": listener, "not_before": found.not_before, "not_after": found.not_after}
            _logger.error("a CA is not valid now, and clients are refused", extra=extra)
        if not found.crls_are_valid_at(now):
            extra_of_crl = {"listener": listener, "this_update": found.this_update, "next_update": found.next_update}
            _logger.error("a CRL is not valid now, and clients are refused", extra=extra_of_crl)


async def bring_up(
    config: Config, materials: Materials, present: Generation | None, sockets: ListeningSockets, host: Host
) -> Generation:
    """Return a new generation that serves, beside the `present` one if there is one; `sockets` are open already.

    Raises ConfigError and StartupError; then nothing has changed.
    """
    try:
        async with contextlib.AsyncExitStack() as undo:
            opened = open_sockets(config, sockets)
            undo.callback(opened.close, keep=sockets)
            kept = [] if present is None else [present]
            tokens = TokenGroups(config, None if present is None else present.tokens)
            undo.push_async_callback(tokens.stop, [generation.tokens for generation in kept], host.absorb)
            generation = Generation(config, materials, opened, tokens, host)
            undo.push_async_callback(generation.close, kept)
            tokens.start()
            await tokens.wait_ready(materials.certificates, all_new=present is not None)
            await generation.start_workers()
            undo.pop_all()
        return generation
    except OSError as error:
        raise StartupError(f"cannot start the workers: {error.strerror}") from None


def _worker_environment(config: Config) -> dict[str, str]:
    """Return what of the environment proxy workers get, and keep Python from the working directory's modules."""
    pins = {token.pin_env for token in config.hsm.tokens}
    inherited = {name: os.environ[name] for name in os.environ if _INHERITED.fullmatch(name) and name not in pins}
    return inherited | {"PYTHONSAFEPATH": "1"}
