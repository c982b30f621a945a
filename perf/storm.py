"""What a keep-alive client sees while handshakes storm and the HSM is slow, and what the storm itself gets done.

SoftHSM2 stands behind a module that sleeps in C_Sign. The same servers run without and with the sleep, in turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hsm.messages import KeyType
from perf.load import HandshakeLoad, quantile, run_handshakes
from perf.prober import Prober
from perf.setups import SlowHsm, TlsproxySlowHsm, make_credential


@dataclass(slots=True)
class Storm:
    """What came of the turns at one latency."""

    per_second: list[float] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)
    handshake_s: list[float] = field(default_factory=list)
    probe_s: list[float] = field(default_factory=list)
    asked: int = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's options."""
    parser.add_argument("--latency-ms", type=float, action="append", metavar="MS", help="default: 0, 20")
    parser.add_argument("--sessions", type=int, default=64, help="PKCS#11 sessions (default: %(default)s)")
    parser.add_argument("--count", type=int, default=3000, help="handshakes a turn (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=200, help="handshakes under way (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=5, help="turns at each latency (default: %(default)s)")
    parser.add_argument("--probe-rate", type=float, default=100.0, help="requests a second (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print a Markdown table."""
    latencies_ms: Sequence[float] = arguments.latency_ms or [0.0, 20.0]
    storms = {latency_ms: Storm() for latency_ms in latencies_ms}
    with tempfile.TemporaryDirectory(prefix="perf-") as name:
        directory = Path(name)
        credential = make_credential(directory / "credential", KeyType.ECDSA_P256)
        hsm = SlowHsm(directory / "hsm", credential)
        with TlsproxySlowHsm(directory / "tlsproxy", credential, 1, hsm, arguments.sessions) as proxy:
            for turn in range(arguments.turns + 1):
                for latency_ms, storm in storms.items():
                    hsm.control.set_sign_latency(latency_ms / 1e3)
                    _take_turn(proxy, arguments, storm if turn else Storm())
    _print(storms, arguments)
    return 0


def _take_turn(proxy: TlsproxySlowHsm, arguments: argparse.Namespace, storm: Storm) -> None:
    load = HandshakeLoad(
        host="127.0.0.1",
        port=proxy.port,
        server_name="localhost",
        ca_file=proxy.credential.ca_file,
        count=arguments.count,
        concurrency=arguments.concurrency,
    )
    before = proxy.cpu_seconds_by_role()
    with Prober(proxy.port, proxy.credential.ca_file, arguments.probe_rate) as prober:
        result = run_handshakes(load)
    used = {role: seconds - before[role] for role, seconds in proxy.cpu_seconds_by_role().items()}
    if result.failures or result.resumed:
        raise RuntimeError(f"failures {result.failures}, resumed {result.resumed}: not a fair turn")
    storm.per_second.append(result.per_second)
    storm.cpu_us.append((used["proxy"] + used["hsm"]) / result.completed * 1e6)
    storm.handshake_s += result.latencies_s
    storm.probe_s += prober.result.latencies_s
    storm.asked += prober.result.asked


def _print(storms: dict[float, Storm], arguments: argparse.Namespace) -> None:
    first = statistics.median(next(iter(storms.values())).per_second)
    print(
        f"\n{arguments.turns} turns of {arguments.count} handshakes, {arguments.concurrency} at a time, "
        f"{arguments.sessions} PKCS#11 sessions; a prober at {arguments.probe_rate:g} requests/s.\n"
        "Handshake ms: p50 / p99; probe ms: p50 / p99 / max, from the intended start.\n"
    )
    print("| HSM latency | handshakes/s | x | CPU us | handshake ms | probes served | probe ms | over 20 ms |")
    print("|---|---|---|---|---|---|---|---|")
    for latency_ms, storm in storms.items():
        per_second = statistics.median(storm.per_second)
        cpu_us = statistics.median(storm.cpu_us)
        handshake = " / ".join(f"{quantile(storm.handshake_s, q) * 1e3:.1f}" for q in (0.5, 0.99))
        probe = " / ".join(f"{quantile(storm.probe_s, q) * 1e3:.1f}" for q in (0.5, 0.99, 1.0))
        slow = sum(latency > 0.020 for latency in storm.probe_s)
        print(
            f"| {latency_ms:g} ms | {per_second:.0f} | {per_second / first:.2f} | {cpu_us:.0f} "
            f"| {handshake} | {len(storm.probe_s)} of {storm.asked} | {probe} | {slow} |"
        )
