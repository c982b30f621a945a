"""A client on one established keep-alive connection, asking at a steady rate: what it sees is what users see.

Open loop: each request has the time when it is due, and its latency counts from there, however late it could be sent.
So a server that stands still is charged for every request that it holds up: no coordinated omission.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

from perf.clients import client_context, connect
from perf.histogram import Histogram
from perf.request_load import ResponseReader
from perf.setups.base import Server

_GRACE_S = 1.0
_ANSWER_LIMIT_S = 30.0


@dataclass(slots=True)
class ProbeResult:
    """What the prober saw."""

    asked: int = 0
    """Requests that became due. Once the connection has failed all further ones count as unanswered."""
    latencies: Histogram = field(default_factory=Histogram)
    """Of those answered with 200."""


def _probe(
    host: str,
    port: int,
    server_name: str,
    ca_file: Path,
    per_second: float,
    stop: multiprocessing.connection.Connection,
) -> None:
    # Ctrl-C is the parent's to handle: it asks for what there is.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    result = ProbeResult()
    request = f"GET / HTTP/1.1\r\nHost: {server_name}\r\n\r\n".encode()
    reader = ResponseReader()
    buffer = memoryview(bytearray(65536))
    with connect(host, port, server_name, client_context(ca_file)) as connection:

        def ask() -> None:
            connection.sendall(request)
            while True:
                received = connection.recv_into(buffer)
                if not received:
                    raise ConnectionError("the server closed the connection")
                if reader.feed(buffer[:received]):
                    return

        # The first answer opens the upstream connection; it also tells the parent that the prober is at work.
        ask()
        stop.send("ready")
        started_s = time.perf_counter()
        with contextlib.suppress(OSError):
            while not stop.poll():
                due_s = started_s + result.asked / per_second
                time.sleep(max(0.0, due_s - time.perf_counter()))
                result.asked += 1
                ask()
                result.latencies.record(time.perf_counter() - due_s)
    stop.poll(None)
    stopped_s = time.perf_counter()
    with contextlib.suppress(OSError):
        # What became due before has a last second to be answered.
        while (
            due_s := started_s + result.asked / per_second
        ) < stopped_s and time.perf_counter() < stopped_s + _GRACE_S:
            result.asked += 1
            ask()
            result.latencies.record(time.perf_counter() - due_s)
    result.asked = max(result.asked, int((stopped_s - started_s) * per_second))
    stop.send(result)


class Prober:
    """Runs in a process of its own while its context lasts; `result` is there afterwards."""

    result: ProbeResult

    def __init__(self, server: Server, per_second: float) -> None:
        context = multiprocessing.get_context("spawn")
        self._end, child_end = context.Pipe()
        where = (server.host, server.port, server.server_name, server.ca_file)
        self._process = context.Process(target=_probe, args=(*where, per_second, child_end), daemon=True)

    def __enter__(self) -> Prober:
        self._process.start()
        self._receive()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.send("stop")
        result = self._receive()
        assert isinstance(result, ProbeResult)
        self.result = result
        self._process.join()

    def _receive(self) -> object:
        if not self._end.poll(_ANSWER_LIMIT_S):
            self._process.kill()
            raise RuntimeError(f"the prober gave no answer for {_ANSWER_LIMIT_S:g} s")
        try:
            return self._end.recv()
        except EOFError:
            raise RuntimeError("the prober's first request failed") from None
