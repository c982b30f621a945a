"""CPU of each server for a gigabyte sent to clients in bodies of 10 MB, in one interleaved run."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator, Sequence

from hsm.messages import KeyType
from perf.clients import Clients
from perf.options import add_load_arguments, add_server_arguments, chosen_servers
from perf.parts import Part, Table, figure, figure_and_spread
from perf.plots import bar_chart
from perf.request_load import RequestLoad, run_requests
from perf.setups.base import PROXY_ROLE, Server
from perf.turns import Case, Results, Turn, interleave

SERVERS = ("nginx", "tlsproxy", "tlsproxy-tcp", "haproxy", "hitch", "stunnel")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's options."""
    add_server_arguments(parser, SERVERS)
    add_load_arguments(parser, seconds=1.0, turns=4, concurrency=4)
    parser.add_argument("--path", default="/bulk", help="what to ask for (default: 10 MB at /bulk)")


def measure(arguments: argparse.Namespace) -> Iterator[Part]:
    """Measure; yield the one part."""
    with chosen_servers(arguments, KeyType.ECDSA_P256) as servers, Clients(arguments.clients) as clients:
        results = _take_turns(clients, servers, arguments)
    yield _part(results, arguments)


def _take_turns(clients: Clients, servers: Sequence[Server], arguments: argparse.Namespace) -> Results:
    """Let the servers take turns. An operation is a gigabyte (10^9 bytes)."""

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
        charged = clients.run(run_requests, load, server.pids_by_role())
        result = charged.result
        gigabytes = result.received_bytes / 1e9
        return Turn(
            gigabytes,
            gigabytes / result.elapsed_s,
            charged.cpu_s,
            result.latencies,
            dict(result.failures),
            result.client_busy,
        )

    cases = {Case(server.name): functools.partial(take, server) for server in servers}
    return interleave(cases, arguments.turns, "bulk")


def _part(results: Results, arguments: argparse.Namespace) -> Part:
    """What came of it; ratios are to the first server."""
    baseline, _ = next(iter(results.values())).proxy_cpu_s(1)
    rows = []
    for case, series in results.items():
        own, spread = series.proxy_cpu_s(1)
        rows.append(
            (
                case.server,
                figure_and_spread(own, spread, ".2f"),
                figure(own / baseline, ".2f"),
                figure(series.per_second, ".2f"),
            )
        )
    title = "Bodies of 10 MB"
    cpu_s = {case.server: series.cpu_s(PROXY_ROLE) for case, series in results.items()}
    return Part(
        title,
        f"{arguments.turns} turns of {arguments.seconds:g} s, {arguments.concurrency} connections, "
        f"downloads through a reverse proxy from the same back end.",
        Table(("server", "CPU s/GB", f"x {next(iter(results)).server}", "GB/s"), rows),
        [bar_chart(title, "CPU s per GB", cpu_s)],
        {"bulk": results},
    )
