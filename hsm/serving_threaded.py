"""Serves a token whose signatures cost waiting: one thread for each Signer, and this one, which reads.

The reader puts what has come into one queue for each client and a note for each request into a queue all signing
threads wait at. A thread that gets a note takes a request from the clients in turn, so that a busy proxy process does
not delay the others, signs, and sends the reply itself. While anything is in hand the reader looks up every 50 ms, for
a token that hangs answers nobody: what has expired is answered, and a signature that outlasts the hang limit ends the
process, as only a new one can shake off the thread that is stuck in the token's library.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections import deque
from collections.abc import Sequence
from queue import SimpleQueue
from time import monotonic_ns

from hsm.backends.base import Backend, Signer
from hsm.errors import PinRefused, TokenError
from hsm.messages import ProtocolError, SignRequest, Status
from hsm.metricstore import MetricStore
from hsm.serving import HEARTBEAT_S, Client, ClientGoneError, Clients, Peer, send_whole
from hsm.signing import RequestHandler, encode_outcome
from hsm.workerspec import WorkerSpec

_TICK_NS = 50_000_000
_IN_HAND_PER_SIGNER = 2
"""How many requests a client may have here for each signature the token can make at a time: enough that none has to
wait for the next request. What is more waits in the proxy, which can still send it elsewhere."""

_log = logging.getLogger(__name__)


class _Client(Client):
    """A connected proxy process. Everything but `connection` and `peer` is guarded by the server's lock."""

    __slots__ = ("gone", "in_turn", "signing")

    def __init__(self, connection: socket.socket, peer: Peer, hello: bytes) -> None:
        super().__init__(connection, peer, hello)
        self.signing = 0
        """Requests in the hands of signing threads."""
        self.in_turn = False
        """Stands in the server's queue of those whose turn will come."""
        self.gone = False


class _SigningThread(threading.Thread):
    """Signs with one Signer. `since_ns` is when it began what it does now, or 0."""

    def __init__(self, server: _Server, signer: Signer, number: int) -> None:
        super().__init__(name=f"signer-{number}", daemon=True)
        self._server = server
        self._signer = signer
        self.since_ns = 0

    def run(self) -> None:
        server = self._server
        while server.notes.get():
            taken = server.take()
            if taken is None:
                continue
            client, request, received_ns = taken
            self.since_ns = monotonic_ns()
            try:
                reply = server.handler.answer(self._signer, request, received_ns)
                send_whole(client.connection, reply)
            except (ClientGoneError, ProtocolError) as error:
                server.hang_up(client, error)
            except PinRefused as error:
                server.fail(error)
            finally:
                self.since_ns = 0
                server.finish(client)


def serve(
    backend: Backend, listener: socket.socket, spec: WorkerSpec, store: MetricStore, stop_fds: Sequence[int]
) -> None:
    """Answer requests until one of `stop_fds` becomes readable; then answer what was received, and return.

    Raises PinRefused, and TokenError when a signature outlasts the hang limit or the token is lost. Threads may then
    still be inside the token's library: the process can only be ended, without running any library's destructors.
    """
    _Server(backend, listener, spec, store, stop_fds).run()


class _Server:
    def __init__(
        self, backend: Backend, listener: socket.socket, spec: WorkerSpec, store: MetricStore, stop_fds: Sequence[int]
    ) -> None:
        self.handler = RequestHandler(spec.token, backend.keys, store)
        self.notes: SimpleQueue[bool] = SimpleQueue()
        """True for each request received, False for each thread that is to end."""
        self._backend = backend
        self._threads = [_SigningThread(self, signer, number) for number, signer in enumerate(backend.signers)]
        self._hang_limit_ns = round(spec.hang_limit_s * 1e9)
        self._is_hung = False
        """As far as the last look could tell."""
        self._window = min(spec.max_in_flight, _IN_HAND_PER_SIGNER * len(self._threads))
        self._failure: PinRefused | None = None
        self._failure_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        stops = (*stop_fds, self._failure_fd)
        self._clients = Clients(_Client, self, listener, spec, backend.keys, self._window, stops)
        self._lock = threading.Lock()
        self._in_turn: deque[_Client] = deque()
        """Clients that have requests waiting, and some whose requests have just expired."""
        self._in_hand = 0
        """Requests received and not yet answered."""

    def run(self) -> None:
        clients = self._clients
        for thread in self._threads:
            thread.start()
        next_check_ns = 0
        while not (clients.stopping and self._in_hand == 0):
            clients.poll(_TICK_NS / 1e9 if self._in_hand else HEARTBEAT_S)
            if self._failure is not None:
                raise self._failure
            now_ns = monotonic_ns()
            if now_ns >= next_check_ns:
                next_check_ns = now_ns + _TICK_NS
                self._check_health(now_ns)
                self._expire_waiting(now_ns)
        for _ in self._threads:
            self.notes.put(False)
        for thread in self._threads:
            thread.join()
        os.close(self._failure_fd)
        clients.close()

    # Called by the signing threads.

    def take(self) -> tuple[_Client, SignRequest, int] | None:
        """Return the next request, of the client whose turn it is, or None if it has expired or its client has gone."""
        with self._lock:
            while self._in_turn:
                client = self._in_turn.popleft()
                client.in_turn = False
                if client.waiting:
                    request, received_ns = client.waiting.popleft()
                    if client.waiting:
                        self._give_turn(client)
                    client.signing += 1
                    return client, request, received_ns
            return None

    def finish(self, client: _Client) -> None:
        """The request taken from this client has been dealt with."""
        with self._lock:
            client.signing -= 1
            self._in_hand -= 1
            if client.gone and not client.signing:
                client.connection.close()

    def hang_up(self, client: _Client, error: Exception) -> None:
        """Make the reader drop the client. It is the reader that closes: the descriptor is in use by others."""
        with self._lock:
            if client.gone:
                return
            if isinstance(error, ProtocolError):
                _log.warning("dropping client pid %d: %s", client.peer.pid, error)
            try:
                client.connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                _log.debug("client pid %d has gone already", client.peer.pid)

    def fail(self, error: PinRefused) -> None:
        """Make `serve` raise this."""
        self._failure = error
        os.eventfd_write(self._failure_fd, 1)

    def _give_turn(self, client: _Client) -> None:
        self._in_turn.append(client)
        client.in_turn = True

    # The reader.

    def requests_came(self, client: _Client, requests: list[SignRequest]) -> None:
        """See ClientEvents."""
        now_ns = monotonic_ns()
        with self._lock:
            # A client that has read a reply may be ahead of the thread that sent it by one request.
            in_hand = len(client.waiting) + client.signing + len(requests)
            if in_hand > self._window + len(self._threads):
                raise ProtocolError(f"more than its window of {self._window} requests in flight")
            if not client.in_turn:
                self._give_turn(client)
            client.waiting.extend((request, now_ns) for request in requests)
            self._in_hand += len(requests)
        for _ in requests:
            self.notes.put(True)

    def client_dropped(self, client: _Client) -> None:
        """See ClientEvents."""
        with self._lock:
            client.gone = True
            self._in_hand -= len(client.waiting)
            client.waiting.clear()
            # While a thread is about to send, the descriptor's number must not become another client's.
            if not client.signing:
                client.connection.close()

    def _check_health(self, now_ns: int) -> None:
        """Raises TokenError when only a new process can help."""
        since_ns = [since_ns for thread in self._threads if (since_ns := thread.since_ns)]
        was_hung, self._is_hung = self._is_hung, bool(since_ns) and now_ns - min(since_ns) > self._hang_limit_ns
        # Found twice: after this process had been stopped itself, the signature may have come meanwhile.
        if was_hung and self._is_hung:
            raise TokenError(
                "HUNG", f"a signature has not returned for {self._hang_limit_ns / 1e9:g} s", retryable=True
            )
        if self._backend.is_lost:
            raise TokenError("LOST", "the token has not worked for a while; loading its library anew", retryable=True)

    def _expire_waiting(self, now_ns: int) -> None:
        """Answer what waits and has expired."""
        for client in self._clients:
            with self._lock:
                expired = [entry for entry in client.waiting if entry[0].deadline_ns <= now_ns]
                if not expired:
                    continue
                live = [entry for entry in client.waiting if entry[0].deadline_ns > now_ns]
                client.waiting.clear()
                client.waiting.extend(live)
                self._in_hand -= len(expired)
            replies = [encode_outcome(request, Status.EXPIRED, b"", now_ns - since_ns) for request, since_ns in expired]
            try:
                send_whole(client.connection, b"".join(replies))
            except (ClientGoneError, ProtocolError) as error:
                self._clients.drop(client, error)
