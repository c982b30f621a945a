"""A client on one established keep-alive connection, asking at a steady rate: what it sees is what users see.

Open loop: each request has its intended start, and its latency counts from there, however late it could be sent, so a
server that stands still is charged for every request that it should have answered meanwhile: no coordinated omission.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path

from perf.load import client_context

_REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


@dataclass(slots=True)
class ProbeResult:
    """What the prober saw: a latency in seconds for each request that was answered with 200."""

    asked: int = 0
    latencies_s: list[float] = field(default_factory=list)

    @property
    def served(self) -> int:
        """Requests answered with 200."""
        return len(self.latencies_s)

    def slower_than(self, seconds: float) -> int:
        """Requests that took longer."""
        return sum(latency > seconds for latency in self.latencies_s)


def _probe(
    port: int, ca_file: Path, per_second: float, stop: multiprocessing.connection.Connection, give_up_s: float
) -> None:
    result = ProbeResult()
    raw = socket.create_connection(("127.0.0.1", port))
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    raw.settimeout(10)
    with client_context(ca_file).wrap_socket(raw, server_hostname="localhost") as connection:
        # The first answer opens the upstream connection; it also tells the parent that the prober is at work.
        connection.sendall(_REQUEST)
        connection.recv(65536)
        stop.send("ready")
        started = time.perf_counter()
        while not stop.poll():
            intended = started + result.asked / per_second
            if intended - started > give_up_s:
                break
            time.sleep(max(0.0, intended - time.perf_counter()))
            connection.sendall(_REQUEST)
            result.asked += 1
            answer = connection.recv(65536)
            if answer.startswith(b"HTTP/1.1 200 "):
                result.latencies_s.append(time.perf_counter() - intended)
    stop.send(result)


class Prober:
    """Runs in a process of its own while its context lasts; `result` is there afterwards."""

    result: ProbeResult

    def __init__(self, port: int, ca_file: Path, per_second: float = 100.0, give_up_s: float = 120.0) -> None:
        context = multiprocessing.get_context("spawn")
        self._end, child_end = context.Pipe()
        self._process = context.Process(target=_probe, args=(port, ca_file, per_second, child_end, give_up_s))

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
        if not self._end.poll(30):
            self._process.kill()
            raise RuntimeError("the prober gave no answer for 30 s")
        return self._end.recv()
