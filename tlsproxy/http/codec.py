"""Requests and responses as they come from the wire, one message at a time.

h11 judges the heads of requests, llhttp those of responses, each behind the checks of `syntax`; bodies are framed by
`body`. A reader is fed bytes as they come; its owner asks for the head, then for the body until `at_end`, then for the
next head. Nothing is decoded before it is asked for, so a pipelined request waits its turn.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import h11
import httptools

from tlsproxy.errors import HttpError, UpstreamError
from tlsproxy.http.body import Body, ChunkedBody, LengthBody, UntilCloseBody
from tlsproxy.http.syntax import MessageError, check_head, check_partial_head, list_members
from tlsproxy.http.target import host_name, origin_form, routing_path

MAX_RESPONSE_HEAD_BYTES = 64 * 1024
_EMPTY_LINES = re.compile(rb"\A(?:\r\n)+")
_CONTENT_LENGTH = re.compile(rb"[0-9]{1,18}")
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) [1-9][0-9]{2}(?: ([^\r]*))?\r\n")
_REFUSED_METHODS = frozenset((b"CONNECT", b"TRACE"))

Field = tuple[bytes, bytes, bytes]
"""A header field: its name in lower case, its name as received, its value."""


class RequestHead(NamedTuple):
    """A request without its body."""

    method: bytes
    target: bytes
    """Origin-form, as sent on."""
    path: bytes
    """Normalised, for routing."""
    host: bytes
    """The Host value as received; empty if an HTTP/1.0 client sent none."""
    host_name: str
    """Its name, lower case, without port."""
    http_1_0: bool
    fields: list[Field]
    connection_options: list[bytes]
    """Members of Connection, lower case."""
    content_length: int | None
    chunked: bool
    keep_alive: bool
    """The client wants to use the connection again."""

    @property
    def has_body(self) -> bool:
        """A body follows."""
        return self.chunked or bool(self.content_length)


class ResponseHead(NamedTuple):
    """A response without its body; `status` may be 1xx, then another head follows."""

    status: int
    reason: bytes
    fields: list[Field]
    connection_options: list[bytes]
    content_length: int | None
    """As the field says, even where no body follows (HEAD, 304)."""
    has_body: bool
    keep_alive: bool
    """The server will take another request on the connection."""


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

    def _take_head(self, limit_bytes: int) -> bytes | None:
        buffer = self._buffer
        end = buffer.find(b"\r\n\r\n", self._searched) + 4
        if 4 <= end <= limit_bytes:
            self._buffer = buffer[end:]
            self._searched = 0
            head = buffer[:end]
            check_head(head)
            return head
        if end >= 4 or len(buffer) > limit_bytes:
            raise MessageError("header_too_large")
        check_partial_head(buffer)
        self._searched = max(0, len(buffer) - 3)
        return None


class RequestReader(_Reader):
    """Reads the requests of one client connection.

    `header_bytes` limits the size of a head.
    """

    __slots__ = ("_body", "_body_left", "_header_bytes", "at_end")

    def __init__(self, header_bytes: int) -> None:
        super().__init__()
        self._header_bytes = header_bytes
        self._body: LengthBody | ChunkedBody | None = None
        self._body_left: int | None = None
        self.at_end = True
        """The last request has been read to its end."""

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
            request = _parse_request(head)
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
        if body.complete:
            self._body = None
            self._body_left = None
            self.at_end = True
        return data


def _parse_request(head: bytes) -> RequestHead:
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=len(head))
    connection.receive_data(head)
    try:
        event = connection.next_event()
    except h11.RemoteProtocolError:
        raise MessageError("bad_head") from None
    if type(event) is not h11.Request:
        raise MessageError("bad_head")
    http_1_0 = event.http_version == b"1.0"
    if not http_1_0 and event.http_version != b"1.1":
        raise MessageError("bad_version")
    fields: list[Field] = []
    options: list[bytes] = []
    host = b""
    length: bytes | None = None
    chunked = False
    for name, value in event.headers.raw_items():
        lower = name.lower()
        fields.append((lower, name, value))
        if lower == b"host":
            host = value
        elif lower == b"connection":
            options += list_members(value)
        elif lower == b"content-length":
            length = value
        elif lower == b"transfer-encoding":
            chunked = True
    content_length = None
    if length is not None:
        # h11 has folded repeated lengths into one; two of them are two readings, even if equal.
        content_length = _one_length(length, head)
    if chunked and (http_1_0 or length is not None):
        raise MessageError("ambiguous_length")
    target = origin_form(event.method, event.target, host)
    return RequestHead(
        event.method,
        target,
        routing_path(target),
        host,
        host_name(host) if host or not http_1_0 else "",
        http_1_0,
        fields,
        options,
        content_length,
        chunked,
        b"keep-alive" in options if http_1_0 else b"close" not in options,
    )


def _one_length(value: bytes, head: bytes) -> int:
    lower = head.lower()
    start = lower.find(b"\r\ncontent-length:") + 17
    if lower.find(b"\r\ncontent-length:", start) >= 0 or b"," in head[start : head.find(b"\r\n", start)]:
        raise MessageError("ambiguous_length")
    if _CONTENT_LENGTH.fullmatch(value) is None:
        raise MessageError("bad_content_length")
    return int(value)


class _Fields:
    """What llhttp calls back; whether a head ends well is seen from its raising."""

    __slots__ = ("items",)

    def __init__(self) -> None:
        self.items: list[tuple[bytes, bytes]] = []

    def on_header(self, name: bytes, value: bytes) -> None:
        self.items.append((name, value))


class ResponseReader(_Reader):
    """Reads the responses of one upstream connection, each to a request whose method is given."""

    __slots__ = ("_body", "at_end", "keep_alive")

    def __init__(self) -> None:
        super().__init__()
        self._body: Body | None = None
        self.at_end = False
        """The response (not an interim one) has been read to its end."""
        self.keep_alive = False
        """The connection can carry another request once `at_end`."""

    def next_response(self) -> None:
        """Get ready for the response to the next request."""
        self.at_end = False
        self._body = None

    def read_head(self, method: bytes) -> ResponseHead | None:
        """Return the head of the response to a `method` request, or None until it is complete.

        Raises UpstreamError 502 for a head that can't be read in one way only.
        """
        try:
            head = self._take_head(MAX_RESPONSE_HEAD_BYTES)
            if head is None:
                return None
            response, self._body = _parse_response(head, method)
        except MessageError as error:
            raise UpstreamError(502, error.rule) from None
        if response.status >= 200:
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


def _parse_response(head: bytes, method: bytes) -> tuple[ResponseHead, Body | None]:
    status_line = _STATUS_LINE.match(head)
    if status_line is None:
        raise MessageError("bad_status_line")
    collected = _Fields()
    parser = httptools.HttpResponseParser(collected)
    try:
        parser.feed_data(head)
    except httptools.HttpParserUpgrade:
        raise MessageError("unexpected_upgrade") from None
    except httptools.HttpParserError:
        raise MessageError("bad_head") from None
    status = parser.get_status_code()
    http_1_0 = status_line[1] == b"0"
    fields: list[Field] = []
    options: list[bytes] = []
    content_length: int | None = None
    chunked = False
    for name, value in collected.items:
        lower = name.lower()
        value = value.rstrip(b" \t")
        fields.append((lower, name, value))
        if lower == b"connection":
            options += list_members(value)
        elif lower == b"content-length":
            if content_length is not None or _CONTENT_LENGTH.fullmatch(value) is None:
                raise MessageError("bad_content_length")
            content_length = int(value)
        elif lower == b"transfer-encoding":
            if chunked or value.lower() != b"chunked" or http_1_0:
                raise MessageError("bad_transfer_encoding")
            chunked = True
    if chunked and content_length is not None:
        raise MessageError("ambiguous_length")
    body: Body | None = None
    if status >= 200 and method != b"HEAD" and status not in (204, 304):
        if chunked:
            body = ChunkedBody()
        elif content_length is None:
            body = UntilCloseBody()
        elif content_length:
            body = LengthBody(content_length)
    keep_alive = (b"keep-alive" in options if http_1_0 else b"close" not in options) and type(
        body
    ) is not UntilCloseBody
    return (
        ResponseHead(status, status_line[2] or b"", fields, options, content_length, body is not None, keep_alive),
        body,
    )
