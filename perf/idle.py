"""Memory of each server for a TLS connection on which nothing happens, or whose client does not read."""

from __future__ import annotations

import argparse
import ssl
import time
from collections.abc import Iterator

from hsm.messages import KeyType
from perf import cpu
from perf.clients import client_context, connect
from perf.options import add_json_argument, add_server_arguments, chosen_servers
from perf.parts import Part, Table
from perf.setups.base import Server
from perf.turns import Progress

SERVERS = ("nginx", "tlsproxy", "haproxy")
_WARM_UP = 100
_SETTLE_S = 2.0
"""So long after the last request a server has filled what it fills for a client that does not read."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's options."""
    add_server_arguments(parser, SERVERS)
    parser.add_argument("--connections", type=int, default=10_000, help="open at a time (default: %(default)s)")
    parser.add_argument("--stalled", action="store_true", help="each has asked for 10 MB at /bulk and reads none of it")
    add_json_argument(parser)


def measure(arguments: argparse.Namespace) -> Iterator[Part]:
    """Measure; yield the one part."""
    rows = []
    kib: dict[str, float] = {}
    with chosen_servers(arguments, KeyType.ECDSA_P256) as servers:
        for server in servers:
            _open(server, _WARM_UP)
            before = _resident_bytes(server)
            connections = _open(server, arguments.connections, stalled=arguments.stalled)
            used = _resident_bytes(server) - before
            for connection in connections:
                connection.close()
            kib[server.name] = used / len(connections) / 1024
            rows.append((server.name, f"{before / 2**20:.0f}", f"{kib[server.name]:.1f}"))
    title = "Stalled connections" if arguments.stalled else "Idle connections"
    what = "having asked for 10 MB and read nothing" if arguments.stalled else "after one request"
    yield Part(
        title,
        f"{arguments.connections} TLS 1.3 connections, each {what}. Resident memory of all processes.",
        Table(("server", "MiB without them", "KiB for each"), rows),
        [],
        figures=kib,
    )


def _open(server: Server, number: int, *, stalled: bool = False) -> list[ssl.SSLSocket]:
    """Open connections, make one request on each, read the answer unless `stalled`, and keep them."""
    context = client_context(server.ca_file)
    request = f"GET {'/bulk' if stalled else '/'} HTTP/1.1\r\nHost: {server.server_name}\r\n\r\n".encode()
    connections: list[ssl.SSLSocket] = []
    progress = Progress(f"idle, {server.name}", number)
    try:
        for _ in range(number):
            connection = connect(server.host, server.port, server.server_name, context)
            connection.sendall(request)
            if not stalled and not connection.recv(65536):
                raise RuntimeError(f"{server.name} closed connection {len(connections) + 1}")
            connections.append(connection)
            progress.step()
            if len(connections) % 100 == 0:
                progress.show(f"{len(connections)} open")
    except OSError as error:
        raise RuntimeError(f"{server.name} refused connection {len(connections) + 1}: {error}") from error
    finally:
        progress.clear()
    if stalled:
        time.sleep(_SETTLE_S)
    return connections


def _resident_bytes(server: Server) -> int:
    return sum(map(cpu.resident_bytes, server.pids_by_role()))
