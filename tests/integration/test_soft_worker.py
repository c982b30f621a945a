"""A real worker process of a soft token, asked over its real socket."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import signal
import socket
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hsm import metrics
from hsm.keys import is_signature_valid, load_public_key
from hsm.messages import (
    DEFAULT_WINDOW,
    MAX_TBS_BYTES,
    REPLY_HEADER,
    REQUEST_HEADER,
    KeyType,
    SignatureScheme,
    SignRequest,
    Status,
    encode_request,
    keys_from_json,
)
from hsm.metricstore import create_store, read_samples
from tests.tokens import (
    CERTIFICATE_VERIFY,
    SERVER_KEY_EXCHANGE,
    SoftTokenFiles,
    WorkerClient,
    WorkerProcess,
    deadline_in,
    make_soft_token,
    soft_worker,
)

KEYS = {"www": KeyType.ECDSA_P256, "p384": KeyType.ECDSA_P384, "rsa": KeyType.RSA_2048}
P256 = SignatureScheme.ECDSA_SECP256R1_SHA256


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> SoftTokenFiles:
    return make_soft_token(tmp_path_factory.mktemp("token"), KEYS)


@pytest.fixture
def worker(tmp_path: Path, files: SoftTokenFiles) -> Iterator[WorkerProcess]:
    with soft_worker(tmp_path, files) as worker:
        yield worker


@pytest.fixture
def client(worker: WorkerProcess) -> Iterator[WorkerClient]:
    with WorkerClient(worker.socket_path) as client:
        yield client


def request(
    id_: int = 1, key: int = 0, scheme: int = P256, tbs: bytes = CERTIFICATE_VERIFY, within_s: float = 30
) -> SignRequest:
    return SignRequest(id_, key, scheme, deadline_in(within_s), tbs)


def test_says_that_it_is_ready_and_greets_with_the_same_keys(worker: WorkerProcess, client: WorkerClient) -> None:
    assert worker.status["state"] == "ready"
    assert worker.status["pid"] == client.hello.pid == worker.process.pid
    assert keys_from_json(worker.status["keys"]) == client.hello.keys
    assert [(key.number, key.label, key.key_type) for key in client.hello.keys] == [
        (number, label, kind) for number, (label, kind) in enumerate(KEYS.items())
    ]
    assert client.hello.window == DEFAULT_WINDOW


def test_signs_with_every_scheme_of_every_key(client: WorkerClient) -> None:
    for key in client.hello.keys:
        for scheme in key.key_type.schemes:
            (reply,) = client.ask(request(7, key.number, scheme, SERVER_KEY_EXCHANGE))
            assert (reply.id, reply.status) == (7, Status.OK), (key.label, scheme)
            assert is_signature_valid(load_public_key(key.public_key), scheme, SERVER_KEY_EXCHANGE, reply.payload)


def test_answers_a_full_window_and_serves_clients_beside_each_other(worker: WorkerProcess) -> None:
    with WorkerClient(worker.socket_path) as greedy, WorkerClient(worker.socket_path) as modest:
        greedy.socket.sendall(b"".join(encode_request(request(number, 2, 0x0804)) for number in range(DEFAULT_WINDOW)))
        (reply,) = modest.ask(request(1))
        assert reply.status is Status.OK
        arrived = 0
        with contextlib.suppress(BlockingIOError):
            arrived = len(greedy.socket.recv(1 << 20, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        assert arrived < DEFAULT_WINDOW * 256, "the modest client waited for all of the greedy one's signatures"
        assert {reply.id for reply in greedy.receive(DEFAULT_WINDOW)} == set(range(DEFAULT_WINDOW))


@pytest.mark.parametrize(
    ("asked", "status", "payload"),
    [
        ({"within_s": -1}, Status.EXPIRED, b""),
        ({"key": 3}, Status.NO_KEY, b"no key of this number"),
        ({"scheme": 0x0804}, Status.POLICY, b"key-scheme"),
        ({"scheme": 0x9999}, Status.POLICY, b"key-scheme"),
        ({"key": 2, "scheme": 0x0401}, Status.POLICY, b"tls13-scheme"),
        ({"tbs": b"From: me. I owe you a million."}, Status.POLICY, b"tls12-length"),
        ({"tbs": b""}, Status.POLICY, b"tls12-length"),
    ],
)
def test_refuses_one_request_and_goes_on(
    client: WorkerClient, asked: dict[str, Any], status: Status, payload: bytes
) -> None:
    refused, signed = client.ask(request(**asked), request(2))
    assert (refused.id, refused.status, refused.payload) == (1, status, payload)
    assert (signed.id, signed.status) == (2, Status.OK)


def test_counts_what_the_policy_refuses(tmp_path: Path, files: SoftTokenFiles) -> None:
    store = create_store()
    with (
        soft_worker(tmp_path, files, metrics_fd=store, inherited_fds=[store]) as worker,
        WorkerClient(worker.socket_path) as client,
    ):
        client.ask(request(tbs=b"x"), request(scheme=0x0804), request(tbs=b"y"))
        samples = read_samples(store, {metrics.POLICY_REJECTED.name: metrics.POLICY_REJECTED})
    os.close(store)
    counted = {sample.labels: sample.values for sample in samples if sample.values != (0,)}
    assert counted == {("tls12-length",): (2,), ("key-scheme",): (1,)}


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (REQUEST_HEADER.pack(1, MAX_TBS_BYTES + 1, P256, 0, 0), "tbs of 1025 bytes"),
        (encode_request(request(tbs=b"")) * (DEFAULT_WINDOW + 1), "more than its window of 128 requests"),
    ],
)
def test_drops_a_client_that_breaks_the_protocol_and_no_other(
    worker: WorkerProcess, client: WorkerClient, sent: bytes, reason: str
) -> None:
    with WorkerClient(worker.socket_path) as hostile:
        hostile.socket.sendall(sent)
        with pytest.raises((EOFError, ConnectionResetError)):
            hostile.receive(DEFAULT_WINDOW + 1)
    assert client.ask(request())[0].status is Status.OK
    _, log = worker.stop()
    assert f"dropped client pid {os.getpid()}: {reason}" in log


def unread_bytes(connection: socket.socket) -> int:
    return int.from_bytes(fcntl.ioctl(connection, termios.FIONREAD, bytes(4)), sys.byteorder)


def test_drops_a_client_that_keeps_its_window_but_reads_no_replies(worker: WorkerProcess, client: WorkerClient) -> None:
    with WorkerClient(worker.socket_path) as stalled:
        hung_up = select.poll()
        hung_up.register(stalled.socket, select.POLLHUP)
        while not hung_up.poll(0):
            before = unread_bytes(stalled.socket)
            stalled.socket.sendall(encode_request(request(tbs=b"")) * DEFAULT_WINDOW)
            give_up = time.monotonic() + 20
            while unread_bytes(stalled.socket) < before + DEFAULT_WINDOW * REPLY_HEADER.size and not hung_up.poll(1):
                assert time.monotonic() < give_up, "neither answered nor dropped"
    assert client.ask(request())[0].status is Status.OK
    _, log = worker.stop()
    assert f"dropped client pid {os.getpid()}: does not read its replies" in log


def test_survives_clients_that_vanish(worker: WorkerProcess, client: WorkerClient) -> None:
    before = len(os.listdir(f"/proc/{worker.process.pid}/fd"))
    for number in range(300):
        with WorkerClient(worker.socket_path) as vanishing:
            vanishing.socket.sendall(encode_request(request()) * 3 + encode_request(request())[: number % 100])
    assert client.ask(request())[0].status is Status.OK
    assert len(os.listdir(f"/proc/{worker.process.pid}/fd")) <= before + 1


def test_survives_clients_that_vanish_while_their_requests_wait(worker: WorkerProcess, client: WorkerClient) -> None:
    rsa_frames = [encode_request(request(number, 2, SignatureScheme.RSA_PSS_RSAE_SHA256)) for number in range(50)]
    for _ in range(10):
        # Several, so that one is gone while another is served: its requests are then found and it is not.
        vanishing = [WorkerClient(worker.socket_path) for _ in range(4)]
        for one in vanishing:
            one.socket.sendall(b"".join(rsa_frames))
        for one in vanishing:
            one.receive(1)
            one.socket.close()
    assert client.ask(request())[0].status is Status.OK
    assert worker.process.poll() is None


def test_takes_frames_in_any_pieces(client: WorkerClient) -> None:
    frames = b"".join(encode_request(request(number)) for number in range(3))
    for position in range(len(frames)):
        client.socket.sendall(frames[position : position + 1])
    assert [reply.id for reply in client.receive(3)] == [0, 1, 2]


def test_answers_what_it_has_and_ends_on_sigterm(worker: WorkerProcess, client: WorkerClient) -> None:
    frames = [encode_request(request(number, 2, SignatureScheme.RSA_PSS_RSAE_SHA256)) for number in range(100)]
    client.socket.sendall(b"".join(frames))
    replies = client.receive(1)  # the worker has read all of them, in one piece, and has most still to sign
    worker.process.send_signal(signal.SIGTERM)
    replies += client.receive(100 - len(replies))
    assert {reply.id for reply in replies if reply.status is Status.OK} == set(range(100))
    assert worker.wait()[0] == 0
    with pytest.raises((EOFError, ConnectionResetError)):
        client.receive(1)


def test_ends_when_its_parent_is_gone(worker: WorkerProcess) -> None:
    worker.parent_end.close()
    assert worker.wait()[0] == 0


def test_ctrl_c_does_not_end_it(worker: WorkerProcess, client: WorkerClient) -> None:
    worker.process.send_signal(signal.SIGINT)
    assert client.ask(request())[0].status is Status.OK


def test_is_sealed(worker: WorkerProcess, client: WorkerClient) -> None:
    process = Path(f"/proc/{worker.process.pid}")
    status = dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines())
    assert status["NoNewPrivs"].strip() == "1"
    limits = (process / "limits").read_text()
    assert re.search(r"^Max core file size +0 +0 ", limits, re.MULTILINE)
    may_lock = os.geteuid() == 0 or "Max locked memory         unlimited" in limits
    assert (int(status["VmLck"].split()[0]) > 0) is may_lock


def test_keeps_no_descriptor_of_its_parent_but_those_it_was_given(tmp_path: Path, files: SoftTokenFiles) -> None:
    reader, writer = os.pipe2(os.O_NONBLOCK)
    with soft_worker(tmp_path, files, inherited_fds=[writer]):
        os.close(writer)
        assert os.read(reader, 1) == b"", "no longer open at the other end"
    os.close(reader)


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("wrong pin", "the PIN is wrong"),
        ("no pin file", "expected the token's PIN; No such file or directory"),
        ("open pin file", "expected a file closed to others"),
        ("no token", "expected a soft token; No such file or directory"),
        ("damaged token", "the file is damaged"),
    ],
)
def test_says_in_one_line_why_it_cannot_start(tmp_path: Path, fault: str, expected: str) -> None:
    files = make_soft_token(tmp_path)
    match fault:
        case "wrong pin":
            files.pin_file.write_text("another\n")
        case "no pin file":
            files.pin_file.unlink()
        case "open pin file":
            files.pin_file.chmod(0o644)
        case "no token":
            files.path.unlink()
        case "damaged token":
            files.path.write_bytes(files.path.read_bytes().replace(b"P-256", b"").replace(b'"id": "', b'"id": "0'))
    with soft_worker(tmp_path, files) as worker:
        assert worker.status["state"] == "failed"
        assert worker.status["permanent"] is True
        assert expected in worker.status["error"]
        code, log = worker.wait()
    assert code == 2
    assert log.count("\n") == 1
    assert "Traceback" not in log
