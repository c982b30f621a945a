"""The processes that make the load: prepared together, begun together, while the servers' CPU time is taken.

CPU time of the servers counts from the moment when every client process has its connections, to the end of the load.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import signal
import socket
import ssl
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Barrier, BrokenBarrierError
from typing import TYPE_CHECKING

from perf import cpu
from perf.load import LoadResult, LoadType, merged, shares

if TYPE_CHECKING:
    from typing_extensions import Self

_PREPARATION_LIMIT_S = 60.0
_together: Barrier


def client_context(ca_file: Path, tls_version: ssl.TLSVersion | None = None) -> ssl.SSLContext:
    """A context that verifies the server, and speaks one TLS version if given."""
    context = ssl.create_default_context(cafile=ca_file)
    if tls_version is not None:
        context.minimum_version = context.maximum_version = tls_version
    return context


def connect(host: str, port: int, server_name: str, context: ssl.SSLContext) -> ssl.SSLSocket:
    """Connect and complete the handshake, blocking for 10 s at most. Raises OSError."""
    raw = socket.create_connection((host, port), timeout=10)
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        return context.wrap_socket(raw, server_hostname=server_name)
    except BaseException:
        raw.close()
        raise


@dataclass(frozen=True, slots=True)
class Charged:
    """A load's result and the CPU seconds that the servers used meanwhile, by role."""

    result: LoadResult
    cpu_s: Mapping[str, float]


class Clients:
    """Client processes that stay for many loads: a context manager."""

    def __init__(self, processes: int) -> None:
        self.processes = processes
        context = multiprocessing.get_context("spawn")
        self._together = context.Barrier(processes + 1)
        self._executor = ProcessPoolExecutor(
            processes, mp_context=context, initializer=_prepare_process, initargs=(self._together,)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._together.abort()
        self._executor.shutdown(cancel_futures=True)

    def run(
        self, function: Callable[[LoadType, Callable[[], None]], LoadResult], load: LoadType, pids: Mapping[int, str]
    ) -> Charged:
        """Carry out `load`, a share in each process; charge the processes `pids` by role. Raises RuntimeError."""
        parts = shares(load, self.processes)
        if len(parts) < self.processes:
            raise RuntimeError(f"{self.processes} client processes need as many connections; got {load.concurrency}")
        work = functools.partial(_work, function)
        futures = [self._executor.submit(work, part) for part in parts]
        with contextlib.suppress(BrokenBarrierError):
            # Once to see that all are ready, once to let them begin: in between they use no CPU.
            self._together.wait(_PREPARATION_LIMIT_S)
            before = {pid: cpu.cpu_seconds(pid) for pid in pids}
            self._together.wait(_PREPARATION_LIMIT_S)
        try:
            result = merged(future.result() for future in futures)
        except OSError as error:
            raise RuntimeError(f"{load.host}:{load.port}: {error}") from error
        used: dict[str, float] = {}
        for pid, role in pids.items():
            used[role] = used.get(role, 0.0) + cpu.cpu_seconds(pid) - before[pid]
        return Charged(result, used)


def _prepare_process(together: Barrier) -> None:
    # Ctrl-C is the parent's to handle: it ends these with the executor.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    global _together  # noqa: PLW0603  # an executor's initializer has no other way to hand something to the work
    _together = together


def _work(function: Callable[[LoadType, Callable[[], None]], LoadResult], load: LoadType) -> LoadResult:
    try:
        return function(load, _wait_for_all)
    except BaseException:
        _together.abort()
        raise


def _wait_for_all() -> None:
    _together.wait(_PREPARATION_LIMIT_S)
    _together.wait(_PREPARATION_LIMIT_S)
