"""Confines a proxy worker by Landlock, where the kernel has it.

A worker that has been taken over reads no file but the program's own and what name resolution needs, writes none, runs
no program, binds no TCP port and connects to none but those of servers, and can neither trace nor signal a process
outside. Descriptors it has already are not affected.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import tlsproxy
from hsm import landlock
from tlsproxy.config import Address, Config

_DNS_PORT = 53
_RESOLVER_PATHS = ("/etc", "/run/systemd/resolve", "/run/resolvconf", "/run/nscd")


def confine(config: Config) -> int:
    """Confine this thread and all it will start; return Landlock's version, 0 where the kernel has none.

    Needs PR_SET_NO_NEW_PRIVS. What is replaced in /etc while the worker runs must stay readable if it resolves names:
    then all of /etc is. Raises OSError.
    """
    peers = list(_peers(config))
    readable = {*landlock.program_paths(), *_own_paths()}
    ports = {peer.port for peer in peers}
    if not all(peer.is_ip for peer in peers):
        readable.update(_RESOLVER_PATHS)
        ports.add(_DNS_PORT)
    forbidden = landlock.Tcp.BIND | landlock.Tcp.CONNECT
    return landlock.restrict(readable=readable, forbidden=forbidden, connectable=ports, isolated=True)


def _peers(config: Config) -> Iterator[Address]:
    """All that a worker connects to over TCP: servers, and the collector of spans."""
    for upstream in config.upstreams:
        yield from (server.address for server in upstream.servers if isinstance(server.address, Address))
    if config.tracing is not None:
        endpoint = urlsplit(config.tracing.endpoint)
        yield Address(endpoint.hostname or "", endpoint.port or (443 if endpoint.scheme == "https" else 80))


def _own_paths() -> Iterator[str]:
    """Our modules, and what libuv and OpenSSL read of their own."""
    yield str(Path(tlsproxy.__file__).parent)
    # libuv keeps it open, to have a descriptor to spare when they run out; if it can't, it tries with every connection.
    yield os.devnull
    openssl = ssl.get_default_verify_paths()
    yield from filter(None, (openssl.cafile, openssl.capath, "/etc/ssl/openssl.cnf"))
