from __future__ import annotations

import dataclasses
import random
import ssl
from pathlib import Path
from typing import TypeAlias

import pytest

from hsm.messages import KeyType
from tests.unit.tls.peers import Authority, Client, Signer, client_context, shake_hands, until_suspended
from tests.unit.tls.records import (
    ALERT,
    APPLICATION_DATA,
    HANDSHAKE,
    RecordWriter,
    Tls12RecordWriter,
    without_key_shares,
)
from tlsproxy.tls.context import TlsContext
from tlsproxy.tls.engine import MAX_HANDSHAKE_BYTES, State, TlsConnection, live_jobs
from tlsproxy.tls.events import (
    ClientHelloReceived,
    CloseNotify,
    ConnectionFailed,
    HandshakeComplete,
    HandshakeFailed,
    PlaintextReceived,
    SignatureNeeded,
)

Written: TypeAlias = tuple[TlsConnection, RecordWriter]

HOST = "www.example.com"
UNEXPECTED_MESSAGE, BAD_RECORD_MAC, RECORD_OVERFLOW, HANDSHAKE_FAILURE, DECODE_ERROR = 10, 20, 22, 40, 50
NO_APPLICATION_PROTOCOL, UNKNOWN_CA = 120, 48


@pytest.fixture(scope="module")
def context(signer: Signer) -> TlsContext:
    return TlsContext([signer.certificate(KeyType.ECDSA_P256, HOST)])


@pytest.fixture
def written(
    authority: Authority, signer: Signer, context: TlsContext, tmp_path: Path
) -> tuple[TlsConnection, RecordWriter]:
    """An established connection, and a hand that writes the client's records."""
    client_tls = client_context(authority)
    client_tls.keylog_filename = str(tmp_path / "keys")
    server = shake_hands(context, Client(client_tls), signer).server
    return server, RecordWriter(tmp_path / "keys")


def failure(server: TlsConnection, data: bytes) -> HandshakeFailed:
    (event,) = server.receive_data(data)
    assert isinstance(event, HandshakeFailed)
    assert server.state is State.CLOSED
    return event


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", bytes(64), b"\xff" * 64, b"SSH-2.0-OpenSSH_9.2\r\n", b"\x80" * 64]
)
def test_what_is_not_tls(context: TlsContext, data: bytes):
    server = context.connection()
    event = failure(server, data)
    assert event.alert_received is None
    assert event.reason
    assert server.receive_data(data) == []


def test_random_bytes_never_do_more_than_fail(context: TlsContext):
    seeded = random.Random(1)
    for length in range(1, 600):
        server = context.connection()
        server.receive_data(b"\x16\x03\x01" + seeded.randbytes(2) + b"\x01" + seeded.randbytes(length))
        server.abort()


def test_every_mutation_of_a_client_hello(authority: Authority, context: TlsContext):
    hello = Client(client_context(authority, alpn=["http/1.1"])).step()
    outcomes = set()
    for position in range(len(hello)):
        for flip in (0x01, 0x80, 0xFF):
            server = context.connection()
            events = server.receive_data(hello[:position] + bytes([hello[position] ^ flip]) + hello[position + 1 :])
            outcomes.add(type(events[-1]) if events else None)
            server.abort()
    assert outcomes == {SignatureNeeded, HandshakeFailed, None}


def test_a_client_hello_in_single_bytes(authority: Authority, signer: Signer, context: TlsContext):
    client = Client(client_context(authority))
    server = context.connection()
    hello = client.step()
    for position in range(len(hello) - 1):
        assert server.receive_data(hello[position : position + 1]) == []
    events = server.receive_data(hello[-1:])
    assert [type(event) for event in events] == [ClientHelloReceived, SignatureNeeded]
    server.provide_signature(signer.sign(events[-1]))
    finished = client.step(server.data_to_send())
    for position in range(len(finished) - 1):
        assert server.receive_data(finished[position : position + 1]) == []
    assert isinstance(server.receive_data(finished[-1:])[0], HandshakeComplete)


def test_a_hello_retry_request_chooses_no_second_certificate(authority: Authority, context: TlsContext):
    client_tls = client_context(authority)
    client_tls.set_ecdh_curve("prime256v1")
    hello = Client(client_tls).step()
    server = context.connection()
    events = server.receive_data(without_key_shares(hello))
    assert [type(event) for event in events] == [ClientHelloReceived]
    retry_random = bytes.fromhex("cf21ad74e59a6111be1d8c021e65b891c2a211167abb8c5e079e09e2c8a8339c")  # section 4.1.3
    assert server.data_to_send()[11:43] == retry_random
    events = server.receive_data(hello)
    assert [type(event) for event in events] == [SignatureNeeded]
    server.abort()


def test_a_client_hello_that_never_ends(context: TlsContext):
    server = context.connection()
    fragment = bytes([0x01, 0x01, 0xFF, 0x00]) + bytes(16380)  # a ClientHello of 130816 bytes is announced
    sent = 0
    while sent <= MAX_HANDSHAKE_BYTES:
        assert server.state is State.HANDSHAKING
        record = b"\x16\x03\x01" + len(fragment).to_bytes(2, "big") + fragment
        events = server.receive_data(record)
        sent += len(record)
        fragment = bytes(16384)
    assert events == [HandshakeFailed(None, None, "more than 65536 bytes without a complete handshake")]


def test_nothing_may_follow_a_client_hello_in_its_record(authority: Authority, context: TlsContext):
    for tls12 in (True, False):
        hello = Client(client_context(authority, tls12=tls12)).step()
        body = hello[5:] + bytes([11, 0, 0, 3, 0, 0, 0])  # an empty Certificate
        event = failure(context.connection(), hello[:3] + len(body).to_bytes(2, "big") + body)
        assert (event.alert_sent, event.reason) == (UNEXPECTED_MESSAGE, "unexpected message")


def test_clients_without_common_ground(authority: Authority, signer: Signer, context: TlsContext):
    client = Client(client_context(authority, tls12=True, ciphers="ECDHE-RSA-AES128-GCM-SHA256"))
    server = context.connection()
    events = server.receive_data(client.step())
    assert events[-1] == HandshakeFailed(HANDSHAKE_FAILURE, None, "no shared cipher")
    with pytest.raises(ssl.SSLError, match="HANDSHAKE_FAILURE"):
        client.step(server.data_to_send())


def test_no_application_protocol_in_common(authority: Authority, context: TlsContext):
    server = context.connection()
    events = server.receive_data(Client(client_context(authority, alpn=["h2"])).step())
    assert isinstance(events[-1], HandshakeFailed)
    assert events[-1].alert_sent == NO_APPLICATION_PROTOCOL


def test_a_client_that_does_not_trust_us(signer: Signer, context: TlsContext):
    client = Client(ssl.create_default_context())
    server, request = until_suspended(context, client)
    server.provide_signature(signer.sign(request))
    with pytest.raises(ssl.SSLCertVerificationError):
        client.step(server.data_to_send())
    event = failure(server, client.pending())
    assert (event.alert_sent, event.alert_received) == (None, UNKNOWN_CA)


def test_a_wrong_signature_is_found_by_the_client(authority: Authority, signer: Signer, context: TlsContext):
    client = Client(client_context(authority))
    server, request = until_suspended(context, client)
    server.provide_signature(signer.sign(dataclasses.replace(request, tbs=request.tbs + b"x")))
    with pytest.raises(ssl.SSLError, match="bad signature"):
        client.step(server.data_to_send())


def test_eof_during_the_handshake(authority: Authority, context: TlsContext):
    fresh = context.connection()
    suspended, _ = until_suspended(context, Client(client_context(authority)))
    for server in (fresh, suspended):
        assert server.receive_eof() == [HandshakeFailed(None, None, "the client closed the connection")]
        assert server.state is State.CLOSED
        assert server.receive_eof() == []
    assert live_jobs() == 0


def test_close_notify_during_the_handshake(authority: Authority, signer: Signer, context: TlsContext):
    server, request = until_suspended(context, Client(client_context(authority, tls12=True)))
    server.provide_signature(signer.sign(request))
    event = failure(server, b"\x15\x03\x03\x00\x02\x01\x00")
    assert event == HandshakeFailed(None, None, "the client closed the connection")


def test_bytes_that_come_while_suspended_are_kept(authority: Authority, signer: Signer, context: TlsContext):
    client = Client(client_context(authority))
    server, request = until_suspended(context, client)
    compatibility_ccs = b"\x14\x03\x03\x00\x01\x01"  # RFC 8446 appendix D.4
    assert server.receive_data(compatibility_ccs[:3]) == server.receive_data(compatibility_ccs[3:]) == []
    assert server.provide_signature(signer.sign(request)) == []
    assert isinstance(server.receive_data(client.step(server.data_to_send()))[0], HandshakeComplete)


def test_garbage_that_comes_while_suspended_fails_afterwards(authority: Authority, signer: Signer, context: TlsContext):
    server, request = until_suspended(context, Client(client_context(authority)))
    assert server.receive_data(b"garbage garbage garbage") == []
    (event,) = server.provide_signature(signer.sign(request))
    assert isinstance(event, HandshakeFailed)


def test_a_flood_while_suspended(authority: Authority, context: TlsContext):
    server, _ = until_suspended(context, Client(client_context(authority)))
    for _ in range(MAX_HANDSHAKE_BYTES // 4096):
        assert server.receive_data(bytes(4096)) == []
    event = failure(server, b"x")
    assert event.reason == "more than 65536 bytes before the server's answer"
    assert live_jobs() == 0


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("leave", ["abort", "eof", "flood", "drop", "fail"])
def test_clients_that_vanish_while_suspended_leave_nothing_behind(
    authority: Authority, context: TlsContext, leave: str
):
    hello = Client(client_context(authority)).step()

    def vanish() -> None:
        server = context.connection()
        assert isinstance(server.receive_data(hello)[-1], SignatureNeeded)
        if leave == "abort":
            server.receive_data(b"extra")
            server.abort()
        elif leave == "eof":
            server.receive_eof()
        elif leave == "flood":
            server.receive_data(bytes(MAX_HANDSHAKE_BYTES + 1))
        elif leave == "fail":
            server.fail_signature("no token")

    for _ in range(200):
        vanish()
    before = resident_bytes()
    for _ in range(3000):
        vanish()
    assert live_jobs() == 0
    assert resident_bytes() - before < 2 << 20  # one job's stack is 32 KiB


def test_a_flood_of_key_updates_is_cut_off(written: Written):
    server, writer = written
    flood = b"".join(writer.key_update() for _ in range(1000))
    (event,) = server.receive_data(flood)
    assert event == ConnectionFailed(None, None, "too many handshake messages")
    assert len(server.data_to_send()) < 40 * 100  # an answer to each up to the limit, no more


def test_key_updates_are_earned_by_data(written: Written):
    server, writer = written
    for _ in range(100):
        data = b"".join(writer.record(APPLICATION_DATA, bytes(16384)) for _ in range(4)) + writer.key_update()
        (event,) = server.receive_data(data)
        assert event == PlaintextReceived(bytes(65536))


def test_empty_records_do_not_go_on_forever(written: Written):
    server, writer = written
    events = server.receive_data(b"".join(writer.record(APPLICATION_DATA, b"") for _ in range(1000)))
    assert isinstance(events[-1], ConnectionFailed)


def test_a_forged_record(written: Written):
    server, writer = written
    good, bad = writer.record(APPLICATION_DATA, b"good"), bytearray(writer.record(APPLICATION_DATA, b"bad"))
    bad[-1] ^= 1
    first, second = server.receive_data(good + bytes(bad))
    assert first == PlaintextReceived(b"good")
    assert isinstance(second, ConnectionFailed)
    assert second.alert_sent == BAD_RECORD_MAC
    assert server.data_to_send()


def test_a_fatal_alert_after_the_handshake(written: Written):
    server, writer = written
    (event,) = server.receive_data(writer.record(ALERT, bytes([2, UNEXPECTED_MESSAGE])))
    assert isinstance(event, ConnectionFailed)
    assert event.alert_received == UNEXPECTED_MESSAGE


def test_an_oversized_record(written: Written):
    server, _ = written
    (event,) = server.receive_data(b"\x17\x03\x03\x48\x00" + bytes(0x4800))
    assert isinstance(event, ConnectionFailed)
    assert event.alert_sent == RECORD_OVERFLOW


def test_data_after_close_notify_is_ignored(written: Written):
    server, writer = written
    close_notify = writer.record(ALERT, bytes([1, 0]))
    assert server.receive_data(close_notify + writer.record(APPLICATION_DATA, b"late")) == [CloseNotify()]
    assert server.receive_data(writer.record(APPLICATION_DATA, b"later")) == []
    assert server.receive_eof() == []


def test_tls12_renegotiation_is_refused_and_then_cut_off(
    authority: Authority, signer: Signer, context: TlsContext, tmp_path: Path
):
    server_hellos = []
    client_tls = client_context(authority, tls12=True)
    client_tls.keylog_filename = str(tmp_path / "keys")
    client_tls._msg_callback = lambda connection, direction, version, content, message, data: (
        server_hellos.append(data) if getattr(message, "name", "") == "SERVER_HELLO" else None
    )
    client = Client(client_tls)
    hello = Client(client_tls).step()[5:]
    server = shake_hands(context, client, signer).server
    writer = Tls12RecordWriter(tmp_path / "keys", server_hellos[0][6:38])
    assert server.receive_data(writer.record(HANDSHAKE, hello)) == []
    with pytest.raises(ssl.SSLError, match="NO_RENEGOTIATION"):
        client.read(server.data_to_send())
    assert server.receive_data(writer.record(APPLICATION_DATA, b"still fine")) == [PlaintextReceived(b"still fine")]
    (event,) = server.receive_data(b"".join(writer.record(HANDSHAKE, hello) for _ in range(100)))
    assert event == ConnectionFailed(None, None, "too many handshake messages")
