"""A worker that does as a test says: answers late, wrongly, with garbage, or dies with a request in hand.

Signatures are real, by the keys it is given. `async with FakeWorker(path, {"www": key}) as worker:` serves them;
`worker.behaviour = delayed(0.02)` changes what happens to the requests that come from then on.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path

from hsm.keys import PrivateKey, generate_private_key, key_type_of, public_key_der, scheme_arguments
from hsm.messages import (
    DEFAULT_WINDOW,
    MAX_TBS_BYTES,
    REQUEST_HEADER,
    Hello,
    KeyInfo,
    SignatureScheme,
    SignReply,
    SignRequest,
    Status,
    decode_requests,
    encode_hello,
    encode_reply,
)


class FakeConnection:
    """One client's connection, as a behaviour sees it."""

    def __init__(self, worker: FakeWorker, writer: asyncio.StreamWriter) -> None:
        self._worker = worker
        self._writer = writer

    def signature(self, request: SignRequest) -> bytes:
        """Return the right signature."""
        key = list(self._worker.private_keys.values())[request.key]
        return key.sign(request.tbs, *scheme_arguments(SignatureScheme(request.scheme)))

    def reply(self, request: SignRequest, status: Status, payload: bytes) -> None:
        """Send a reply."""
        self.write(encode_reply(SignReply(request.id, status, payload, queue_us=10, sign_us=20)))

    def write(self, data: bytes) -> None:
        """Send any bytes."""
        if not self._writer.is_closing():
            self._writer.write(data)

    def close(self) -> None:
        """Close the connection."""
        self._writer.close()


Behaviour = Callable[[FakeConnection, SignRequest], Awaitable[None]]


async def signs(connection: FakeConnection, request: SignRequest) -> None:
    """Answer at once with the right signature."""
    connection.reply(request, Status.OK, connection.signature(request))


def delayed(delay_s: float) -> Behaviour:
    """Answer with the right signature after `delay_s`, any number of requests at a time."""

    async def behave(connection: FakeConnection, request: SignRequest) -> None:
        await asyncio.sleep(delay_s)
        await signs(connection, request)

    return behave


def held_until(event: asyncio.Event) -> Behaviour:
    """Answer with the right signature once `event` is set."""

    async def behave(connection: FakeConnection, request: SignRequest) -> None:
        await event.wait()
        await signs(connection, request)

    return behave


def refuses(status: Status, reason: str = "") -> Behaviour:
    """Answer with a status other than OK."""

    async def behave(connection: FakeConnection, request: SignRequest) -> None:
        connection.reply(request, status, reason.encode())

    return behave


async def never_answers(connection: FakeConnection, request: SignRequest) -> None:
    """Keep the request."""


async def signs_with_another_key(connection: FakeConnection, request: SignRequest) -> None:
    """Answer with a sound signature by a key of the same type that nobody knows."""
    scheme = SignatureScheme(request.scheme)
    key_type = next(key.key_type for key in connection._worker.hello.keys if key.number == request.key)
    connection.reply(request, Status.OK, generate_private_key(key_type).sign(request.tbs, *scheme_arguments(scheme)))


def answers_bytes(data: bytes) -> Behaviour:
    """Answer with any bytes, such as no frame at all."""

    async def behave(connection: FakeConnection, request: SignRequest) -> None:
        connection.write(data)

    return behave


async def dies(connection: FakeConnection, request: SignRequest) -> None:
    """Close the connection with the request unanswered, as a killed process does."""
    connection.close()


def in_turn(*behaviours: Behaviour) -> Behaviour:
    """Give each request the next behaviour; the last one is for all that follow."""
    rest: Iterator[Behaviour] = iter(behaviours[:-1])

    async def behave(connection: FakeConnection, request: SignRequest) -> None:
        await next(rest, behaviours[-1])(connection, request)

    return behave


class FakeWorker:
    """An asyncio server that speaks the worker's protocol on the Unix socket `path`."""

    def __init__(
        self,
        path: Path,
        private_keys: Mapping[str, PrivateKey],
        *,
        token: str = "fake",
        window: int = DEFAULT_WINDOW,
        behaviour: Behaviour = signs,
    ) -> None:
        self.path = path
        self.private_keys = private_keys
        self.behaviour = behaviour
        self.hello = Hello(
            token,
            os.getpid(),
            window,
            tuple(
                KeyInfo(number, label, key_type_of(key), public_key_der(key.public_key()))
                for number, (label, key) in enumerate(private_keys.items())
            ),
        )
        self.hello_bytes = encode_hello(self.hello)
        """What a client gets first: b"" is a worker that is not up."""
        self.requests: list[SignRequest] = []
        """All that ever came, in order."""
        self._request_came = asyncio.Condition()
        self.connections: set[FakeConnection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> FakeWorker:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen on the socket, again after a `stop`."""
        self._server = await asyncio.start_unix_server(self._serve, self.path)

    async def stop(self) -> None:
        """Close the socket and all connections, whatever they wait for."""
        if self._server is None:
            return
        self._server.close()
        self._server = None
        for connection in self.connections:
            connection.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def received(self, count: int) -> None:
        """Wait until `count` requests have come in all."""
        async with self._request_came:
            await self._request_came.wait_for(lambda: len(self.requests) >= count)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = FakeConnection(self, writer)
        self.connections.add(connection)
        connection.write(self.hello_bytes)
        buffer = b""
        try:
            while data := await reader.read(REQUEST_HEADER.size + MAX_TBS_BYTES):
                requests, used = decode_requests(buffer + data)
                buffer = (buffer + data)[used:]
                for request in requests:
                    self.requests.append(request)
                    task = asyncio.ensure_future(self.behaviour(connection, request))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
                async with self._request_came:
                    self._request_came.notify_all()
        except ConnectionError:
            pass
        finally:
            self.connections.discard(connection)
            connection.close()
