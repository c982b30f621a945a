"""The admin port: /metrics for Prometheus, /healthz and /readyz for orchestrators, / for people.

Plain HTTP/1.1, GET and HEAD, read only. It runs in the supervisor, which must outlive anything a client does here: all
sizes, times and connections are limited.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus

import h11
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from tlsproxy.serve.snapshot import Snapshot
from tlsproxy.serve.status_page import render

MAX_CONNECTIONS = 64
MAX_REQUEST_BYTES = 16 << 10
_READ_BYTES = 4096
REQUEST_TIMEOUT_S = 10.0
"""For a request to arrive, from the connection's start or the response before; and for a response to be taken."""

_logger = logging.getLogger("tlsproxy.admin")


@dataclass(frozen=True, slots=True)
class Response:
    """An answer with all of its body."""

    status: HTTPStatus
    content_type: str
    body: bytes


def respond(target: bytes, accept: str, snapshot: Snapshot, registry: CollectorRegistry) -> Response:
    """Return the answer to GET `target`."""
    path = target.partition(b"?")[0]
    if path == b"/metrics":
        encode, content_type = choose_encoder(accept)
        return Response(HTTPStatus.OK, content_type, encode(registry))
    if path == b"/healthz":
        return _verdict(snapshot.healthy, {"workers_ready": snapshot.workers_ready, "workers": len(snapshot.workers)})
    if path == b"/readyz":
        return _verdict(snapshot.ready, {"workers_ready": snapshot.workers_ready, "tokens": snapshot.tokens})
    if path == b"/":
        return Response(HTTPStatus.OK, "text/html; charset=utf-8", render(snapshot).encode())
    return _text(HTTPStatus.NOT_FOUND)


def _verdict(good: bool, details: dict[str, object]) -> Response:
    status = HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE
    body = {"status": "ok" if good else "unavailable"} | details
    return Response(status, "application/json", json.dumps(body).encode() + b"\n")


def _text(status: HTTPStatus) -> Response:
    return Response(status, "text/plain; charset=utf-8", f"{status.value} {status.phrase}\n".encode())


class AdminServer:
    """Answers on the listening socket `listening`; asks `snapshot` for the state of the whole at each request."""

    def __init__(self, listening: socket.socket, registry: CollectorRegistry, snapshot: Callable[[], Snapshot]) -> None:
        self._listening = listening
        self._registry = registry
        self._snapshot = snapshot
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
                    response = _text(HTTPStatus(error.error_status_hint))
                    await _send(connection, writer, response, with_body=True, close=True)
                return
            if request is None:
                return
            with_body = request.method != b"HEAD"
            await _send(connection, writer, self._answer(request), with_body=with_body, close=False)
            if connection.our_state is not h11.DONE or connection.their_state is not h11.DONE:
                return
            connection.start_next_cycle()

    def _answer(self, request: h11.Request) -> Response:
        if request.method not in (b"GET", b"HEAD"):
            return _text(HTTPStatus.METHOD_NOT_ALLOWED)
        accept = b",".join(value for name, value in request.headers if name == b"accept")
        return respond(request.target, accept.decode("ascii", "replace"), self._snapshot(), self._registry)


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
    headers = [
        ("Content-Type", response.content_type),
        ("Content-Length", str(len(response.body))),
        ("Cache-Control", "no-store"),
        ("X-Content-Type-Options", "nosniff"),
        ("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'"),
    ]
    if close:
        headers.append(("Connection", "close"))
    head = h11.Response(status_code=response.status.value, reason=response.status.phrase, headers=headers)
    pieces = [connection.send(head)]
    if with_body:
        pieces.append(connection.send(h11.Data(data=response.body)))
    pieces.append(connection.send(h11.EndOfMessage()))
    writer.write(b"".join(piece for piece in pieces if piece))
    await asyncio.wait_for(writer.drain(), REQUEST_TIMEOUT_S)
