"""The load client: full TLS handshakes from non-blocking sockets, in as many processes as asked.

Closed loop: `concurrency` connections are kept under way until `count` are done. Each one is a full handshake with the
chain verified, proven unresumed, then close_notify and the server's end of the connection, so that the server has
finished its part as well when the connection counts as done. Latency runs from connect() to the end of the client's
handshake.
"""

from __future__ import annotations

import multiprocessing
import selectors
import socket
import ssl
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path


@dataclass(frozen=True, slots=True)
class HandshakeLoad:
    """What to do: `count` handshakes in all, `concurrency` at a time, shared by `processes`."""

    host: str
    port: int
    server_name: str
    ca_file: Path
    count: int
    concurrency: int
    processes: int = 1
    tls_version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3
    give_up_s: float = 120.0
    """The whole run ends then, whatever is left."""


@dataclass(slots=True)
class LoadResult:
    """What came of it. Latencies are seconds, in order of completion."""

    completed: int = 0
    resumed: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    latencies_s: list[float] = field(default_factory=list)
    elapsed_s: float = 0.0
    client_cpu_s: float = 0.0

    @property
    def failed(self) -> int:
        """Connections that ended in any error."""
        return sum(self.failures.values())

    @property
    def per_second(self) -> float:
        """Completed handshakes a second."""
        return self.completed / self.elapsed_s if self.elapsed_s else 0.0


def quantile(values: Sequence[float], q: float) -> float:
    """The nearest-rank quantile; NaN of nothing."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


class _Connection:
    """One connection's way through connect, handshake, close."""

    __slots__ = ("handshaken", "started", "tls")

    def __init__(self, load: HandshakeLoad, context: ssl.SSLContext) -> None:
        raw = socket.socket(socket.AF_INET6 if ":" in load.host else socket.AF_INET)
        raw.setblocking(False)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.started = time.perf_counter()
        self.handshaken: float | None = None
        raw.connect_ex((load.host, load.port))
        self.tls = context.wrap_socket(
            raw, server_hostname=load.server_name, do_handshake_on_connect=False, suppress_ragged_eofs=False
        )

    def advance(self) -> int | None:
        """Do what can be done. Return the selector events to wait for, or None when finished. Raises OSError."""
        try:
            if self.handshaken is None:
                self.tls.do_handshake()
                self.handshaken = time.perf_counter()
            self.tls.unwrap()
        except ssl.SSLWantReadError:
            return selectors.EVENT_READ
        except ssl.SSLWantWriteError:
            return selectors.EVENT_WRITE
        except ssl.SSLEOFError:
            # nginx answers close_notify by closing: the end is as good, but only after the handshake.
            if self.handshaken is None:
                raise
        return None


def client_context(ca_file: Path, tls_version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
    """A context that verifies the server and speaks one TLS version."""
    context = ssl.create_default_context(cafile=ca_file)
    context.minimum_version = context.maximum_version = tls_version
    return context


def _run_one_process(load: HandshakeLoad) -> LoadResult:
    context = client_context(load.ca_file, load.tls_version)
    result = LoadResult()
    cpu_before = time.process_time()
    selector = selectors.DefaultSelector()
    started = time.perf_counter()
    give_up_at = started + load.give_up_s
    begun = 0
    under_way = 0

    def fail(reason: str) -> None:
        result.failures[reason] = result.failures.get(reason, 0) + 1

    while under_way or begun < load.count:
        while under_way < load.concurrency and begun < load.count:
            connection = _Connection(load, context)
            selector.register(connection.tls, selectors.EVENT_WRITE, connection)
            begun += 1
            under_way += 1
        for key, _ in selector.select(timeout=1.0):
            connection = key.data
            try:
                wanted = connection.advance()
            except OSError as error:
                fail(getattr(error, "reason", None) or type(error).__name__)
            else:
                if wanted is not None:
                    if wanted != key.events:
                        selector.modify(connection.tls, wanted, connection)
                    continue
                result.completed += 1
                result.resumed += bool(connection.tls.session_reused)
                result.latencies_s.append(connection.handshaken - connection.started)
            selector.unregister(key.fileobj)
            connection.tls.close()
            under_way -= 1
        if time.perf_counter() > give_up_at:
            result.failures["given up"] = result.failures.get("given up", 0) + under_way + load.count - begun
            break
    result.elapsed_s = time.perf_counter() - started
    result.client_cpu_s = time.process_time() - cpu_before
    return result


def run_handshakes(load: HandshakeLoad) -> LoadResult:
    """Carry out the load and return the sum over its processes; `elapsed_s` is the slowest process's."""
    share = replace(
        load, count=load.count // load.processes, concurrency=max(1, load.concurrency // load.processes), processes=1
    )
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(load.processes, mp_context=context) as executor:
        parts = list(executor.map(_run_one_process, [share] * load.processes))
    total = LoadResult(elapsed_s=max(part.elapsed_s for part in parts))
    for part in parts:
        total.completed += part.completed
        total.resumed += part.resumed
        total.latencies_s += part.latencies_s
        total.client_cpu_s += part.client_cpu_s
        for reason, number in part.failures.items():
            total.failures[reason] = total.failures.get(reason, 0) + number
    return total
