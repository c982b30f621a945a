"""Several tokens with the same key: how signatures per second grow with them, and what overload leaves of them.

Each token is SoftHSM2 behind tests/fault_module, which sleeps in C_Sign, so `sessions / latency` signatures per second
are possible of each. Overload is an open loop: requests come at three times what one token can do, whatever becomes of
them, and each has its deadline.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from statistics import quantiles

import uvloop

from hsm.launcher import Pkcs11Token, WorkerGroup
from hsm.messages import SignatureScheme
from hsm.pool import Signature, SignerPool
from perf.pool import SignatureLoad, measure_turn
from tests.softhsm import FaultyToken
from tests.tokens import CERTIFICATE_VERIFY

_SCHEME = SignatureScheme.ECDSA_SECP256R1_SHA256
_COUNTS = (1, 2, 4)
_OVERLOAD = 3
_TICK_S = 0.002


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("--sessions", type=int, default=4, help="PKCS#11 sessions of each token (default: 4)")
    parser.add_argument("--latency-ms", type=float, default=5.0, help="what C_Sign takes (default: 5)")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a turn (default: 3)")
    parser.add_argument("--deadline", type=float, default=2.0, help="sign_deadline in seconds (default: 2)")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; return the exit code."""
    uvloop.install()
    with tempfile.TemporaryDirectory(prefix="perf-cluster-") as directory:
        tokens = []
        for number in range(max(_COUNTS)):
            token = FaultyToken(Path(directory), name=f"hsm-{number}")
            token.faults.set_sign_latency(arguments.latency_ms / 1000)
            tokens.append(token.launchable(sessions=arguments.sessions))
        asyncio.run(_measure(arguments, tokens, os.path.join(directory, "run")))
    return 0


async def _measure(arguments: argparse.Namespace, tokens: Sequence[Pkcs11Token], directory: str) -> None:
    possible = arguments.sessions / arguments.latency_ms * 1000
    print(f"{arguments.sessions} sessions of {arguments.latency_ms:g} ms: {possible:.0f} signatures/s for each token")
    alone = 0.0
    for count in _COUNTS:
        async with _open(tokens[:count], directory, arguments.deadline) as (pool, pids):
            load = SignatureLoad(pool, pool.key("www"), _SCHEME)
            concurrency = 2 * count * arguments.sessions
            await measure_turn(load, pids, concurrency, 1.0)
            signed, worker_us, client_us = await measure_turn(load, pids, concurrency, arguments.seconds)
        alone = alone or signed
        print(
            f"  {count} tokens {signed:8.1f} /s  {signed / alone:.2f}x  {signed / possible / count:.1%} of possible, "
            f"CPU: workers {worker_us:.0f} us, client {client_us:.1f} us"
        )
    async with _open(tokens[:1], directory, arguments.deadline) as (pool, _):
        await _overload(pool, possible, arguments.deadline, arguments.seconds)


@contextlib.asynccontextmanager
async def _open(
    tokens: Sequence[Pkcs11Token], directory: str, deadline_s: float
) -> AsyncIterator[tuple[SignerPool, Sequence[int]]]:
    groups = [WorkerGroup(token, directory, log_level="warning") for token in tokens]
    try:
        for group in groups:
            group.start()
        for group in groups:
            await group.wait_ready(30)
        endpoints = [group.endpoints for group in groups]
        async with SignerPool(endpoints, sign_deadline_s=deadline_s, max_pending=1 << 20) as pool:
            await pool.wait_ready(30)
            yield pool, [pid for group in groups for pid in group.pids]
    finally:
        for group in groups:
            await group.stop()


async def _overload(pool: SignerPool, possible: float, deadline_s: float, seconds: float) -> None:
    """Ask for three times what is possible; the first deadline's worth of time fills the queue and does not count."""
    loop = asyncio.get_running_loop()
    start_s = loop.time()
    begin_s = start_s + deadline_s
    end_s = begin_s + seconds
    outcomes: Counter[str] = Counter()
    latencies_s: list[float] = []
    key = pool.key("www")
    asked = 0

    def ask() -> None:
        submitted_s = loop.time()

        def on_done(future: asyncio.Future[Signature]) -> None:
            now_s = loop.time()
            error = future.exception()
            if error is None and begin_s <= now_s < end_s:
                latencies_s.append(now_s - submitted_s)
            if submitted_s >= begin_s:
                outcomes["signed" if error is None else type(error).__name__] += 1

        pool.submit(key, _SCHEME, CERTIFICATE_VERIFY).add_done_callback(on_done)

    while (now_s := loop.time()) < end_s:
        while asked < (now_s - start_s) * _OVERLOAD * possible:
            ask()
            asked += 1
        await asyncio.sleep(_TICK_S)
    goodput = len(latencies_s) / seconds
    percentiles_ms = [cut * 1e3 for cut in quantiles(latencies_s, n=100)]
    print(
        f"overload, {_OVERLOAD}x: {goodput:.1f} /s in time, {goodput / possible:.1%} of possible; "
        f"p50 {percentiles_ms[49]:.0f} ms, p99 {percentiles_ms[98]:.0f} ms; "
        f"outcomes {dict(outcomes)}"
    )
