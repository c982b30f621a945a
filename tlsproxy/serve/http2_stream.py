"""One request of an HTTP/2 connection and its response (RFC 9113 section 5)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from time import monotonic
from typing import TYPE_CHECKING

from h2.errors import ErrorCodes

from tlsproxy.config import ProxyProtocol
from tlsproxy.errors import HttpError, UpstreamError
from tlsproxy.http.forwarding import ResponseRules
from tlsproxy.http.heads import RequestHead, ResponseHead
from tlsproxy.http.http2 import DataReceived
from tlsproxy.http.http2_heads import request_of, response_fields, trailer_fields, trailers_of
from tlsproxy.http.pace import Pace
from tlsproxy.http.syntax import Field
from tlsproxy.serve.client import LINGER_S
from tlsproxy.serve.exchange import Exchange
from tlsproxy.serve.responder import CLIENT_CLOSED, Responder
from tlsproxy.serve.upstream_connection import UpstreamConnection

if TYPE_CHECKING:
    from tlsproxy.serve.http2_session import Http2Session


class Http2Stream(Responder):
    """Lives from a request's head to the last frame of its response."""

    __slots__ = (
        "_accepting",
        "_body",
        "_body_left",
        "_exchange",
        "_heads",
        "_held_bytes",
        "_length_left",
        "_lingering",
        "_output",
        "_request_ended",
        "_response_ended",
        "_sent_bytes",
        "_session",
        "_trailers",
        "client_cert_field",
        "client_ip",
        "client_ip_bytes",
        "client_subject",
        "deadline",
        "id",
        "peer_is_trusted",
        "runtime",
    )

    def __init__(self, session: Http2Session, stream_id: int) -> None:
        client = session.client
        self._session = session
        self.id = stream_id
        self.runtime = client.runtime
        self.client_ip = client.client_ip
        self.client_ip_bytes = client.client_ip_bytes
        self.client_cert_field = client.client_cert_field
        self.client_subject = client.client_subject
        self.peer_is_trusted = client.peer_is_trusted
        self.deadline = math.inf
        """Monotonic seconds; on_timeout is called within a second after."""
        self._exchange: Exchange | None = None
        self._request_ended = False
        self._body_left: int | None = None
        """Until the route's limit."""
        self._length_left: int | None = None
        """Of the Content-Length. h2 does not look at it where a body ends with trailers."""
        self._accepting = True
        self._held_bytes = 0
        """Of the windows, taken by what the server behind has not."""
        self._heads: list[list[tuple[bytes, bytes]]] = []
        """Of the response, interim ones before it, with the next flush."""
        self._body: list[memoryview] = []
        """Likewise."""
        self._output: deque[memoryview] = deque()
        """Flushed, but more than the client takes."""
        self._trailers: list[tuple[bytes, bytes]] = []
        self._response_ended = False
        self._lingering = False
        """The response is complete, the request is not."""
        self._sent_bytes = 0
        """Since the deadline was set."""

    # What the session calls.

    def begin(self, fields: Sequence[tuple[bytes, bytes]], *, ended: bool) -> None:
        """Start an exchange, or answer what needs no upstream."""
        self._request_ended = ended
        try:
            if sum(len(name) + len(value) + 32 for name, value in fields) > self.runtime.config.limits.header_bytes:
                # As SETTINGS_MAX_HEADER_LIST_SIZE has told the client.
                raise HttpError(431, "header_too_large")
            request = request_of(fields, ended=ended)
            route = self.runtime.router.find(request)
        except HttpError as error:
            self._refuse(error)
            return
        trace = self.begin_trace(request, route, self._session.take_handshake())
        if route is None or route.config.upstream is None:
            self.answer_without_upstream(request, route, trace)
            return
        exchange = Exchange(self, request, route, self.runtime.upstreams[route.config.upstream], trace)
        self._exchange = exchange
        self._length_left = request.content_length
        if route.config.body_bytes:
            self._body_left = route.config.body_bytes
            if request.content_length is not None and request.content_length > self._body_left:
                self._refuse(HttpError(413, "body_too_large"))
                return
        exchange.start()
        if self._exchange is not None:
            if ended:
                exchange.send(b"", last=True)
            self._set_deadline()

    def body_received(self, part: DataReceived) -> None:
        """Hand it on; the client may send as much again once the server behind has taken it."""
        self._request_ended = part.ended
        self._held_bytes += part.window_bytes
        exchange = self._exchange
        if exchange is None:
            self._give_back()
            self._end_lingering()
            return
        try:
            self._measure(len(part.data), ended=part.ended)
        except HttpError as error:
            self._refuse(error)
            return
        if part.data and exchange.pace is not None:
            exchange.pace.received(len(part.data), monotonic())
        exchange.send(part.data, last=part.ended)
        if self._accepting:
            self._give_back()
        self._set_deadline()

    def trailers_received(self, fields: Sequence[tuple[bytes, bytes]]) -> None:
        """End the request's body with them."""
        self._request_ended = True
        if self._exchange is None:
            self._end_lingering()
            return
        try:
            self._measure(0, ended=True)
            trailers = trailers_of(fields)
        except HttpError as error:
            self._refuse(error)
            return
        self._exchange.send(b"", last=True, trailers=trailers)
        self._set_deadline()

    def client_ended(self) -> None:
        """Nothing more will come on the connection: a request that is not whole never will be."""
        if not self._request_ended:
            self._session.forget(self)
            self.abandon()

    def abandon(self) -> None:
        """Let go of everything: the client has reset the stream, or is gone."""
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.cancel()
            self.record(exchange.request, exchange.status or CLIENT_CLOSED, exchange, reason="client_closed")
        self._give_back()

    def on_timeout(self, now_s: float) -> None:
        """End what takes too long: 408 where a request is missing its rest."""
        if self.is_blocked:
            config = self.runtime.config
            if self._sent_bytes >= max(1.0, config.limits.body_rate * config.timeouts.body_idle_s):
                self.await_client(now_s)
                return
        elif self._exchange is not None and not self._exchange.status:
            self._refuse(HttpError(408, "body_timeout"))
            return
        self._session.reset(self, ErrorCodes.NO_ERROR if self._lingering else ErrorCodes.CANCEL)
        self.abandon()

    # What the session asks when there is room in the client's windows, or for none.

    @property
    def is_blocked(self) -> bool:
        """There is more to say than the client takes."""
        return bool(self._output)

    def send_frame(self) -> int:
        """Send a frame of the body, with its end if that has come; return its bytes, -1 if there is no room."""
        protocol = self._session.protocol
        piece = self._output[0]
        room = protocol.room(self.id) if piece else 0
        if len(piece) > room:
            if room <= 0:
                return -1
            piece, self._output[0] = piece[:room], piece[room:]
        else:
            self._output.popleft()
        last = self._response_ended and not self._output
        if piece or not self._trailers:
            protocol.send_data(self.id, piece, ended=last and not self._trailers)
        self._sent_bytes += len(piece)
        if last:
            if self._trailers:
                protocol.send_headers(self.id, self._trailers, ended=True)
            self._complete()
        return len(piece)

    def await_client(self, now_s: float) -> None:
        """Give the client `body_idle` seconds to take some of what waits for it."""
        self._sent_bytes = 0
        self.deadline = now_s + self.runtime.config.timeouts.body_idle_s
        self._session.deadline_changed(self)

    def drained(self) -> None:
        """Nothing waits any more: the server may go on."""
        self._set_deadline()
        if self._exchange is not None:
            self._exchange.client_drained()

    # What an exchange calls.

    @property
    def write_paused(self) -> bool:  # type: ignore[override] # elsewhere it is what a transport says
        """The client can't take more of the response for now."""
        return self.is_blocked

    def accept_body(self, accept: bool) -> None:
        """Open the client's window again, or leave it as it is."""
        self._accepting = accept
        if accept:
            self._give_back()
        self._set_deadline()

    def proxy_header(self, version: ProxyProtocol) -> bytes:
        """Return what tells an upstream server who the client is."""
        return self._session.client.proxy_header(version)

    def send_interim_response(self, request: RequestHead, head: ResponseHead, rules: ResponseRules) -> None:  # noqa: ARG002
        """Pass it on."""
        self._heads.append(response_fields(head, rules))

    def begin_response(self, request: RequestHead | None, head: ResponseHead, rules: ResponseRules) -> None:  # noqa: ARG002
        """Pass the head on."""
        self._heads.append(response_fields(head, rules))

    def add_to_response(self, data: bytes) -> None:
        """Pass a part of the body on."""
        self._body.append(memoryview(data))

    def end_response(self, trailers: Sequence[Field], rules: ResponseRules) -> None:
        """End the stream, perhaps with trailers."""
        self._trailers = trailer_fields(trailers, rules)
        self._response_ended = True

    def flush_response(self) -> None:
        """Send heads now, and of the body what the client takes."""
        protocol = self._session.protocol
        heads, self._heads = self._heads, []
        body, self._body = self._body, []
        ends_with_head = bool(heads) and self._response_ended and not body and not self._trailers
        for fields in heads:
            protocol.send_headers(self.id, fields, ended=ends_with_head and fields is heads[-1])
        if ends_with_head:
            self._complete()
        elif self._response_ended and not body:
            # What says so is a frame, if an empty one.
            body.append(memoryview(b""))
        self._output.extend(body)
        self._session.pump(self)

    def exchange_completed(self) -> None:
        """Take note; what is left of the response goes as the client takes it."""
        exchange, self._exchange = self._exchange, None
        assert exchange is not None
        self.record(exchange.request, exchange.status, exchange)
        self._give_back()
        self._set_deadline()

    def exchange_failed(self, error: UpstreamError) -> None:
        """Reply, or reset the stream."""
        exchange, self._exchange = self._exchange, None
        assert exchange is not None
        self._heads.clear()
        self._body.clear()
        self._response_ended = False
        if exchange.status:
            self.record(exchange.request, exchange.status, exchange, reason=error.reason)
            self._session.reset(self, ErrorCodes.INTERNAL_ERROR)
        else:
            self.reply_for(exchange, error)
        self._give_back()

    def protocol_switched(self, connection: UpstreamConnection, data: bytes) -> None:
        """Never: a request in HTTP/2 asks for no upgrade, and a 101 unasked for is an error."""
        raise NotImplementedError

    # Inside.

    def _refuse(self, error: HttpError) -> None:
        """Answer a request that broke a rule or a limit, or took too long."""
        self.runtime.metrics.count_rejected(error.reason)
        exchange, self._exchange = self._exchange, None
        if exchange is None:
            self.reply(None, error.status, reason=error.reason)
            return
        exchange.cancel()
        if exchange.status:
            self.record(exchange.request, exchange.status, exchange, reason=error.reason)
            self._session.reset(self, ErrorCodes.CANCEL)
        else:
            self.reply_for(exchange, error)
        self._give_back()

    def _measure(self, size: int, *, ended: bool) -> None:
        """Hold the body against its length, which the server behind believes, and its limit. Raises HttpError."""
        if self._length_left is not None:
            self._length_left -= size
            if self._length_left < 0 or (ended and self._length_left):
                raise HttpError(400, "wrong_length")
        if self._body_left is not None:
            self._body_left -= size
            if self._body_left < 0:
                raise HttpError(413, "body_too_large")

    def _complete(self) -> None:
        """The response has gone out. What is left of the request, if anything, is thrown away as it comes.

        To reset the stream with NO_ERROR would do by RFC 9113 section 8.1, but curl (7.88), Java and httpx lose the
        response over it, or wait for a window for ever.
        """
        if self._request_ended:
            self._session.forget(self)
            return
        self._lingering = True
        self.deadline = monotonic() + LINGER_S
        self._session.deadline_changed(self)

    def _end_lingering(self) -> None:
        if self._lingering and self._request_ended:
            self._session.forget(self)

    def _give_back(self) -> None:
        size, self._held_bytes = self._held_bytes, 0
        if size:
            self._session.give_back(self, size)

    def _set_deadline(self) -> None:
        """A request's body is to come at a certain pace; all else is for the upstream's deadlines, or await_client."""
        if self.is_blocked or self._lingering:
            return
        exchange = self._exchange
        if exchange is None or exchange.request_ended or not self._accepting:
            if exchange is not None and exchange.pace is not None:
                exchange.pace.stop(monotonic())
            self.deadline = math.inf
            return
        if exchange.pace is None:
            exchange.pace = Pace(exchange.route.config.body_idle_s, self.runtime.config.limits.body_rate)
        self.deadline = exchange.pace.wait(monotonic())
        self._session.deadline_changed(self)
