"""Serves a token whose signatures cost CPU time and nothing else: one thread, one epoll.

Each turn reads what has come, 32 KB at most from each client, then serves the clients that wait in turn, half a
millisecond each, so that a busy proxy process does not delay the others. The replies of a turn leave in one send.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Sequence
from time import monotonic_ns

from hsm.backends.base import Backend
from hsm.messages import ProtocolError, SignRequest
from hsm.metricstore import MetricStore
from hsm.serving import HEARTBEAT_S, Client, ClientGoneError, Clients, send_whole
from hsm.signing import RequestHandler
from hsm.workerspec import WorkerSpec

_SLICE_NS = 500_000


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
        self._clients = Clients(Client, self, listener, spec, backend.keys, self._window, stop_fds)
        self._busy: deque[Client] = deque()

    def run(self) -> None:
        clients = self._clients
        while not clients.stopping:
            clients.poll(0 if self._busy else HEARTBEAT_S)
            self._serve_busy()
        while self._busy:
            self._serve_busy()
        clients.close()

    def requests_came(self, client: Client, requests: list[SignRequest]) -> None:
        """See ClientEvents."""
        waiting = client.waiting
        if len(waiting) + len(requests) > self._window:
            raise ProtocolError(f"more than its window of {self._window} requests in flight")
        if not waiting:
            self._busy.append(client)
        now_ns = monotonic_ns()
        waiting.extend((request, now_ns) for request in requests)

    def client_dropped(self, client: Client) -> None:
        """See ClientEvents."""
        client.connection.close()
        client.waiting.clear()

    def _serve_busy(self) -> None:
        """Give each client that waits one slice."""
        for _ in range(len(self._busy)):
            client = self._busy.popleft()
            if not client.waiting:
                continue  # dropped since it was put here
            try:
                self._serve_slice(client)
            except (ClientGoneError, ProtocolError) as error:
                self._clients.drop(client, error)
                continue
            if client.waiting:
                self._busy.append(client)

    def _serve_slice(self, client: Client) -> None:
        waiting = client.waiting
        replies = []
        end_ns = monotonic_ns() + _SLICE_NS
        while waiting:
            request, received_ns = waiting.popleft()
            replies.append(self._handler.answer(self._signer, request, received_ns))
            if monotonic_ns() >= end_ns:
                break
        send_whole(client.connection, b"".join(replies))
