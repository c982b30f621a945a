"""Heads of requests and responses: read by parsers in wide use, h11 and llhttp, and judged.

Before the parsers stands `syntax.check_head`, for both forgive what must not pass; after them the rules here, over the
fields that they have read. A head that they refuse is read by `syntax.fields_of`, only to find the rule that it breaks.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import h11
import httptools

from tlsproxy.http.syntax import TOKEN, Field, MessageError, check_head, content_length_of, fields_of, list_members
from tlsproxy.http.target import host_name, origin_form, routing_path

_REQUEST_LINE = re.compile(rb"(" + TOKEN + rb") ([!-~]+) HTTP/([0-9]\.[0-9])\r\n")
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9]{2})(?: ([^\r]*))?\r\n")
_LENGTHS = re.compile(rb"\ncontent-length:([^\r]*)", re.IGNORECASE)
_REQUEST_FIELDS = frozenset((b"host", b"connection", b"content-length", b"transfer-encoding", b"upgrade", b"te"))
_RESPONSE_FIELDS = frozenset((b"connection", b"content-length", b"transfer-encoding", b"upgrade"))
"""What fields mean something here; most do not."""
_PROTOCOL = re.compile(TOKEN + rb"(?:/" + TOKEN + rb")?")
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
    version: bytes
    """Of HTTP, as the client spoke it: `1.0`, `1.1` or `2.0`."""
    fields: list[Field]
    connection_options: frozenset[bytes]
    """Members of Connection, lower case. Every field is looked for in it, and there can be thousands."""
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
    connection_options: frozenset[bytes]
    content_length: int | None
    """As the field says, even where no body follows (HEAD, 304)."""
    chunked: bool
    """Likewise."""
    has_body: bool
    """A body follows. If it has neither a length nor chunks it ends with the connection."""
    keep_alive: bool
    """The server will take another request on the connection."""
    upgrade: bytes
    """With status 101: the protocol the connection goes on with."""


def read_request_head(head: bytes) -> RequestHead:
    """Return what the head of a request says, from its first byte to the empty line. Raises MessageError.

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
        version,
        fields,
        frozenset(options),
        content_length,
        chunked,
        b"keep-alive" in options if http_1_0 else b"close" not in options,
        upgrade,
        takes_trailers,
    )


def _may_ask_for(protocol: bytes) -> bool:
    """Tell whether an Upgrade value is one protocol that the server behind may be asked for."""
    return _PROTOCOL.fullmatch(protocol) is not None and (protocol.lower().partition(b"/")[0] not in _REFUSED_PROTOCOLS)


class _Fields:
    """The fields that llhttp calls back for."""

    __slots__ = ("fields",)

    def __init__(self) -> None:
        self.fields: list[Field] = []

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a field; what llhttp leaves of the space around a value goes."""
        self.fields.append((name.lower(), name, value.strip(b" \t")))


def read_response_head(head: bytes, method: bytes) -> ResponseHead:
    """Return what the head of a response to a `method` request says. Raises MessageError."""
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
) -> ResponseHead:
    """Return what a head says. Raises MessageError where it could be read in two ways."""
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
    no_body = status < 200 or status in (204, 304) or method == b"HEAD" or content_length == 0
    until_close = not no_body and content_length is None and not chunked
    return ResponseHead(
        status,
        reason,
        fields,
        frozenset(options),
        content_length,
        chunked,
        not no_body,
        not until_close and (b"keep-alive" in options if http_1_0 else b"close" not in options),
        upgrade if status == 101 else b"",
    )
