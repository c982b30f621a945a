"""What changes in a message on its way through: heads are written anew, from what was understood of them.

Hop-by-hop fields end here, also those that Connection names (RFC 9110 section 7.6.1). What a client says about itself
in X-Forwarded-* and the like is deleted and said by the proxy instead, unless the peer is a trusted proxy. Whom a
client's certificate names nobody else may say at all (RFC 9440 section 4): a proxy that is trusted about addresses need
not know that field, and would pass on what clients put there. Fields whose name is not PLAIN_NAME are deleted too, as
nginx does. Message framing is written by the proxy alone.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from tlsproxy.config import HeaderRules, plain_ip
from tlsproxy.http.heads import RequestHead, ResponseHead
from tlsproxy.http.syntax import PLAIN_NAME

_HOP_BY_HOP = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-connection",
        b"proxy-authorization",
        b"proxy-authenticate",
        b"te",
        b"transfer-encoding",
        b"upgrade",
        b"content-length",
    )
)
_SAID_BY_PROXY = frozenset(
    (
        b"host",
        b"client-cert",
        b"client-cert-chain",
        b"forwarded",
        b"proxy",
        b"x-forwarded-for",
        b"x-forwarded-host",
        b"x-forwarded-port",
        b"x-forwarded-proto",
        b"x-forwarded-server",
        b"x-real-ip",
        b"x-request-id",
        b"via",
    )
)
_TRACE_CONTEXT = frozenset((b"traceparent", b"tracestate"))
_TRUSTED_PEER_MAY_SAY = frozenset(
    (
        b"forwarded",
        b"x-forwarded-for",
        b"x-forwarded-host",
        b"x-forwarded-port",
        b"x-forwarded-proto",
        b"x-request-id",
    )
)
_NOT_SENT_UP = _HOP_BY_HOP | _SAID_BY_PROXY


class RequestRules:
    """What a route does to the header fields of requests, made ready."""

    __slots__ = ("appended", "host", "not_sent")

    def __init__(self, rules: HeaderRules) -> None:
        self.host = next((value.encode() for name, value in rules.set if name.lower() == "host"), None)
        """What Host is set to; None leaves the client's."""
        kept = [(name, value) for name, value in rules.set if name.lower() != "host"]
        self.not_sent = _NOT_SENT_UP | _names(rules)
        self.appended = _lines((*kept, *rules.add))


class ResponseRules:
    """What a route does to the header fields of responses, made ready. `always` comes last, whatever the rules say."""

    __slots__ = ("appended", "appended_fields", "not_sent")

    def __init__(self, rules: HeaderRules, always: Sequence[tuple[str, str]] = ()) -> None:
        self.not_sent = _HOP_BY_HOP | _names(rules) | {name.lower().encode() for name, _ in always}
        appended = (*rules.set, *rules.add, *always)
        self.appended = _lines(appended)
        self.appended_fields = [(name.lower().encode(), value.encode()) for name, value in appended]


def _names(rules: HeaderRules) -> set[bytes]:
    return {name.lower().encode() for name in (*(name for name, _ in rules.set), *rules.remove)}


def _lines(fields: Iterable[tuple[str, str]]) -> bytes:
    return "".join(f"{name}: {value}\r\n" for name, value in fields).encode("ascii")


class Hop(NamedTuple):
    """What the proxy knows of a request besides its head."""

    client_ip: bytes
    """Address of the peer."""
    proto: bytes
    """`https` or `http`: how the peer came."""
    request_id: bytes
    upstream_authority: bytes
    """`host:port` of the upstream server, sent as Host when the client sent none."""
    trusted: bool
    """What the peer says of those before it is believed and passed on."""
    forwarded: bool
    """Say it in Forwarded (RFC 7239) too."""
    trace: bytes = b""
    """Lines with traceparent and tracestate, in place of the client's; empty if the proxy takes no part in traces."""
    client_cert: bytes = b""
    """The line that client_cert_field returns; empty for a client without certificate."""


def client_cert_field(der: bytes) -> bytes:
    """Return the line with a client's certificate (RFC 9440 section 2.2).

    The chain is not sent along: a resumed session has the certificate alone.
    """
    return b"Client-Cert: :%b:\r\n" % base64.b64encode(der)


def request_head(request: RequestHead, hop: Hop, rules: RequestRules) -> bytes:
    """Return the head to send to the upstream server."""
    host = request.host or hop.upstream_authority
    out = [request.method, b" ", request.target, b" HTTP/1.1\r\nHost: ", rules.host or host, b"\r\n"]
    named = request.connection_options
    not_sent = rules.not_sent | _TRACE_CONTEXT if hop.trace else rules.not_sent
    vias = []
    for lower, name, value in request.fields:
        if lower in not_sent or lower in named:
            if lower == b"via":
                vias.append(value)
            continue
        if lower.translate(None, PLAIN_NAME) or (lower.startswith(b"x-forwarded-") and not hop.trusted):
            continue
        if lower == b"expect" and request.version == b"1.0":
            continue
        out += (name, b": ", value, b"\r\n")
    if request.chunked:
        out.append(b"Transfer-Encoding: chunked\r\n")
    elif request.content_length is not None:
        out.append(b"Content-Length: %d\r\n" % request.content_length)
    if request.upgrade:
        out.append(b"Connection: Upgrade\r\nUpgrade: %b\r\n" % request.upgrade)
    elif request.takes_trailers:
        out.append(b"Connection: TE\r\nTE: trailers\r\n")
    vias.append(request.version + b" tlsproxy")
    if hop.trusted or hop.forwarded:
        out.append(_origin_fields(request, hop, host))
    else:
        out.append(
            b"X-Forwarded-For: %b\r\nX-Forwarded-Proto: %b\r\nX-Forwarded-Host: %b\r\nX-Request-ID: %b\r\n"
            % (hop.client_ip, hop.proto, host, hop.request_id)
        )
    if hop.client_cert:
        out.append(hop.client_cert)
    out.append(b"%b%bVia: %b\r\n\r\n" % (hop.trace, rules.appended, b", ".join(vias)))
    return b"".join(out)


def _origin_fields(request: RequestHead, hop: Hop, host: bytes) -> bytes:
    """Return the fields that tell where a request came from, going on from what a trusted peer has said."""
    said: dict[bytes, bytes] = {}
    if hop.trusted:
        for lower, _, value in request.fields:
            if lower in _TRUSTED_PEER_MAY_SAY and value:
                said[lower] = b"%b, %b" % (said[lower], value) if lower in said else value
    out = [
        b"X-Forwarded-For: %b\r\nX-Forwarded-Proto: %b\r\nX-Forwarded-Host: %b\r\nX-Request-ID: %b\r\n"
        % (
            b"%b, %b" % (said[b"x-forwarded-for"], hop.client_ip) if b"x-forwarded-for" in said else hop.client_ip,
            said.get(b"x-forwarded-proto", hop.proto),
            said.get(b"x-forwarded-host", host),
            request_id(request, hop.request_id, trusted=hop.trusted),
        )
    ]
    if b"x-forwarded-port" in said:
        out.append(b"X-Forwarded-Port: %b\r\n" % said[b"x-forwarded-port"])
    before = said.get(b"forwarded")
    if hop.forwarded or before is not None:
        # A value that is no token is quoted (RFC 7239 section 4): an IPv6 address, a host with a port.
        node = b'"[%b]"' % hop.client_ip if b":" in hop.client_ip else hop.client_ip
        quoted_host = b'"%b"' % host if b":" in host else host
        element = b"for=%b;host=%b;proto=%b" % (node, quoted_host, hop.proto)
        out.append(b"Forwarded: %b\r\n" % (element if before is None else b"%b, %b" % (before, element)))
    return b"".join(out)


def request_id(request: RequestHead, own: bytes, *, trusted: bool) -> bytes:
    """Return the X-Request-ID that the server is sent: `own`, or what a `trusted` peer has said."""
    said = [value for lower, _, value in request.fields if lower == b"x-request-id" and value] if trusted else ()
    return b", ".join(said) or own


def client_address(request: RequestHead, peer: str, is_trusted: Callable[[str], bool]) -> str:
    """Return the address a request came from: the last in X-Forwarded-For that is not a trusted proxy's.

    `peer` is the connection's own, which is trusted. What is no address ends the search: nobody vouches for the rest.
    """
    found = peer
    lists = [value for lower, _, value in request.fields if lower == b"x-forwarded-for"]
    for member in reversed(b",".join(lists).split(b",")):
        text = member.strip().decode("latin-1")
        try:
            found = plain_ip(text)
        except ValueError:
            break
        if not is_trusted(found):
            break
    return found


def response_head(
    response: ResponseHead, rules: ResponseRules, *, chunked: bool, http_1_0: bool, keep_alive: bool
) -> bytes:
    """Return the head to send to the client.

    `chunked` says that the body follows in chunks; `keep_alive` that the connection stays open after it.
    """
    out = [b"HTTP/1.1 %d %b\r\n" % (response.status, response.reason)]
    named = response.connection_options
    not_sent = rules.not_sent
    for lower, name, value in response.fields:
        if lower not in not_sent and lower not in named:
            out += (name, b": ", value, b"\r\n")
    if response.status >= 200:
        out.append(rules.appended)
    elif response.upgrade:
        out.append(b"Connection: Upgrade\r\nUpgrade: %b\r\n" % response.upgrade)
    if chunked:
        out.append(b"Transfer-Encoding: chunked\r\n")
    elif response.content_length is not None and response.status != 204 and response.status >= 200:
        out.append(b"Content-Length: %d\r\n" % response.content_length)
    if response.status >= 200:
        if not keep_alive:
            out.append(b"Connection: close\r\n")
        elif http_1_0:
            out.append(b"Connection: keep-alive\r\n")
    out.append(b"\r\n")
    return b"".join(out)
