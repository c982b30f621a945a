"""Requests and responses as they come from the wire, one message at a time.

Heads are read by parsers in wide use: h11 for requests, llhttp for responses. Before them stands `syntax.check_head`,
for both forgive what must not pass; after them the rules here, over the fields that they have read. Bodies are framed
by `body`. A reader is fed bytes as they come; its owner asks for the head, then for the body until `at_end`, then for
the next head. Nothing is decoded before it is asked for, so a pipelined request waits its turn.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import h11
import httptools

from tlsproxy.errors import HttpError, UpstreamError
from tlsproxy.http.body import Body, ChunkedBody, LengthBody, UntilCloseBody
from tlsproxy.http.syntax import (
    TOKEN,
    Field,
    MessageError,
    check_head,
    check_partial_head,
    content_length_of,
    fields_of,
    list_members,
)
from tlsproxy.http.target import host_name, origin_form, routing_path

MAX_RESPONSE_HEAD_BYTES = 64 * 1024
_EMPTY_LINES = re.compile(rb"\A(?:\r\n)+")
_REQUEST_LINE = re.compile(rb"(" + TOKEN + rb") ([!-~]+) HTTP/([0-9]\.[0-9])\r\n")
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9]{2})(?: ([^\r]*))?\r\n")
_LENGTHS = re.compile(rb"\ncontent-length:([^\r]*)", re.IGNORECASE)
_REQUEST_FIELDS = frozenset((b"host", b"connection", b"content-length", b"transfer-encoding", b"upgrade", b"te"))
_RESPONSE_FIELDS = frozenset((b"connection", b"content-length", b"transfer-encoding", b"upgrade"))
"""What fields mean something here; most do not."""
_PROTOCOL = re.compile(TOKEN + rb"(?:/" + TOKEN + rb")?")
_REFUSED_METHODS = frozenset((b"CONNECT", b"TRACE"))
_REFUSED_PROTOCOLS = frozenset((b"h2", b"h2c", b"http", b"tls"))
"""Upgrades to these would hide requests from the proxy, or ask it for what it does itself."""


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
    upgrade: bytes
    """The protocol the client asks to go on with, if that is for the server to decide; else empty."""
    takes_trailers: bool
    """The client has said `TE: trailers`."""

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
    upgrade: bytes
    """With status 101: the protocol the connection goes on with."""


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
        self.has_more = body.has_more
        if body.complete:
            self._body = None
            self._body_left = None
            self.at_end = True
            self.trailers = body.trailers
        return data


def _parse_request(head: bytes) -> RequestHead:
    """Read a head by h11. Raises MessageError.

    A connection of h11's is made for each: it costs less than what h11 wants to be told before it takes another.
    """
    lines = check_head(head)
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(head)
    try:
        event = connection.next_event()
    except h11.RemoteProtocolError:
        raise _broken_rule(head) from None
    if type(event) is not h11.Request:
        raise MessageError("bad_head")
    fields = [(name.lower(), name, value) for name, value in event.headers.raw_items()]
    request = _understand_request(event.method, event.target, event.http_version, fields)
    if request.content_length is not None:
        # h11 makes one of several that are equal, be they members or fields.
        lengths = _LENGTHS.findall(head)
        if len(lengths) != 1 or b"," in lengths[0]:
            raise MessageError("ambiguous_length")
    if len(fields) != lines - 2:
        raise MessageError("bad_head")
    return request


def _broken_rule(head: bytes) -> MessageError:
    """Return what is wrong with a head that h11 refuses: its own words are no metric labels."""
    line = _REQUEST_LINE.match(head)
    if line is None:
        return MessageError("bad_request_line")
    try:
        _understand_request(line[1], line[2], line[3], fields_of(head, line.end()))
    except MessageError as error:
        return error
    return MessageError("bad_head")


def _understand_request(method: bytes, target: bytes, version: bytes, fields: list[Field]) -> RequestHead:
    """Return what a head says. Raises MessageError where it could be read in two ways."""
    http_1_0 = version == b"1.0"
    if not http_1_0 and version != b"1.1":
        raise MessageError("bad_version")
    options: list[bytes] = []
    host: bytes | None = None
    content_length: int | None = None
    chunked = False
    upgrade = b""
    takes_trailers = False
    for lower, _, value in fields:
        if lower not in _REQUEST_FIELDS:
            continue
        if lower == b"host":
            if host is not None:
                raise MessageError("bad_host")
            host = value
        elif lower == b"connection":
            options += list_members(value)
        elif lower == b"content-length":
            content_length = content_length_of(value, content_length)
        elif lower == b"transfer-encoding":
            if chunked or value.lower() != b"chunked":
                raise MessageError("bad_transfer_encoding")
            chunked = True
        elif lower == b"upgrade":
            upgrade = b"%b, %b" % (upgrade, value) if upgrade else value
        elif lower == b"te":
            takes_trailers = takes_trailers or b"trailers" in list_members(value)
    if chunked and (http_1_0 or content_length is not None):
        raise MessageError("ambiguous_length")
    if host is None and not http_1_0:
        raise MessageError("bad_host")
    target = origin_form(method, target, host or b"")
    if upgrade and (http_1_0 or chunked or content_length or b"upgrade" not in options or not _may_ask_for(upgrade)):
        upgrade = b""
    return RequestHead(
        method,
        target,
        routing_path(target),
        host or b"",
        "" if host is None else host_name(host),
        http_1_0,
        fields,
        options,
        content_length,
        chunked,
        b"keep-alive" in options if http_1_0 else b"close" not in options,
        upgrade,
        takes_trailers,
    )


def _may_ask_for(protocol: bytes) -> bool:
    """Tell whether an Upgrade value is one protocol that the server behind may be asked for."""
    return _PROTOCOL.fullmatch(protocol) is not None and (protocol.lower().partition(b"/")[0] not in _REFUSED_PROTOCOLS)


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


class _Fields:
    """The fields that llhttp calls back for."""

    __slots__ = ("fields",)

    def __init__(self) -> None:
        self.fields: list[Field] = []

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a field; what llhttp leaves of the space around a value goes."""
        self.fields.append((name.lower(), name, value.strip(b" \t")))


def _parse_response(head: bytes, method: bytes) -> tuple[ResponseHead, Body | None]:
    """Read the head of a response to a `method` request by llhttp. Raises MessageError."""
    lines = check_head(head)
    line = _STATUS_LINE.match(head)
    if line is None:
        raise MessageError("bad_status_line")
    http_1_0, status, reason = line[1] == b"0", int(line[2]), line[3] or b""
    read = _Fields()
    parser = httptools.HttpResponseParser(read)
    try:
        parser.feed_data(head)
    except httptools.HttpParserUpgrade:
        pass  # how httptools says that the head of a 101 has ended
    except httptools.HttpParserError:
        # Its own words are no metric labels.
        _understand_response(method, status, reason, http_1_0, fields_of(head, line.end()))
        raise MessageError("bad_head") from None
    if parser.get_status_code() != status or len(read.fields) != lines - 2:
        raise MessageError("bad_head")
    return _understand_response(method, status, reason, http_1_0, read.fields)


def _understand_response(
    method: bytes, status: int, reason: bytes, http_1_0: bool, fields: list[Field]
) -> tuple[ResponseHead, Body | None]:
    """Return what a head says, and the body that follows. Raises MessageError where it could be read in two ways."""
    options: list[bytes] = []
    content_length: int | None = None
    chunked = False
    upgrade = b""
    for lower, _, value in fields:
        if lower not in _RESPONSE_FIELDS:
            continue
        if lower == b"connection":
            options += list_members(value)
        elif lower == b"content-length":
            content_length = content_length_of(value, content_length)
        elif lower == b"transfer-encoding":
            if chunked or value.lower() != b"chunked" or http_1_0:
                raise MessageError("bad_transfer_encoding")
            chunked = True
        elif lower == b"upgrade":
            upgrade = value
    if chunked and content_length is not None:
        raise MessageError("ambiguous_length")
    if (status < 200 or status == 204) and (chunked or content_length):
        # What follows is no body by the rules (RFC 9112 section 6.3), and yet the server says it is one.
        raise MessageError("body_not_allowed")
    if status == 101 and (b"upgrade" not in options or not upgrade):
        raise MessageError("bad_upgrade")
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
        ResponseHead(
            status,
            reason,
            fields,
            options,
            content_length,
            body is not None,
            keep_alive,
            upgrade if status == 101 else b"",
        ),
        body,
    )
