"""CPU of each server for a gigabyte in bodies of 10 MB, to clients or from them, in one interleaved run."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from perf.clients import Charged
from perf.options import add_load_arguments, add_server_arguments
from perf.parts import Part, Table, figure, figure_and_spread
from perf.plots import bar_chart
from perf.request_turns import SERVERS, take_turns
from perf.setups.base import PROXY_ROLE
from perf.setups.nginx import BULK_BYTES
from perf.turns import Results, Turn


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's options."""
    add_server_arguments(parser, SERVERS)
    add_load_arguments(parser, seconds=1.0, turns=4, concurrency=4)
    parser.add_argument("--upload", action="store_true", help="send bodies of 10 MB instead of asking for them")
    parser.add_argument("--path", help="what to ask for, or to send to (default: /bulk, and /sink for uploads)")


def measure(arguments: argparse.Namespace) -> Iterator[Part]:
    """Measure; yield the one part. An operation is a gigabyte (10^9 bytes)."""
    if arguments.upload:
        path, upload_bytes = arguments.path or "/sink", BULK_BYTES
    else:
        path, upload_bytes = arguments.path or "/bulk", 0

    def turn_of(charged: Charged) -> Turn:
        result = charged.result
        return Turn.of(charged, (result.completed * upload_bytes or result.received_bytes) / 1e9)

    yield _part(take_turns(arguments, "bulk", turn_of, path=path, upload_bytes=upload_bytes), arguments)


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
    title = f"{'Uploads' if arguments.upload else 'Downloads'} of 10 MB"
    cpu_s = {case.server: series.cpu_s(PROXY_ROLE) for case, series in results.items()}
    return Part(
        title,
        f"{arguments.turns} turns of {arguments.seconds:g} s, {arguments.concurrency} connections, "
        "a reverse proxy before the same back end.",
        Table(("server", "CPU s/GB", f"x {next(iter(results)).server}", "GB/s"), rows),
        [bar_chart(title, "CPU s per GB", cpu_s)],
        {"bulk": results},
    )
