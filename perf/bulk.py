"""CPU of each server for a gigabyte sent to clients in bodies of 10 MB, in one interleaved run."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence

from hsm.messages import KeyType
from perf.clients import Clients
from perf.options import add_load_arguments, add_server_arguments, chosen_servers, write_json
from perf.request_load import RequestLoad, run_requests
from perf.setups.base import PROXY_ROLE, Server
from perf.tables import Table, warnings
from perf.turns import Results, Turn, interleave

SERVERS = ("nginx", "tlsproxy", "tlsproxy-tcp", "haproxy", "hitch", "stunnel")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's options."""
    add_server_arguments(parser, SERVERS)
    add_load_arguments(parser, seconds=1.0, turns=4, concurrency=4)
    parser.add_argument("--path", default="/bulk", help="what to ask for (default: 10 MB at /bulk)")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print a Markdown table."""
    with chosen_servers(arguments, KeyType.ECDSA_P256) as servers, Clients(arguments.clients) as clients:
        results = measure_bulk(clients, servers, arguments)
    print(bulk_table(results, arguments).markdown())
    write_json(arguments.json, {"bulk": results})
    return 130 if results.interrupted else 0


def measure_bulk(clients: Clients, servers: Sequence[Server], arguments: argparse.Namespace) -> Results[str]:
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

    cases = {server.name: functools.partial(take, server) for server in servers}
    return interleave(cases, arguments.turns, "bulk")


def bulk_table(results: Results[str], arguments: argparse.Namespace) -> Table:
    """What came of it; ratios are to the first server."""
    baseline = next(iter(results.values())).cpu_s(PROXY_ROLE)
    rows = []
    for name, series in results.items():
        own = series.cpu_s(PROXY_ROLE)
        least, greatest = series.proxy_cpu_spread_s()
        rows.append(
            (name, f"{own:.2f} ({least:.2f}-{greatest:.2f})", f"{own / baseline:.2f}", f"{series.per_second:.2f}")
        )
    return Table(
        "Bodies of 10 MB",
        f"{arguments.turns} turns of {arguments.seconds:g} s, {arguments.concurrency} connections, "
        f"downloads through a reverse proxy from the same back end.{warnings(results)}",
        ("server", "CPU s/GB", f"x {next(iter(results))}", "GB/s"),
        rows,
    )
