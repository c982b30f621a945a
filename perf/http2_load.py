"""Requests in HTTP/2, many at a time on each connection: nghttp2's h2load makes them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from perf.load import Load, LoadResult

_FINISHED = re.compile(r"finished in .*?, (?P<per_second>[0-9.]+) req/s", re.MULTILINE)
_REQUESTS = re.compile(r"^requests: .* (?P<succeeded>\d+) succeeded, (?P<failed>\d+) failed", re.MULTILINE)
_STATUSES = re.compile(r"^status codes: (?P<ok>\d+) 2xx", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Http2Load(Load):
    """GETs of one path; `concurrency` connections, with `streams` requests under way on each. Closed loop."""

    path: str = "/"
    streams: int = 1


def run_http2_requests(load: Http2Load, ready: Callable[[], None]) -> LoadResult:
    """Carry out the load (see perf.clients). The handshakes count too: a few among thousands of requests.

    Raises OSError where h2load fails or is answered anything but 200.
    """
    ready()
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "requests"
        command = [
            "h2load",
            *("--clients", str(load.concurrency), "--max-concurrent-streams", str(load.streams)),
            *("--duration", f"{load.seconds * 1e3:.0f}ms", "--log-file", str(log)),
            *("--connect-to", f"{load.host}:{load.port}", f"https://{load.server_name}:{load.port}{load.path}"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        finished, requests, statuses = (pattern.search(done.stdout) for pattern in (_FINISHED, _REQUESTS, _STATUSES))
        if done.returncode or finished is None or requests is None or statuses is None:
            raise OSError(f"h2load: {done.stderr.strip() or done.stdout.strip()}")
        completed = int(statuses["ok"])
        if int(requests["failed"]) or completed < int(requests["succeeded"]):
            raise OSError(f"h2load: {requests[0]}; {statuses[0]}")
        result = LoadResult(completed=completed, elapsed_s=load.seconds)
        for line in log.read_text().splitlines():
            # When it began in us since the epoch, its status, how long it took in us.
            result.latencies.record(int(line.split("\t")[2]) / 1e6)
    return result
