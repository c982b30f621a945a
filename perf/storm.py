"""What a client on an established connection sees while handshakes storm, and what the storm gets done.

The servers' keys are in SoftHSM2 behind a module that sleeps in C_Sign. A prober asks at a steady rate on one
keep-alive connection: first while all is quiet, then during the storm, the servers in turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence

from hsm.messages import KeyType
from perf.clients import Clients
from perf.handshakes import add_handshake_arguments, cases_by_latency, take_handshakes
from perf.histogram import Histogram
from perf.options import add_load_arguments, add_server_arguments, chosen_servers
from perf.parts import Part, Table, figure, latency_chart, quantiles_ms
from perf.prober import Prober
from perf.setups.base import Server
from perf.turns import Case, Results, Series, Turn, interleave

SERVERS = ("nginx-pkcs11", "tlsproxy-pkcs11", "stunnel-pkcs11")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's options."""
    add_server_arguments(parser, SERVERS)
    add_load_arguments(parser, seconds=3.0, turns=3, concurrency=64)
    add_handshake_arguments(parser)
    parser.add_argument(
        "--latency-ms", type=float, action="append", metavar="MS", help="of the HSMs; repeat to compare (default: 20)"
    )
    parser.add_argument("--probe-rate", type=float, default=100.0, help="requests a second (default: %(default)s)")


def measure(arguments: argparse.Namespace) -> Iterator[Part]:
    """Measure; yield the one part."""
    with chosen_servers(arguments, KeyType.ECDSA_P256) as servers, Clients(arguments.clients) as clients:
        quiet, storm = _take_turns(clients, servers, arguments)
    yield _part(quiet, storm, arguments)


def _take_turns(clients: Clients, servers: Sequence[Server], arguments: argparse.Namespace) -> tuple[Results, Results]:
    """Probe every server while all is quiet, once, then let them take turns in the storm, at each HSM latency (s)."""

    def be_quiet(server: Server) -> Turn:
        with Prober(server, arguments.probe_rate) as prober:
            time.sleep(arguments.seconds)
        nothing = Turn(0, 0.0, {}, Histogram(), {}, 0.0)
        return dataclasses.replace(nothing, probes=prober.result.latencies, probes_asked=prober.result.asked)

    def take(server: Server) -> Turn:
        with Prober(server, arguments.probe_rate) as prober:
            turn = take_handshakes(clients, server, arguments)
        return dataclasses.replace(turn, probes=prober.result.latencies, probes_asked=prober.result.asked)

    quiet = interleave({Case(server.name): functools.partial(be_quiet, server) for server in servers}, 1, "quiet")
    latencies_ms = [0.0] if arguments.target else arguments.latency_ms or [20.0]
    storm = interleave(
        cases_by_latency(servers, latencies_ms, take), 0 if quiet.interrupted else arguments.turns, "storm"
    )
    return quiet, storm


def _part(quiet: Results, storm: Results, arguments: argparse.Namespace) -> Part:
    rows = [(case.server, "quiet", "-", "-", "-", *_probes(series)) for case, series in quiet.items()]
    rows += [
        (
            name,
            f"storm, {latency_s * 1e3:g} ms",
            figure(series.per_second, ".0f"),
            figure(series.cpu_s() * 1e6, ".0f"),
            quantiles_ms(series.latencies, 0.5, 0.99),
            *_probes(series),
        )
        for (name, latency_s), series in storm.items()
    ]
    storming = f"{arguments.concurrency} handshakes at a time"
    if arguments.rate is not None:
        storming = f"{arguments.rate:g} handshakes due each second, {storming} at most"
    title = "An established connection in a storm of handshakes"
    probes = {f"{case}, quiet": series.probes for case, series in quiet.items()}
    probes |= {str(case): series.probes for case, series in storm.items()}
    return Part(
        title,
        f"{arguments.turns} turns of {arguments.seconds:g} s, {storming}; "
        f"meanwhile {arguments.probe_rate:g} requests a second on one connection, timed from when they were due.",
        Table(
            (
                "server",
                "",
                "handshakes/s",
                "CPU us/handshake",
                "handshake p50 / p99 ms",
                "probes served",
                "probe p50 / p99 / p99.9 ms",
            ),
            rows,
        ),
        [latency_chart(title, "probe", probes)],
        {"quiet": quiet, "storm": storm},
    )


def _probes(series: Series) -> tuple[str, str]:
    asked = sum(turn.probes_asked for turn in series)
    return f"{series.probes.count} of {asked}", quantiles_ms(series.probes, 0.5, 0.99, 0.999)
