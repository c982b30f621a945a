"""Requests on TLS connections that live on: GET of a small or large resource, or POST of a body."""

from __future__ import annotations

import re
import selectors
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass

from perf.clients import client_context, connect
from perf.load import Load, LoadResult, drive

_HEAD_LIMIT = 65536
_PIECE = 1 << 18
"""What is encrypted at a time."""
_CONTENT_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)[ \t]*\r\n", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class RequestLoad(Load):
    """Requests for one path; each connection has one request under way at most."""

    path: str = "/"
    upload_bytes: int = 0
    """Length of each request's body; 0 for a GET without one."""

    def request(self) -> bytes:
        """Head and body."""
        method = "POST" if self.upload_bytes else "GET"
        length = f"Content-Length: {self.upload_bytes}\r\n" if self.upload_bytes else ""
        head = f"{method} {self.path} HTTP/1.1\r\nHost: {self.server_name}\r\n{length}\r\n"
        return head.encode() + bytes(self.upload_bytes)


class ResponseReader:
    """Tells when a response is complete: 200, framed by Content-Length."""

    __slots__ = ("_head", "_remaining", "body_bytes")

    def __init__(self) -> None:
        self._head = b""
        self._remaining: int | None = None
        self.body_bytes = 0
        """Of the response under way, or just completed."""

    def feed(self, data: memoryview) -> bool:
        """Take in what was received; return True at the response's end. Raises ConnectionError."""
        size = len(data)
        if self._remaining is None:
            self._head += bytes(data)
            end = self._head.find(b"\r\n\r\n")
            if end < 0:
                if len(self._head) > _HEAD_LIMIT:
                    raise ConnectionError("the response's head has no end")
                return False
            size = len(self._head) - end - 4
            self._begin_body(self._head[: end + 2])
        assert self._remaining is not None
        self._remaining -= size
        if self._remaining > 0:
            return False
        if self._remaining < 0:
            raise ConnectionError("more than one response to one request")
        self._remaining, self._head = None, b""
        return True

    def _begin_body(self, head: bytes) -> None:
        if not head.startswith(b"HTTP/1.1 200 "):
            status_line = head.partition(b"\r\n")[0]
            raise ConnectionError(f"answered {status_line[:40]!r}")
        length = _CONTENT_LENGTH.search(head)
        if length is None:
            raise ConnectionError("a response without Content-Length")
        self.body_bytes = self._remaining = int(length[1])


class _Connection:
    """One keep-alive connection."""

    __slots__ = ("_buffer", "_reader", "_request", "_sent", "done_s", "tls")

    def __init__(self, load: RequestLoad, context: ssl.SSLContext, request: memoryview, buffer: memoryview) -> None:
        self._request = request
        self._sent = 0
        self._reader = ResponseReader()
        self._buffer = buffer
        self.done_s = 0.0
        self.tls = connect(load.host, load.port, load.server_name, context)
        self.tls.setblocking(False)

    def begin(self) -> int:
        """See Exchange."""
        self._sent = 0
        return self._send()

    def advance(self) -> int:
        """See Exchange."""
        if self._sent < len(self._request):
            return self._send()
        while True:
            try:
                received = self.tls.recv_into(self._buffer)
            except ssl.SSLWantReadError:
                return selectors.EVENT_READ
            if not received:
                raise ConnectionError("the server closed the connection")
            if self._reader.feed(self._buffer[:received]):
                self.done_s = time.perf_counter()
                return 0

    def _send(self) -> int:
        """Send what there is room for."""
        try:
            while self._sent < len(self._request):
                # After SSLWantWriteError it has to be the same piece again.
                self._sent += self.tls.send(self._request[self._sent : self._sent + _PIECE])
        except ssl.SSLWantWriteError:
            return selectors.EVENT_WRITE
        return selectors.EVENT_READ

    def add_to(self, result: LoadResult) -> None:
        """See Exchange."""
        result.received_bytes += self._reader.body_bytes


def run_requests(load: RequestLoad, ready: Callable[[], None]) -> LoadResult:
    """Carry out the load in this process (see perf.clients)."""
    context = client_context(load.ca_file)
    buffer = memoryview(bytearray(65536))
    request = memoryview(load.request())
    return drive(load, lambda: _Connection(load, context, request, buffer), ready, reusable=True)
