"""Requests and responses as they come from the wire, one message at a time.

Heads are read by `heads`, bodies are framed by `body`. A reader is fed bytes as they come; its owner asks for the head,
then for the body until `at_end`, then for the next head. Nothing is decoded before it is asked for, so a pipelined
request waits its turn.
"""

from __future__ import annotations

import re

from tlsproxy.errors import HttpError, UpstreamError
from tlsproxy.http.body import Body, ChunkedBody, LengthBody, UntilCloseBody
from tlsproxy.http.heads import RequestHead, ResponseHead, read_request_head, read_response_head
from tlsproxy.http.syntax import Field, MessageError, check_partial_head

MAX_RESPONSE_HEAD_BYTES = 64 * 1024
_EMPTY_LINES = re.compile(rb"\A(?:\r\n)+")
_REFUSED_METHODS = frozenset((b"CONNECT", b"TRACE"))


class _Reader:
    """Bytes received, and the search for the end of a head in them."""

    __slots__ = ("_buffer", "_searched")

    def __init__(self) -> None:
        self._buffer = b""
        self._searched = 0

    @property
    def buffered_bytes(self) -> int:
        """Bytes received and not read yet."""
        return len(self._buffer)

    def receive(self, data: bytes) -> None:
        """Take bytes from the peer."""
        self._buffer = self._buffer + data if self._buffer else data

    def take_buffered(self) -> bytes:
        """Take what has come after a switch of protocols: it is no HTTP."""
        data, self._buffer = self._buffer, b""
        return data

    def _take_head(self, limit_bytes: int) -> bytes | None:
        buffer = self._buffer
        end = buffer.find(b"\r\n\r\n", self._searched) + 4
        if 4 <= end <= limit_bytes:
            self._buffer = buffer[end:]
            self._searched = 0
            return buffer[:end]
        if end >= 4 or len(buffer) > limit_bytes:
            raise MessageError("header_too_large")
        check_partial_head(buffer)
        self._searched = max(0, len(buffer) - 3)
        return None


class RequestReader(_Reader):
    """Reads the requests of one client connection.

    `header_bytes` limits the size of a head.
    """

    __slots__ = ("_body", "_body_left", "_header_bytes", "at_end", "has_more", "trailers")

    def __init__(self, header_bytes: int) -> None:
        super().__init__()
        self._header_bytes = header_bytes
        self._body: LengthBody | ChunkedBody | None = None
        self._body_left: int | None = None
        self.at_end = True
        """The last request has been read to its end."""
        self.has_more = False
        """The last read_body has stopped before the end of what it could have decoded."""
        self.trailers: list[Field] = []
        """Trailer fields of the body that was read last."""

    def read_head(self) -> RequestHead | None:
        """Return the next request's head, or None until it is complete.

        Raises HttpError: 400 for whatever could be read in two ways, 414 or 431 for a line or head too large, 501 for
        CONNECT and TRACE. Where the next request starts is then unknown.
        """
        if self._buffer[:2] == b"\r\n":
            # Clients of old sent an empty line after a body; RFC 9112 section 2.2 says to ignore it.
            self._buffer = _EMPTY_LINES.sub(b"", self._buffer)
            self._searched = 0
        try:
            head = self._take_head(self._header_bytes)
            if head is None:
                return None
            request = read_request_head(head)
        except MessageError as error:
            raise HttpError(self._status_of(error.rule), error.rule) from None
        if request.method in _REFUSED_METHODS:
            raise HttpError(501, "method_refused")
        if request.chunked:
            self._body = ChunkedBody()
        elif request.content_length:
            self._body = LengthBody(request.content_length)
        self.at_end = self._body is None
        return request

    def _status_of(self, rule: str) -> int:
        if rule == "header_too_large" and self._buffer.find(b"\r\n", 0, self._header_bytes) < 0:
            return 414
        return 431 if rule in ("header_too_large", "too_many_fields") else 400

    def limit_body(self, limit_bytes: int) -> None:
        """Limit the body of the request whose head was just read. Raises HttpError 413 if its length is known."""
        self._body_left = limit_bytes
        if isinstance(self._body, LengthBody) and self._body.remaining > limit_bytes:
            raise HttpError(413, "body_too_large")

    def read_body(self) -> bytes:
        """Return what has come of the body since the last call; sets `at_end`.

        Raises HttpError: 400 for broken chunks, 413 once a chunked body exceeds its limit.
        """
        body = self._body
        if body is None:
            return b""
        try:
            data, self._buffer = body.decode(self._buffer)
        except MessageError as error:
            raise HttpError(400, error.rule) from None
        if self._body_left is not None:
            self._body_left -= len(data)
            if self._body_left < 0:
                raise HttpError(413, "body_too_large")
        self.has_more = body.has_more
        if body.complete:
            self._body = None
            self._body_left = None
            self.at_end = True
            self.trailers = body.trailers
        return data


class ResponseReader(_Reader):
    """Reads the responses of one upstream connection, each to a request whose method is given."""

    __slots__ = ("_body", "at_end", "has_more", "keep_alive", "trailers")

    def __init__(self) -> None:
        super().__init__()
        self._body: Body | None = None
        self.at_end = False
        """The response (not an interim one) has been read to its end."""
        self.keep_alive = False
        """The connection can carry another request once `at_end`."""
        self.has_more = False
        """The last read_body has stopped before the end of what it could have decoded."""
        self.trailers: list[Field] = []
        """Trailer fields of the body that was read last."""

    def next_response(self) -> None:
        """Get ready for the response to the next request."""
        self.at_end = False
        self._body = None

    def read_head(self, method: bytes) -> ResponseHead | None:
        """Return the head of the response to a `method` request, or None until it is complete.

        After an interim one (1xx but 101) another follows.

        Raises UpstreamError 502 for a head that can't be read in one way only.
        """
        try:
            head = self._take_head(MAX_RESPONSE_HEAD_BYTES)
            if head is None:
                return None
            response = read_response_head(head, method)
        except MessageError as error:
            raise UpstreamError(502, error.rule) from None
        if response.status >= 200:
            self._body = _body_of(response) if response.has_body else None
            self.keep_alive = response.keep_alive
            self.at_end = self._body is None
        return response

    def read_body(self) -> bytes:
        """Return what has come of the body since the last call; sets `at_end`. Raises UpstreamError 502."""
        if self._body is None:
            return b""
        try:
            data, self._buffer = self._body.decode(self._buffer)
        except MessageError as error:
            raise UpstreamError(502, error.rule) from None
        self.at_end = self._body.complete
        self.has_more = self._body.has_more
        self.trailers = self._body.trailers
        return data

    def end_of_input(self) -> None:
        """Say that the server has closed: sets `at_end` if that ends the body. Raises UpstreamError 502 otherwise."""
        if self._body is None:
            raise UpstreamError(502, "closed_before_response")
        try:
            self._body.end_of_input()
        except MessageError as error:
            raise UpstreamError(502, error.rule) from None
        self.at_end = True


def _body_of(response: ResponseHead) -> Body:
    if response.chunked:
        return ChunkedBody()
    return UntilCloseBody() if response.content_length is None else LengthBody(response.content_length)
