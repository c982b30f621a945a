"""What `requests` and `bulk` share: servers take turns under requests on TLS connections that live on."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

from hsm.messages import KeyType
from perf.clients import Charged, Clients
from perf.http2_load import Http2Load, run_http2_requests
from perf.options import chosen_servers, load_on
from perf.request_load import RequestLoad, run_requests
from perf.setups.base import Server
from perf.turns import Case, Results, Turn, interleave

SERVERS = ("nginx", "tlsproxy", "tlsproxy-tcp", "haproxy", "hitch", "stunnel")


def take_turns(
    arguments: argparse.Namespace,
    what: str,
    turn_of: Callable[[Charged], Turn],
    *,
    path: str,
    upload_bytes: int = 0,
    streams: int = 0,
) -> Results:
    """Start the servers that the command line names, and let them take turns; `turn_of` says what an operation is.

    With `streams`, so many requests are under way on each connection, in HTTP/2.
    """
    with chosen_servers(arguments, KeyType.ECDSA_P256) as servers, Clients(arguments.clients) as clients:

        def take(server: Server) -> Turn:
            if streams:
                http2_load = load_on(server, Http2Load, arguments, path=path, streams=streams)
                return turn_of(clients.run(run_http2_requests, http2_load, server.pids_by_role()))
            load = load_on(server, RequestLoad, arguments, path=path, upload_bytes=upload_bytes)
            return turn_of(clients.run(run_requests, load, server.pids_by_role()))

        cases = {Case(server.name): functools.partial(take, server) for server in servers}
        return interleave(cases, arguments.turns, what)
