"""Listening sockets: one for each proxy worker on the same address, so that the kernel spreads the connections."""

from __future__ import annotations

import errno
import socket

from tlsproxy.config import Address
from tlsproxy.errors import StartupError

_BACKLOG = 4096
_REASONS = {
    errno.EADDRINUSE: "the port is in use",
    errno.EACCES: "ports below 1024 need root or CAP_NET_BIND_SERVICE",
    errno.EADDRNOTAVAIL: "no interface of this machine has this address",
}


def listen(address: Address, count: int, *, what: str) -> list[socket.socket]:
    """Return `count` listening SO_REUSEPORT sockets on `address`.

    Raises StartupError, also where SO_REUSEPORT alone would let us share the port with another instance. `what` names
    the socket in that error.
    """
    sockets: list[socket.socket] = []
    try:
        _bound(address, reuse_port=False).close()
        for _ in range(count):
            sockets.append(_bound(address, reuse_port=True))
            sockets[-1].listen(_BACKLOG)
    except OSError as error:
        for bound in sockets:
            bound.close()
        reason = _REASONS.get(error.errno or 0, error.strerror)
        raise StartupError(f"{what}: cannot listen on {address}: {reason}") from None
    return sockets


def _bound(address: Address, *, reuse_port: bool) -> socket.socket:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind((address.host, address.port))
    except OSError:
        bound.close()
        raise
    return bound
