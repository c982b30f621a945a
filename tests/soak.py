"""`python -m tests.soak`: bodies of 1 GB both ways past a slow reader, and how much memory the proxy needs for that."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from hsm.messages import KeyType
from tests.backends import BackendConnection, backend, ok
from tests.proxy import Proxy, make_site, running_proxy, site_config

GB = 1 << 30
MB = 1 << 20
LIMIT_BYTES = 16 * MB
_PIECE = bytes(256 * 1024)
_KEYS = {"www": KeyType.ECDSA_P256}


class Growth(NamedTuple):
    """The most that the proxy worker's resident memory grew by, in bytes."""

    download: int
    upload: int


def rss_bytes(pid: int) -> int:
    """Return the resident memory of a process."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) * 1024


@contextlib.contextmanager
def peak_rss(pid: int) -> Iterator[list[int]]:
    """Look at a process's memory all the time; the list's one item is the largest value."""
    peak = [rss_bytes(pid)]
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.01):
            peak[0] = max(peak[0], rss_bytes(pid))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


async def _read_slowly(reader: asyncio.StreamReader, size: int) -> None:
    """Read `size` bytes with a pause now and then, so that whoever sends has to wait."""
    left = size
    pause_at = left - size // 8
    while left:
        data = await reader.read(min(left, len(_PIECE)))
        assert data, f"the body ended {left} bytes too early"
        left -= len(data)
        if left < pause_at:
            pause_at -= size // 8
            await asyncio.sleep(0.2)


async def _serve(connection: BackendConnection) -> None:
    """GET /SIZE answers that many bytes; of a POST the body is read slowly."""
    while head := await connection.head():
        method, path, _ = head.split(b" ", 2)
        size = int(path[1:])
        if method == b"POST":
            await _read_slowly(connection.reader, size)
            await connection.send(ok())
            continue
        await connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        for _ in range(size // len(_PIECE)):
            await connection.send(_PIECE)


async def _transfer(proxy: Proxy, method: bytes, size: int) -> None:
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", proxy.port, ssl=proxy.client_context(), server_hostname="localhost"
    )
    length = b"Content-Length: %d\r\n" % size if method == b"POST" else b""
    writer.write(b"%b /%d HTTP/1.1\r\nHost: localhost\r\n%b\r\n" % (method, size, length))
    if method == b"POST":
        for _ in range(size // len(_PIECE)):
            writer.write(_PIECE)
            await writer.drain()
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), head
    if method == b"GET":
        await _read_slowly(reader, size)
    writer.transport.abort()


async def measure(directory: Path, size: int) -> Growth:
    """Send a body of `size` bytes (a multiple of 256 KiB) each way, through the whole product."""
    make_site(directory, _KEYS)
    async with backend(_serve) as upstream:
        config = site_config(directory, _KEYS, f"127.0.0.1:{upstream.port}")
        async with running_proxy(directory, config) as proxy:
            (pid,) = proxy.proxy_workers
            grown = []
            for method in (b"GET", b"POST"):
                # What is allocated once, whatever the size, is there after a small body.
                await _transfer(proxy, method, 4 * MB)
                before = rss_bytes(pid)
                with peak_rss(pid) as peak:
                    await _transfer(proxy, method, size)
                grown.append(peak[0] - before)
            return Growth(*grown)


def main() -> int:
    """Print the figures; 1 if memory was not flat."""
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        growth = asyncio.run(measure(Path(directory), GB))
    sys.stdout.write(
        f"1 GB down: the proxy grew by {growth.download / MB:.1f} MB; 1 GB up: {growth.upload / MB:.1f} MB "
        f"({time.monotonic() - started_s:.0f} s)\n"
    )
    return int(max(growth) >= LIMIT_BYTES)


if __name__ == "__main__":
    sys.exit(main())
