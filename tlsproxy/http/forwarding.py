"""What changes in a message on its way through: heads are written anew, from what was understood of them.

Hop-by-hop fields end here, also those that Connection names (RFC 9110 section 7.6.1). What a client says about itself
in X-Forwarded-* and the like is deleted and said by the proxy instead. Message framing is written by the proxy alone.
"""

from __future__ import annotations

from typing import NamedTuple

from tlsproxy.http.codec import RequestHead, ResponseHead

_HOP_BY_HOP = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-connection",
        b"proxy-authorization",
        b"proxy-authenticate",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"content-length",
    )
)
_SAID_BY_PROXY = frozenset(
    (
        b"host",
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
_NOT_SENT_UP = _HOP_BY_HOP | _SAID_BY_PROXY
LAST_CHUNK = b"0\r\n\r\n"


class Hop(NamedTuple):
    """What the proxy knows of a request besides its head."""

    client_ip: bytes
    proto: bytes
    """`https` or `http`: how the client came."""
    request_id: bytes
    upstream_authority: bytes
    """`host:port` of the upstream server, sent as Host when the client sent none."""


def request_head(request: RequestHead, hop: Hop) -> bytes:
    """Return the head to send to the upstream server."""
    host = request.host or hop.upstream_authority
    out = [request.method, b" ", request.target, b" HTTP/1.1\r\nHost: ", host, b"\r\n"]
    named = request.connection_options
    vias = []
    for lower, name, value in request.fields:
        if lower in _NOT_SENT_UP or lower in named:
            if lower == b"via":
                vias.append(value)
            continue
        if b"_" in lower and lower.replace(b"_", b"-") in _NOT_SENT_UP:
            # CGI and WSGI servers read X_Forwarded_For as X-Forwarded-For.
            continue
        if lower == b"expect" and request.http_1_0:
            continue
        out += (name, b": ", value, b"\r\n")
    if request.chunked:
        out.append(b"Transfer-Encoding: chunked\r\n")
    elif request.content_length is not None:
        out.append(b"Content-Length: %d\r\n" % request.content_length)
    vias.append(b"1.0 tlsproxy" if request.http_1_0 else b"1.1 tlsproxy")
    out.append(
        b"X-Forwarded-For: %b\r\nX-Forwarded-Proto: %b\r\nX-Forwarded-Host: %b\r\nX-Request-ID: %b\r\nVia: %b\r\n\r\n"
        % (hop.client_ip, hop.proto, host, hop.request_id, b", ".join(vias))
    )
    return b"".join(out)


def response_head(response: ResponseHead, *, chunked: bool, http_1_0: bool, keep_alive: bool) -> bytes:
    """Return the head to send to the client.

    `chunked` says that the body follows in chunks; `keep_alive` that the connection stays open after it.
    """
    out = [b"HTTP/1.1 %d %b\r\n" % (response.status, response.reason)]
    named = response.connection_options
    for lower, name, value in response.fields:
        if lower not in _HOP_BY_HOP and lower not in named:
            out += (name, b": ", value, b"\r\n")
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


def chunk(data: bytes) -> tuple[bytes, bytes, bytes]:
    """Return the pieces that carry `data`, which is not empty, in a chunked body."""
    return b"%x\r\n" % len(data), data, b"\r\n"
