"""A new instance takes over from the one that runs: its listening sockets first, its place when the new one serves.

So a new version of the program replaces the old with no connection refused. They speak over the command socket.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from pathlib import Path

from tlsproxy.errors import StartupError
from tlsproxy.serve.sockets import ListeningSockets, adopt

MAX_DESCRIPTORS = 250
"""The kernel passes at most 253 at a time."""
_TIMEOUT_S = 10.0
_MAX_ANSWER_BYTES = 1 << 16


class Predecessor:
    """The instance that runs, and what it has handed over."""

    def __init__(self, command_socket: Path) -> None:
        """Ask for its sockets; it serves on. Raises StartupError."""
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._connection.settimeout(_TIMEOUT_S)
            self._connection.connect(str(command_socket))
            self._connection.sendall(b'{"command": "hand_over"}\n')
            answer, descriptors, _, _ = socket.recv_fds(self._connection, _MAX_ANSWER_BYTES, MAX_DESCRIPTORS)
        except OSError as error:
            raise StartupError(f"{command_socket}: expected a running tlsproxy; {error.strerror or error}") from None
        if not descriptors:
            raise StartupError(f"{command_socket}: expected the sockets of a running tlsproxy; got {_reason(answer)}")
        for fd in descriptors:
            os.set_inheritable(fd, False)
        self.lock_fd, *listening = descriptors
        """The lock of the runtime directory, which both hold from now on."""
        self.sockets: ListeningSockets = adopt(socket.socket(fileno=fd) for fd in listening)

    def retire(self) -> None:
        """Have it let its connections finish and end."""
        with self._connection, contextlib.suppress(OSError):
            self._connection.sendall(b'{"command": "drain"}\n')


def hand_over(connection: socket.socket, lock_fd: int, sockets: ListeningSockets) -> None:
    """Send the sockets to a successor. Raises StartupError."""
    descriptors = [lock_fd, *(sock.fileno() for sock in sockets.all())]
    if len(descriptors) > MAX_DESCRIPTORS:
        raise StartupError(f"hand over: expected at most {MAX_DESCRIPTORS} sockets; got {len(descriptors)}")
    socket.send_fds(connection, [b'{"ok": true}\n'], descriptors)


def _reason(answer: bytes) -> str:
    try:
        return "; ".join(json.loads(answer)["errors"])
    except (ValueError, KeyError, TypeError):
        return "none"
