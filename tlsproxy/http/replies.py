"""Responses the proxy makes itself: a status, a line of text, and never a byte of the peers'."""

from __future__ import annotations

from http import HTTPStatus


def error_reply(status: int, *, keep_alive: bool, head_only: bool = False) -> bytes:
    """Return a whole response that says no more than its status; `head_only` for a HEAD request."""
    phrase = HTTPStatus(status).phrase
    body = f"{status} {phrase}\n"
    head = (
        f"HTTP/1.1 {status} {phrase}\r\nContent-Type: text/plain\r\nContent-Length: {len(body)}\r\n"
        f"Cache-Control: no-store\r\nConnection: {'keep-alive' if keep_alive else 'close'}\r\n\r\n"
    )
    return (head if head_only else head + body).encode("ascii")
