"""`python -m tests.abuse [KIND ...]`: clients that mean harm, and what honest ones notice of them.

For each kind of abuse, with the default timeouts and limits: attackers at work, honest clients that each make a new
connection and a request, 20 a second. At least 99% of these must succeed, 99% of them within 1 s (3 s where the attack
is one on CPU time), and attackers that are merely slow must be cut off within 25 s.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import socket
import ssl
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from hsm.messages import KeyType
from tests.backends import BackendConnection, backend, ok
from tests.proxy import Proxy, make_site, running_proxy, site_config

KEYS = {"www": KeyType.ECDSA_P256}
PROBE_INTERVAL_S = 0.05
MIN_DURATION_S = 10.0
CUT_WITHIN_S = 25.0
IDLE_CONNECTIONS = 10_000
POST = b"POST / HTTP/1.1\r\nHost: localhost\r\n"


@dataclass
class Probes:
    """What honest clients saw."""

    latencies_s: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def success_share(self) -> float:
        """Of all requests."""
        return len(self.latencies_s) / max(1, len(self.latencies_s) + len(self.failures))

    @property
    def p99_s(self) -> float:
        """Of those that succeeded."""
        ordered = sorted(self.latencies_s) or [float("inf")]
        return ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]


async def probe(proxy: Proxy, context: ssl.SSLContext, probes: Probes) -> None:
    """Make one honest request."""
    started_s = time.monotonic()
    try:
        async with _timeout(10):
            reader, writer = await _connect(proxy, context)
            writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            answer = await reader.read()
            writer.close()
        if not answer.startswith(b"HTTP/1.1 200 "):
            raise ConnectionError(f"got {answer[:20]!r}")
        probes.latencies_s.append(time.monotonic() - started_s)
    except (OSError, asyncio.TimeoutError) as error:
        probes.failures.append(f"{type(error).__name__}: {error}")


@contextlib.asynccontextmanager
async def _timeout(seconds: float) -> AsyncIterator[None]:
    """Raise asyncio.TimeoutError if the block takes longer (asyncio.timeout is newer than Python 3.10)."""
    task = asyncio.current_task()
    assert task is not None
    timer = asyncio.get_running_loop().call_later(seconds, task.cancel)
    try:
        yield
    except asyncio.CancelledError:
        raise asyncio.TimeoutError from None
    finally:
        timer.cancel()


async def _connect(proxy: Proxy, context: ssl.SSLContext) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", proxy.port, ssl=context, server_hostname="localhost")


async def until_cut(reader: asyncio.StreamReader) -> None:
    """Read up to the end that the proxy makes of the connection."""
    with contextlib.suppress(OSError):
        while await reader.read(65536):
            pass


async def drip(writer: asyncio.StreamWriter, piece: bytes) -> None:
    """Send a piece a second."""
    with contextlib.suppress(OSError):
        while not writer.transport.is_closing():
            writer.write(piece)
            await asyncio.sleep(1)


Attack = Callable[[Proxy, ssl.SSLContext], Awaitable[None]]
"""One attacker; it returns when the proxy has ended its connection."""


async def _slow(proxy: Proxy, context: ssl.SSLContext, start: bytes, piece: bytes) -> None:
    reader, writer = await _connect(proxy, context)
    writer.write(start)
    dripping = asyncio.ensure_future(drip(writer, piece))
    await until_cut(reader)
    dripping.cancel()
    writer.transport.abort()


async def slow_header(proxy: Proxy, context: ssl.SSLContext) -> None:
    """A header line a second, for ever."""
    await _slow(proxy, context, b"GET / HTTP/1.1\r\nHost: localhost\r\n", b"X: y\r\n")


async def slow_body(proxy: Proxy, context: ssl.SSLContext) -> None:
    """A byte of body a second."""
    await _slow(proxy, context, POST + b"Content-Length: 1000000\r\n\r\n", b"x")


async def slow_chunks(proxy: Proxy, context: ssl.SSLContext) -> None:
    """A chunk of one byte a second."""
    await _slow(proxy, context, POST + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n")


async def idle_handshake(proxy: Proxy, context: ssl.SSLContext) -> None:
    """A connection on which nothing is said."""
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    await until_cut(reader)
    writer.transport.abort()


async def slow_handshake(proxy: Proxy, context: ssl.SSLContext) -> None:
    """A ClientHello, a byte a second."""
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
    dripping = asyncio.ensure_future(drip(writer, b"x"))
    await until_cut(reader)
    dripping.cancel()
    writer.transport.abort()


async def garbage(proxy: Proxy, context: ssl.SSLContext) -> None:
    """Connections one after the other that send what is no TLS, and requests that are no HTTP."""
    for number in range(100):
        with contextlib.suppress(OSError):
            if number % 10:
                reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
            else:
                reader, writer = await _connect(proxy, context)
            writer.write(bytes((number * 7 + index * 13) % 256 for index in range(300)))
            await until_cut(reader)
            writer.transport.abort()


async def _by_openssl(proxy: Proxy, version: str, lines: str, start: str = "") -> None:
    """Have `openssl s_client`, a process of its own, send the same lines again and again, as fast as they are taken."""
    quiet = "-quiet" if start else ""
    shell = (
        f"{{ printf '{start}'; yes \"$(printf '{lines}')\"; }} | timeout {MIN_DURATION_S:.0f} openssl s_client {quiet} "
        f"-connect 127.0.0.1:{proxy.port} -servername localhost -{version} >/dev/null 2>&1"
    )
    await (await asyncio.create_subprocess_exec("sh", "-c", shell)).wait()


async def tiny_chunks(proxy: Proxy, context: ssl.SSLContext) -> None:
    """Chunks of one byte, as many as get through."""
    start = "POST / HTTP/1.1\\r\\nHost: localhost\\r\\nTransfer-Encoding: chunked\\r\\n\\r\\n"
    await _by_openssl(proxy, "tls1_3", "1\\r\\nx\\r", start)


async def pipelined(proxy: Proxy, context: ssl.SSLContext) -> None:
    """Requests that the proxy answers itself, as many as get through."""
    request = "GET / HTTP/1.1\\r\\nHost: nowhere\\r\\n\\r"
    await _by_openssl(proxy, "tls1_3", request, request + "\\n")


async def key_updates(proxy: Proxy, context: ssl.SSLContext) -> None:
    """KeyUpdates that ask for one in return (RFC 8446 section 4.6.3)."""
    await _by_openssl(proxy, "tls1_3", "K")


async def renegotiations(proxy: Proxy, context: ssl.SSLContext) -> None:
    """TLS 1.2 renegotiations (RFC 5746), again and again on new connections."""
    await _by_openssl(proxy, "tls1_2", "R")


async def idle_connections(proxy: Proxy, context: ssl.SSLContext) -> None:
    """Open 10,000 connections, and leave them to their idleness; the client keeps but the sockets."""
    files = await asyncio.to_thread(_open_idle, proxy.port, context)
    await asyncio.sleep(MIN_DURATION_S)
    for file in files:
        os.close(file)


def _open_idle(port: int, context: ssl.SSLContext) -> list[int]:
    files = []
    for _ in range(IDLE_CONNECTIONS):
        with context.wrap_socket(socket.create_connection(("127.0.0.1", port)), server_hostname="localhost") as tls:
            tls.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            tls.recv(4096)
            files.append(tls.detach())
    return files


# HTTP/2. Frames as attackers send them: what a library would refuse to.

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)
_ENDED, _OPEN = 5, 4
"""Flags of HEADERS with a whole head: END_HEADERS, with END_STREAM or without."""
_GET = b"\x82\x87\x84\x41\x09localhost"
"""A head in HPACK: GET, https, /, :authority: localhost."""
_POST = b"\x83" + _GET[1:]


def _frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream_id.to_bytes(4, "big") + payload


def _reset(stream_id: int) -> bytes:
    return _frame(3, 0, stream_id, b"\0\0\0\x08")


async def _flood(proxy: Proxy, frames: Callable[[int], bytes], *, reads: bool = True) -> None:
    """Have `openssl s_client` send `frames(n)` for n = 1, 3, 5 ..., on one connection after the other."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(_PREFACE + b"".join(frames(stream_id) for stream_id in range(1, 40_001, 2)))
        file.flush()
        client = f"openssl s_client -quiet -no_ign_eof -connect 127.0.0.1:{proxy.port} -servername localhost -alpn h2"
        output = ">/dev/null" if reads else "| sleep 60"
        shell = f"while :; do {client} <{file.name} 2>/dev/null {output}; done"
        await (await asyncio.create_subprocess_exec("timeout", f"{MIN_DURATION_S:.0f}", "sh", "-c", shell)).wait()


async def rapid_resets(proxy: Proxy, context: ssl.SSLContext) -> None:
    """Requests taken back at once (CVE-2023-44487)."""
    await _flood(proxy, lambda n: _frame(1, _ENDED, n, _GET) + _reset(n))


async def provoked_resets(proxy: Proxy, context: ssl.SSLContext) -> None:
    """Requests that the proxy is made to take back (CVE-2025-8671)."""
    await _flood(proxy, lambda n: _frame(1, _ENDED, n, _GET) + _frame(8, 0, n, b"\x7f\xff\xff\xff"))


async def window_updates(proxy: Proxy, context: ssl.SSLContext) -> None:
    """A hundred responses that wait for a window, and windows opened byte by byte."""
    small_windows = _frame(4, 0, 0, b"\0\4" + bytes(4))
    await _flood(
        proxy,
        lambda n: (
            (small_windows if n == 1 else b"")
            + (_frame(1, _ENDED, n, _GET) if n < 200 else _frame(8, 0, 0, b"\0\0\0\1") * 10)
        ),
    )


async def compressed_heads(proxy: Proxy, context: ssl.SSLContext) -> None:
    """Heads of 60 KB in 30 bytes, by references to what has been sent before (RFC 7541); for nobody's host."""
    stored = b"\x40\x01a\x7f" + b"\xbd\x1e" + b"x" * 4028
    elsewhere = _GET[:3] + b"\x01\x09elsewhere"
    await _flood(proxy, lambda n: _frame(1, _ENDED, n, elsewhere + (stored if n == 1 else b"\xbe" * 14)))


async def pings(proxy: Proxy, context: ssl.SSLContext) -> None:
    """PINGs whose answers nobody reads (CVE-2019-9512)."""
    await _flood(proxy, lambda n: _frame(6, 0, 0, bytes(8)) * 10, reads=False)


async def tiny_data(proxy: Proxy, context: ssl.SSLContext) -> None:
    """A request's body, byte by byte, each a frame."""
    await _flood(proxy, lambda n: _frame(1, _OPEN, 1, _POST) if n == 1 else _frame(0, 0, 1, b"x") * 10)


async def slow_heads(proxy: Proxy, context: ssl.SSLContext) -> None:
    """A CONTINUATION a second, for ever."""
    context = proxy.client_context()
    context.set_alpn_protocols(["h2"])
    await _slow(proxy, context, _PREFACE + _frame(1, 1, 1, _GET), _frame(9, 0, 1, b"\0\1a\1b"))


@dataclass(frozen=True)
class Kind:
    """A kind of abuse: so many attackers at a time."""

    attack: Attack
    attackers: int
    on_cpu: bool = False
    is_slow: bool = False


KINDS = {
    "slow headers": Kind(slow_header, 300, is_slow=True),
    "slow bodies": Kind(slow_body, 300, is_slow=True),
    "slow chunks": Kind(slow_chunks, 300, is_slow=True),
    "idle handshakes": Kind(idle_handshake, 1000, is_slow=True),
    "slow handshakes": Kind(slow_handshake, 500, is_slow=True),
    "garbage": Kind(garbage, 20, on_cpu=True),
    "tiny chunks": Kind(tiny_chunks, 4, on_cpu=True),
    "pipelined requests": Kind(pipelined, 4, on_cpu=True),
    "KeyUpdates": Kind(key_updates, 4, on_cpu=True),
    "idle connections": Kind(idle_connections, 1),
    "renegotiations": Kind(renegotiations, 4, on_cpu=True),
    "rapid resets": Kind(rapid_resets, 4, on_cpu=True),
    "provoked resets": Kind(provoked_resets, 4, on_cpu=True),
    "window updates": Kind(window_updates, 4, on_cpu=True),
    "compressed heads": Kind(compressed_heads, 4, on_cpu=True),
    "pings": Kind(pings, 4, on_cpu=True),
    "tiny DATA": Kind(tiny_data, 4, on_cpu=True),
    "slow CONTINUATIONs": Kind(slow_heads, 300, is_slow=True),
}


async def attack(proxy: Proxy, kind: Kind) -> tuple[Probes, float]:
    """Attack while honest clients are at work; return what these saw, and how long the last attacker was suffered."""
    context = proxy.client_context()
    probes = Probes()
    started_s = time.monotonic()
    attackers = asyncio.gather(*(kind.attack(proxy, context) for _ in range(kind.attackers)), return_exceptions=True)
    probing: list[asyncio.Task[None]] = []
    ended_s = 0.0
    while not ended_s or time.monotonic() - started_s < MIN_DURATION_S:
        probing.append(asyncio.ensure_future(probe(proxy, context, probes)))
        await asyncio.sleep(PROBE_INTERVAL_S)
        if attackers.done() and not ended_s:
            ended_s = time.monotonic() - started_s
        if time.monotonic() - started_s > 2 * CUT_WITHIN_S:
            attackers.cancel()
            ended_s = time.monotonic() - started_s
            break
    await asyncio.gather(*probing)
    with contextlib.suppress(asyncio.CancelledError):
        await attackers
    return probes, ended_s


async def serve(connection: BackendConnection) -> None:
    """Answer a GET; read a body before answering, however long it takes."""
    while head := await connection.head():
        if head.startswith(b"POST"):
            while await connection.reader.read(65536):
                pass
            return
        await connection.send(ok())


async def run(names: list[str], directory: Path) -> bool:
    """Run the attacks and print a line for each; tell whether all was well."""
    make_site(directory, KEYS)
    all_well = True
    async with backend(serve) as upstream:
        config = site_config(directory, KEYS, f"127.0.0.1:{upstream.port}")
        config["listeners"][0]["routes"] = [{"host": "localhost", "upstream": "app"}]
        config["listeners"][0]["http2"] = True
        config["log"]["level"] = "warning"
        async with running_proxy(directory, config) as proxy:
            for name in names:
                kind = KINDS[name]
                probes, ended_s = await attack(proxy, kind)
                well = (
                    probes.success_share >= 0.99
                    and probes.p99_s <= (3 if kind.on_cpu else 1)
                    and (not kind.is_slow or ended_s <= CUT_WITHIN_S)
                )
                all_well = all_well and well
                cut = f", cut off after {ended_s:.1f} s" if kind.is_slow else ""
                sys.stdout.write(
                    f"{name:20} {kind.attackers:5} attackers: {probes.success_share:7.2%} of honest requests, "
                    f"p99 {probes.p99_s * 1000:5.0f} ms{cut}{'' if well else '   <- too bad'}\n"
                )
                if probes.failures:
                    sys.stdout.write(f"  {len(probes.failures)} failures, such as {probes.failures[0]}\n")
                sys.stdout.flush()
    return all_well


def main() -> int:
    """Run what is named, or everything."""
    parser = argparse.ArgumentParser(prog="python -m tests.abuse", description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}; default: all")
    names = parser.parse_args().kinds or list(KINDS)
    if unknown := [name for name in names if name not in KINDS]:
        parser.error(f"expected any of {', '.join(KINDS)}; got {', '.join(unknown)}")
    with tempfile.TemporaryDirectory() as directory:
        return 0 if asyncio.run(run(names, Path(directory))) else 1


if __name__ == "__main__":
    sys.exit(main())
