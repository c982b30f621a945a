"""Memory of each server for a TLS connection on which nothing happens."""

from __future__ import annotations

import argparse
import ssl
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's options."""
    add_server_arguments(parser, SERVERS)
    parser.add_argument("--connections", type=int, default=10_000, help="open at a time (default: %(default)s)")
    add_json_argument(parser)


def measure(arguments: argparse.Namespace) -> Iterator[Part]:
    """Measure; yield the one part."""
    rows = []
    kib: dict[str, float] = {}
    with chosen_servers(arguments, KeyType.ECDSA_P256) as servers:
        for server in servers:
            _open(server, _WARM_UP)
            before = _resident_bytes(server)
            connections = _open(server, arguments.connections)
            used = _resident_bytes(server) - before
            for connection in connections:
                connection.close()
            kib[server.name] = used / len(connections) / 1024
            rows.append((server.name, f"{before / 2**20:.0f}", f"{kib[server.name]:.1f}"))
    yield Part(
        "Idle connections",
        f"{arguments.connections} TLS 1.3 connections, each after one request. Resident memory of all processes.",
        Table(("server", "MiB without them", "KiB for each"), rows),
        [],
        figures=kib,
    )


def _open(server: Server, number: int) -> list[ssl.SSLSocket]:
    """Open connections, make one request on each, and keep them."""
    context = client_context(server.ca_file)
    request = f"GET / HTTP/1.1\r\nHost: {server.server_name}\r\n\r\n".encode()
    connections: list[ssl.SSLSocket] = []
    progress = Progress(f"idle, {server.name}", number)
    try:
        for _ in range(number):
            connection = connect(server.host, server.port, server.server_name, context)
            connection.sendall(request)
            if not connection.recv(65536):
                raise RuntimeError(f"{server.name} closed connection {len(connections) + 1}")
            connections.append(connection)
            progress.step()
            if len(connections) % 100 == 0:
                progress.show(f"{len(connections)} open")
    except OSError as error:
        raise RuntimeError(f"{server.name} refused connection {len(connections) + 1}: {error}") from error
    finally:
        progress.clear()
    return connections


def _resident_bytes(server: Server) -> int:
    return sum(map(cpu.resident_bytes, server.pids_by_role()))
