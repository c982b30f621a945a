"""Serves a token whose signatures cost CPU time and nothing else: one thread, one epoll.

Each turn reads what has come, 32 KB at most from each client, then serves the clients that wait in turn, half a
millisecond each, so that a busy proxy process does not delay the others. The replies of a turn leave in one send.
"""

from __future__ import annotations

import logging
import os
import select
import socket
from collections import deque
from collections.abc import Sequence
from time import monotonic_ns

from hsm.backends.base import Backend
from hsm.messages import Hello, ProtocolError, SignRequest, encode_hello
from hsm.metricstore import MetricStore
from hsm.serving import (
    HEARTBEAT_S,
    MAX_CLIENTS,
    ClientGoneError,
    Heartbeat,
    Peer,
    accept_client,
    receive_requests,
    send_whole,
)
from hsm.signing import RequestHandler
from hsm.workerspec import WorkerSpec

_SLICE_NS = 500_000

_log = logging.getLogger(__name__)


class _Client:
    """A connected proxy process. `unsent` is what its Hello still has to go: until then nothing is read."""

    __slots__ = ("buffer", "connection", "peer", "unsent", "waiting")

    def __init__(self, connection: socket.socket, peer: Peer, hello: bytes) -> None:
        self.connection = connection
        self.peer = peer
        self.unsent = hello
        self.buffer = bytearray()
        self.waiting: deque[tuple[SignRequest, int]] = deque()


def serve(
    backend: Backend, listener: socket.socket, spec: WorkerSpec, store: MetricStore, stop_fds: Sequence[int]
) -> None:
    """Answer requests until one of `stop_fds` becomes readable; then answer what was received, and return.

    Raises PinRefused.
    """
    _Server(backend, listener, spec, store, stop_fds).run()


class _Server:
    def __init__(
        self, backend: Backend, listener: socket.socket, spec: WorkerSpec, store: MetricStore, stop_fds: Sequence[int]
    ) -> None:
        (self._signer,) = backend.signers
        self._handler = RequestHandler(spec.token, backend.keys, store)
        self._window = spec.max_in_flight
        self._hello = encode_hello(Hello(spec.token, os.getpid(), self._window, backend.keys))
        self._allowed_uids = frozenset((spec.allowed_uid, os.geteuid()))
        self._heartbeat = Heartbeat(spec.status_fd)
        self._listener = listener
        self._stop_fds = frozenset(stop_fds)
        self._clients: dict[int, _Client] = {}
        self._busy: deque[_Client] = deque()
        self._epoll = select.epoll()
        self._stopping = False

    def run(self) -> None:
        self._listener.setblocking(False)
        for fd in (self._listener.fileno(), *self._stop_fds):
            self._epoll.register(fd, select.EPOLLIN)
        with self._epoll:
            while not self._stopping:
                for fd, _ in self._epoll.poll(0 if self._busy else HEARTBEAT_S):
                    self._on_ready(fd)
                self._serve_busy()
                self._heartbeat.beat(monotonic_ns())
        while self._busy:
            self._serve_busy()
        for client in self._clients.values():
            client.connection.close()

    def _on_ready(self, fd: int) -> None:
        if fd in self._clients:
            client = self._clients[fd]
            try:
                if client.unsent:
                    self._send_hello(client)
                else:
                    self._receive(client)
            except (ClientGoneError, ProtocolError) as error:
                self._drop(client, error)
        elif fd in self._stop_fds:
            self._stopping = True
        else:
            self._accept()

    def _accept(self) -> None:
        while accepted := accept_client(self._listener, self._allowed_uids):
            connection, peer = accepted
            if len(self._clients) >= MAX_CLIENTS:
                connection.close()
                _log.warning("refused client pid %d: expected at most %d connections", peer.pid, MAX_CLIENTS)
                continue
            self._clients[connection.fileno()] = _Client(connection, peer, self._hello)
            self._epoll.register(connection, select.EPOLLOUT)

    def _send_hello(self, client: _Client) -> None:
        try:
            sent = client.connection.send(client.unsent)
        except OSError as error:
            raise ClientGoneError from error
        client.unsent = client.unsent[sent:]
        if not client.unsent:
            self._epoll.modify(client.connection, select.EPOLLIN)

    def _receive(self, client: _Client) -> None:
        requests = receive_requests(client.connection, client.buffer)
        waiting = client.waiting
        if len(waiting) + len(requests) > self._window:
            raise ProtocolError(f"more than its window of {self._window} requests in flight")
        if requests:
            if not waiting:
                self._busy.append(client)
            now_ns = monotonic_ns()
            waiting.extend((request, now_ns) for request in requests)

    def _serve_busy(self) -> None:
        """Give each client that waits one slice."""
        for _ in range(len(self._busy)):
            client = self._busy.popleft()
            if not client.waiting:
                continue  # dropped since it was put here
            try:
                self._serve_slice(client)
            except (ClientGoneError, ProtocolError) as error:
                self._drop(client, error)
                continue
            if client.waiting:
                self._busy.append(client)

    def _serve_slice(self, client: _Client) -> None:
        waiting = client.waiting
        replies = []
        end_ns = monotonic_ns() + _SLICE_NS
        while waiting:
            request, received_ns = waiting.popleft()
            replies.append(self._handler.answer(self._signer, request, received_ns))
            if monotonic_ns() >= end_ns:
                break
        send_whole(client.connection, b"".join(replies))

    def _drop(self, client: _Client, error: Exception) -> None:
        if isinstance(error, ProtocolError):
            _log.warning("dropped client pid %d: %s", client.peer.pid, error)
        del self._clients[client.connection.fileno()]
        client.connection.close()
        client.waiting.clear()
