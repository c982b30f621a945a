"""CPU of each server for a small request on TLS connections that live on, in one interleaved run."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence

from hsm.messages import KeyType
from perf.clients import Clients
from perf.options import add_load_arguments, add_server_arguments, chosen_servers, write_json
from perf.request_load import RequestLoad, run_requests
from perf.setups.base import PROXY_ROLE, Server
from perf.tables import Table, quantiles_ms, warnings
from perf.turns import Results, Turn, interleave

SERVERS = ("nginx", "tlsproxy", "tlsproxy-tcp", "haproxy", "hitch", "stunnel")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's options."""
    add_server_arguments(parser, SERVERS)
    add_load_arguments(parser, seconds=1.0, turns=5, concurrency=16)
    parser.add_argument("--path", default="/", help="what to ask for (default: 100 bytes at /)")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print a Markdown table."""
    with chosen_servers(arguments, KeyType.ECDSA_P256) as servers, Clients(arguments.clients) as clients:
        results = measure_requests(clients, servers, arguments)
    print(requests_table(results, arguments).markdown())
    write_json(arguments.json, {"requests": results})
    return 130 if results.interrupted else 0


def measure_requests(clients: Clients, servers: Sequence[Server], arguments: argparse.Namespace) -> Results[str]:
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

    cases = {server.name: functools.partial(take, server) for server in servers}
    return interleave(cases, arguments.turns, "requests")


def requests_table(results: Results[str], arguments: argparse.Namespace) -> Table:
    """What came of it; ratios are to the first server."""
    baseline = next(iter(results.values())).cpu_s(PROXY_ROLE)
    rows = []
    for name, series in results.items():
        own = series.cpu_s(PROXY_ROLE)
        least, greatest = series.proxy_cpu_spread_s()
        rows.append(
            (
                name,
                f"{own * 1e6:.1f} ({least * 1e6:.1f}-{greatest * 1e6:.1f})",
                f"{own / baseline:.2f}",
                f"{series.per_second:.0f}",
                quantiles_ms(series.latencies, 0.5, 0.99),
            )
        )
    loop = "closed loop" if arguments.rate is None else f"open loop, {arguments.rate:g} due each second"
    return Table(
        "Small requests on TLS keep-alive",
        f"{arguments.turns} turns of {arguments.seconds:g} s, {arguments.concurrency} connections, {loop}, "
        f"a reverse proxy before the same back end.{warnings(results)}",
        ("server", "CPU us/request", f"x {next(iter(results))}", "requests/s", "p50 / p99 ms"),
        rows,
    )
