"""Responses the proxy makes itself: a status, a line of text, and never a byte of the peers'."""

from __future__ import annotations

from http import HTTPStatus

from tlsproxy.http.heads import ResponseHead
from tlsproxy.http.syntax import Field


def own_reply(status: int) -> tuple[ResponseHead, bytes]:
    """Return head and body of a response that says no more than its status."""
    body = f"{status} {HTTPStatus(status).phrase}\n".encode("ascii")
    fields = [(b"content-type", b"Content-Type", b"text/plain"), (b"cache-control", b"Cache-Control", b"no-store")]
    return _head(status, fields, len(body)), body


def redirect_reply(status: int, location: str) -> ResponseHead:
    """Return the head of a response without a body that sends the client to `location`."""
    return _head(status, [(b"location", b"Location", location.encode("ascii"))], 0)


def _head(status: int, fields: list[Field], length: int) -> ResponseHead:
    return ResponseHead(
        status=status,
        reason=HTTPStatus(status).phrase.encode("ascii"),
        fields=fields,
        connection_options=frozenset(),
        content_length=length,
        chunked=False,
        has_body=length > 0,
        keep_alive=True,
        upgrade=b"",
    )
