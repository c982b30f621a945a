"""Responses the proxy makes itself: a status, a line of text, and never a byte of the peers'."""

from __future__ import annotations

from http import HTTPStatus


def own_reply(status: int, *, keep_alive: bool, head_only: bool = False, fields: bytes = b"") -> bytes:
    """Return a whole response that says no more than its status; `head_only` for a HEAD request.

    `fields` are further header fields as whole lines.
    """
    phrase = HTTPStatus(status).phrase
    body = f"{status} {phrase}\n"
    head = (
        f"HTTP/1.1 {status} {phrase}\r\nContent-Type: text/plain\r\nContent-Length: {len(body)}\r\n"
        f"Cache-Control: no-store\r\nConnection: {'keep-alive' if keep_alive else 'close'}\r\n"
    )
    return b"%b%b\r\n%b" % (head.encode("ascii"), fields, b"" if head_only else body.encode("ascii"))


def redirect_reply(status: int, location: str, *, keep_alive: bool, fields: bytes) -> bytes:
    """Return a whole response that sends the client to `location`."""
    head = (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nLocation: {location}\r\nContent-Length: 0\r\n"
        f"Connection: {'keep-alive' if keep_alive else 'close'}\r\n"
    )
    return b"%b%b\r\n" % (head.encode("ascii"), fields)
