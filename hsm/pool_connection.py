"""One connection from the pool to one worker, and the link that keeps making it anew.

A worker is up when its Hello has come: before, the connection may merely wait in the backlog of a socket that outlives
its workers. Nothing a worker sends is trusted to be well-formed: what the protocol does not allow ends the connection.
"""

from __future__ import annotations

import asyncio
import logging
import random
from typing import TYPE_CHECKING, Protocol, cast

from hsm.messages import (
    DEFAULT_WINDOW,
    REQUEST_HEADER,
    Hello,
    KeyInfo,
    ProtocolError,
    SignReply,
    decode_hello,
    decode_replies,
)
from hsm.pool_request import Request, SigningKey

if TYPE_CHECKING:
    from hsm.pool_token import PoolToken

_MIN_DELAY_S = 0.05
_MAX_DELAY_S = 2.0
_ID_MASK = 0xFFFFFFFF

_log = logging.getLogger(__name__)

Answer = tuple[Request, int, SignReply]
"""A request, when it was sent (ns), and the reply."""


class WorkerEvents(Protocol):
    """What the owner of a WorkerConnection is told."""

    def worker_up(self, connection: WorkerConnection) -> None:
        """The Hello came."""

    def worker_down(self, connection: WorkerConnection) -> None:
        """A connection that was up is lost; `in_flight` is what it leaves unanswered."""

    def worker_replied(self, connection: WorkerConnection, answers: list[Answer]) -> None:
        """These are no longer in flight."""

    def key_mismatch(self, connection: WorkerConnection, key: SigningKey) -> None:
        """The worker's key of this name is another than the user expects; it will not be used."""


class WorkerConnection(asyncio.Protocol):
    """The client's end of the protocol in hsm.messages."""

    def __init__(self, token: PoolToken, owner: WorkerEvents) -> None:
        self.token = token
        self._owner = owner
        self._transport: asyncio.WriteTransport | None = None
        self._buffer = bytearray()
        self._last_id = 0
        self._keys: dict[SigningKey, KeyInfo | None] = {}
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the connection has ended."""
        self.hello: Hello | None = None
        self.up = False
        """The Hello came and the connection still stands."""
        self.window = 0
        """Requests that may be in flight."""
        self.in_flight: dict[int, tuple[Request, int]] = {}
        """Request and when it was sent (ns), by id, oldest first."""
        self.last_ok_ns = 0
        self.last_sent = 0
        """The owner's count at the last send: of equal connections the least recently used is taken."""
        self.overdue_since_ns = 0
        """When it was first found to owe an answer for too long, having signed nothing since; 0: it does not."""
        self.stalled = False
        """It has owed answers for too long: nothing more is sent until it signs again."""

    def key_info(self, key: SigningKey) -> KeyInfo | None:
        """Return what the worker said of `key`, or None if it does not have it."""
        try:
            return self._keys[key]
        except KeyError:
            info = self._keys[key] = self._find(key)
            return info

    def send(self, request: Request, key_number: int, now_ns: int) -> None:
        """Ask the worker for a signature. The caller keeps to the window."""
        self._last_id = id_ = (self._last_id + 1) & _ID_MASK
        self.in_flight[id_] = (request, now_ns)
        request.in_flight += 1
        request.sends += 1
        assert self._transport is not None
        tbs = request.tbs
        self._transport.write(REQUEST_HEADER.pack(id_, len(tbs), request.scheme, key_number, request.deadline_ns) + tbs)

    def abort(self) -> None:
        """End the connection at once."""
        if self._transport is not None:
            self._transport.abort()
        self._down()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        # uvloop's transports are of no class of asyncio's.
        self._transport = cast("asyncio.WriteTransport", transport)

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        try:
            if self.hello is None:
                self._take_hello(data)
            else:
                self._take_replies(data)
        except ProtocolError as error:
            _log.error("token %s: a worker broke the protocol: %s", self.token.name, error)
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """See asyncio.Protocol."""
        self._down()
        if not self.lost.done():
            self.lost.set_result(None)

    def _take_hello(self, data: bytes) -> None:
        self._buffer += data
        taken = decode_hello(self._buffer)
        if taken is None:
            return
        self.hello, used = taken
        if used < len(self._buffer):
            raise ProtocolError("data after the hello; none expected before the first request")
        self._buffer.clear()
        self.window = min(self.hello.window, DEFAULT_WINDOW)
        self.up = True
        self._owner.worker_up(self)

    def _take_replies(self, data: bytes) -> None:
        if self._buffer:
            self._buffer += data
            replies, used = decode_replies(self._buffer)
            del self._buffer[:used]
        else:
            replies, used = decode_replies(data)
            self._buffer += data[used:]
        take = self.in_flight.pop
        answers = [(*sent, reply) for reply in replies if (sent := take(reply.id, None)) is not None]
        if answers:
            self._owner.worker_replied(self, answers)
        if len(answers) < len(replies):
            raise ProtocolError("a reply to a request that is not in flight")

    def _down(self) -> None:
        if self.up:
            self.up = False
            self._owner.worker_down(self)

    def _find(self, key: SigningKey) -> KeyInfo | None:
        assert self.hello is not None
        found = [info for info in self.hello.keys if key.reference.matches(info)]
        for info in found:
            if key.public_key in (None, info.public_key):
                return info
        if found:
            self._owner.key_mismatch(self, key)
        return None


async def keep_connected(path: str, token: PoolToken, owner: WorkerEvents) -> None:
    """Keep one connection to the worker of `token` behind the Unix socket `path`, until cancelled."""
    loop = asyncio.get_running_loop()
    delay_s = _MIN_DELAY_S
    while True:
        connection = WorkerConnection(token, owner)
        try:
            await loop.create_unix_connection(lambda made=connection: made, path)  # type: ignore[misc]
        except OSError as error:
            _log.debug("%s: %s", path, error.strerror)
        else:
            try:
                await connection.lost
            finally:
                connection.abort()
            if connection.hello is not None:
                delay_s = _MIN_DELAY_S
        await asyncio.sleep(delay_s * random.uniform(0.5, 1))  # noqa: S311
        delay_s = min(2 * delay_s, _MAX_DELAY_S)
