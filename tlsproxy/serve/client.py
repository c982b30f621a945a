"""A client's connection: its bytes through TLS and back, flow control, closing.

How it begins is told in proxy_header.py and handshake.py. What happens inside TLS is a subclass's part: HTTP
(http_connection) or plain bytes (tunnel). Callbacks only; nothing here waits, and every deadline is one attribute that
the listener's sweep looks at.
"""

from __future__ import annotations

import asyncio
import enum
import fcntl
import math
import sys
import termios
from abc import ABC, abstractmethod
from time import monotonic
from typing import TYPE_CHECKING, cast

from tlsproxy.config import Address, ProxyProtocol, plain_ip
from tlsproxy.proxy_protocol import Endpoints
from tlsproxy.serve.handshake import Handshake, HandshakeSummary
from tlsproxy.serve.plain import PlainConnection
from tlsproxy.serve.proxy_header import ProxyHeaderReader, header_for_server
from tlsproxy.tls.engine import TlsConnection
from tlsproxy.tls.errors import ConnectionClosedError
from tlsproxy.tls.events import CloseNotify, ConnectionFailed, Event, HandshakeComplete, PlaintextReceived

if TYPE_CHECKING:
    from tlsproxy.serve.listener import ListenerRuntime

WRITE_BUFFER_BYTES = 64 * 1024
"""A transport that holds more than this is full: whoever fills it is paused."""
LINGER_S = 20.0
"""How long a client may go on sending after the proxy has closed its side, before it is cut off.

Many send all of a large body before they read the response that refuses it.
"""
DRAIN_IDLE_S = 2.0
"""How long a connection without a request is kept once the proxy drains: one may be on its way."""


class Phase(enum.Enum):
    """Where a client connection is."""

    NEW = "new"
    """Not on the listener's books: just made, or refused for want of room."""
    PROXY_HEADER = "proxy_header"
    """The proxy before us is to say who the client is."""
    HANDSHAKE = "handshake"
    OPEN = "open"
    LINGERING = "lingering"
    """Our side is closed; what still comes is thrown away, so that the client gets to read our last words."""
    CLOSED = "closed"


class PauseReason(enum.IntEnum):
    """Why nothing is read from the client; reading goes on when none is left.

    Bits of an int: to combine an IntFlag's members takes ten times as long.
    """

    UPSTREAM = 1
    """The upstream connection is not open yet, or full."""
    PIPELINE = 2
    """The client has sent further requests before the response to this one."""
    CLIENT = 4
    """The client does not read what is sent to it."""
    TURN = 8
    """What it has sent is more than one turn's work; other connections come first."""


class ClientConnection(asyncio.Protocol, ABC):
    """One client."""

    __slots__ = (
        "_handshake",
        "_input_ended",
        "_last_unread",
        "_negotiated",
        "_paused",
        "_proxied",
        "_proxy_header",
        "_tls",
        "_transport",
        "client_ip",
        "deadline",
        "peer",
        "phase",
        "runtime",
        "write_paused",
    )

    def __init__(self, runtime: ListenerRuntime) -> None:
        self.runtime = runtime
        self.phase = Phase.NEW
        self.deadline = math.inf
        """Monotonic seconds; on_timeout is called within a second after."""
        self.client_ip = ""
        """Empty until it is known: where a PROXY protocol header is awaited, that is told there."""
        self.write_paused = False
        self.peer: Address
        """The other end of the socket: the client, or the proxy before us."""
        self._transport: asyncio.Transport
        self._tls: TlsConnection | PlainConnection
        self._paused = 0
        """PauseReasons, combined."""
        self._proxy_header: ProxyHeaderReader | None = None
        self._proxied: Endpoints | None = None
        self._handshake: Handshake | None = None
        self._negotiated: HandshakeComplete | None = None
        self._last_unread = 0
        self._input_ended = False

    # What a subclass does.

    @abstractmethod
    def established(self, handshake: HandshakeSummary | None) -> None:
        """The handshake is complete; None: the listener has no TLS."""

    @abstractmethod
    def plaintext_received(self, data: bytes) -> None:
        """Data from the client."""

    @abstractmethod
    def input_ended(self) -> None:
        """The client has sent close_notify: no more data will come."""

    @abstractmethod
    def output_writable(self, writable: bool) -> None:
        """The client's transport has room again, or is full."""

    @abstractmethod
    def open_timeout(self, now_s: float) -> None:
        """The deadline has passed while open."""

    @abstractmethod
    def ended(self) -> None:
        """The connection is gone or going: let go of everything. Called once if `established` was."""

    @abstractmethod
    def drain(self) -> None:
        """Close as soon as nothing is lost by it."""

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin, unless a limit is reached."""
        # uvloop's transports are no subclasses of asyncio's.
        self._transport = cast("asyncio.Transport", transport)
        peer = transport.get_extra_info("peername")
        # A client that has left again already has no address any more.
        if peer is None or not self.runtime.admit(self, transport.get_extra_info("socket").fileno()):
            self._transport.abort()
            return
        self.peer = Address(plain_ip(peer[0]), peer[1])
        self._transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        self._tls = PlainConnection()
        if self.runtime.expects_proxy_header(self.peer.host):
            self._proxy_header = ProxyHeaderReader(self)
            self.phase = Phase.PROXY_HEADER
            self.deadline = monotonic() + self.runtime.config.timeouts.handshake_s
        else:
            self._start(self.peer.host)

    def _start(self, client_ip: str) -> None:
        """Begin the handshake or, without TLS, what the connection is for."""
        self.client_ip = client_ip
        if not self.runtime.admit_client(self):
            self.refuse()
            return
        if self.runtime.tls is None:
            self.phase = Phase.OPEN
            self.established(None)
            return
        now_s = monotonic()
        self.phase = Phase.HANDSHAKE
        self.deadline = now_s + self.runtime.config.timeouts.handshake_s
        self._tls = tls = self.runtime.tls.connection()
        self._handshake = Handshake(self, tls, now_s)

    def data_received(self, data: bytes) -> None:
        """Decrypt, and act on what that yields; after our end, throw away."""
        if self.phase is Phase.OPEN:
            self.act_on(self._tls.receive_data(data))
        elif self._handshake is not None:
            self._handshake.data_received(data)
        elif self._proxy_header is not None:
            self._proxy_header.data_received(data)

    def eof_received(self) -> bool:
        """End, unless the client had said close_notify and an answer is still due (True: keep the transport)."""
        self._input_ended = True
        if self.phase is Phase.HANDSHAKE:
            self._end_handshake("client_closed", "the client closed the connection")
        elif self.phase is Phase.OPEN:
            self.act_on(self._tls.receive_eof())
        return self.phase is Phase.OPEN

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        """Clean up."""
        phase = self.phase
        if phase is Phase.NEW:
            return
        if phase is Phase.HANDSHAKE:
            self._end_handshake("client_closed", "the client closed the connection")
        self.phase = Phase.CLOSED
        self._proxy_header = None
        if phase is Phase.OPEN:
            self.ended()
        self._tls.abort()
        self.runtime.release(self)

    def pause_writing(self) -> None:
        """The client reads slower than is sent to it."""
        self.write_paused = True
        self._last_unread = self._unread_bytes()
        if self.phase is Phase.OPEN:
            self.output_writable(False)

    def resume_writing(self) -> None:
        """The client has caught up."""
        self.write_paused = False
        if self.phase is Phase.OPEN:
            self.output_writable(True)

    # For subclasses and what they own.

    def send(self, *pieces: bytes) -> None:
        """Encrypt and write `pieces`, which are not all empty."""
        if self.phase is not Phase.OPEN:
            return
        try:
            self._tls.send(*pieces)
        except ConnectionClosedError:
            self.abort()
            return
        metrics = self.runtime.metrics
        metrics.values[metrics.bytes_out] += sum(map(len, pieces))
        self._transport.write(self._tls.data_to_send())

    def proxy_header(self, version: ProxyProtocol) -> bytes:
        """Return what tells an upstream server who the client is."""
        endpoints = self._proxied
        if endpoints is None:
            own = self._transport.get_extra_info("sockname")
            # None: the client has left meanwhile.
            if own is not None:
                endpoints = Endpoints(self.peer, Address(plain_ip(own[0]), own[1]))
        return header_for_server(version, endpoints, self._negotiated)

    def pause(self, reason: int) -> None:
        """Stop reading from the client for `reason`."""
        if not self._paused and not self._transport.is_closing():
            self._transport.pause_reading()
        self._paused |= reason

    def resume(self, reason: int) -> None:
        """Withdraw `reason`; with the last one gone, read again."""
        if self._paused:
            self._paused &= ~reason
            if not self._paused and not self._transport.is_closing():
                self._transport.resume_reading()

    @property
    def is_paused(self) -> bool:
        """Nothing is read from the client at present."""
        return bool(self._paused)

    def finish(self) -> None:
        """Close in order: close_notify, end of output, then wait a little for the client to do the same."""
        if self.phase is not Phase.OPEN:
            return
        self._leave_open()
        self._tls.close()
        self._linger()

    def end_output(self) -> None:
        """Send close_notify and the end of output; the client may go on sending."""
        self._tls.close()
        self._flush()
        self._transport.write_eof()

    def abort(self) -> None:
        """Close at once and without close_notify: the client can tell that something is missing."""
        if self.phase is Phase.OPEN:
            self._leave_open()
        if not self._transport.is_closing():
            self._transport.abort()

    def on_timeout(self, now_s: float) -> None:
        """Act on the deadline having passed."""
        if self.phase is Phase.HANDSHAKE:
            self._end_handshake("timeout", "the handshake took too long")
            self._transport.abort()
        elif self.phase is Phase.OPEN:
            self.open_timeout(now_s)
        elif not self.output_progressed(now_s):
            self._transport.abort()

    def output_progressed(self, now_s: float) -> bool:
        """Tell whether the client has read enough of what waits for it; if so, the deadline moves on."""
        config = self.runtime.config
        unread = self._unread_bytes()
        enough = max(1.0, config.limits.body_rate * config.timeouts.body_idle_s)
        progressed = 0 < unread <= self._last_unread - enough
        self._last_unread = unread
        if progressed:
            self.deadline = now_s + config.timeouts.body_idle_s
        return progressed

    def _unread_bytes(self) -> int:
        """Return how much the client has not acknowledged, of what the transport and the kernel have.

        The kernel takes up to some megabytes, and then nothing for minutes if the client is slow but sound.
        """
        transport = self._transport
        in_transport = transport.get_write_buffer_size()
        if transport.is_closing():
            return in_transport
        in_kernel = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
        return in_transport + int.from_bytes(in_kernel, sys.byteorder)

    # What the ProxyHeaderReader calls.

    def refuse(self) -> None:
        """Close at once: nobody has been served yet."""
        self._proxy_header = None
        self.phase = Phase.CLOSED
        self._transport.abort()

    def identified(self, endpoints: Endpoints | None, data: bytes) -> None:
        """The proxy before us has said whose connection it passes on, None: its own; `data` is the client's."""
        self._proxy_header = None
        self._proxied = endpoints
        client = self.peer if endpoints is None else endpoints.client
        self._start(plain_ip(client.host))
        if data and self.phase is not Phase.CLOSED:
            self.data_received(data)

    # What the handshake calls.

    def act_on(self, events: list[Event]) -> None:
        """Do what `events` ask for, and send what they left to send."""
        for event in events:
            if type(event) is PlaintextReceived:
                if self.phase is Phase.OPEN:
                    metrics = self.runtime.metrics
                    metrics.values[metrics.bytes_in] += len(event.data)
                    self.plaintext_received(event.data)
            elif self._handshake is not None:
                self._handshake.act_on(event)
            elif self.phase is not Phase.OPEN:
                continue
            elif type(event) is CloseNotify:
                self._input_ended = True
                self.input_ended()
            elif type(event) is ConnectionFailed:
                self._leave_open()
                self._linger()
        self._flush()

    def handshake_completed(self, handshake: HandshakeSummary) -> None:
        """Open: what the connection is for begins."""
        self._handshake = None
        self._negotiated = handshake.complete
        self.phase = Phase.OPEN
        self.established(handshake)

    def handshake_failed(self, result: str, reason: str) -> None:
        """Close, with the alert that says why."""
        self._end_handshake(result, reason)
        self._linger()

    # Closing.

    def _end_handshake(self, result: str, reason: str) -> None:
        handshake = self._handshake
        assert handshake is not None
        self._handshake = None
        self.phase = Phase.CLOSED
        handshake.end(result, reason)

    def _leave_open(self) -> None:
        self.phase = Phase.CLOSED
        self.ended()

    def _flush(self) -> None:
        data = self._tls.data_to_send()
        if data and not self._transport.is_closing():
            self._transport.write(data)

    def _linger(self) -> None:
        """Send what is left, then our end of output, and throw away what still comes until the client closes too.

        A client that has ended its output is not waited for: nothing of it can come and have the kernel reset what it
        has not read yet.
        """
        transport = self._transport
        if transport.is_closing():
            return
        self._flush()
        self.deadline = monotonic() + LINGER_S
        if self._input_ended:
            self._last_unread = transport.get_write_buffer_size()
            transport.close()
            return
        self.phase = Phase.LINGERING
        self._last_unread = self._unread_bytes() + 1
        transport.write_eof()
        if self._paused:
            self._paused = 0
            transport.resume_reading()
