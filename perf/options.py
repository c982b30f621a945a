"""What the subcommands' command lines have in common, and the servers that they name."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsm.messages import KeyType
from perf import cpu
from perf.load import LoadType
from perf.setups.base import PROXY_ROLE, Server
from perf.setups.catalogue import SETUPS, Servers, running


@dataclass(frozen=True, slots=True)
class Target:
    """A server that somebody else runs. Satisfies Server."""

    host: str
    port: int
    server_name: str
    ca_file: Path
    pids: Sequence[int]
    """Processes to charge with CPU time, each with all below it; none if they are out of reach."""

    @property
    def name(self) -> str:
        """Where it is."""
        return f"{self.host}:{self.port}"

    def pids_by_role(self) -> dict[int, str]:
        """See Server: all are one."""
        return {pid: PROXY_ROLE for parent in self.pids for pid in cpu.descendants(parent)}


def add_server_arguments(parser: argparse.ArgumentParser, default: Sequence[str]) -> None:
    """Which servers to measure: set-ups by name, or one target."""
    names = ", ".join(SETUPS)
    parser.add_argument(
        "--server", action="append", choices=SETUPS, metavar="NAME", help=f"of {names}; default: {', '.join(default)}"
    )
    parser.add_argument("--workers", type=_positive, default=1, help="workers of each server (default: 1)")
    parser.add_argument("--tokens", type=_positive, default=1, help="HSMs behind this proxy (default: 1)")
    parser.add_argument("--sessions", type=_positive, default=64, help="its PKCS#11 sessions with each (default: 64)")
    parser.add_argument("--target", type=_address, metavar="HOST:PORT", help="measure this server instead; needs --ca")
    parser.add_argument("--ca", type=Path, metavar="FILE", help="the CA that the target's certificate comes from, PEM")
    parser.add_argument("--server-name", metavar="NAME", help="SNI and Host for the target (default: its host)")
    parser.add_argument(
        "--pid", type=int, action="append", default=[], help="charge this process of the target, and all below it"
    )
    parser.set_defaults(default_servers=list(default))


def add_load_arguments(parser: argparse.ArgumentParser, *, seconds: float, turns: int, concurrency: int) -> None:
    """How much load, how long, how often."""
    parser.add_argument("--turns", type=_positive, default=turns, help="turns of each (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=seconds, help="length of a turn (default: %(default)s)")
    parser.add_argument(
        "--concurrency", type=_positive, default=concurrency, help="exchanges under way at most (default: %(default)s)"
    )
    parser.add_argument("--rate", type=float, help="open loop: so many due each second, Poisson (default: closed loop)")
    parser.add_argument("--clients", type=_positive, default=1, help="client processes (default: 1)")
    add_json_argument(parser)


def load_on(server: Server, kind: type[LoadType], arguments: argparse.Namespace, **particulars: Any) -> LoadType:
    """The load that the command line asks for, on one server."""
    return kind(
        server.host,
        server.port,
        server.server_name,
        server.ca_file,
        arguments.seconds,
        arguments.concurrency,
        arguments.rate,
        **particulars,
    )


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """Where the raw data goes."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the raw data there")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not 0 < int(port) < 65536:
        raise ValueError
    return host.strip("[]"), int(port)


@contextlib.contextmanager
def chosen_servers(arguments: argparse.Namespace, key_type: KeyType) -> Iterator[Sequence[Server]]:
    """Start the servers that the command line names, or stand for the target."""
    if arguments.target:
        if arguments.ca is None:
            raise RuntimeError("--target needs --ca FILE: certificates are verified")
        host, port = arguments.target
        yield [Target(host, port, arguments.server_name or host, arguments.ca, arguments.pid)]
        return
    with started(arguments, key_type) as servers:
        yield servers


@contextlib.contextmanager
def started(arguments: argparse.Namespace, key_type: KeyType) -> Iterator[Servers]:
    """Start the servers that the command line names."""
    names = arguments.server or arguments.default_servers
    with running(
        names, key_type, workers=arguments.workers, tokens=arguments.tokens, sessions=arguments.sessions
    ) as servers:
        yield servers
