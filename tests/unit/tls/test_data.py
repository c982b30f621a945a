from __future__ import annotations

import os
import ssl

import pytest

from hsm.messages import KeyType
from tests.unit.tls.peers import Authority, Client, Handshake, Signer, client_context, shake_hands
from tlsproxy.tls.context import TlsContext
from tlsproxy.tls.engine import State
from tlsproxy.tls.events import CloseNotify, ConnectionFailed, HandshakeComplete, PlaintextReceived, SignatureNeeded

HOST = "www.example.com"
BODY = os.urandom(1_000_000)


@pytest.fixture(params=["TLSv1.2", "TLSv1.3"])
def handshake(request: pytest.FixtureRequest, authority: Authority, signer: Signer) -> Handshake:
    context = TlsContext([signer.certificate(KeyType.ECDSA_P256, HOST)])
    client = Client(client_context(authority, tls12=request.param == "TLSv1.2"))
    return shake_hands(context, client, signer)


@pytest.mark.parametrize("size", [1, 5, 16_383, 16_384, 100_000, 1_000_000])
def test_large_data_from_the_client_in_any_slices(handshake: Handshake, size: int):
    body = BODY[: 20_000 * size]
    ciphertext = handshake.client.send(body)
    received = bytearray()
    for position in range(0, len(ciphertext), size):
        for event in handshake.server.receive_data(ciphertext[position : position + size]):
            assert isinstance(event, PlaintextReceived)
            received += event.data
    assert received == body


def test_all_plaintext_of_one_receive_is_one_event(handshake: Handshake):
    assert handshake.server.receive_data(handshake.client.send(BODY)) == [PlaintextReceived(BODY)]


@pytest.mark.parametrize(
    "pieces",
    [
        (BODY,),
        (b"head", BODY),
        (b"head", BODY[:100], BODY[:20_000], b"tail", b"er"),
        (BODY[:20_000], BODY[:20_000]),
        (b"", b"x", b""),
        (b"",),
        (),
    ],
)
def test_pieces_arrive_as_one_stream(handshake: Handshake, pieces: tuple[bytes, ...]):
    handshake.server.send(*pieces)
    assert handshake.server.bytes_to_send >= sum(map(len, pieces))
    assert handshake.client.read(handshake.server.data_to_send()) == b"".join(pieces)
    assert (handshake.server.bytes_to_send, handshake.server.data_to_send()) == (0, b"")


def test_small_pieces_share_a_record(handshake: Handshake):
    handshake.server.send(b"a" * 100)
    one = handshake.server.bytes_to_send
    handshake.server.data_to_send()
    handshake.server.send(*[b"a"] * 100)
    assert handshake.server.bytes_to_send == one


def test_data_in_the_same_segment_as_the_end_of_the_handshake(authority: Authority, signer: Signer):
    client = Client(client_context(authority))
    server = TlsContext([signer.certificate(KeyType.ECDSA_P256, HOST)]).connection()
    request = server.receive_data(client.step())[-1]
    assert isinstance(request, SignatureNeeded)
    server.provide_signature(signer.sign(request))
    data = client.step(server.data_to_send()) + client.send(BODY) + client.close()
    complete, plaintext, close_notify = server.receive_data(data)
    assert isinstance(complete, HandshakeComplete)
    assert plaintext == PlaintextReceived(BODY)
    assert close_notify == CloseNotify()


def test_the_client_closes_first_and_still_gets_its_answer(handshake: Handshake):
    data = handshake.client.send(b"request") + handshake.client.close()
    assert handshake.server.receive_data(data) == [PlaintextReceived(b"request"), CloseNotify()]
    assert handshake.server.state is State.ESTABLISHED
    handshake.server.send(b"answer")
    handshake.server.close()
    assert handshake.server.state is State.CLOSED
    assert len(handshake.server.data_to_send()) > len(b"answer") + 22


def test_the_server_closes_first_and_still_receives(handshake: Handshake):
    server, client = handshake.server, handshake.client
    server.send(b"answer")
    server.close()
    assert server.state is State.CLOSING
    assert server.receive_data(client.send(b"more")) == [PlaintextReceived(b"more")]
    assert client.read(server.data_to_send()) == b"answer"
    server.close()
    assert server.data_to_send() == b""
    assert server.receive_data(client.close()) == [CloseNotify()]
    assert server.state is State.CLOSED


def test_eof_without_close_notify_is_a_failure(handshake: Handshake):
    (event,) = handshake.server.receive_eof()
    assert event == ConnectionFailed(None, None, "the client closed the connection without close_notify")
    assert handshake.server.receive_eof() == []


def test_client_sees_no_truncation_after_close(handshake: Handshake):
    client = handshake.client
    with pytest.raises(ssl.SSLWantReadError):
        client.tls.read(1)
    handshake.server.close()
    client.read(handshake.server.data_to_send())
    assert client.tls.read(1) == b""
