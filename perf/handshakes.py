"""CPU and rate of TLS handshakes, this proxy against its peers, in one interleaved run.

All servers stay up for the whole run and take turns; the figures are medians over the turns. On a noisy machine the
ratio of two medians from the same minutes is the only figure to trust.
"""

from __future__ import annotations

import argparse
import functools
import ssl
from collections.abc import Callable, Iterator, Sequence

from hsm.messages import KeyType
from perf.clients import Clients
from perf.handshake_load import HandshakeLoad, run_handshakes
from perf.options import add_load_arguments, add_server_arguments, chosen_servers, load_on
from perf.parts import Part, Table, figure, figure_and_spread, latency_chart, quantiles_ms
from perf.plots import Axis, bar_chart, line_chart
from perf.setups.base import Server
from perf.setups.catalogue import Servers
from perf.turns import Case, Results, Turn, interleave

SERVERS = ("nginx", "tlsproxy")
_TLS_VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's options."""
    add_server_arguments(parser, SERVERS)
    add_load_arguments(parser, seconds=1.0, turns=7, concurrency=16)
    add_handshake_arguments(parser)
    parser.add_argument(
        "--key-type", type=KeyType, action="append", metavar="TYPE", help="default: ecdsa-p256, rsa-2048"
    )
    parser.add_argument(
        "--latency-ms",
        type=float,
        action="append",
        metavar="MS",
        help="what a signature of the HSMs takes beyond their CPU time; repeat to compare (default: 0)",
    )


def add_handshake_arguments(parser: argparse.ArgumentParser) -> None:
    """What kind of handshakes."""
    parser.add_argument("--tls", choices=_TLS_VERSIONS, default="1.3", help="TLS version (default: %(default)s)")
    parser.add_argument("--resumed", action="store_true", help="resume one ticket instead of full handshakes")


def measure(arguments: argparse.Namespace) -> Iterator[Part]:
    """Measure; yield a part for each key type."""
    key_types = arguments.key_type or [KeyType.ECDSA_P256, KeyType.RSA_2048]
    # Whoever runs a target has chosen its key.
    for key_type in key_types[:1] if arguments.target else key_types:
        with chosen_servers(arguments, key_type) as servers, Clients(arguments.clients) as clients:
            results = _take_turns(clients, servers, arguments)
        yield _part("" if arguments.target else f", {key_type.value}", results, arguments)
        if results.interrupted:
            return


def take_handshakes(clients: Clients, server: Server, arguments: argparse.Namespace) -> Turn:
    """One server's turn. Raises RuntimeError if handshakes were resumed that must be full, or the other way round."""
    load = load_on(server, HandshakeLoad, arguments, tls_version=_TLS_VERSIONS[arguments.tls], resume=arguments.resumed)
    charged = clients.run(run_handshakes, load, server.pids_by_role())
    result = charged.result
    if result.resumed != (result.completed if arguments.resumed else 0):
        raise RuntimeError(f"{server.name}: {result.resumed} of {result.completed} handshakes were resumed")
    return Turn.of(charged)


def _take_turns(clients: Clients, servers: Sequence[Server], arguments: argparse.Namespace) -> Results:
    """Let the servers take turns at each HSM latency (s)."""
    return interleave(
        cases_by_latency(
            servers, arguments.latency_ms or [0.0], lambda server: take_handshakes(clients, server, arguments)
        ),
        arguments.turns,
        "handshakes",
    )


def cases_by_latency(
    servers: Sequence[Server], latencies_ms: Sequence[float], take: Callable[[Server], Turn]
) -> dict[Case, Callable[[], Turn]]:
    """Cases for interleave(): every server at every HSM latency, by name and latency.

    Raises RuntimeError for latencies of HSMs that are not there.
    """
    hsms = servers.site.hsms if isinstance(servers, Servers) else ()
    if any(latencies_ms) and not hsms:
        raise RuntimeError("--latency-ms is for servers whose key is in an HSM of this run: those with -pkcs11")

    def take_at(server: Server, latency_s: float) -> Turn:
        for hsm in hsms:
            hsm.set_latency(latency_s)
        return take(server)

    return {
        Case(server.name, latency_ms / 1e3): functools.partial(take_at, server, latency_ms / 1e3)
        for latency_ms in latencies_ms
        for server in servers
    }


def _part(key_name: str, results: Results, arguments: argparse.Namespace) -> Part:
    """What came of it; ratios are to the first server at the same latency."""
    rows = []
    baselines: dict[float, tuple[float, float]] = {}
    for (name, latency_s), series in results.items():
        total = series.cpu_s()
        baseline_s, baseline_per_second = baselines.setdefault(latency_s, (total, series.per_second))
        rows.append(
            (
                f"{latency_s * 1e3:g} ms",
                name,
                figure_and_spread(*series.proxy_cpu_s(1e6), ".0f"),
                figure(total * 1e6, ".0f"),
                figure(total / baseline_s, ".2f"),
                figure(series.per_second, ".0f"),
                figure(series.per_second / baseline_per_second, ".2f") if baseline_per_second else "-",
                quantiles_ms(series.latencies, 0.5, 0.99),
            )
        )
    loop = "closed loop" if arguments.rate is None else f"open loop, {arguments.rate:g} due each second"
    ratio = f"x {next(iter(results)).server}"
    columns = ("HSM latency", "server", "proxy CPU us", "all CPU us", ratio, "handshakes/s", ratio, "p50 / p99 ms")
    title = f"{'Resumed' if arguments.resumed else 'Full'} handshakes{key_name}"
    return Part(
        title,
        f"TLS {arguments.tls}, {arguments.turns} turns of {arguments.seconds:g} s, {arguments.concurrency} at a time, "
        f"{loop}. CPU is for one handshake: of the processes that speak TLS, and of all.",
        Table(columns, rows),
        _charts(title, results),
        {"handshakes": results},
    )


def _charts(title: str, results: Results) -> list[str]:
    """Of one latency, where the CPU goes and what clients see; of several, what latency does to the rate."""
    latencies_s = {latency_s for _, latency_s in results}
    if len(latencies_s) == 1:
        cpu_us = {name: series.cpu_s() * 1e6 for (name, _), series in results.items()}
        seen = {name: series.latencies for (name, _), series in results.items()}
        return [
            bar_chart(title, "CPU us per handshake, all processes", cpu_us),
            latency_chart(title, "handshake", seen),
        ]
    lines: dict[str, list[tuple[float, float]]] = {}
    for (name, latency_s), series in results.items():
        lines.setdefault(name, []).append((latency_s * 1e3, series.per_second))
    return [line_chart(title, Axis("HSM latency, ms"), Axis("handshakes/s"), lines)]
