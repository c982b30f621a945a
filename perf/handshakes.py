"""CPU seconds of each server process for a full handshake, this proxy against nginx, in one interleaved run.

Both servers stay up for the whole run and take turns; the figures are medians over the turns. On a noisy machine the
ratio of two medians from the same minutes is the only figure to trust.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from hsm.messages import KeyType
from perf.load import HandshakeLoad, quantile, run_handshakes
from perf.setups import NginxKeyFile, Setup, TlsproxySoft, make_credential


@dataclass(slots=True)
class Turns:
    """What one setup did over its turns."""

    cpu_us: dict[str, list[float]] = field(default_factory=dict)
    """Role to CPU microseconds per handshake, a value for each turn."""
    per_second: list[float] = field(default_factory=list)
    p99_ms: list[float] = field(default_factory=list)

    def median_cpu_us(self, role: str) -> float:
        """NaN for a role the setup does not have."""
        return statistics.median(self.cpu_us[role]) if role in self.cpu_us else float("nan")


def take_turn(setup: Setup, load: HandshakeLoad, turns: Turns) -> None:
    """Run the load once and add what it cost. Raises RuntimeError if a handshake failed or was resumed."""
    before = setup.cpu_seconds_by_role()
    result = run_handshakes(load)
    after = setup.cpu_seconds_by_role()
    if result.failures or result.resumed:
        raise RuntimeError(f"{setup.name}: failures {result.failures}, resumed {result.resumed}: not a fair turn")
    for role in filter(None, after):
        turns.cpu_us.setdefault(role, []).append((after[role] - before[role]) / result.completed * 1e6)
    turns.per_second.append(result.per_second)
    turns.p99_ms.append(quantile(result.latencies_s, 0.99) * 1e3)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's options."""
    parser.add_argument(
        "--key-type", type=KeyType, action="append", metavar="TYPE", help="default: ecdsa-p256, rsa-2048"
    )
    parser.add_argument("--count", type=int, default=1500, help="handshakes a turn (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=7, help="turns of each server (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=16, help="connections under way (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print a Markdown table for each key type."""
    for key_type in arguments.key_type or [KeyType.ECDSA_P256, KeyType.RSA_2048]:
        with tempfile.TemporaryDirectory(prefix="perf-") as name:
            directory = Path(name)
            credential = make_credential(directory / "credential", key_type)
            with (
                NginxKeyFile(directory / "nginx", credential, workers=1) as nginx,
                TlsproxySoft(directory / "tlsproxy", credential, workers=1) as proxy,
            ):
                _compare(key_type, nginx, proxy, arguments)
    return 0


def _compare(key_type: KeyType, nginx: Setup, proxy: Setup, arguments: argparse.Namespace) -> None:
    results = {setup.name: Turns() for setup in (nginx, proxy)}
    for turn in range(arguments.turns + 1):
        for setup in (nginx, proxy):
            load = HandshakeLoad(
                host="127.0.0.1",
                port=setup.port,
                server_name="localhost",
                ca_file=setup.credential.ca_file,
                count=arguments.count,
                concurrency=arguments.concurrency,
            )
            # The first turn of each warms caches, allocators and pools; it does not count.
            take_turn(setup, load, results[setup.name] if turn else Turns())
    baseline = results[nginx.name].median_cpu_us("proxy")
    print(f"\n### {key_type.value}, TLS 1.3, {arguments.turns} turns of {arguments.count} handshakes\n")
    print("| server | proxy CPU us/handshake | x nginx | hsm CPU us | handshakes/s | p99 ms |")
    print("|---|---|---|---|---|---|")
    for name, turns in results.items():
        own = turns.median_cpu_us("proxy")
        print(
            f"| {name} | {own:.0f} ({min(turns.cpu_us['proxy']):.0f}-{max(turns.cpu_us['proxy']):.0f}) "
            f"| {own / baseline:.2f} | {turns.median_cpu_us('hsm'):.0f} | {statistics.median(turns.per_second):.0f} "
            f"| {statistics.median(turns.p99_ms):.1f} |"
        )
