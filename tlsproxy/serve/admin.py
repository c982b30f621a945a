"""The admin port: /metrics for Prometheus, /healthz and /readyz for orchestrators, / for people, /live for their pages.

Plain HTTP/1.1, GET and HEAD, read only. It runs in the supervisor, which must outlive anything a client does here: all
sizes, times and connections are limited. On loopback it answers to no name but localhost: a web page could have its own
name point there (DNS rebinding), and read everything with the browser of somebody who works on this machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import re
import socket
from collections.abc import Sequence
from http import HTTPStatus

import h11

from tlsproxy.serve.admin_pages import Response, Source, respond, text
from tlsproxy.serve.live_feed import LiveFeed, TooManyWatchersError

MAX_CONNECTIONS = 64
MAX_REQUEST_BYTES = 16 << 10
_READ_BYTES = 4096
REQUEST_TIMEOUT_S = 10.0
"""For a request to arrive, from the connection's start or the response before; and for a response to be taken."""

_LIVE = b"/live"
_LOCAL_HOST = re.compile(rb"(?:localhost|[0-9.]+|\[[0-9a-f:.]+\])(?::[0-9]+)?", re.IGNORECASE)
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

_logger = logging.getLogger("tlsproxy.admin")


class AdminServer:
    """Answers on the listening socket `listening`; asks `source` for the state of the whole at each request."""

    def __init__(self, listening: socket.socket, source: Source) -> None:
        self._listening = listening
        self._is_local = ipaddress.ip_address(listening.getsockname()[0]).is_loopback
        self._source = source
        self._feed = LiveFeed(source)
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Start to answer."""
        self._server = await asyncio.start_server(self._accept, sock=self._listening, limit=MAX_REQUEST_BYTES)

    async def close(self) -> None:
        """Stop listening and close all connections."""
        if self._server is not None:
            self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._connections) >= MAX_CONNECTIONS:
            writer.transport.abort()
            return
        self._connections.add(task)
        try:
            await self._converse(reader, writer)
        except asyncio.CancelledError:
            writer.transport.abort()
        except (OSError, TimeoutError, asyncio.TimeoutError):
            writer.transport.abort()
        except Exception:
            _logger.exception("admin request failed")
            writer.transport.abort()
        finally:
            self._connections.discard(task)
            writer.close()
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await writer.wait_closed()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_REQUEST_BYTES)
        while True:
            try:
                request = await asyncio.wait_for(_next_request(connection, reader), REQUEST_TIMEOUT_S)
            except h11.RemoteProtocolError as error:
                if connection.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                    response = text(HTTPStatus(error.error_status_hint))
                    await _send(connection, writer, response, with_body=True, close=True)
                return
            if request is None:
                return
            if not self._is_asked(request):
                await _send(connection, writer, text(HTTPStatus.MISDIRECTED_REQUEST), with_body=True, close=True)
                return
            if request.method == b"GET" and request.target == _LIVE:
                await self._stream(connection, writer)
                return
            with_body = request.method != b"HEAD"
            await _send(connection, writer, self._answer(request), with_body=with_body, close=False)
            if connection.our_state is not h11.DONE or connection.their_state is not h11.DONE:
                return
            connection.start_next_cycle()

    async def _stream(self, connection: h11.Connection, writer: asyncio.StreamWriter) -> None:
        """Send events until the client is gone or takes none."""
        try:
            async with self._feed.watch() as events:
                head = _head(HTTPStatus.OK, "text/event-stream", [("Connection", "close")])
                writer.write(connection.send(head) or b"")
                async for event in events:
                    writer.write(connection.send(h11.Data(data=event)) or b"")
                    await asyncio.wait_for(writer.drain(), REQUEST_TIMEOUT_S)
        except TooManyWatchersError:
            await _send(connection, writer, text(HTTPStatus.SERVICE_UNAVAILABLE), with_body=True, close=True)

    def _is_asked(self, request: h11.Request) -> bool:
        """Tell whether it is this server that a request is for. Browsers always say which."""
        hosts = [value for name, value in request.headers if name == b"host"]
        return not self._is_local or all(_LOCAL_HOST.fullmatch(host) for host in hosts)

    def _answer(self, request: h11.Request) -> Response:
        if request.method not in (b"GET", b"HEAD"):
            return text(HTTPStatus.METHOD_NOT_ALLOWED)
        accept = b",".join(value for name, value in request.headers if name == b"accept")
        return respond(request.target, accept.decode("ascii", "replace"), self._source)


async def _next_request(connection: h11.Connection, reader: asyncio.StreamReader) -> h11.Request | None:
    """Return the next request's head once all of the request is here; None at the end of the connection.

    Bodies are of no use here: what there is of one is read and dropped, as far as MAX_REQUEST_BYTES.
    """
    request: h11.Request | None = None
    body_bytes = 0
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(_READ_BYTES))
        elif isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.Data):
            body_bytes += len(event.data)
            if body_bytes > MAX_REQUEST_BYTES:
                raise h11.RemoteProtocolError("body too long", error_status_hint=413)
        elif isinstance(event, h11.EndOfMessage):
            return request
        else:
            return None


async def _send(
    connection: h11.Connection, writer: asyncio.StreamWriter, response: Response, *, with_body: bool, close: bool
) -> None:
    headers = [("Content-Length", str(len(response.body)))]
    if close:
        headers.append(("Connection", "close"))
    head = _head(response.status, response.content_type, headers)
    pieces = [connection.send(head)]
    if with_body:
        pieces.append(connection.send(h11.Data(data=response.body)))
    pieces.append(connection.send(h11.EndOfMessage()))
    writer.write(b"".join(piece for piece in pieces if piece))
    await asyncio.wait_for(writer.drain(), REQUEST_TIMEOUT_S)


def _head(status: HTTPStatus, content_type: str, headers: Sequence[tuple[str, str]]) -> h11.Response:
    always = [
        ("Content-Type", content_type),
        ("Cache-Control", "no-store"),
        ("X-Content-Type-Options", "nosniff"),
        ("Content-Security-Policy", _POLICY),
        ("Referrer-Policy", "no-referrer"),
    ]
    return h11.Response(status_code=status.value, reason=status.phrase, headers=[*always, *headers])
