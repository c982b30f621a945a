"""A PKCS#11 worker before a token that takes its time: signatures of those possible, CPU beyond the module's own.

The token is SoftHSM2 behind tests/fault_module, which sleeps in C_Sign, so `sessions / latency` signatures per second
are possible. What the module itself costs, waking from its sleep included, is measured first: as many threads of C that
sign and do nothing else (perf/bare_module.c).
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import uvloop

from hsm.launcher import WorkerGroup
from hsm.messages import SignatureScheme
from hsm.pool import SignerPool
from perf.pool import SignatureLoad, measure_turn
from tests.softhsm import PIN, FaultyToken

_SCHEME = SignatureScheme.ECDSA_SECP256R1_SHA256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("--tokens", type=int, default=1, help="tokens with the key, a worker each (default: 1)")
    parser.add_argument("--sessions", type=int, default=32, help="PKCS#11 sessions of each (default: 32)")
    parser.add_argument("--latency-ms", type=float, default=5.0, help="what C_Sign takes (default: 5)")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a turn (default: 3)")
    parser.add_argument("--turns", type=int, default=5, help="turns, of which the table gives the median (default: 5)")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print a table; return the exit code."""
    uvloop.install()
    with tempfile.TemporaryDirectory(prefix="perf-hsm-") as directory:
        tokens = [FaultyToken(Path(directory), name=f"hsm-{number}") for number in range(arguments.tokens)]
        for token in tokens:
            token.faults.set_sign_latency(arguments.latency_ms / 1000)
        module_us = _bare_module_us(tokens[0], Path(directory), arguments.sessions, arguments.seconds)
        run_directory = os.path.join(directory, "run")
        launchable = [token.launchable(sessions=arguments.sessions) for token in tokens]
        groups = [WorkerGroup(token, run_directory, log_level="warning") for token in launchable]
        asyncio.run(_measure(arguments, groups, module_us))
    return 0


def _bare_module_us(token: FaultyToken, directory: Path, threads: int, seconds: float) -> float:
    """Return the CPU microseconds of one signature by so many threads of C, which do nothing else."""
    program = directory / "bare_module"
    subprocess.run(
        ["gcc", "-O2", "-Ihsm/backends", "-o", program, "perf/bare_module.c", "-ldl", "-lpthread"], check=True
    )
    output = subprocess.run(
        [program, token.faults.path, PIN, str(threads), str(math.ceil(seconds))], check=True, capture_output=True
    ).stdout
    return float(output.split()[1])


async def _measure(arguments: argparse.Namespace, groups: Sequence[WorkerGroup], module_us: float) -> None:
    concurrency = 2 * arguments.sessions * len(groups)
    try:
        for group in groups:
            group.start()
        for group in groups:
            await group.wait_ready(30)
        async with SignerPool([group.endpoints for group in groups]) as pool:
            await pool.wait_ready(30)
            load = SignatureLoad(pool, pool.key("www"), _SCHEME)
            pids = [pid for group in groups for pid in group.pids]
            await measure_turn(load, pids, concurrency, arguments.seconds)
            turns = [await measure_turn(load, pids, concurrency, arguments.seconds) for _ in range(arguments.turns)]
    finally:
        for group in groups:
            await group.stop()
    signed, worker_us, client_us = zip(*turns, strict=True)
    possible = len(groups) * arguments.sessions / arguments.latency_ms * 1000
    sizes = f"{len(groups)} tokens, {arguments.sessions} sessions of each, {arguments.latency_ms:g} ms"
    print(f"{sizes}, {concurrency} requests at a time")
    print(f"  signatures   {median(signed):8.1f} /s  {median(signed) / possible:.1%} of {possible:.0f} possible")
    beyond_us = median(worker_us) - module_us
    print(f"  worker CPU   {median(worker_us):8.1f} us  {beyond_us:.1f} beyond the module's {module_us:.1f}")
    print(f"  client CPU   {median(client_us):8.1f} us")
