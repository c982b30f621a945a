"""A new instance takes over from the one that runs: its listening sockets first, its place when the new one serves.

So a new version of the program replaces the old with no connection refused, and no client's session ticket in vain.
They speak over the command socket, where only root and the user the supervisor runs as are listened to.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path

from tlsproxy.errors import StartupError
from tlsproxy.serve.command_socket import command_line
from tlsproxy.serve.sockets import ListeningSockets, adopt
from tlsproxy.tls.context import TicketKey

MAX_DESCRIPTORS = 250
"""The kernel passes at most 253 at a time."""
_TIMEOUT_S = 10.0
_MAX_ANSWER_BYTES = 1 << 16
_TICKET_KEY_BYTES = 80
"""Name, AES key and HMAC key of a TicketKey."""


class Predecessor:
    """The instance that runs, and what it has handed over."""

    def __init__(self, command_socket: Path) -> None:
        """Ask for its sockets and ticket keys; it serves on. Raises StartupError."""
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with contextlib.ExitStack() as undo:
            undo.callback(self._connection.close)
            answer, descriptors = self._ask(command_socket)
            self.ticket_keys = _read_ticket_keys(answer)
            """Those its session tickets can be decrypted with, the newest first."""
            self.lock_fd, *listening = descriptors
            """The lock of the runtime directory, which both hold from now on."""
            self.sockets: ListeningSockets = adopt(socket.socket(fileno=fd) for fd in listening)
            undo.pop_all()

    def _ask(self, command_socket: Path) -> tuple[bytes, list[int]]:
        """Return the answer and the descriptors that came with it, one at least."""
        try:
            self._drain = command_line(command_socket, "drain")
            self._connection.settimeout(_TIMEOUT_S)
            self._connection.connect(str(command_socket))
            self._connection.sendall(command_line(command_socket, "hand_over"))
            answer, descriptors, _, _ = socket.recv_fds(self._connection, _MAX_ANSWER_BYTES, MAX_DESCRIPTORS)
        except OSError as error:
            raise StartupError(f"{command_socket}: expected a running tlsproxy; {error.strerror or error}") from None
        if not descriptors:
            raise StartupError(f"{command_socket}: expected the sockets of a running tlsproxy; got {_reason(answer)}")
        for fd in descriptors:
            os.set_inheritable(fd, False)
        return answer, descriptors

    def retire(self) -> None:
        """Have it let its connections finish and end."""
        with self._connection, contextlib.suppress(OSError):
            self._connection.sendall(self._drain)


def hand_over(
    connection: socket.socket, lock_fd: int, sockets: ListeningSockets, ticket_keys: Sequence[TicketKey]
) -> None:
    """Send the sockets and the ticket keys to a successor. Raises StartupError."""
    descriptors = [lock_fd, *(sock.fileno() for sock in sockets.all())]
    if len(descriptors) > MAX_DESCRIPTORS:
        raise StartupError(f"hand over: expected at most {MAX_DESCRIPTORS} sockets; got {len(descriptors)}")
    answer = {"ok": True, "ticket_keys": [(key.name + key.aes + key.hmac).hex() for key in ticket_keys]}
    socket.send_fds(connection, [json.dumps(answer).encode() + b"\n"], descriptors)


def _read_ticket_keys(answer: bytes) -> tuple[TicketKey, ...]:
    """Return the keys in an answer: none, if it is of a version that hands none over. Raises StartupError."""
    try:
        blocks = [bytes.fromhex(text) for text in json.loads(answer).get("ticket_keys", [])]
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise StartupError("take over: expected ticket keys in hexadecimal; got something else") from None
    if any(len(block) != _TICKET_KEY_BYTES for block in blocks):
        raise StartupError(f"take over: expected ticket keys of {_TICKET_KEY_BYTES} bytes; got others")
    return tuple(TicketKey(block[:16], block[16:48], block[48:]) for block in blocks)


def _reason(answer: bytes) -> str:
    try:
        return "; ".join(json.loads(answer)["errors"])
    except (ValueError, KeyError, TypeError):
        return "none"
