"""Full or resumed TLS handshakes, each on a connection of its own.

A handshake counts when both ends are done: the client verifies the chain, and after its own end of the handshake sends
close_notify and waits for the server's. Latency runs to the client's end of the handshake.
"""

from __future__ import annotations

import selectors
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass

from perf.clients import client_context, connect
from perf.load import Load, LoadResult, drive


@dataclass(frozen=True, slots=True)
class HandshakeLoad(Load):
    """Handshakes of one TLS version, all full or all resumed from one ticket."""

    tls_version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3
    resume: bool = False


class _Handshake:
    """One connection's way through connect, handshake, close."""

    __slots__ = ("_resumed", "done_s", "tls")

    def __init__(self, load: HandshakeLoad, context: ssl.SSLContext, tls_session: ssl.SSLSession | None) -> None:
        raw = socket.socket(socket.AF_INET6 if ":" in load.host else socket.AF_INET)
        raw.setblocking(False)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.done_s = 0.0
        self._resumed = False
        raw.connect_ex((load.host, load.port))
        self.tls = context.wrap_socket(
            raw,
            server_hostname=load.server_name,
            do_handshake_on_connect=False,
            suppress_ragged_eofs=False,
            session=tls_session,
        )

    def begin(self) -> int:
        """See Exchange: the connection is under way since it was made."""
        return selectors.EVENT_WRITE

    def advance(self) -> int:
        """See Exchange."""
        try:
            if not self.done_s:
                self.tls.do_handshake()
                self.done_s = time.perf_counter()
                # Not later: unwrap() lets go of what knows it.
                self._resumed = bool(self.tls.session_reused)
            self.tls.unwrap()
        except ssl.SSLWantReadError:
            return selectors.EVENT_READ
        except ssl.SSLWantWriteError:
            return selectors.EVENT_WRITE
        except (ssl.SSLEOFError, ConnectionResetError):
            # nginx and HAProxy answer close_notify by closing: the end is as good, but only after the handshake.
            if not self.done_s:
                raise
        return 0

    def add_to(self, result: LoadResult) -> None:
        """See Exchange."""
        result.resumed += self._resumed


def _ticket(load: HandshakeLoad, context: ssl.SSLContext) -> ssl.SSLSession:
    """Return a session of the server's, to resume. Raises OSError."""
    with connect(load.host, load.port, load.server_name, context) as connection:
        # In TLS 1.3 the ticket comes after the handshake, with or before the first answer.
        connection.sendall(f"GET / HTTP/1.1\r\nHost: {load.server_name}\r\n\r\n".encode())
        connection.recv(65536)
        tls_session = connection.session
    if tls_session is None or not tls_session.has_ticket:
        raise ConnectionError(f"the server at {load.host}:{load.port} gave no session ticket")
    return tls_session


def run_handshakes(load: HandshakeLoad, ready: Callable[[], None]) -> LoadResult:
    """Carry out the load in this process (see perf.clients)."""
    context = client_context(load.ca_file, load.tls_version)
    tls_session = _ticket(load, context) if load.resume else None
    return drive(load, lambda: _Handshake(load, context, tls_session), ready, reusable=False)
