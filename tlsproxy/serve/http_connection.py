"""HTTP on a client connection: 1.1 here, where requests are read one after the other, each becoming an exchange.

What goes on in another protocol (HTTP/2 by ALPN, or what a 101 has switched to) is a successor's.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from time import monotonic
from typing import TYPE_CHECKING

from tlsproxy.errors import HttpError, UpstreamError
from tlsproxy.http.chunks import chunk, last_chunk
from tlsproxy.http.codec import RequestReader
from tlsproxy.http.forwarding import ResponseRules, client_cert_field, response_head
from tlsproxy.http.heads import RequestHead, ResponseHead
from tlsproxy.http.pace import Pace
from tlsproxy.http.syntax import Field
from tlsproxy.serve.client import DRAIN_IDLE_S, ClientConnection, PauseReason, Phase
from tlsproxy.serve.exchange import Exchange
from tlsproxy.serve.http2_session import Http2Session
from tlsproxy.serve.responder import CLIENT_CLOSED, Responder
from tlsproxy.serve.tunnel import Tunnel
from tlsproxy.serve.upstream_connection import UpstreamConnection

if TYPE_CHECKING:
    from tlsproxy.serve.handshake import HandshakeSummary
    from tlsproxy.serve.listener import ListenerRuntime

PIPELINED_BYTES = 64 * 1024
"""What is read ahead while a response is under way. Reading on is how a client that leaves is noticed."""
STEPS_PER_TURN = 16
"""Requests answered by the proxy itself before other connections get their turn."""


class HttpConnection(ClientConnection, Responder):
    """A client that speaks HTTP, inside TLS or not."""

    __slots__ = (
        "_advancing",
        "_chunked_response",
        "_closing_input",
        "_exchange",
        "_head_started",
        "_keep_alive",
        "_reader",
        "_response",
        "_successor",
        "_untraced_handshake",
        "client_cert_field",
        "client_ip_bytes",
        "client_subject",
        "peer_is_trusted",
    )

    def __init__(self, runtime: ListenerRuntime) -> None:
        super().__init__(runtime)
        self._reader = RequestReader(runtime.config.limits.header_bytes)
        self._exchange: Exchange | None = None
        self._successor: Tunnel | Http2Session | None = None
        self._response: list[bytes] = []
        """What is to be sent with the next flush."""
        self._chunked_response = False
        self._keep_alive = False
        """After the present response the connection can carry another request."""
        self._advancing = False
        self._head_started = False
        self._closing_input = False
        self._untraced_handshake: HandshakeSummary | None = None
        """What the first request on the connection had to wait for, if requests are traced."""
        self.client_ip_bytes = b""
        self.client_cert_field = b""
        self.client_subject: str | None = None
        self.peer_is_trusted = False

    # What ClientConnection calls.

    def established(self, handshake: HandshakeSummary | None) -> None:
        """Wait for a request."""
        if self.runtime.tracing is not None:
            self._untraced_handshake = handshake
        self.client_ip_bytes = self.client_ip.encode("ascii")
        if handshake is not None and handshake.complete.client_certificate is not None:
            self.client_cert_field = client_cert_field(handshake.complete.client_certificate.der)
            self.client_subject = handshake.complete.client_certificate.subject
        self.peer_is_trusted = self.runtime.is_trusted(self.client_ip)
        self.deadline = monotonic() + self.runtime.config.timeouts.header_s
        if handshake is not None and handshake.complete.alpn == b"h2":
            self._successor = Http2Session(self, self._untraced_handshake)
            if self.runtime.draining:
                self._successor.drain()

    def plaintext_received(self, data: bytes) -> None:
        """Read on."""
        if self._successor is not None:
            self._successor.client_data(data)
            return
        self._reader.receive(data)
        self._advance()

    def input_ended(self) -> None:
        """Answer what is there; a request that is not whole never will be."""
        self._closing_input = True
        exchange = self._exchange
        if self._successor is not None:
            self._successor.client_ended()
        elif exchange is None:
            if not self._paused & PauseReason.TURN:
                self.finish()
        elif not exchange.request_ended and not self._paused & PauseReason.TURN:
            self.abort()

    def output_writable(self, writable: bool) -> None:
        """Take no further requests while the client does not read; the exchange sees to the upstream."""
        if self._successor is not None:
            self._successor.client_writable(writable)
        elif writable:
            self.resume(PauseReason.CLIENT)
            self._set_deadline()
            if self._exchange is not None:
                self._exchange.client_drained()
        else:
            self.pause(PauseReason.CLIENT)
            self._set_deadline()
            self.deadline = monotonic() + self.runtime.config.timeouts.body_idle_s

    def open_timeout(self, now_s: float) -> None:
        """End what takes too long: 408 where a request is missing its rest."""
        exchange = self._exchange
        if self._successor is not None:
            self._successor.idle_timeout(now_s)
        elif self.write_paused:
            if not self.output_progressed(now_s):
                self.abort()
        elif exchange is None:
            if self._head_started:
                self._refuse(HttpError(408, "header_timeout"))
            else:
                self.finish()
        elif not exchange.request_ended and not self.is_paused:
            if exchange.status:
                self.abort()
            else:
                self._refuse(HttpError(408, "body_timeout"))
        else:
            self.deadline = math.inf

    def ended(self) -> None:
        """Give up what is under way."""
        exchange = self._exchange
        if exchange is not None:
            self._exchange = None
            exchange.cancel()
            self.record(exchange.request, exchange.status or CLIENT_CLOSED, exchange, reason="client_closed")
        elif self._successor is not None:
            self._successor.close()

    def drain(self) -> None:
        """Close after the next response; if idle, soon: a request that is on its way now would be lost."""
        if self._successor is not None:
            self._successor.drain()
        elif self._exchange is None and not self._head_started:
            self.deadline = min(self.deadline, monotonic() + DRAIN_IDLE_S)

    # What an exchange calls.

    def accept_body(self, accept: bool) -> None:
        """Read on, or no further for now."""
        if accept:
            self.resume(PauseReason.UPSTREAM)
        else:
            self.pause(PauseReason.UPSTREAM)
        self._set_deadline()

    def send_interim_response(self, request: RequestHead, head: ResponseHead, rules: ResponseRules) -> None:
        """Pass it on, but not to HTTP/1.0."""
        if request.version != b"1.0":
            self._response.append(response_head(head, rules, chunked=False, http_1_0=False, keep_alive=True))

    def begin_response(self, request: RequestHead | None, head: ResponseHead, rules: ResponseRules) -> None:
        """Write the head."""
        http_1_0 = request is not None and request.version == b"1.0"
        unknown_length = head.has_body and head.content_length is None
        self._chunked_response = unknown_length and not http_1_0
        exchange = self._exchange
        if exchange is not None:
            # A body of unknown length ends an HTTP/1.0 connection.
            self._keep_alive = self._may_keep_alive(exchange) and not (unknown_length and http_1_0)
        self._response.append(
            response_head(head, rules, chunked=self._chunked_response, http_1_0=http_1_0, keep_alive=self._keep_alive)
        )

    def add_to_response(self, data: bytes) -> None:
        """Write it as it is, or as a chunk."""
        if self._chunked_response:
            self._response.extend(chunk(data))
        else:
            self._response.append(data)

    def end_response(self, trailers: Sequence[Field], rules: ResponseRules) -> None:
        """Write the last chunk."""
        if self._chunked_response:
            self._response.append(last_chunk(trailers, rules.not_sent))

    def flush_response(self) -> None:
        """Send what there is, in one go."""
        if self._response:
            pieces, self._response = self._response, []
            self.send(*pieces)

    def exchange_completed(self) -> None:
        """Go on with the next request, or close."""
        exchange = self._exchange
        assert exchange is not None
        self._exchange = None
        self.resume(PauseReason.UPSTREAM)
        self.record(exchange.request, exchange.status, exchange)
        self._next()

    def protocol_switched(self, connection: UpstreamConnection, data: bytes) -> None:
        """Leave the connection to a tunnel."""
        exchange = self._exchange
        assert exchange is not None
        self._exchange = None
        self.record(exchange.request, 101, exchange)
        tunnel = self._successor = Tunnel(self, exchange.upstream)
        if ahead := self._reader.take_buffered():
            tunnel.client_data(ahead)
        tunnel.upstream_ready(connection)
        if data:
            tunnel.upstream_data(data)
        self.resume(PauseReason.PIPELINE | PauseReason.CLIENT)
        if self._closing_input:
            tunnel.client_ended()

    def exchange_failed(self, error: UpstreamError) -> None:
        """Reply, or cut the response off."""
        exchange = self._exchange
        assert exchange is not None
        self._response.clear()
        self._keep_alive = self._may_keep_alive(exchange)
        self._exchange = None
        self.resume(PauseReason.UPSTREAM)
        if exchange.status:
            self.record(exchange.request, exchange.status, exchange, reason=error.reason)
            self.abort()
            return
        self.reply_for(exchange, error)
        self._next()

    # Inside.

    def _advance(self) -> None:
        """Act on what has been read, as far as it goes, and for one turn of the loop."""
        if self._advancing:
            # A request has been answered while it was begun: the loop below goes on by itself.
            return
        self._advancing = True
        try:
            for _ in range(STEPS_PER_TURN):
                if self.phase is not Phase.OPEN or not self._step():
                    return
            self._end_turn()
        except HttpError as error:
            self._refuse(error)
        finally:
            self._advancing = False

    def _end_turn(self) -> None:
        """Let other connections have theirs before going on."""
        self.pause(PauseReason.TURN)
        asyncio.get_running_loop().call_soon(self._next_turn)

    def _next_turn(self) -> None:
        if self.phase is Phase.OPEN:
            self.resume(PauseReason.TURN)
            self._advance()

    def _step(self) -> bool:
        """Read a head or part of a body; tell whether there is more to do."""
        reader = self._reader
        exchange = self._exchange
        if exchange is None:
            request = reader.read_head()
            if request is None:
                self._await_head()
                return False
            self._head_started = False
            self._begin(request)
            exchange = self._exchange
            if exchange is None:
                return True
        if not exchange.request_ended:
            data = reader.read_body()
            if data and exchange.pace is not None:
                exchange.pace.received(len(data), monotonic())
            exchange.send(data, last=reader.at_end, trailers=reader.trailers)
            self._set_deadline()
            if reader.has_more:
                self._end_turn()
                return False
            if self._exchange is None:
                return True
            if self._closing_input and not reader.at_end:
                self.abort()
                return False
        if reader.buffered_bytes > PIPELINED_BYTES:
            self.pause(PauseReason.PIPELINE)
        return False

    def _await_head(self) -> None:
        if self._closing_input:
            self.finish()
        elif self._reader.buffered_bytes and not self._head_started:
            self._head_started = True
            self.deadline = monotonic() + self.runtime.config.timeouts.header_s

    def _begin(self, request: RequestHead) -> None:
        """Start an exchange, or answer what needs no upstream."""
        runtime = self.runtime
        route = runtime.router.find(request)
        handshake, self._untraced_handshake = self._untraced_handshake, None
        trace = self.begin_trace(request, route, handshake)
        if route is None or route.config.upstream is None:
            self._keep_alive = request.keep_alive and not request.has_body and not runtime.draining
            self.answer_without_upstream(request, route, trace)
            if not self._keep_alive:
                self.finish()
            return
        if route.config.body_bytes:
            self._reader.limit_body(route.config.body_bytes)
        self._exchange = Exchange(self, request, route, runtime.upstreams[route.config.upstream], trace)
        self._exchange.start()

    def _may_keep_alive(self, exchange: Exchange) -> bool:
        """Tell whether another request can follow; one not read to its end hides the next."""
        return exchange.request.keep_alive and exchange.request_ended and not self.runtime.draining

    def _next(self) -> None:
        """Go on with the next request, or close."""
        if not self._keep_alive or self.runtime.draining:
            self.finish()
            return
        self._set_deadline()
        self.resume(PauseReason.PIPELINE)
        if self._reader.buffered_bytes or self._closing_input:
            self._advance()

    def _set_deadline(self) -> None:
        """Between requests the client has `idle` seconds; its body is to come at a certain pace."""
        exchange = self._exchange
        if exchange is not None and exchange.pace is not None and (exchange.request_ended or self.is_paused):
            exchange.pace.stop(monotonic())
        if self.write_paused:
            return
        if exchange is None:
            self.deadline = monotonic() + self.runtime.config.timeouts.idle_s
        elif exchange.request_ended or self.is_paused:
            self.deadline = math.inf
        else:
            if exchange.pace is None:
                exchange.pace = Pace(exchange.route.config.body_idle_s, self.runtime.config.limits.body_rate)
            self.deadline = exchange.pace.wait(monotonic())

    def _refuse(self, error: HttpError) -> None:
        """Answer a request that broke a rule or a limit, and close: where the next one starts is not known."""
        self.runtime.metrics.count_rejected(error.reason)
        exchange, self._exchange = self._exchange, None
        self._keep_alive = False
        if exchange is None:
            self.reply(None, error.status, reason=error.reason)
            self.finish()
            return
        exchange.cancel()
        if exchange.status:
            self.record(exchange.request, exchange.status, exchange, reason=error.reason)
            self.abort()
        else:
            self.reply_for(exchange, error)
            self.finish()
