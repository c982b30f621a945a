"""One request and its response, on their way through an upstream connection.

The client's side (responder) hands in the request's body as it comes and is handed the response. Neither body is held:
each side pauses the other when its transport is full.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from time import monotonic
from typing import TYPE_CHECKING

from tlsproxy.config import HashConfig, ProxyProtocol
from tlsproxy.errors import UpstreamError
from tlsproxy.http.affinity import hash_key
from tlsproxy.http.chunks import chunk, last_chunk
from tlsproxy.http.codec import ResponseReader
from tlsproxy.http.forwarding import Hop, request_head, request_id
from tlsproxy.http.heads import RequestHead, ResponseHead
from tlsproxy.http.pace import Pace
from tlsproxy.http.routing import Route
from tlsproxy.http.syntax import Field
from tlsproxy.serve.servers import Server
from tlsproxy.serve.upstream import Upstream
from tlsproxy.serve.upstream_connection import UpstreamConnection

if TYPE_CHECKING:
    from tlsproxy.serve.responder import Responder
    from tlsproxy.serve.tracing import RequestTrace

_IDEMPOTENT = frozenset((b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE"))
"""RFC 9110 section 9.2.2: these may be sent again."""
MAX_INTERIM_RESPONSES = 16
"""Interim responses (1xx) to one request: they go to the client as they come, however slowly it reads."""


class Exchange:
    """Lives from a request's head to the last byte of its response."""

    __slots__ = (
        "_client",
        "_connection",
        "_interim_responses",
        "_pending",
        "_reader",
        "_request_ended",
        "_request_id",
        "_response",
        "_response_timeout_s",
        "_started",
        "_tried",
        "pace",
        "request",
        "route",
        "server",
        "started_s",
        "trace",
        "upstream",
    )

    def __init__(
        self,
        client: Responder,
        request: RequestHead,
        route: Route,
        upstream: Upstream,
        trace: RequestTrace | None,
    ) -> None:
        self._client = client
        self.request = request
        self.route = route
        self.upstream = upstream
        self.server: Server | None = None
        """To which the request was sent last."""
        self.trace = trace
        self.started_s = monotonic()
        self.pace: Pace | None = None
        """Of the request's body, once it has been waited for."""
        self._connection: UpstreamConnection | None = None
        self._pending: list[bytes] = []
        self._request_ended = False
        self._reader = ResponseReader()
        self._response: ResponseHead | None = None
        self._interim_responses = 0
        self._request_id = client.runtime.next_request_id()
        self._started = False
        self._tried: list[Server] = []
        """Servers that failed to answer, of those the request was sent to."""
        response_s = route.config.response_s
        self._response_timeout_s = upstream.timeouts.response_s if response_s is None else response_s

    @property
    def status(self) -> int:
        """Status of the response, 0 before it has come."""
        return self._response.status if self._response is not None else 0

    @property
    def request_id(self) -> bytes:
        """What the server is told as X-Request-ID."""
        return request_id(self.request, self._request_id, trusted=self._client.peer_is_trusted)

    @property
    def request_ended(self) -> bool:
        """All of the request has been handed in."""
        return self._request_ended

    def start(self) -> None:
        """Ask for a connection."""
        if self.trace is not None:
            self.trace.attempt_begun()
        self.upstream.acquire(self)
        self._started = True
        if self._connection is None and self.request.has_body:
            self._client.accept_body(False)

    def send(self, data: bytes, *, last: bool, trailers: Sequence[Field] = ()) -> None:
        """Hand in what has come of the request's body, perhaps nothing; `last` with its end."""
        pieces = self._pending
        if data:
            if self.request.chunked:
                pieces.extend(chunk(data))
            else:
                pieces.append(data)
        if last:
            self._request_ended = True
            if self.request.chunked:
                pieces.append(last_chunk(trailers, self.route.request_rules.not_sent))
        self._flush()

    def cancel(self) -> None:
        """Let go of everything: the client is gone, or has been answered already."""
        if self._connection is None:
            self.upstream.cancel(self)
        else:
            self._connection.abort()
            self._connection = None

    def client_drained(self) -> None:
        """The client can take more of the response."""
        if self._connection is not None:
            self._connection.resume_reading()
            self._expect_bytes()

    # What the upstream calls.

    def hash_key(self, source: HashConfig) -> bytes:
        """Return what decides about the server."""
        return hash_key(self.request, source, self._client.client_address(self.request))

    def proxy_header(self, version: ProxyProtocol) -> bytes:
        """Return what tells a server who the client is."""
        return self._client.proxy_header(version)

    def upstream_ready(self, connection: UpstreamConnection) -> None:
        """Send what there is of the request."""
        self._connection = connection
        self.server = connection.server
        client = self._client
        hop = Hop(
            client.client_ip_bytes,
            client.runtime.proto,
            self._request_id,
            connection.server.authority,
            client.peer_is_trusted,
            client.runtime.config.forwarded,
            b"" if self.trace is None else self.trace.attempt_connected(connection, self.upstream.name),
            client.client_cert_field,
        )
        self._pending.insert(0, request_head(self.request, hop, self.route.request_rules))
        if self._started:
            client.accept_body(True)
            self._flush()

    def upstream_failed(self, error: UpstreamError) -> None:
        """Tell the client."""
        self._fail(error)

    def upstream_data(self, data: bytes) -> None:
        """Pass on what has come of the response."""
        self._reader.receive(data)
        self._pass_response_on()

    def upstream_eof(self) -> bool:
        """End the response if that is what the server means; otherwise it has failed."""
        connection = self._connection
        assert connection is not None
        try:
            self._reader.end_of_input()
        except UpstreamError as error:
            if not self._retry(error.reason):
                self._fail(error)
            return False
        self._client.end_response((), self.route.response_rules)
        self._client.flush_response()
        self._complete(connection)
        return False

    def upstream_lost(self, error: Exception | None) -> None:
        """Act on a connection that is gone before the response was complete."""
        if isinstance(error, TimeoutError):
            self._fail(UpstreamError(504, "response_timeout"))
        elif not self._retry("connection_lost"):
            self._fail(UpstreamError(502, "connection_lost"))

    def upstream_writable(self, writable: bool) -> None:
        """Let the client go on sending, or not."""
        self._client.accept_body(writable)
        self._expect_bytes()

    # Inside.

    def _flush(self) -> None:
        connection = self._connection
        if connection is None:
            return
        if self._pending:
            pieces, self._pending = self._pending, []
            connection.write(pieces)
        if self._request_ended:
            self._expect_bytes()

    def _expect_bytes(self) -> None:
        """Give the server `response` seconds to take or send something, where that is its turn."""
        connection = self._connection
        if connection is None:
            return
        if self._request_ended or connection.write_paused:
            connection.deadline = monotonic() + self._response_timeout_s
        else:
            connection.deadline = math.inf

    def _pass_response_on(self) -> None:
        """Send the client what has come, and stop the upstream if the client can't take more."""
        connection = self._connection
        assert connection is not None
        begun = self._response is not None
        try:
            self._read_response()
        except UpstreamError as error:
            if not begun:
                # Nothing of it has been sent: the client gets a 502, not a response cut off.
                self._response = None
            self._client.runtime.metrics.count_rejected(error.reason)
            self._fail(error)
            return
        self._client.flush_response()
        if self._connection is None:
            return
        if self._reader.at_end:
            self._complete(connection)
        elif self.status == 101:
            self._switch_protocols(connection)
        elif self._response is not None:
            if self._reader.has_more:
                connection.pause_reading()
                asyncio.get_running_loop().call_soon(self._read_on)
            elif self._client.write_paused:
                connection.pause_reading()
                connection.deadline = math.inf
            else:
                connection.resume_reading()
                self._expect_bytes()

    def _read_on(self) -> None:
        """Go on with what was left for another turn of the loop."""
        if self._connection is not None:
            self._pass_response_on()

    def _read_response(self) -> None:
        """Hand on what is there of the response: head, part of the body, end."""
        client = self._client
        rules = self.route.response_rules
        if self._response is None:
            head = self._read_final_head()
            if head is None:
                return
            self._response = head
            client.begin_response(self.request, head, rules)
        data = self._reader.read_body()
        if data:
            client.add_to_response(data)
        if self._reader.at_end:
            client.end_response(self._reader.trailers, rules)

    def _read_final_head(self) -> ResponseHead | None:
        """Return the head of the response proper, or None until it is there; interim ones are handed on."""
        request = self.request
        while (head := self._reader.read_head(request.method)) is not None:
            if head.status >= 200:
                return head
            if head.status == 101:
                if head.upgrade.lower() != request.upgrade.lower():
                    raise UpstreamError(502, "unexpected_upgrade")
                return head
            self._interim_responses += 1
            if self._interim_responses > MAX_INTERIM_RESPONSES:
                raise UpstreamError(502, "too_many_interim_responses")
            self._client.send_interim_response(request, head, self.route.response_rules)
        return None

    def _complete(self, connection: UpstreamConnection) -> None:
        self._connection = None
        self._succeeded(connection)
        reader = self._reader
        if reader.keep_alive and self._request_ended and not reader.buffered_bytes and not connection.write_paused:
            connection.resume_reading()
            connection.release()
        else:
            connection.abort()
        self._client.exchange_completed()

    def _switch_protocols(self, connection: UpstreamConnection) -> None:
        """Leave the connection to a tunnel: what follows is no HTTP."""
        self._connection = None
        self._succeeded(connection)
        self._client.protocol_switched(connection, self._reader.take_buffered())

    def _succeeded(self, connection: UpstreamConnection) -> None:
        connection.succeeded()
        if self.trace is not None:
            self.trace.attempt_ended(self.status)

    def _retry(self, reason: str) -> bool:
        """Send the request again if nothing of a response has come and it may be sent twice; `reason` is why it failed.

        A kept-alive connection that is closed tells nothing of its server; otherwise it is another server's turn.
        """
        connection = self._connection
        request = self.request
        if (
            connection is None
            or self._response is not None
            or self._interim_responses
            or self._reader.buffered_bytes
            or request.has_body
            or request.method not in _IDEMPOTENT
        ):
            return False
        if not connection.reused:
            tried = [*self._tried, connection.server]
            if len(tried) > self.upstream.retries or not self.upstream.has_others(tried):
                return False
            self._tried = tried
            connection.failed()
        connection.abort()
        self._connection = None
        metrics = self.upstream.metrics
        metrics.values[metrics.retries] += 1.0
        if self.trace is not None:
            self.trace.attempt_ended(0, reason)
            self.trace.attempt_begun()
        self.upstream.acquire(self, fresh=True, tried=self._tried)
        return True

    def _fail(self, error: UpstreamError) -> None:
        if self._connection is not None:
            self._connection.failed()
            self._connection.abort()
            self._connection = None
        self.upstream.metrics.count_error(error.reason)
        if self.trace is not None:
            self.trace.attempt_ended(self.status, error.reason)
        self._client.exchange_failed(error)
