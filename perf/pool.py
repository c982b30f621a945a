"""CPU per signature, of the soft token's worker and of the pool's client, with the worker saturated.

A client with uvloop keeps a number of requests unanswered; every signature that comes makes room for the next. The
client's figure includes what this loop itself costs, about a microsecond.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import uvloop

from hsm.keys import generate_private_key
from hsm.launcher import SoftToken, WorkerGroup
from hsm.messages import KeyType, SignatureScheme
from hsm.pool import Signature, SignerPool, SigningKey
from hsm.vault import Vault
from perf.cpu import cpu_seconds, total_cpu_seconds

CERTIFICATE_VERIFY = b" " * 64 + b"TLS 1.3, server CertificateVerify\x00" + bytes(32)
_SCHEMES = {
    KeyType.ECDSA_P256: SignatureScheme.ECDSA_SECP256R1_SHA256,
    KeyType.ECDSA_P384: SignatureScheme.ECDSA_SECP384R1_SHA384,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("--key-type", type=KeyType, choices=list(KeyType), default=KeyType.ECDSA_P256)
    parser.add_argument("--workers", type=int, default=1, help="worker processes (default: 1)")
    parser.add_argument("--concurrency", type=int, default=64, help="requests unanswered at a time (default: 64)")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a turn (default: 2)")
    parser.add_argument("--turns", type=int, default=5, help="turns, of which the table gives the median (default: 5)")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print a table; return the exit code."""
    uvloop.install()
    with tempfile.TemporaryDirectory(prefix="perf-pool-") as directory:
        token = _make_token(directory, arguments.key_type, arguments.workers)
        asyncio.run(_measure(arguments, token, os.path.join(directory, "run")))
    return 0


class SignatureLoad:
    """Keeps a number of requests to a pool unanswered, and counts the signatures."""

    def __init__(self, pool: SignerPool, key: SigningKey, scheme: SignatureScheme) -> None:
        self._pool = pool
        self._key = key
        self._scheme = scheme
        self.signatures = 0
        self._stopping = False
        self._idle = asyncio.Event()

    def start(self, concurrency: int) -> None:
        """Begin, with so many requests at a time."""
        self._stopping = False
        self._idle.clear()
        for _ in range(concurrency):
            self._submit()

    async def stop(self) -> None:
        """Ask no more and wait for what is unanswered."""
        self._stopping = True
        await self._idle.wait()

    def _submit(self) -> None:
        self._pool.submit(self._key, self._scheme, CERTIFICATE_VERIFY).add_done_callback(self._on_signature)

    def _on_signature(self, future: asyncio.Future[Signature]) -> None:
        future.result()
        self.signatures += 1
        if not self._stopping:
            self._submit()
        elif not self._pool.pending:
            self._idle.set()


def _make_token(directory: str, key_type: KeyType, workers: int) -> SoftToken:
    token_path, pin_path = Path(directory, "token"), Path(directory, "pin")
    pin = secrets.token_hex(16)
    pin_path.touch(mode=0o600)
    pin_path.write_text(pin)
    Vault.create(str(token_path), pin.encode()).add("key", generate_private_key(key_type))
    return SoftToken(name="soft", path=str(token_path), pin_file=str(pin_path), workers=workers)


async def _measure(arguments: argparse.Namespace, token: SoftToken, directory: str) -> None:
    group = WorkerGroup(token, directory, log_level="warning")
    group.start()
    try:
        await group.wait_ready(30)
        async with SignerPool([group.endpoints]) as pool:
            await pool.wait_ready(30)
            await asyncio.sleep(0.1)
            scheme = _SCHEMES.get(arguments.key_type, SignatureScheme.RSA_PSS_RSAE_SHA256)
            load = SignatureLoad(pool, pool.key("key"), scheme)
            await measure_turn(load, group.pids, arguments.concurrency, arguments.seconds)
            turns = [
                await measure_turn(load, group.pids, arguments.concurrency, arguments.seconds)
                for _ in range(arguments.turns)
            ]
    finally:
        await group.stop()
    print(f"{arguments.key_type.value}, {arguments.workers} workers, {arguments.concurrency} requests at a time")
    for name, unit, values in zip(
        ("signatures", "worker CPU", "client CPU"), ("/s", "us", "us"), zip(*turns, strict=True), strict=True
    ):
        print(f"  {name:<12} {median(values):8.1f} {unit:<3} ({min(values):.1f} to {max(values):.1f})")


async def measure_turn(
    load: SignatureLoad, pids: Sequence[int], concurrency: int, seconds: float
) -> tuple[float, float, float]:
    """Return signatures per second, CPU microseconds per signature of the workers (`pids`) and of this process."""
    loop = asyncio.get_running_loop()
    load.start(concurrency)
    await asyncio.sleep(0.2)
    signed, begun_s = load.signatures, loop.time()
    worker_s, client_s = total_cpu_seconds(pids), cpu_seconds(os.getpid())
    await asyncio.sleep(seconds)
    worker_s, client_s = total_cpu_seconds(pids) - worker_s, cpu_seconds(os.getpid()) - client_s
    signed, elapsed_s = load.signatures - signed, loop.time() - begun_s
    await load.stop()
    return signed / elapsed_s, worker_s / signed * 1e6, client_s / signed * 1e6
