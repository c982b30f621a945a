"""CPU of each server for a small request on TLS connections that live on, in one interleaved run."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from perf.options import add_load_arguments, add_server_arguments
from perf.parts import Part, Table, figure, figure_and_spread, latency_chart, quantiles_ms
from perf.plots import bar_chart
from perf.request_turns import SERVERS, take_turns
from perf.setups.base import PROXY_ROLE
from perf.turns import Results, Turn


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's options."""
    add_server_arguments(parser, SERVERS)
    add_load_arguments(parser, seconds=1.0, turns=5, concurrency=16)
    parser.add_argument(
        "--http2", type=int, default=0, metavar="STREAMS", help="in HTTP/2, with so many under way on each connection"
    )
    parser.add_argument("--path", default="/", help="what to ask for (default: 100 bytes at /)")


def measure(arguments: argparse.Namespace) -> Iterator[Part]:
    """Measure; yield the one part. Raises RuntimeError."""
    if arguments.http2 and arguments.rate is not None:
        raise RuntimeError("--http2 is a closed loop only: leave --rate out")
    yield _part(take_turns(arguments, "requests", Turn.of, path=arguments.path, streams=arguments.http2), arguments)


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
    if arguments.http2:
        title = f"Small requests in HTTP/2, {arguments.http2} at a time on each connection"
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
