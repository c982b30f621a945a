"""What both kinds of serving, one signer in line and many in threads, do alike with a client's socket."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
from dataclasses import dataclass

from hsm.messages import ProtocolError, SignRequest, decode_requests

MAX_CLIENTS = 256
"""Connections a worker keeps: far above the proxy processes of one machine, below the usual descriptor limit."""
RECEIVE_BYTES = 32 << 10
"""A larger buffer is allocated and shrunk each time: 256 KB doubles the cost of small reads."""
_PEER_CREDENTIALS = struct.Struct("3i")

_log = logging.getLogger(__name__)


HEARTBEAT_S = 1.0


class Heartbeat:
    """Tells the parent, on the status descriptor, that the serving loop goes round."""

    def __init__(self, status_fd: int) -> None:
        self._status_fd = status_fd
        self._due_ns = 0
        # A parent that does not read must not stop the worker.
        os.set_blocking(status_fd, False)

    def beat(self, now_ns: int) -> None:
        """Give a sign of life if HEARTBEAT_S have passed since the last; `now_ns` is on CLOCK_MONOTONIC."""
        if now_ns >= self._due_ns:
            self._due_ns = now_ns + round(HEARTBEAT_S * 1e9)
            with contextlib.suppress(OSError):
                os.write(self._status_fd, b'{"state": "alive"}\n')


class ClientGoneError(Exception):
    """The client closed its connection, or the kernel did. Nobody is left to answer."""


@dataclass(frozen=True, slots=True)
class Peer:
    """The process at the other end, as the kernel knows it."""

    pid: int
    uid: int


def accept_client(listener: socket.socket, allowed_uids: frozenset[int]) -> tuple[socket.socket, Peer] | None:
    """Return the next client that may connect, or None while nobody waits. The socket does not block."""
    while True:
        try:
            connection, _ = listener.accept()
        except BlockingIOError:
            return None
        except ConnectionError:
            continue
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
        pid, uid, _ = _PEER_CREDENTIALS.unpack(credentials)
        if uid in allowed_uids:
            connection.setblocking(False)
            return connection, Peer(pid, uid)
        connection.close()
        _log.warning("refused a client: expected uid %s; got uid %d, pid %d", sorted(allowed_uids), uid, pid)


def receive_requests(connection: socket.socket, buffer: bytearray) -> list[SignRequest]:
    """Read once; return the whole requests there are. An incomplete one stays in `buffer`.

    Raises ClientGoneError and ProtocolError.
    """
    try:
        data = connection.recv(RECEIVE_BYTES)
    except (BlockingIOError, InterruptedError):
        return []
    except OSError as error:
        raise ClientGoneError from error
    if not data:
        raise ClientGoneError
    if buffer:
        buffer += data
        requests, used = decode_requests(buffer)
        del buffer[:used]
        return requests
    requests, used = decode_requests(data)
    buffer += data[used:]
    return requests


def send_whole(connection: socket.socket, replies: bytes) -> None:
    """Send replies that fit the socket's buffer as long as the client keeps its window. Never blocks.

    Raises ClientGoneError, or ProtocolError when they do not fit.
    """
    try:
        sent = connection.send(replies)
    except BlockingIOError:
        sent = 0
    except OSError as error:
        raise ClientGoneError from error
    if sent < len(replies):
        raise ProtocolError("does not read its replies")
