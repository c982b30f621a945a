"""Chunked bodies as the proxy writes them (RFC 9112 section 7.1), with the trailer fields that may follow.

Trailers go on in both directions, for any HTTP/1.1 recipient has to read past them. Servers are known to merge them
into the header, so no field passes here that would not have passed there, nor any that means something to framing,
routing, authentication or the body's format (RFC 9110 section 6.5.1).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from tlsproxy.http.syntax import PLAIN_NAME, Field

_LAST_CHUNK = b"0\r\n\r\n"
_NEVER_IN_TRAILERS = frozenset(
    (
        b"age",
        b"authorization",
        b"cache-control",
        b"content-encoding",
        b"content-language",
        b"content-location",
        b"content-range",
        b"content-type",
        b"cookie",
        b"date",
        b"expect",
        b"expires",
        b"if-match",
        b"if-modified-since",
        b"if-none-match",
        b"if-range",
        b"if-unmodified-since",
        b"location",
        b"max-forwards",
        b"pragma",
        b"range",
        b"retry-after",
        b"set-cookie",
        b"trailer",
        b"vary",
        b"warning",
        b"www-authenticate",
    )
)


def chunk(data: bytes) -> tuple[bytes, bytes, bytes]:
    """Return the pieces that carry `data`, which is not empty, in a chunked body."""
    return b"%x\r\n" % len(data), data, b"\r\n"


def last_chunk(trailers: Sequence[Field], not_sent: Collection[bytes]) -> bytes:
    """Return the end of a chunked body, with those `trailers` that may go on. `not_sent` as for the header."""
    if not trailers:
        return _LAST_CHUNK
    out = [b"0\r\n"]
    for _, name, value in passed_trailers(trailers, not_sent):
        out += (name, b": ", value, b"\r\n")
    out.append(b"\r\n")
    return b"".join(out)


def passed_trailers(trailers: Sequence[Field], not_sent: Collection[bytes]) -> list[Field]:
    """Return those `trailers` that may go on. `not_sent` as for the header."""
    passed = []
    for field in trailers:
        lower = field[0]
        if lower.translate(None, PLAIN_NAME) or lower.startswith(b"x-forwarded-"):
            continue
        if lower not in _NEVER_IN_TRAILERS and lower not in not_sent:
            passed.append(field)
    return passed
