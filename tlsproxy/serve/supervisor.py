"""The supervisor: starts the HSM workers and the proxy workers, watches over them, replaces and ends them in order.

It reads no PIN and holds no key. Nothing a client sends ever reaches it, the admin port's requests excepted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import tlsproxy
from hsm.errors import HsmError
from tlsproxy.config import Config
from tlsproxy.config_yaml import load_config
from tlsproxy.errors import ConfigError, StartupError
from tlsproxy.serve.admin import AdminServer
from tlsproxy.serve.command_socket import CommandServer
from tlsproxy.serve.control import NewTicketKeys
from tlsproxy.serve.figures import Figures
from tlsproxy.serve.generation import Generation, Host, bring_up
from tlsproxy.serve.materials import Materials, file_versions, load_materials
from tlsproxy.serve.rates import SAMPLE_INTERVAL_S
from tlsproxy.serve.runtime_directory import RuntimeDirectory
from tlsproxy.serve.service_manager import ServiceManager
from tlsproxy.serve.sockets import NO_SOCKETS, ListeningSockets
from tlsproxy.serve.takeover import Predecessor, hand_over
from tlsproxy.tls.context import TicketKey

TICKET_KEY_LIFETIME_S = 12 * 3600.0
"""A key encrypts session tickets so long, then decrypts them for twice that."""
_OLD_TICKET_KEYS = 2
WATCH_INTERVAL_S = 2.0

_logger = logging.getLogger("tlsproxy.supervisor")


class Supervisor:
    """One running proxy."""

    def __init__(
        self,
        config_file: str,
        config: Config,
        materials: Materials,
        *,
        inherited: ListeningSockets = NO_SOCKETS,
        predecessor: Predecessor | None = None,
        on_ready: Callable[[], None] | None = None,
    ) -> None:
        """`config` is what is in `config_file`, `materials` what it refers to; `on_ready` is called once it serves.

        `inherited` are sockets opened by the service manager; or there is a `predecessor` that serves until we do.
        """
        self._config_file = config_file
        self._config = config
        self._materials = materials
        self._inherited = inherited if predecessor is None else predecessor.sockets
        self._predecessor = predecessor
        self._on_ready = on_ready
        self._service_manager = ServiceManager()
        self._handed_over = False
        # Its keys go on aging: new tickets are made with one of our own.
        old_keys = () if predecessor is None else predecessor.ticket_keys[:_OLD_TICKET_KEYS]
        self._ticket_keys: tuple[TicketKey, ...] = (TicketKey.generate(), *old_keys)
        self._generations: list[Generation] = []
        """The one in force first, then those that are draining."""
        self._figures = Figures(lambda: self._generations)
        self._figures.ticket_key_made()
        self._host = Host(lambda: self._ticket_keys, self._figures.count_restart, self._figures.absorb)
        self._admin: AdminServer | None = None
        self._reloading = asyncio.Lock()
        self._reload_task: asyncio.Task[Any] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._stopped = asyncio.Event()

    async def run(self) -> None:
        """Start everything, serve until SIGTERM or SIGINT, then let connections finish; a second signal cuts them off.

        SIGHUP loads the configuration anew. Raises ConfigError and StartupError.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end)
        loop.add_signal_handler(signal.SIGHUP, lambda: self._spawn(self._reload_on_signal()))
        async with contextlib.AsyncExitStack() as stack:
            if not await self._is_started(stack):
                _logger.info("told to end before it served")
                return
            if os.geteuid() == 0 and None in (self._config.user, self._config.hsm_user):
                _logger.warning("workers run as root: set user and hsm_user")
            _logger.info("ready", extra={"workers": self._config.workers, "version": tlsproxy.__version__})
            self._service_manager.ready()
            if self._on_ready is not None:
                self._on_ready()
            await self._stop.wait()
            self._service_manager.stopping()
            _logger.info("draining", extra={"timeout_s": self._current.config.drain_timeout_s})
            await self._drain()
            self._stopped.set()
            # The next step ends the processes: whoever asked to drain hears of it before.
            await asyncio.sleep(0)
        _logger.info("stopped")

    @property
    def _current(self) -> Generation:
        return self._generations[0]

    async def _is_started(self, stack: contextlib.AsyncExitStack) -> bool:
        """Start, and tell whether we serve; not if we were told to end meanwhile: then a predecessor serves on."""
        # A reload that is asked for now may be for the sake of files that have been read already: it comes after.
        async with self._reloading:
            starting = asyncio.create_task(self._start(stack))
            stopping = asyncio.create_task(self._stop.wait())
            await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            starting.cancel()
            await asyncio.wait((starting,))
            if starting.cancelled():
                return False
            await starting
            return True

    async def _start(self, stack: contextlib.AsyncExitStack) -> None:
        stack.callback(self._figures.close)
        lock_fd = None if self._predecessor is None else self._predecessor.lock_fd
        self._runtime_directory = RuntimeDirectory(self._config.runtime_dir, self._config.user, lock_fd)
        stack.callback(self._runtime_directory.close)
        stack.push_async_callback(self._close)
        generation = await bring_up(self._config, self._materials, None, self._inherited, self._host)
        self._generations.append(generation)
        await self._serve_admin()
        commands = CommandServer(self._runtime_directory.command_socket, self)
        stack.push_async_callback(commands.close)
        await commands.start()
        if self._predecessor is not None:
            self._predecessor.retire()
            self._inherited.close(keep=generation.sockets)
        if self._service_manager.watchdog_s is not None:
            self._spawn(self._feed_watchdog(self._service_manager.watchdog_s))
        self._spawn(self._rotate_ticket_keys())
        self._spawn(self._take_samples())
        self._spawn(self._watch_certificates())

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._admin is not None:
            await self._admin.close()
        for generation in self._generations:
            generation.sockets.close(keep=NO_SOCKETS)
            await generation.close()

    def _end(self) -> None:
        (self._hurry if self._stop.is_set() else self._stop).set()

    async def _drain(self) -> None:
        if self._reload_task is not None:
            self._reload_task.cancel()
        if self._handed_over and self._admin is not None:
            # The successor answers on the admin port now: its counts and ours must not alternate.
            await self._admin.close()
            self._admin = None
        async with self._reloading:
            # While any copy of a listening socket is open, clients are taken into its backlog and wait for nobody.
            keep = self._current.sockets.only(None if (admin := self._current.config.admin) is None else admin.address)
            self._current.sockets.close(keep)
            drains = [asyncio.create_task(generation.drain()) for generation in self._generations]
            hurrying = asyncio.create_task(self._hurry.wait())
            drained = asyncio.create_task(asyncio.wait(drains))
            await asyncio.wait({drained, hurrying}, return_when=asyncio.FIRST_COMPLETED)
            for task in (hurrying, drained, *drains):
                task.cancel()

    # What operators ask for.

    async def drain(self) -> None:
        """End as on SIGTERM; return when every connection has ended."""
        self._stop.set()
        await self._stopped.wait()

    def status(self) -> dict[str, Any]:
        """Return the state of the whole, as JSON has it."""
        return self._figures.status()

    def hand_over(self, connection: socket.socket) -> None:
        """Send sockets and ticket keys to a successor, and serve on until it says drain. Raises StartupError."""
        if self._stop.is_set():
            raise StartupError("hand over: expected a proxy that serves; it is draining")
        hand_over(connection, self._runtime_directory.lock_fd, self._current.sockets, self._ticket_keys)
        self._handed_over = True
        _logger.info("listening sockets and ticket keys handed over to a successor")

    async def reload(self) -> None:
        """Load the configuration and all it names anew, and serve by it; the old state ends its connections and goes.

        Raises ConfigError and StartupError; then the old state serves on.
        """
        await self._change(lambda: load_config(self._config_file))

    async def _change(self, load: Callable[[], Config]) -> None:
        """Serve by the configuration that `load` returns. Raises what reload does."""
        try:
            async with self._reloading:
                if self._stop.is_set():
                    raise StartupError("reload: expected a proxy that serves; it is draining")
                self._reload_task = asyncio.current_task()
                self._service_manager.reloading()
                try:
                    config = await asyncio.to_thread(load)
                    self._expect_same_directory(config)
                    await self._replace(config, await asyncio.to_thread(load_materials, config))
                finally:
                    self._reload_task = None
                    if not self._stop.is_set():
                        self._service_manager.ready()
        except (ConfigError, StartupError, HsmError) as error:
            self._figures.count_reload("failure")
            for line in str(error).splitlines():
                _logger.error("reload failed, the old state serves on", extra={"error": line})
            raise
        self._figures.count_reload("success")
        _logger.info("reloaded", extra={"workers": self._current.config.workers})

    async def _reload_on_signal(self) -> None:
        with contextlib.suppress(ConfigError, StartupError, HsmError):
            await self.reload()

    async def _watch_certificates(self) -> None:
        """Where it is wanted, serve by changed files of the configuration in force, once they have stopped changing."""
        config = self._current.config
        served = before = file_versions(config)
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            if self._current.config is not config:
                config = self._current.config
                served = before = file_versions(config)
            found = file_versions(config)
            if config.watch_certificates and found == before != served:
                _logger.info("certificates, CRLs or soft tokens have changed")
                served = found
                with contextlib.suppress(ConfigError, StartupError, HsmError):
                    await self._change(lambda: self._current.config)
            before = found

    async def _replace(self, config: Config, materials: Materials) -> None:
        old = self._current
        new = await bring_up(config, materials, old, old.sockets, self._host)
        self._generations.insert(0, new)
        old.sockets.close(keep=new.sockets)
        self._spawn(self._retire(old))
        if config.admin != old.config.admin:
            await self._serve_admin()

    async def _retire(self, old: Generation) -> None:
        await old.drain()
        await old.close([generation for generation in self._generations if generation is not old])
        self._generations.remove(old)

    def _expect_same_directory(self, config: Config) -> None:
        present = self._current.config
        for key in ("runtime_dir", "user"):
            old, new = getattr(present, key), getattr(config, key)
            if old != new:
                raise StartupError(f"{key}: expected {old}, as it can change only by a restart; got {new}")

    async def _serve_admin(self) -> None:
        """Answer on the admin port of the generation in force, and no longer on another."""
        previous, self._admin = self._admin, None
        if previous is not None:
            await previous.close()
        admin = self._current.config.admin
        if admin is not None:
            (listening,) = self._current.sockets.for_worker(admin.address, 0, 1)
            self._admin = AdminServer(listening.dup(), self._figures)
            await self._admin.start()

    async def _rotate_ticket_keys(self) -> None:
        while True:
            await asyncio.sleep(TICKET_KEY_LIFETIME_S)
            # Workers that a reload is starting have been told of the keys there were.
            async with self._reloading:
                self._ticket_keys = (TicketKey.generate(), *self._ticket_keys[:_OLD_TICKET_KEYS])
                self._figures.ticket_key_made()
                for generation in self._generations:
                    generation.send(NewTicketKeys(self._ticket_keys))

    async def _feed_watchdog(self, interval_s: float) -> None:
        while True:
            self._service_manager.alive()
            await asyncio.sleep(interval_s)

    async def _take_samples(self) -> None:
        while True:
            self._figures.take_sample()
            await asyncio.sleep(SAMPLE_INTERVAL_S)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
