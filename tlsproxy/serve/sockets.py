"""Listening sockets: one for each proxy worker on the same address, so that the kernel spreads the connections.

A listening socket that is closed resets the connections that wait in its backlog. So it is made once and handed on,
to restarted workers, to the workers of a new configuration, to another supervisor; it is closed when nobody is to
listen on its address any more.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tlsproxy.config import Address, Config
from tlsproxy.errors import StartupError

BACKLOG = 4096
_REASONS = {
    errno.EADDRINUSE: "the port is in use",
    errno.EACCES: "ports below 1024 need root or CAP_NET_BIND_SERVICE",
    errno.EADDRNOTAVAIL: "no interface of this machine has this address",
}


@dataclass(frozen=True, slots=True)
class ListeningSockets:
    """The sockets of every address that is listened on."""

    by_address: Mapping[Address, tuple[socket.socket, ...]]

    def for_worker(self, address: Address, index: int, workers: int) -> tuple[socket.socket, ...]:
        """Return those that proxy worker `index` of `workers` accepts on: each socket has a worker, each worker one."""
        present = self.by_address[_canonical(address)]
        return present[index::workers] if len(present) >= workers else (present[index % len(present)],)

    def all(self) -> list[socket.socket]:
        """Return every socket."""
        return [sock for group in self.by_address.values() for sock in group]

    def only(self, address: Address | None) -> ListeningSockets:
        """Return those of one address, or none."""
        return NO_SOCKETS if address is None else ListeningSockets({address: self.by_address[_canonical(address)]})

    def close(self, keep: ListeningSockets) -> None:
        """Close the sockets that are not in `keep` too."""
        kept = set(keep.all())
        for sock in self.all():
            if sock not in kept:
                sock.close()


NO_SOCKETS = ListeningSockets({})


def expect_wanted(passed: ListeningSockets, config: Config) -> None:
    """See that each socket has a listener: on others, clients would wait for nobody. Raises StartupError."""
    addresses = [listener.address for listener in config.listeners]
    if config.admin is not None:
        addresses.append(config.admin.address)
    for address in passed.by_address.keys() - set(map(_canonical, addresses)):
        raise StartupError(f"the service manager listens on {address}: expected a listener's or the admin address")


def adopt(inherited: Iterable[socket.socket]) -> ListeningSockets:
    """Return sockets that another process has opened, by the address each is bound to. Raises StartupError."""
    by_address: dict[Address, tuple[socket.socket, ...]] = {}
    for sock in inherited:
        if sock.family not in (socket.AF_INET, socket.AF_INET6) or not _is_listening(sock):
            raise StartupError(f"inherited descriptor {sock.fileno()}: expected a listening TCP socket")
        address = _canonical(Address(*sock.getsockname()[:2]))
        by_address[address] = (*by_address.get(address, ()), sock)
    return ListeningSockets(by_address)


def open_sockets(config: Config, present: ListeningSockets) -> ListeningSockets:
    """Return the sockets that `config` needs: those `present`, and new ones where there are too few.

    Raises StartupError, also where SO_REUSEPORT alone would let us share a port with another instance.
    """
    wanted = [(listener.address, config.workers, listener.origin.path) for listener in config.listeners]
    if config.admin is not None:
        wanted.append((config.admin.address, 1, "admin"))
    opened: dict[Address, tuple[socket.socket, ...]] = {}
    try:
        for address, count, what in wanted:
            found = present.by_address.get(_canonical(address), ())
            opened[_canonical(address)] = (*found, *_missing(address, count, found, what))
    except StartupError:
        ListeningSockets(opened).close(keep=present)
        raise
    return ListeningSockets(opened)


def _missing(address: Address, count: int, found: tuple[socket.socket, ...], what: str) -> list[socket.socket]:
    """Open what `found` lacks; beside a socket that does not share its port the workers must share the socket."""
    if any(not sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT) for sock in found):
        return []
    sockets: list[socket.socket] = []
    try:
        if not found:
            _bound(address, reuse_port=False).close()
        for _ in range(count - len(found)):
            sockets.append(_bound(address, reuse_port=True))
            sockets[-1].listen(BACKLOG)
    except OSError as error:
        for bound in sockets:
            bound.close()
        reason = _REASONS.get(error.errno or 0, error.strerror)
        raise StartupError(f"{what}: cannot listen on {address}: {reason}") from None
    return sockets


def _canonical(address: Address) -> Address:
    return Address(str(ipaddress.ip_address(address.host)), address.port)


def _is_listening(sock: socket.socket) -> bool:
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


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
