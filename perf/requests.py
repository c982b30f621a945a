"""CPU of each server for a small request on TLS connections that live on, in one interleaved run."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator, Sequence

from hsm.messages import KeyType
from perf.clients import Clients
from perf.options import add_load_arguments, add_server_arguments, chosen_servers
from perf.parts import Part, Table, figure, figure_and_spread, latency_chart, quantiles_ms
from perf.plots import bar_chart
from perf.request_load import RequestLoad, run_requests
from perf.setups.base import PROXY_ROLE, Server
from perf.turns import Case, Results, Turn, interleave

SERVERS = ("nginx", "tlsproxy", "tlsproxy-tcp", "haproxy", "hitch", "stunnel")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's options."""
    add_server_arguments(parser, SERVERS)
    add_load_arguments(parser, seconds=1.0, turns=5, concurrency=16)
    parser.add_argument("--path", default="/", help="what to ask for (default: 100 bytes at /)")


def measure(arguments: argparse.Namespace) -> Iterator[Part]:
    """Measure; yield the one part."""
    with chosen_servers(arguments, KeyType.ECDSA_P256) as servers, Clients(arguments.clients) as clients:
        results = _take_turns(clients, servers, arguments)
    yield _part(results, arguments)


def _take_turns(clients: Clients, servers: Sequence[Server], arguments: argparse.Namespace) -> Results:
    """Let the servers take turns."""

    def take(server: Server) -> Turn:
        load = RequestLoad(
            server.host,
            server.port,
            server.server_name,
            server.ca_file,
            arguments.seconds,
            arguments.concurrency,
            arguments.rate,
            path=arguments.path,
        )
        return Turn.of(clients.run(run_requests, load, server.pids_by_role()))

    cases = {Case(server.name): functools.partial(take, server) for server in servers}
    return interleave(cases, arguments.turns, "requests")


def _part(results: Results, arguments: argparse.Namespace) -> Part:
    """What came of it; ratios are to the first server."""
    baseline_us, _ = next(iter(results.values())).proxy_cpu_s(1e6)
    rows = []
    for case, series in results.items():
        own_us, spread_us = series.proxy_cpu_s(1e6)
        rows.append(
            (
                case.server,
                figure_and_spread(own_us, spread_us, ".1f"),
                figure(own_us / baseline_us, ".2f"),
                figure(series.per_second, ".0f"),
                quantiles_ms(series.latencies, 0.5, 0.99),
            )
        )
    loop = "closed loop" if arguments.rate is None else f"open loop, {arguments.rate:g} due each second"
    title = "Small requests on TLS keep-alive"
    cpu_us = {case.server: series.cpu_s(PROXY_ROLE) * 1e6 for case, series in results.items()}
    return Part(
        title,
        f"{arguments.turns} turns of {arguments.seconds:g} s, {arguments.concurrency} connections, {loop}, "
        f"a reverse proxy before the same back end.",
        Table(("server", "CPU us/request", f"x {next(iter(results)).server}", "requests/s", "p50 / p99 ms"), rows),
        [
            bar_chart(title, "CPU us per request", cpu_us),
            latency_chart(title, "latency", {case.server: series.latencies for case, series in results.items()}),
        ],
        {"requests": results},
    )
