"""Requests of clients and what they get, in any version of HTTP: routing, the proxy's own answers, the log.

How requests come and responses go is a subclass's part: one after the other on a connection (http_connection) or many
at once, each on a stream of its own (http2_stream).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from time import monotonic
from typing import TYPE_CHECKING

from hsm.logs import EventLog
from tlsproxy.config import HeaderRules, ProxyProtocol
from tlsproxy.errors import HttpError, UpstreamError
from tlsproxy.http.forwarding import ResponseRules, client_address
from tlsproxy.http.heads import RequestHead, ResponseHead
from tlsproxy.http.replies import own_reply, redirect_reply
from tlsproxy.http.routing import Route, redirect_location
from tlsproxy.http.syntax import Field

if TYPE_CHECKING:
    from tlsproxy.serve.exchange import Exchange
    from tlsproxy.serve.handshake import HandshakeSummary
    from tlsproxy.serve.listener import ListenerRuntime
    from tlsproxy.serve.tracing import RequestTrace
    from tlsproxy.serve.upstream_connection import UpstreamConnection

CLIENT_CLOSED = 499
"""What is counted and logged as the status of a request whose client left before the response began, as nginx does."""

ACCESS_LOG = "tlsproxy.access"
_requests = EventLog(ACCESS_LOG, "request")
_NO_RULES = ResponseRules(HeaderRules((), (), ()))


class Responder(ABC):
    """The client's side of one exchange after another, or of a single one."""

    # A subclass has its own, beside those of asyncio's protocols.
    __slots__ = ()

    runtime: ListenerRuntime
    client_ip: str
    client_ip_bytes: bytes
    client_cert_field: bytes
    """The line that tells servers of the client's certificate; empty without one."""
    client_subject: str | None
    """Whom that certificate names."""
    peer_is_trusted: bool
    """The peer is a proxy whose word on where requests come from is believed."""
    write_paused: bool
    """The client can't take more of the response for now."""

    # What a subclass does for an exchange. What it is handed of a response leaves with flush_response.

    @abstractmethod
    def accept_body(self, accept: bool) -> None:
        """Read on, or no further for now: the upstream can take more of the request's body, or can't."""

    @abstractmethod
    def proxy_header(self, version: ProxyProtocol) -> bytes:
        """Return what tells an upstream server who the client is."""

    @abstractmethod
    def send_interim_response(self, request: RequestHead, head: ResponseHead, rules: ResponseRules) -> None:
        """Pass an interim response (1xx) on, if the client's version of HTTP has them."""

    @abstractmethod
    def begin_response(self, request: RequestHead | None, head: ResponseHead, rules: ResponseRules) -> None:
        """Pass the head of the response on; `request` is None if it could not be read."""

    @abstractmethod
    def add_to_response(self, data: bytes) -> None:
        """Pass a part of the body on."""

    @abstractmethod
    def end_response(self, trailers: Sequence[Field], rules: ResponseRules) -> None:
        """Say that the response is complete."""

    @abstractmethod
    def flush_response(self) -> None:
        """Send what has been handed in."""

    @abstractmethod
    def exchange_completed(self) -> None:
        """The response has been handed in to its end."""

    @abstractmethod
    def exchange_failed(self, error: UpstreamError) -> None:
        """Answer in the upstream's place; a response already begun can only be cut off. What is not flushed is void."""

    @abstractmethod
    def protocol_switched(self, connection: UpstreamConnection, data: bytes) -> None:
        """The server has answered 101, and `data` has come after it: from here on bytes pass as they are."""

    # What subclasses use.

    def client_address(self, request: RequestHead) -> str:
        """Return where a request came from: the peer's address, or the one a trusted proxy tells."""
        if self.peer_is_trusted:
            return client_address(request, self.client_ip, self.runtime.is_trusted)
        return self.client_ip

    def begin_trace(
        self, request: RequestHead, route: Route | None, handshake: HandshakeSummary | None
    ) -> RequestTrace | None:
        """Begin the request's trace, if there are traces; `handshake`: what it had to wait for before."""
        tracing = self.runtime.tracing
        if tracing is None:
            return None
        return tracing.begin(
            request,
            route,
            scheme=self.runtime.proto.decode("ascii"),
            client_ip=self.client_address(request),
            trusted=self.peer_is_trusted,
            handshake=handshake,
        )

    def answer_without_upstream(self, request: RequestHead, route: Route | None, trace: RequestTrace | None) -> None:
        """Redirect, or say that there is nothing at this host and path."""
        redirect = None if route is None else route.config.redirect
        if route is None or redirect is None:
            self.reply(request, 404, trace=trace)
            return
        location = redirect_location(redirect, request)
        if location is None:
            self.reply(request, 400, route=route, trace=trace)
            return
        self.begin_response(request, redirect_reply(redirect.status, location), route.response_rules)
        self.end_response((), route.response_rules)
        self.flush_response()
        self.record(request, redirect.status, trace=trace)

    def reply_for(self, exchange: Exchange, error: HttpError | UpstreamError) -> None:
        """Answer in the upstream's place."""
        self.reply(exchange.request, error.status, route=exchange.route, exchange=exchange, reason=error.reason)

    def reply(
        self,
        request: RequestHead | None,
        status: int,
        *,
        route: Route | None = None,
        exchange: Exchange | None = None,
        reason: str = "",
        trace: RequestTrace | None = None,
    ) -> None:
        """Answer with no more than a status; `reason` is why, for the log."""
        rules = _NO_RULES if route is None else route.reply_rules
        head, body = own_reply(status)
        self.begin_response(request, head, rules)
        if request is None or request.method != b"HEAD":
            self.add_to_response(body)
        self.end_response((), rules)
        self.flush_response()
        self.record(request, status, exchange, reason=reason, trace=trace)

    def record(
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
                "version": None if request is None else request.version.decode("ascii"),
                "status": status,
                "reason": reason or None,
                "upstream": upstream or None,
                "duration_s": round(duration_s, 6),
                "trace_id": None if trace is None else trace.recorded_id,
                "client_subject": self.client_subject,
            }
            if exchange is not None:
                fields["server"] = None if exchange.server is None else str(exchange.server.address)
                fields["request_id"] = exchange.request_id.decode("latin-1")
            _requests.write(fields)
        if trace is not None:
            trace.ended(status, reason)
