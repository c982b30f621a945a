"""The Unix socket in the runtime directory by which operators reload, drain and ask for the status.

One JSON object each way, a line each: `{"command": "reload", "key": "..."}`, then `{"ok": true}` or `{"ok": false,
"errors": [...], "exit_code": 2}`. Only the user the supervisor runs as, and root, are listened to, and only if they can
read the key in the file beside the socket: a proxy worker that has been taken over may be of the same user, and
Landlock keeps it from files, but not from sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import os
import secrets
import socket
import struct
from pathlib import Path
from typing import Any, Final, Protocol

from hsm.errors import HsmError
from tlsproxy.errors import ConfigError, StartupError

COMMANDS: Final = ("status", "reload", "drain")
_MAX_REQUEST_BYTES = 4096
_MAX_REPLY_BYTES = 16 << 20
_REQUEST_TIMEOUT_S = 10.0
_MAX_CONNECTIONS = 16
_KEY_BYTES = 32
_PEER_CREDENTIALS = struct.Struct("3i")

_logger = logging.getLogger("tlsproxy.supervisor")


class Operable(Protocol):
    """What obeys the commands. A command that cannot be carried out raises ConfigError, StartupError or HsmError."""

    async def reload(self) -> None:
        """Load the configuration and all it names anew."""

    async def drain(self) -> None:
        """Let connections finish; return when all have ended."""

    def hand_over(self, connection: socket.socket) -> None:
        """Send the listening sockets and the ticket keys to a successor."""

    def status(self) -> dict[str, Any]:
        """Return the state of the whole, as JSON has it."""


class CommandServer:
    """Takes commands at `path`."""

    def __init__(self, path: Path, operated: Operable) -> None:
        self._path = path
        self._operated = operated
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._inode = 0
        self._key = ""
        self._successor: asyncio.StreamWriter | None = None
        """The connection of one that has been handed the sockets, while it lasts."""

    async def start(self) -> None:
        """Make the socket and its key, mode 0600, and begin. Raises StartupError."""
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._key = _make_key(key_file(self._path))
            self._path.unlink(missing_ok=True)
            listening.bind(str(self._path))
            self._path.chmod(0o600)
        except OSError as error:
            listening.close()
            raise StartupError(f"runtime_dir: cannot make {self._path}: {error.strerror or error}") from None
        self._inode = self._path.stat().st_ino
        self._server = await asyncio.start_unix_server(self._serve, sock=listening, limit=_MAX_REQUEST_BYTES)

    async def close(self) -> None:
        """Take no more commands; answers under way are given their end."""
        if self._server is not None:
            self._server.close()
        with contextlib.suppress(FileNotFoundError):
            # A successor may have its own there by now.
            if self._path.stat().st_ino == self._inode:
                self._path.unlink()
        if self._connections:
            await asyncio.wait(self._connections, timeout=1.0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            if len(self._connections) <= _MAX_CONNECTIONS and _is_trusted(writer):
                line = await asyncio.wait_for(reader.readline(), _REQUEST_TIMEOUT_S)
                while line:
                    answer = await self._obey(line, writer)
                    if answer is not None:
                        writer.write(json.dumps(answer).encode() + b"\n")
                        await asyncio.wait_for(writer.drain(), _REQUEST_TIMEOUT_S)
                    line = await reader.readline()
        except (OSError, ValueError, asyncio.TimeoutError):
            writer.transport.abort()
        finally:
            self._connections.discard(task)
            if self._successor is writer:
                self._successor = None
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _obey(self, line: bytes, writer: asyncio.StreamWriter) -> dict[str, Any] | None:
        """Return the answer; None if it has been sent."""
        try:
            request = json.loads(line)
            command, key = request["command"], str(request["key"])
        except (ValueError, KeyError, TypeError, RecursionError):
            command = key = ""
        if not hmac.compare_digest(key.encode("utf-8", "replace"), self._key.encode()):
            _logger.warning("refused a command", extra={"key": "wrong"})
            return _failure([f"expected a command with the key in {key_file(self._path)}"], 2)
        try:
            if command == "status":
                return {"ok": True, "status": self._operated.status()}
            if command == "reload":
                await self._operated.reload()
            elif command == "drain":
                await self._operated.drain()
            elif command == "hand_over":
                if self._successor is not None:
                    raise StartupError("hand over: expected one successor at a time; another one is starting")
                with socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno())) as connection:
                    self._operated.hand_over(connection)
                self._successor = writer
                return None
            else:
                return _failure([f"expected one of the commands {', '.join(COMMANDS)}"], 2)
        except ConfigError as error:
            return _failure([str(problem) for problem in error.problems], 2)
        except (StartupError, HsmError) as error:
            return _failure([f"tlsproxy: {error}"], 1)
        return {"ok": True}


def _failure(errors: list[str], exit_code: int) -> dict[str, Any]:
    return {"ok": False, "errors": errors, "exit_code": exit_code}


def _is_trusted(writer: asyncio.StreamWriter) -> bool:
    sock = writer.get_extra_info("socket")
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    _, uid, _ = _PEER_CREDENTIALS.unpack(credentials)
    if uid in (0, os.geteuid()):
        return True
    _logger.warning("refused a command", extra={"uid": uid})
    return False


def key_file(path: Path) -> Path:
    """Return where the key is for commands at the socket `path`."""
    return path.with_suffix(".key")


def _make_key(path: Path) -> str:
    """Return the key in a file that is made, mode 0600, or was by an instance that is being taken over from."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return path.read_text()
    with os.fdopen(descriptor, "w") as file:
        key = secrets.token_hex(_KEY_BYTES)
        file.write(key)
    return key


def command_line(path: Path, command: str) -> bytes:
    """Return what to send to the socket `path` to give a command. Raises OSError where its key can't be read."""
    request = {"command": command}
    # An instance of a version before there were keys has none.
    with contextlib.suppress(FileNotFoundError):
        request["key"] = key_file(path).read_text()
    return json.dumps(request).encode() + b"\n"


def send_command(path: Path, command: str) -> dict[str, Any]:
    """Give a command to the proxy at `path`; return its answer, however long it takes. Raises StartupError."""
    try:
        line = command_line(path, command)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(str(path))
            connection.sendall(line)
            with connection.makefile("rb") as stream:
                line = stream.readline(_MAX_REPLY_BYTES)
    except (FileNotFoundError, ConnectionRefusedError):
        raise StartupError(f"{path}: expected a running tlsproxy; found none") from None
    except OSError as error:
        raise StartupError(f"{path}: expected a running tlsproxy; {error.strerror or error}") from None
    if not line:
        raise StartupError(f"{path}: the proxy ended before it had answered")
    answer: dict[str, Any] = json.loads(line)
    return answer
