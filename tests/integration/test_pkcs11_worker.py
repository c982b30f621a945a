"""A real worker process of a PKCS#11 token, asked over its real socket, while the token does what HSMs do."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import termios
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from hsm import metrics
from hsm.keys import is_signature_valid, load_public_key
from hsm.messages import (
    KeyInfo,
    KeyType,
    SignatureScheme,
    SignReply,
    SignRequest,
    Status,
    encode_request,
    keys_from_json,
)
from hsm.metricstore import create_store, read_samples
from tests.fault_module import On
from tests.softhsm import FaultyToken
from tests.tokens import CERTIFICATE_VERIFY, WorkerClient, deadline_in

P256 = SignatureScheme.ECDSA_SECP256R1_SHA256
CKR_DEVICE_REMOVED = 0x32
CKR_PIN_INCORRECT = 0xA0


@pytest.fixture
def token(tmp_path: Path) -> FaultyToken:
    return FaultyToken(tmp_path)


def requests(count: int, *, first: int = 0, within_s: float = 10, tbs: bytes = CERTIFICATE_VERIFY) -> list[SignRequest]:
    return [SignRequest(first + n, 0, P256, deadline_in(within_s), tbs) for n in range(count)]


def assert_all_valid(replies: Sequence[SignReply], key: KeyInfo) -> None:
    public_key = load_public_key(key.public_key)
    assert [reply for reply in replies if reply.status is not Status.OK] == []
    assert all(is_signature_valid(public_key, P256, CERTIFICATE_VERIFY, reply.payload) for reply in replies)


def test_signs_as_many_at_a_time_as_it_has_sessions(token: FaultyToken) -> None:
    with token.worker(sessions=8) as worker:
        assert worker.status["state"] == "ready"
        (key,) = keys_from_json(worker.status["keys"])
        token.faults.hang()
        asked = token.faults.get("sign_calls")
        with WorkerClient(worker.socket_path) as client:
            assert client.hello.keys == (key,)
            assert client.hello.window == 16
            client.socket.sendall(b"".join(map(encode_request, requests(16))))
            while token.faults.get("sign_calls") < asked + 8:
                time.sleep(0.001)
            token.faults.recover()
            replies = client.receive(16)
        assert_all_valid(replies, key)
        assert {reply.id for reply in replies} == set(range(16))
        assert worker.stop()[0] == 0


def test_signs_with_the_keys_it_is_told_to(tmp_path: Path) -> None:
    token = FaultyToken(tmp_path, {"www": KeyType.ECDSA_P256, "ca": KeyType.ECDSA_P256})
    with token.worker(keys=("www",)) as worker, WorkerClient(worker.socket_path) as client:
        assert [key.label for key in client.hello.keys] == ["www"]


def test_refuses_what_no_tls_server_signs(token: FaultyToken) -> None:
    with token.worker() as worker, WorkerClient(worker.socket_path) as client:
        asked = token.faults.get("sign_calls")
        (reply,) = client.ask(*requests(1, tbs=b"pay 100 to mallory"))
        assert reply.status is Status.POLICY
        assert token.faults.get("sign_calls") == asked


def send(client: WorkerClient, wanted: Sequence[SignRequest]) -> None:
    """Send requests and wait until the worker has read them."""
    client.socket.sendall(b"".join(map(encode_request, wanted)))
    while struct.unpack("i", fcntl.ioctl(client.socket, termios.TIOCOUTQ, bytes(4)))[0]:
        time.sleep(0.001)


def test_a_busy_client_does_not_delay_another(token: FaultyToken) -> None:
    with token.worker(sessions=2) as worker:
        token.faults.set_sign_latency(0.1)
        token.faults.hang()
        with WorkerClient(worker.socket_path) as busy, WorkerClient(worker.socket_path) as other:
            send(busy, requests(4))
            send(other, requests(4))
            token.faults.recover()
            waits = [sorted(reply.queue_us for reply in client.receive(4)) for client in (busy, other)]
        (_, _, busy_third, busy_last), (other_first, _, other_third, _) = waits
        assert other_first < busy_last, "served before the busy client was done"
        assert busy_third < other_third, "and by turns with it"


def test_drops_a_client_that_breaks_its_window_and_serves_the_others(token: FaultyToken) -> None:
    with token.worker(sessions=2) as worker:
        token.faults.hang()
        with WorkerClient(worker.socket_path) as rude, WorkerClient(worker.socket_path) as other:
            rude.socket.sendall(b"".join(map(encode_request, requests(7))))
            with pytest.raises(EOFError):
                rude.receive(1)
            token.faults.recover()
            assert_all_valid(other.ask(*requests(2)), other.hello.keys[0])
        assert "more than its window of 4 requests in flight" in worker.stop()[1]


def test_forgets_the_requests_of_a_client_that_has_gone(token: FaultyToken) -> None:
    with token.worker(sessions=1) as worker, WorkerClient(worker.socket_path) as other:
        token.faults.hang()
        asked = token.faults.get("sign_calls")
        with WorkerClient(worker.socket_path) as client:
            client.socket.sendall(b"".join(map(encode_request, requests(2))))
            while token.faults.get("sign_calls") == asked:
                time.sleep(0.001)
        # The worker has seen the end of that connection when it has served one that was made after it.
        WorkerClient(worker.socket_path).socket.close()
        token.faults.recover()
        assert_all_valid(other.ask(*requests(1)), other.hello.keys[0])
        assert token.faults.get("sign_calls") == asked + 2


def test_answers_what_expires_while_the_token_hangs(token: FaultyToken) -> None:
    with token.worker(sessions=1) as worker, WorkerClient(worker.socket_path) as client:
        token.faults.hang()
        client.socket.sendall(b"".join(map(encode_request, requests(1) + requests(1, first=1, within_s=0.1))))
        (reply,) = client.receive(1)
        assert (reply.id, reply.status) == (1, Status.EXPIRED)
        token.faults.recover()
        (reply,) = client.receive(1)
        assert (reply.id, reply.status) == (0, Status.OK)


def test_ends_when_a_signature_outlasts_the_hang_limit(token: FaultyToken) -> None:
    with token.worker(sessions=2, hang_limit_s=0.2) as worker, WorkerClient(worker.socket_path) as client:
        token.faults.hang()
        client.socket.sendall(b"".join(map(encode_request, requests(1))))
        with pytest.raises(EOFError):
            client.receive(1)
        code, log = worker.wait()
        assert code == 1
        assert "HUNG: a signature has not returned for 0.2 s" in log


def test_a_refused_pin_ends_it_for_good_after_one_try(token: FaultyToken) -> None:
    token.faults.fail(CKR_PIN_INCORRECT, On.LOGIN)
    with token.worker() as worker:
        assert worker.status["state"] == "failed"
        assert worker.status["permanent"]
        assert worker.status["error"] == "token with label 'hsm': the PIN was refused: CKR_PIN_INCORRECT"
        assert worker.wait()[0] == 2
    assert token.faults.get("login_calls") == 1


def test_a_pin_refused_later_ends_it_for_good_after_one_try(token: FaultyToken) -> None:
    with token.worker(sessions=4) as worker, WorkerClient(worker.socket_path) as client:
        token.faults.fail(CKR_PIN_INCORRECT, On.LOGIN)
        token.faults.lose_sessions()
        client.socket.sendall(b"".join(map(encode_request, requests(8))))
        with pytest.raises(EOFError):
            client.receive(8)
        code, log = worker.wait()
        assert code == 2
        assert "Traceback" not in log
    assert token.faults.get("login_calls") == 2


def test_says_that_a_token_that_is_away_may_come_back(token: FaultyToken) -> None:
    token.faults.fail(CKR_DEVICE_REMOVED, On.ALL)
    with token.worker() as worker:
        assert worker.status == {"state": "failed", "error": "CKR_DEVICE_REMOVED: in C_GetSlotList", "permanent": False}
        assert worker.wait()[0] == 1


def test_the_client_hears_of_an_error_it_may_take_elsewhere(token: FaultyToken) -> None:
    store = create_store()
    try:
        with (
            token.worker(sessions=2, metrics_fd=store, inherited_fds=[store]) as worker,
            WorkerClient(worker.socket_path) as client,
        ):
            token.faults.fail(CKR_DEVICE_REMOVED, On.SIGN_INIT)
            (reply,) = client.ask(*requests(1))
            assert reply.status is Status.RETRY
            assert reply.payload == b"CKR_DEVICE_REMOVED: in C_SignInit"
            samples = {(s.family, s.labels): s.values for s in read_samples(store, metrics.FAMILIES)}
        assert samples[metrics.ERRORS, ("hsm", "CKR_DEVICE_REMOVED")] == (1.0,)
        assert samples[metrics.SESSIONS, ("hsm", "open")] == (1.0,)
    finally:
        os.close(store)


def test_answers_what_it_has_received_before_it_ends(token: FaultyToken) -> None:
    with token.worker(sessions=2) as worker, WorkerClient(worker.socket_path) as client:
        token.faults.set_sign_latency(0.1)
        client.socket.sendall(b"".join(map(encode_request, requests(4))))
        first = client.receive(1)
        worker.process.send_signal(signal.SIGTERM)
        assert_all_valid(first + client.receive(4 - len(first)), client.hello.keys[0])
        assert worker.wait()[0] == 0
    assert token.faults.get("open_sessions") == 0, "closed by C_Finalize, not left to the token"


def test_ends_although_the_token_hangs(token: FaultyToken) -> None:
    with token.worker(sessions=1, hang_limit_s=0.3) as worker, WorkerClient(worker.socket_path) as client:
        token.faults.hang()
        send(client, requests(1))
        code, log = worker.stop()
        assert code == 1
        assert "HUNG" in log


def test_never_lets_a_faulty_rsa_signature_out(tmp_path: Path) -> None:
    token = FaultyToken(tmp_path, {"rsa": KeyType.RSA_2048})
    with token.worker() as worker, WorkerClient(worker.socket_path) as client:
        token.faults.corrupt_signatures(one_in=1)
        scheme = SignatureScheme.RSA_PSS_RSAE_SHA256
        (reply,) = client.ask(SignRequest(1, 0, scheme, deadline_in(10), CERTIFICATE_VERIFY))
        assert reply.status is Status.RETRY
        assert reply.payload.startswith(b"SIGNATURE_INVALID")


SIGNATURES = 10_000


def test_no_signature_is_lost_or_mixed_up_while_sessions_end_at_random(token: FaultyToken) -> None:
    with token.worker(sessions=16) as worker:
        token.faults.close_sessions_at_random(one_in=50, all_one_in=2000)
        outcomes: Counter[str] = Counter()
        threads = [threading.Thread(target=_sign_distinct, args=(worker.socket_path, n, outcomes)) for n in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert outcomes["valid"] == SIGNATURES, outcomes
    assert token.faults.get("login_calls") > 1, "all sessions were lost at least once"


def _sign_distinct(socket_path: Path, part: int, outcomes: Counter[str]) -> None:
    """Ask for half the signatures, each of other bytes, a window at a time; again for those the token failed."""
    with WorkerClient(socket_path) as client:
        public_key = load_public_key(client.hello.keys[0].public_key)
        wanted = {
            n: CERTIFICATE_VERIFY[:-32] + n.to_bytes(16, "big") + part.to_bytes(16, "big")
            for n in range(SIGNATURES // 2)
        }
        while wanted:
            batch = [
                SignRequest(n, 0, P256, deadline_in(30), tbs) for n, tbs in list(wanted.items())[: client.hello.window]
            ]
            for reply in client.ask(*batch):
                if reply.status is Status.RETRY:
                    outcomes["retried"] += 1
                    continue
                valid = is_signature_valid(public_key, P256, wanted.pop(reply.id), reply.payload)
                outcomes["valid" if valid else "invalid"] += 1
