"""What requests have in common that are to reach the same server."""

from __future__ import annotations

from tlsproxy.config import HashConfig, HashSource
from tlsproxy.http.heads import RequestHead


def hash_key(request: RequestHead, config: HashConfig, client_address: str) -> bytes:
    """Return what is hashed: the header field or cookie asked for or, where there is none, the client's address."""
    found = None
    if config.source is HashSource.HEADER:
        found = _field(request, config.name.lower().encode("ascii"))
    elif config.source is HashSource.COOKIE:
        found = _cookie(request, config.name.encode("ascii"))
    return found or client_address.encode("ascii")


def _field(request: RequestHead, lower_name: bytes) -> bytes | None:
    return next((value for lower, _, value in request.fields if lower == lower_name), None)


def _cookie(request: RequestHead, name: bytes) -> bytes | None:
    """Return a cookie's value (RFC 6265 section 5.4: pairs, separated by semicolons)."""
    for lower, _, value in request.fields:
        if lower == b"cookie":
            for pair in value.split(b";"):
                found, equals, cookie = pair.strip(b" \t").partition(b"=")
                if equals and found == name:
                    return cookie
    return None
