"""HTTP/1.1 on a client connection: requests are read one after the other, each becomes an exchange with an upstream."""

from __future__ import annotations

import asyncio
import math
from time import monotonic
from typing import TYPE_CHECKING

from hsm.logs import EventLog
from tlsproxy.errors import HttpError, UpstreamError
from tlsproxy.http.codec import RequestReader
from tlsproxy.http.forwarding import client_address
from tlsproxy.http.heads import RequestHead
from tlsproxy.http.pace import Pace
from tlsproxy.http.replies import own_reply, redirect_reply
from tlsproxy.http.routing import Route, redirect_location
from tlsproxy.serve.client import ClientConnection, PauseReason, Phase
from tlsproxy.serve.exchange import Exchange
from tlsproxy.serve.tunnel import Tunnel
from tlsproxy.serve.upstream_connection import UpstreamConnection

if TYPE_CHECKING:
    from tlsproxy.serve.handshake import HandshakeSummary
    from tlsproxy.serve.listener import ListenerRuntime
    from tlsproxy.serve.tracing import RequestTrace, Tracing

PIPELINED_BYTES = 64 * 1024
"""What is read ahead while a response is under way. Reading on is how a client that leaves is noticed."""
STEPS_PER_TURN = 16
"""Requests answered by the proxy itself before other connections get their turn."""
DRAIN_IDLE_S = 2.0
"""How long a connection without a request is kept once the proxy drains."""

CLIENT_CLOSED = 499
"""What is counted and logged as the status of a request whose client left before the response began, as nginx does."""

ACCESS_LOG = "tlsproxy.access"
_requests = EventLog(ACCESS_LOG, "request")


class HttpConnection(ClientConnection):
    """A client that speaks HTTP/1.1, inside TLS or not."""

    __slots__ = (
        "_advancing",
        "_closing_input",
        "_exchange",
        "_head_started",
        "_reader",
        "_tunnel",
        "_untraced_handshake",
        "client_ip_bytes",
        "peer_is_trusted",
    )

    def __init__(self, runtime: ListenerRuntime) -> None:
        super().__init__(runtime)
        self._reader = RequestReader(runtime.config.limits.header_bytes)
        self._exchange: Exchange | None = None
        self._tunnel: Tunnel | None = None
        self._advancing = False
        self._head_started = False
        self._closing_input = False
        self._untraced_handshake: HandshakeSummary | None = None
        """What the first request on the connection had to wait for, if requests are traced."""
        self.client_ip_bytes = b""
        self.peer_is_trusted = False
        """The peer is a proxy whose word on where requests come from is believed."""

    @property
    def may_keep_alive(self) -> bool:
        """After the present exchange the connection can carry another."""
        exchange = self._exchange
        return exchange is not None and exchange.request.keep_alive and not self.runtime.draining

    # What ClientConnection calls.

    def established(self, handshake: HandshakeSummary | None) -> None:
        """Wait for a request."""
        if self.runtime.tracing is not None:
            self._untraced_handshake = handshake
        self.client_ip_bytes = self.client_ip.encode("ascii")
        self.peer_is_trusted = self.runtime.is_trusted(self.client_ip)
        self.deadline = monotonic() + self.runtime.config.timeouts.header_s

    def plaintext_received(self, data: bytes) -> None:
        """Read on."""
        if self._tunnel is not None:
            self._tunnel.client_data(data)
            return
        self._reader.receive(data)
        self._advance()

    def input_ended(self) -> None:
        """Answer what is there; a request that is not whole never will be."""
        self._closing_input = True
        exchange = self._exchange
        if self._tunnel is not None:
            self._tunnel.client_ended()
        elif exchange is None:
            if not self._paused & PauseReason.TURN:
                self.finish()
        elif not exchange.request_ended and not self._paused & PauseReason.TURN:
            self.abort()

    def output_writable(self, writable: bool) -> None:
        """Take no further requests while the client does not read; the exchange sees to the upstream."""
        if self._tunnel is not None:
            self._tunnel.client_writable(writable)
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
        if self._tunnel is not None:
            self._tunnel.idle_timeout(now_s)
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
            self._record(exchange.request, exchange.status or CLIENT_CLOSED, exchange, reason="client_closed")
        elif self._tunnel is not None:
            self._tunnel.close()

    def drain(self) -> None:
        """Close after the next response; if idle, soon: a request that is on its way now would be lost.

        A tunnel goes on: only the protocol inside knows when it may end.
        """
        if self._exchange is None and self._tunnel is None and not self._head_started:
            self.deadline = min(self.deadline, monotonic() + DRAIN_IDLE_S)

    # What an exchange calls.

    def client_address(self, request: RequestHead) -> str:
        """Return where a request came from: the peer's address, or the one a trusted proxy tells."""
        if self.peer_is_trusted:
            return client_address(request, self.client_ip, self.runtime.is_trusted)
        return self.client_ip

    def accept_body(self, accept: bool) -> None:
        """Read on, or no further for now: the upstream can take more of the request's body, or can't."""
        if accept:
            self.resume(PauseReason.UPSTREAM)
        else:
            self.pause(PauseReason.UPSTREAM)
        self._set_deadline()

    def exchange_completed(self, *, keep_alive: bool) -> None:
        """The response has been sent to its end."""
        exchange = self._exchange
        assert exchange is not None
        self._exchange = None
        self.resume(PauseReason.UPSTREAM)
        self._record(exchange.request, exchange.status, exchange)
        self._next(keep_alive=keep_alive)

    def protocol_switched(self, connection: UpstreamConnection, data: bytes) -> None:
        """The server has answered 101, and `data` has come after it: from here on bytes pass as they are."""
        exchange = self._exchange
        assert exchange is not None
        self._exchange = None
        self._record(exchange.request, 101, exchange)
        tunnel = self._tunnel = Tunnel(self, exchange.upstream)
        if ahead := self._reader.take_buffered():
            tunnel.client_data(ahead)
        tunnel.upstream_ready(connection)
        if data:
            tunnel.upstream_data(data)
        self.resume(PauseReason.PIPELINE | PauseReason.CLIENT)
        if self._closing_input:
            tunnel.client_ended()

    def exchange_failed(self, error: UpstreamError) -> None:
        """Answer in the upstream's place; a response already begun can only be cut off."""
        exchange = self._exchange
        assert exchange is not None
        keep_alive = self.may_keep_alive and exchange.request_ended
        self._exchange = None
        self.resume(PauseReason.UPSTREAM)
        if exchange.status:
            self._record(exchange.request, exchange.status, exchange, reason=error.reason)
            self.abort()
            return
        self._reply_for(exchange, error, keep_alive=keep_alive)
        self._next(keep_alive=keep_alive)

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
        route = runtime.router.find(request.host_name, request.path)
        trace = None if runtime.tracing is None else self._begin_trace(runtime.tracing, request, route)
        if route is None or route.config.upstream is None:
            keep_alive = request.keep_alive and not request.has_body and not runtime.draining
            if route is None:
                self._reply(request, 404, keep_alive=keep_alive, trace=trace)
            else:
                self._redirect(request, route, trace, keep_alive=keep_alive)
            if not keep_alive:
                self.finish()
            return
        if route.config.body_bytes:
            self._reader.limit_body(route.config.body_bytes)
        self._exchange = Exchange(self, request, route, runtime.upstreams[route.config.upstream], trace)
        self._exchange.start()

    def _begin_trace(self, tracing: Tracing, request: RequestHead, route: Route | None) -> RequestTrace:
        """Begin the request's trace."""
        handshake, self._untraced_handshake = self._untraced_handshake, None
        return tracing.begin(
            request,
            route,
            scheme=self.runtime.proto.decode("ascii"),
            client_ip=self.client_address(request),
            trusted=self.peer_is_trusted,
            handshake=handshake,
        )

    def _redirect(self, request: RequestHead, route: Route, trace: RequestTrace | None, *, keep_alive: bool) -> None:
        redirect = route.config.redirect
        assert redirect is not None
        location = redirect_location(redirect, request)
        if location is None:
            self._reply(request, 400, keep_alive=keep_alive, route=route, trace=trace)
            return
        fields = route.response_rules.appended
        self.send(redirect_reply(redirect.status, location, keep_alive=keep_alive, fields=fields))
        self._record(request, redirect.status, trace=trace)

    def _next(self, *, keep_alive: bool) -> None:
        """Go on with the next request, or close."""
        if not keep_alive or self.runtime.draining:
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
        if exchange is None:
            self._reply(None, error.status, keep_alive=False, reason=error.reason)
            self.finish()
            return
        exchange.cancel()
        if exchange.status:
            self._record(exchange.request, exchange.status, exchange, reason=error.reason)
            self.abort()
        else:
            self._reply_for(exchange, error, keep_alive=False)
            self.finish()

    def _reply_for(self, exchange: Exchange, error: HttpError | UpstreamError, *, keep_alive: bool) -> None:
        """Answer in the upstream's place."""
        self._reply(
            exchange.request,
            error.status,
            keep_alive=keep_alive,
            route=exchange.route,
            exchange=exchange,
            reason=error.reason,
        )

    def _reply(
        self,
        request: RequestHead | None,
        status: int,
        *,
        keep_alive: bool,
        route: Route | None = None,
        exchange: Exchange | None = None,
        reason: str = "",
        trace: RequestTrace | None = None,
    ) -> None:
        head_only = request is not None and request.method == b"HEAD"
        fields = b"" if route is None else route.response_rules.always
        self.send(own_reply(status, keep_alive=keep_alive, head_only=head_only, fields=fields))
        self._record(request, status, exchange, reason=reason, trace=trace)

    def _record(
        self,
        request: RequestHead | None,
        status: int,
        exchange: Exchange | None = None,
        *,
        reason: str = "",
        trace: RequestTrace | None = None,
    ) -> None:
        """Count and log a request that has ended; `reason` is why it failed, if it did."""
        now_s = monotonic()
        duration_s = 0.0
        upstream = ""
        if exchange is not None:
            duration_s = now_s - exchange.started_s
            trace = exchange.trace
            if exchange.status or status == CLIENT_CLOSED:
                upstream = exchange.upstream.name
        method = b"" if request is None else request.method
        self.runtime.metrics.count_request(upstream, method, status, duration_s)
        if _requests.takes(now_s):
            fields = {
                "client": self.client_ip,
                "method": method.decode("ascii"),
                "host": None if request is None else request.host_name,
                "target": None if request is None else request.target.decode("ascii"),
                "status": status,
                "reason": reason or None,
                "upstream": upstream or None,
                "duration_s": round(duration_s, 6),
                "trace_id": None if trace is None else trace.recorded_id,
            }
            if exchange is not None:
                fields["server"] = None if exchange.server is None else str(exchange.server.address)
                fields["request_id"] = exchange.request_id.decode("latin-1")
            _requests.write(fields)
        if trace is not None:
            trace.ended(status, reason)
