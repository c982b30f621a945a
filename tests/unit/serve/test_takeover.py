"""What passes from an instance to its successor."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tlsproxy.errors import StartupError
from tlsproxy.serve.command_socket import CommandServer
from tlsproxy.serve.sockets import NO_SOCKETS, adopt
from tlsproxy.serve.takeover import Predecessor, hand_over
from tlsproxy.tls.context import TicketKey

KEYS = tuple(TicketKey.generate() for _ in range(3))


@contextlib.contextmanager
def successor_of(directory: Path, answer: Callable[[socket.socket], None]) -> Iterator[Path]:
    """Run an instance that answers one request for its sockets so, at the path returned."""

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            assert json.loads(connection.recv(1024)) == {"command": "hand_over", "key": "sesame"}
            answer(connection)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / "sock"))
        listener.listen()
        (directory / "sock.key").write_text("sesame")
        thread = threading.Thread(target=serve)
        thread.start()
        yield directory / "sock"
        thread.join()


def test_sockets_and_ticket_keys_are_handed_over(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening, (tmp_path / "lock").open("w") as lock:
        sockets = adopt([listening])
        with successor_of(tmp_path, lambda to: hand_over(to, lock.fileno(), sockets, KEYS)) as path:
            predecessor = Predecessor(path)
        assert predecessor.ticket_keys == KEYS
        assert predecessor.sockets.by_address.keys() == sockets.by_address.keys()
        assert os.fstat(predecessor.lock_fd).st_ino == os.fstat(lock.fileno()).st_ino
        predecessor.sockets.close(keep=NO_SOCKETS)
        os.close(predecessor.lock_fd)
        predecessor.retire()


class Instance:
    """One that runs, and has no sockets but the lock's."""

    def __init__(self, lock_fd: int) -> None:
        self._lock_fd = lock_fd

    async def reload(self) -> None:
        raise AssertionError

    async def drain(self) -> None:
        raise AssertionError

    def status(self) -> dict[str, object]:
        raise AssertionError

    def hand_over(self, connection: socket.socket) -> None:
        hand_over(connection, self._lock_fd, NO_SOCKETS, KEYS)


async def test_there_is_one_successor_at_a_time(tmp_path: Path) -> None:
    """Of two that had the sockets both would serve in the end, and one would hear no command."""
    path = tmp_path / "sock"
    with (tmp_path / "lock").open("w") as lock:
        commands = CommandServer(path, Instance(lock.fileno()))
        await commands.start()
        first = await asyncio.to_thread(Predecessor, path)
        with pytest.raises(StartupError, match="expected one successor at a time; another one is starting"):
            await asyncio.to_thread(Predecessor, path)
        first._connection.close()
        while commands._successor is not None:  # noqa: ASYNC110 - comes in some steps
            await asyncio.sleep(0)
        second = await asyncio.to_thread(Predecessor, path)
        second._connection.close()
        for predecessor in (first, second):
            os.close(predecessor.lock_fd)
        await commands.close()


SECRET = KEYS[0].aes.hex()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (b'{"ok": true}\n', None),
        (b'{"ok": true, "ticket_keys": []}\n', None),
        (f'{{"ticket_keys": ["{SECRET}"]}}'.encode(), "expected ticket keys of 80 bytes; got others"),
        (f'{{"ticket_keys": ["{SECRET}g"]}}'.encode(), "expected ticket keys in hexadecimal; got something else"),
        (b'{"ticket_keys": 3}', "expected ticket keys in hexadecimal; got something else"),
        (b"[]", "expected ticket keys in hexadecimal; got something else"),
        (b"{", "expected ticket keys in hexadecimal; got something else"),
    ],
)
def test_an_answer_without_keys_is_an_older_version_and_a_strange_one_is_an_error_that_names_no_key(
    tmp_path: Path, answer: bytes, expected: str | None
) -> None:
    with (
        (tmp_path / "lock").open("w") as lock,
        successor_of(tmp_path, lambda to: socket.send_fds(to, [answer], [lock.fileno()])) as path,
    ):
        if expected is None:
            predecessor = Predecessor(path)
            assert predecessor.ticket_keys == ()
            os.close(predecessor.lock_fd)
            predecessor.retire()
            return
        with pytest.raises(StartupError, match=expected) as raised:
            Predecessor(path)
        assert SECRET not in str(raised.value)
