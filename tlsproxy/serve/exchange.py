"""One request and its response, on their way through an upstream connection.

The client's side (http_connection) hands in the request's body as it comes and is handed the response as bytes to
send. Neither body is held: each side pauses the other when its transport is full.
"""

from __future__ import annotations

import math
from time import monotonic
from typing import TYPE_CHECKING

from tlsproxy.errors import UpstreamError
from tlsproxy.http.codec import RequestHead, ResponseHead, ResponseReader
from tlsproxy.http.forwarding import LAST_CHUNK, Hop, chunk, request_head, response_head
from tlsproxy.http.routing import Route
from tlsproxy.serve.upstream import Upstream, UpstreamConnection

if TYPE_CHECKING:
    from tlsproxy.serve.http_connection import HttpConnection

_IDEMPOTENT = frozenset((b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE"))
"""RFC 9110 section 9.2.2: these may be sent again."""


class Exchange:
    """Lives from a request's head to the last byte of its response."""

    __slots__ = (
        "_chunked_response",
        "_client",
        "_connection",
        "_keep_alive",
        "_pending",
        "_reader",
        "_request_ended",
        "_request_id",
        "_response",
        "_response_timeout_s",
        "_started",
        "request",
        "route",
        "started_s",
        "upstream",
    )

    def __init__(self, client: HttpConnection, request: RequestHead, route: Route, upstream: Upstream) -> None:
        self._client = client
        self.request = request
        self.route = route
        self.upstream = upstream
        self.started_s = monotonic()
        self._connection: UpstreamConnection | None = None
        self._pending: list[bytes] = []
        self._request_ended = False
        self._reader = ResponseReader()
        self._response: ResponseHead | None = None
        self._chunked_response = False
        self._keep_alive = False
        self._request_id = client.runtime.next_request_id()
        self._started = False
        response_s = route.config.response_s
        self._response_timeout_s = upstream.timeouts.response_s if response_s is None else response_s

    @property
    def status(self) -> int:
        """Status of the response, 0 before it has come."""
        return self._response.status if self._response is not None else 0

    @property
    def request_ended(self) -> bool:
        """All of the request has been handed in."""
        return self._request_ended

    def start(self) -> None:
        """Ask for a connection."""
        self.upstream.acquire(self)
        self._started = True
        if self._connection is None and self.request.has_body:
            self._client.accept_body(False)

    def send(self, data: bytes, *, last: bool) -> None:
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
                pieces.append(LAST_CHUNK)
        self._flush()

    def cancel(self) -> None:
        """The client is gone: let go of everything."""
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

    def upstream_ready(self, connection: UpstreamConnection) -> None:
        """Send what there is of the request."""
        self._connection = connection
        client = self._client
        hop = Hop(
            client.client_ip_bytes,
            client.runtime.proto,
            self._request_id,
            connection.server.authority,
            client.peer_is_trusted,
            client.runtime.config.forwarded,
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
        connection = self._connection
        assert connection is not None
        self._reader.receive(data)
        try:
            pieces = self._read_response()
        except UpstreamError as error:
            self._client.runtime.metrics.count_rejected(error.reason)
            self._fail(error)
            return
        if pieces:
            self._client.send(*pieces)
        if self._reader.at_end:
            self._complete(connection)
        elif self._connection is not None and self._response is not None:
            if self._client.write_paused:
                connection.pause_reading()
                connection.deadline = math.inf
            else:
                self._expect_bytes()

    def upstream_eof(self) -> bool:
        """End the response if that is what the server means; otherwise it has failed."""
        connection = self._connection
        assert connection is not None
        try:
            self._reader.end_of_input()
        except UpstreamError as error:
            if not self._retry():
                self._fail(error)
            return False
        if self._chunked_response:
            self._client.send(LAST_CHUNK)
        self._complete(connection)
        return False

    def upstream_lost(self, error: Exception | None) -> None:
        """Act on a connection that is gone before the response was complete."""
        if isinstance(error, TimeoutError):
            self._fail(UpstreamError(504, "response_timeout"))
        elif not self._retry():
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

    def _read_response(self) -> list[bytes]:
        pieces: list[bytes] = []
        if self._response is None:
            head = self._reader.read_head(self.request.method)
            while head is not None and head.status < 200:
                if not self.request.http_1_0:
                    rules = self.route.response_rules
                    pieces.append(response_head(head, rules, chunked=False, http_1_0=False, keep_alive=True))
                head = self._reader.read_head(self.request.method)
            if head is None:
                return pieces
            pieces.append(self._begin_response(head))
        data = self._reader.read_body()
        if data:
            if self._chunked_response:
                pieces.extend(chunk(data))
            else:
                pieces.append(data)
        if self._chunked_response and self._reader.at_end:
            pieces.append(LAST_CHUNK)
        return pieces

    def _begin_response(self, head: ResponseHead) -> bytes:
        self._response = head
        http_1_0 = self.request.http_1_0
        unknown_length = head.has_body and head.content_length is None
        self._chunked_response = unknown_length and not http_1_0
        # A body of unknown length ends an HTTP/1.0 connection; a request not read to its end hides the next one.
        self._keep_alive = self._client.may_keep_alive and self._request_ended and not (unknown_length and http_1_0)
        rules = self.route.response_rules
        return response_head(
            head, rules, chunked=self._chunked_response, http_1_0=http_1_0, keep_alive=self._keep_alive
        )

    def _complete(self, connection: UpstreamConnection) -> None:
        self._connection = None
        reader = self._reader
        if reader.keep_alive and self._request_ended and not reader.buffered_bytes and not connection.write_paused:
            connection.resume_reading()
            connection.release()
        else:
            connection.abort()
        self._client.exchange_completed(keep_alive=self._keep_alive)

    def _retry(self) -> bool:
        """Send the request again if the server closed a kept-alive connection before it can have seen it."""
        connection = self._connection
        request = self.request
        if (
            connection is None
            or not connection.reused
            or self._response is not None
            or self._reader.buffered_bytes
            or request.has_body
            or request.method not in _IDEMPOTENT
        ):
            return False
        connection.abort()
        self._connection = None
        metrics = self.upstream.metrics
        metrics.values[metrics.retries] += 1.0
        self.upstream.acquire(self, fresh=True)
        return True

    def _fail(self, error: UpstreamError) -> None:
        if self._connection is not None:
            self._connection.abort()
            self._connection = None
        self.upstream.metrics.count_error(error.reason)
        self._client.exchange_failed(error)
