from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from hsm.messages import KeyInfo, KeyType, ProtocolError, SignRequest, decode_hello, encode_request
from hsm.serving import MAX_CLIENTS, Client, ClientGoneError, Clients, accept_client, receive_requests, send_whole
from hsm.workerspec import WorkerSpec

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


class Owner:
    """Notes what it is told, and finds fault with requests if it is to."""

    def __init__(self) -> None:
        self.received: list[tuple[Client, SignRequest]] = []
        self.dropped: list[Client] = []
        self.fault: ProtocolError | None = None

    def requests_came(self, client: Client, requests: list[SignRequest]) -> None:
        if self.fault is not None:
            raise self.fault
        self.received += [(client, request) for request in requests]

    def client_dropped(self, client: Client) -> None:
        self.dropped.append(client)
        client.connection.close()


class Served:
    """Clients of a listener, and the far ends of what they got from their parent."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.owner = Owner()
        self.status, status_fd = os.pipe()
        self.stop_fd, self.stop = os.pipe()
        self.spec = WorkerSpec(
            token="t",
            kind="soft",
            path="p",
            pin_file="f",
            listen_fd=listener.fileno(),
            status_fd=status_fd,
            allowed_uid=os.getuid(),
        )
        self.keys = [KeyInfo(0, "www", KeyType.ECDSA_P256, b"spki")]
        self.clients = Clients(Client, self.owner, listener, self.spec, self.keys, 5, [self.stop_fd])

    def close(self) -> None:
        self.clients.close()
        for fd in (self.status, self.spec.status_fd, self.stop_fd, self.stop):
            os.close(fd)


@pytest.fixture
def served(listener: socket.socket) -> Iterator[Served]:
    served = Served(listener)
    yield served
    served.close()


def greeted(served: Served) -> socket.socket:
    """Return a client that has been accepted and has read its Hello."""
    client = connected(served.listener)
    for _ in range(2):  # accept; send the Hello
        served.clients.poll(0)
    taken = decode_hello(client.recv(1 << 16))
    assert taken is not None
    assert (taken[0].token, taken[0].window, list(taken[0].keys)) == ("t", 5, served.keys)
    return client


def test_a_client_is_greeted_and_its_requests_reach_the_owner(served: Served) -> None:
    with greeted(served) as client:
        client.sendall(encode_request(REQUEST) * 2)
        served.clients.poll(0)
        (one,) = served.clients
        assert served.owner.received == [(one, REQUEST)] * 2
    served.clients.poll(0)
    assert served.owner.dropped == [one]
    assert list(served.clients) == []


@pytest.mark.parametrize("sent", [encode_request(REQUEST), b"\xff" * 100])
def test_a_client_that_is_found_at_fault_is_dropped_and_logged(
    served: Served, caplog: pytest.LogCaptureFixture, sent: bytes
) -> None:
    served.owner.fault = ProtocolError("too much of it")
    with greeted(served) as client, greeted(served) as other:
        client.sendall(sent)
        served.clients.poll(0)
        assert client.recv(1) == b""
        assert len(served.owner.dropped) == 1
        assert f"dropped client pid {os.getpid()}: " in caplog.text
        served.owner.fault = None
        other.sendall(encode_request(REQUEST))
        served.clients.poll(0)
        assert len(served.owner.received) == 1


def test_a_hello_that_does_not_fit_goes_on_when_there_is_room(served: Served) -> None:
    served.keys = [KeyInfo(n, "k" * 500, KeyType.ECDSA_P256, bytes(500)) for n in range(700)]
    served.clients.close()
    served.clients = Clients(Client, served.owner, served.listener, served.spec, served.keys, 5, [served.stop_fd])
    with connected(served.listener) as client:
        data = bytearray()
        client.setblocking(False)
        for _ in range(100):
            served.clients.poll(0)
            with contextlib.suppress(BlockingIOError):
                data += client.recv(1 << 16)
        taken = decode_hello(data)
        assert taken is not None
        assert len(taken[0].keys) == 700
        client.sendall(encode_request(REQUEST))
        served.clients.poll(0)
        assert len(served.owner.received) == 1


def test_one_client_too_many_is_refused(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    clients = []
    for _ in range(MAX_CLIENTS + 1):
        clients.append(connected(served.listener))
        served.clients.poll(0)
    assert len(list(served.clients)) == MAX_CLIENTS
    assert f"expected at most {MAX_CLIENTS} connections" in caplog.text
    for client in clients:
        client.close()


def test_it_gives_a_sign_of_life_a_second_and_sees_that_it_is_to_stop(served: Served) -> None:
    served.clients.poll(0)
    served.clients.poll(0)
    assert os.read(served.status, 1024) == b'{"state": "alive"}\n'
    assert not served.clients.stopping
    os.write(served.stop, b"x")
    served.clients.poll(0)
    assert served.clients.stopping
