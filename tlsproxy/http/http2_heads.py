"""Heads in HTTP/2 and what they are in HTTP/1.1, which servers behind are spoken to in (RFC 9113 section 8).

Nothing of what a client sends is taken for granted: a field that HTTP/2 has no use for may be one that HTTP/1.1 obeys.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from hpack.struct import NeverIndexedHeaderTuple

from tlsproxy.errors import HttpError
from tlsproxy.http.chunks import passed_trailers
from tlsproxy.http.forwarding import ResponseRules
from tlsproxy.http.heads import RequestHead, ResponseHead
from tlsproxy.http.syntax import MAX_FIELDS, TOKEN, Field, MessageError, content_length_of
from tlsproxy.http.target import host_name, origin_form, routing_path

_METHOD = re.compile(TOKEN)
_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+")
_VALUE = re.compile(rb"[\t -~\x80-\xff]*")
_TARGET = re.compile(rb"/[!-~]*|\*")
_SCHEMES = frozenset((b"http", b"https"))
_NEEDED = frozenset((b":method", b":scheme", b":path"))
_PSEUDO = _NEEDED | {b":authority", b":protocol"}
_OF_A_CONNECTION = frozenset((b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade"))
"""What HTTP/2 has frames for instead (RFC 9113 section 8.2.2)."""
_REFUSED_METHODS = frozenset((b"CONNECT", b"TRACE"))


def request_of(headers: Sequence[tuple[bytes, bytes]], *, ended: bool) -> RequestHead:
    """Return the request that a block of header fields makes; `ended`: it has no body.

    Raises HttpError: 400 for what can't be said in HTTP/1.1 in one way only, 431 for too many fields, 501 for CONNECT
    and TRACE.
    """
    if len(headers) > MAX_FIELDS + 4:
        raise HttpError(431, "too_many_fields")
    try:
        pseudo, plain = _apart(headers)
        if pseudo.get(b":method") in _REFUSED_METHODS:
            raise HttpError(501, "method_refused")
        return _understand(pseudo, _fields(plain), ended=ended)
    except MessageError as error:
        raise HttpError(400, error.rule) from None


def trailers_of(headers: Sequence[tuple[bytes, bytes]]) -> list[Field]:
    """Return trailer fields as HTTP/1.1 has them. Raises HttpError 400 or 431."""
    if len(headers) > MAX_FIELDS:
        raise HttpError(431, "too_many_fields")
    try:
        return _fields(headers)
    except MessageError as error:
        raise HttpError(400, error.rule) from None


def _apart(headers: Sequence[tuple[bytes, bytes]]) -> tuple[dict[bytes, bytes], list[tuple[bytes, bytes]]]:
    """Return the pseudo-header fields, which come first and once, and the others. Raises MessageError."""
    pseudo: dict[bytes, bytes] = {}
    for name, value in headers:
        if name[:1] != b":":
            break
        if name in pseudo or name not in _PSEUDO:
            raise MessageError("bad_request_line")
        pseudo[name] = value
    return pseudo, list(headers[len(pseudo) :])


def _fields(headers: Sequence[tuple[bytes, bytes]]) -> list[Field]:
    fields = []
    for name, value in headers:
        if _NAME.fullmatch(name) is None or name in _OF_A_CONNECTION:
            raise MessageError("bad_field")
        if _VALUE.fullmatch(value) is None:
            raise MessageError("control_character")
        if value != value.strip(b" \t"):
            raise MessageError("bad_field")
        fields.append((name, name, value))
    return fields


def _understand(pseudo: dict[bytes, bytes], fields: list[Field], *, ended: bool) -> RequestHead:
    if not pseudo.keys() >= _NEEDED or b":protocol" in pseudo:
        raise MessageError("bad_request_line")
    method, target = pseudo[b":method"], pseudo[b":path"]
    if _METHOD.fullmatch(method) is None or pseudo[b":scheme"] not in _SCHEMES:
        raise MessageError("bad_request_line")
    if _TARGET.fullmatch(target) is None:
        raise MessageError("bad_target")
    host = pseudo.get(b":authority")
    content_length: int | None = None
    takes_trailers = False
    host_fields = 0
    for name, _, value in fields:
        if name == b"host":
            host_fields += 1
            if host_fields > 1:
                raise MessageError("bad_host")
            if host is not None and value != host:
                raise MessageError("host_mismatch")
            host = value
        elif name == b"content-length":
            content_length = content_length_of(value, content_length)
        elif name == b"te":
            if value.lower() != b"trailers":
                raise MessageError("bad_field")
            takes_trailers = True
    if host is None:
        raise MessageError("bad_host")
    if ended and content_length:
        # In HTTP/1.1 the next request would be taken for the body.
        raise MessageError("wrong_length")
    target = origin_form(method, target, host)
    return RequestHead(
        method=method,
        target=target,
        path=routing_path(target),
        host=host,
        host_name=host_name(host),
        version=b"2.0",
        fields=fields,
        connection_options=frozenset(),
        content_length=content_length,
        chunked=content_length is None and not ended,
        keep_alive=True,
        upgrade=b"",
        takes_trailers=takes_trailers,
    )


def response_fields(response: ResponseHead, rules: ResponseRules) -> list[tuple[bytes, bytes]]:
    """Return the header fields that a response has in HTTP/2, the pseudo-header field first."""
    out = [(b":status", b"%d" % response.status)]
    named = response.connection_options
    not_sent = rules.not_sent
    for lower, _, value in response.fields:
        if lower not in not_sent and lower not in named:
            # A cookie that enters the compression's table could be guessed by its length (RFC 7541 section 7.1).
            out.append(NeverIndexedHeaderTuple(lower, value) if lower == b"set-cookie" else (lower, value))
    if response.status >= 200:
        out += rules.appended_fields
        if response.content_length is not None and response.status != 204:
            out.append((b"content-length", b"%d" % response.content_length))
    return out


def trailer_fields(trailers: Sequence[Field], rules: ResponseRules) -> list[tuple[bytes, bytes]]:
    """Return the trailer fields that a response has in HTTP/2."""
    return [(lower, value) for lower, _, value in passed_trailers(trailers, rules.not_sent)]
