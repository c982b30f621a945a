"""The clients of a worker: let in, greeted, listened to, dropped. What becomes of their requests is others' business.

Two serving loops do that, `serving_inline` in one thread and `serving_threaded` in many. Both call Clients.poll in a
loop of their own and are told of what has come.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import struct
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import monotonic_ns
from typing import Generic, Protocol, TypeVar

from hsm.messages import Hello, KeyInfo, ProtocolError, SignRequest, decode_requests, encode_hello
from hsm.workerspec import WorkerSpec

MAX_CLIENTS = 256
"""Connections a worker keeps: far above the proxy processes of one machine, below the usual descriptor limit."""
RECEIVE_BYTES = 32 << 10
"""A larger buffer is allocated and shrunk each time: 256 KB doubles the cost of small reads."""
HEARTBEAT_S = 1.0
_HEARTBEAT_NS = round(HEARTBEAT_S * 1e9)
_PEER_CREDENTIALS = struct.Struct("3i")

_log = logging.getLogger(__name__)


class ClientGoneError(Exception):
    """The client closed its connection, or the kernel did. Nobody is left to answer."""


@dataclass(frozen=True, slots=True)
class Peer:
    """The process at the other end, as the kernel knows it."""

    pid: int
    uid: int


class Client:
    """A connected proxy process."""

    __slots__ = ("buffer", "connection", "peer", "unsent", "waiting")

    def __init__(self, connection: socket.socket, peer: Peer, hello: bytes) -> None:
        self.connection = connection
        self.peer = peer
        self.unsent = hello
        """What of the Hello still has to go: until then nothing is read."""
        self.buffer = bytearray()
        self.waiting: deque[tuple[SignRequest, int]] = deque()
        """Requests and when they came, in ns."""


C = TypeVar("C", bound=Client)
C_contra = TypeVar("C_contra", bound=Client, contravariant=True)


class ClientEvents(Protocol[C_contra]):
    """What the owner of Clients is told, in the thread that calls poll() or drop()."""

    def requests_came(self, client: C_contra, requests: list[SignRequest]) -> None:
        """One request or more. Raises ProtocolError: then the client is dropped."""

    def client_dropped(self, client: C_contra) -> None:
        """Nobody is left to answer. The connection is the owner's to close, once nothing uses its descriptor."""


class Clients(Generic[C]):
    """Everybody who is connected to a worker's socket."""

    def __init__(
        self,
        kind: type[C],
        owner: ClientEvents[C],
        listener: socket.socket,
        spec: WorkerSpec,
        keys: Sequence[KeyInfo],
        window: int,
        stop_fds: Sequence[int],
    ) -> None:
        """Each client is a `kind` and is told of `keys` and its `window`; nothing is accepted before poll().

        When one of `stop_fds` becomes readable, `stopping` becomes True.
        """
        self.stopping = False
        self._kind = kind
        self._owner = owner
        self._hello = encode_hello(Hello(spec.token, os.getpid(), window, tuple(keys)))
        self._allowed_uids = frozenset((spec.allowed_uid, os.geteuid()))
        self._connected: dict[int, C] = {}
        self._listener = listener
        self._stop_fds = frozenset(stop_fds)
        self._status_fd = spec.status_fd
        self._heartbeat_due_ns = 0
        # A parent that does not read must not stop the worker.
        os.set_blocking(spec.status_fd, False)
        listener.setblocking(False)
        self._epoll = select.epoll()
        for fd in (listener.fileno(), *stop_fds):
            self._epoll.register(fd, select.EPOLLIN)

    def __iter__(self) -> Iterator[C]:
        """Over those connected now, whoever is dropped meanwhile."""
        return iter(tuple(self._connected.values()))

    def poll(self, timeout_s: float) -> None:
        """Wait at most so long, or HEARTBEAT_S, for something to come, and see to all that has.

        Tells the parent, once in HEARTBEAT_S, that the serving loop goes round.
        """
        for fd, _ in self._epoll.poll(min(timeout_s, HEARTBEAT_S)):
            self._on_ready(fd)
        now_ns = monotonic_ns()
        if now_ns >= self._heartbeat_due_ns:
            self._heartbeat_due_ns = now_ns + _HEARTBEAT_NS
            with contextlib.suppress(OSError):
                os.write(self._status_fd, b'{"state": "alive"}\n')

    def drop(self, client: C, error: Exception) -> None:
        """Have nothing more to do with a client. Of one that is to blame the log says why."""
        if isinstance(error, ProtocolError):
            _log.warning("dropped client pid %d: %s", client.peer.pid, error)
        del self._connected[client.connection.fileno()]
        self._epoll.unregister(client.connection)
        self._owner.client_dropped(client)

    def close(self) -> None:
        """Close all connections. Nobody may be using one."""
        self._epoll.close()
        for client in self._connected.values():
            client.connection.close()

    def _on_ready(self, fd: int) -> None:
        if fd in self._connected:
            client = self._connected[fd]
            try:
                if client.unsent:
                    self._send_hello(client)
                elif requests := receive_requests(client.connection, client.buffer):
                    self._owner.requests_came(client, requests)
            except (ClientGoneError, ProtocolError) as error:
                self.drop(client, error)
        elif fd in self._stop_fds:
            self.stopping = True
            self._epoll.unregister(fd)
        else:
            self._accept()

    def _accept(self) -> None:
        while accepted := accept_client(self._listener, self._allowed_uids):
            connection, peer = accepted
            if len(self._connected) >= MAX_CLIENTS:
                connection.close()
                _log.warning("refused client pid %d: expected at most %d connections", peer.pid, MAX_CLIENTS)
                continue
            self._connected[connection.fileno()] = self._kind(connection, peer, self._hello)
            self._epoll.register(connection, select.EPOLLOUT)

    def _send_hello(self, client: C) -> None:
        try:
            sent = client.connection.send(client.unsent)
        except OSError as error:
            raise ClientGoneError from error
        client.unsent = client.unsent[sent:]
        if not client.unsent:
            self._epoll.modify(client.connection, select.EPOLLIN)


def accept_client(listener: socket.socket, allowed_uids: frozenset[int]) -> tuple[socket.socket, Peer] | None:
    """Return the next client that may connect, or None while nobody waits. The socket does not block."""
    while True:
        try:
            connection, _ = listener.accept()
        except BlockingIOError:
            return None
        except ConnectionError:
            continue
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
        pid, uid, _ = _PEER_CREDENTIALS.unpack(credentials)
        if uid in allowed_uids:
            connection.setblocking(False)
            return connection, Peer(pid, uid)
        connection.close()
        _log.warning("refused a client: expected uid %s; got uid %d, pid %d", sorted(allowed_uids), uid, pid)


def receive_requests(connection: socket.socket, buffer: bytearray) -> list[SignRequest]:
    """Read once; return the whole requests there are. An incomplete one stays in `buffer`.

    Raises ClientGoneError and ProtocolError.
    """
    try:
        data = connection.recv(RECEIVE_BYTES)
    except (BlockingIOError, InterruptedError):
        return []
    except OSError as error:
        raise ClientGoneError from error
    if not data:
        raise ClientGoneError
    if buffer:
        buffer += data
        requests, used = decode_requests(buffer)
        del buffer[:used]
        return requests
    requests, used = decode_requests(data)
    buffer += data[used:]
    return requests


def send_whole(connection: socket.socket, replies: bytes) -> None:
    """Send replies that fit the socket's buffer as long as the client keeps its window. Never blocks.

    Raises ClientGoneError, or ProtocolError when they do not fit.
    """
    try:
        sent = connection.send(replies)
    except BlockingIOError:
        sent = 0
    except OSError as error:
        raise ClientGoneError from error
    if sent < len(replies):
        raise ProtocolError("does not read its replies")
