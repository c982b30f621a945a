from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from hsm.messages import ProtocolError, SignRequest, encode_request
from hsm.serving import ClientGoneError, accept_client, receive_requests, send_whole

REQUEST = SignRequest(1, 2, 0x0403, 4, b"tbs")


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "sock"))
        listener.listen()
        listener.setblocking(False)
        yield listener


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        yield ours, theirs


def connected(listener: socket.socket) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.connect(listener.getsockname())
    return client


def test_a_client_of_an_allowed_uid_comes_in(listener: socket.socket) -> None:
    with connected(listener):
        accepted = accept_client(listener, frozenset((os.getuid(),)))
        assert accepted is not None
        connection, peer = accepted
        with connection:
            assert (peer.pid, peer.uid) == (os.getpid(), os.getuid())
            assert not connection.getblocking()
        assert accept_client(listener, frozenset((os.getuid(),))) is None


def test_a_client_of_another_uid_is_closed_and_logged(
    listener: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    with connected(listener) as client:
        assert accept_client(listener, frozenset((os.getuid() + 1,))) is None
        assert client.recv(1) == b""
    assert f"expected uid [{os.getuid() + 1}]; got uid {os.getuid()}, pid {os.getpid()}" in caplog.text
    assert caplog.records[0].levelno == logging.WARNING


def test_an_incomplete_request_waits_for_its_rest(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    frame = encode_request(REQUEST)
    buffer = bytearray()
    assert receive_requests(ours, buffer) == []
    theirs.sendall(frame + frame[:5])
    assert receive_requests(ours, buffer) == [REQUEST]
    theirs.sendall(frame[5:] + frame)
    assert receive_requests(ours, buffer) == [REQUEST, REQUEST]
    assert buffer == b""


def test_a_closed_connection_is_told_from_silence(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    theirs.close()
    with pytest.raises(ClientGoneError):
        receive_requests(ours, bytearray())
    with pytest.raises(ClientGoneError):
        send_whole(ours, b"reply")


def test_replies_that_do_not_fit_never_block(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    send_whole(ours, b"reply")
    assert theirs.recv(5) == b"reply"
    with pytest.raises(ProtocolError, match="does not read its replies"):
        send_whole(ours, bytes(1 << 24))
    with pytest.raises(ProtocolError, match="does not read its replies"):
        send_whole(ours, b"reply")
