from __future__ import annotations

import pytest

from hsm.messages import KeyType
from tests.unit.tls.peers import Authority, Client, Signer, client_context, shake_hands, until_suspended
from tlsproxy.tls.context import TicketKey, TlsContext
from tlsproxy.tls.engine import State, TlsConnection, live_jobs
from tlsproxy.tls.errors import (
    ConnectionClosedError,
    HandshakeIncompleteError,
    NoSignatureWantedError,
    SignatureLengthError,
    UsedAfterAbortError,
)
from tlsproxy.tls.events import HandshakeComplete

HOST = "www.example.com"


@pytest.fixture
def context(signer: Signer) -> TlsContext:
    return TlsContext([signer.certificate(KeyType.ECDSA_P256, HOST)])


@pytest.fixture
def suspended(authority: Authority, context: TlsContext) -> TlsConnection:
    return until_suspended(context, Client(client_context(authority)))[0]


@pytest.fixture
def established(authority: Authority, signer: Signer, context: TlsContext) -> TlsConnection:
    return shake_hands(context, Client(client_context(authority)), signer).server


def test_a_signature_that_nobody_asked_for(context: TlsContext, established: TlsConnection):
    for server in (context.connection(), established):
        with pytest.raises(NoSignatureWantedError):
            server.provide_signature(b"x" * 70)
        with pytest.raises(NoSignatureWantedError):
            server.fail_signature("no token")


def test_a_second_signature(authority: Authority, signer: Signer, context: TlsContext):
    client = Client(client_context(authority))
    server, request = until_suspended(context, client)
    server.provide_signature(signer.sign(request))
    with pytest.raises(NoSignatureWantedError):
        server.provide_signature(signer.sign(request))
    assert isinstance(server.receive_data(client.step(server.data_to_send()))[0], HandshakeComplete)


@pytest.mark.parametrize("length", [0, 73, 1000])
def test_a_signature_of_impossible_length_leaves_the_connection_waiting(suspended: TlsConnection, length: int):
    with pytest.raises(SignatureLengthError, match=f"72 bytes at most expected; got {length}"):
        suspended.provide_signature(b"x" * length)
    assert (suspended.state, live_jobs()) == (State.SUSPENDED, 1)
    suspended.abort()


@pytest.mark.parametrize("length", [255, 257])
def test_an_rsa_signature_has_the_length_of_the_modulus(authority: Authority, signer: Signer, length: int):
    context = TlsContext([signer.certificate(KeyType.RSA_2048, HOST)])
    server, _ = until_suspended(context, Client(client_context(authority)))
    with pytest.raises(SignatureLengthError, match=f"256 bytes expected; got {length}"):
        server.provide_signature(b"x" * length)
    server.abort()


def test_sending_and_closing_before_the_handshake_is_complete(context: TlsContext, suspended: TlsConnection):
    for server in (context.connection(), suspended):
        with pytest.raises(HandshakeIncompleteError):
            server.send(b"x")
        with pytest.raises(HandshakeIncompleteError):
            server.close()
    suspended.abort()


def test_sending_after_close(established: TlsConnection):
    established.close()
    with pytest.raises(ConnectionClosedError):
        established.send(b"x")


def test_sending_on_a_failed_connection(established: TlsConnection):
    established.receive_eof()
    with pytest.raises(ConnectionClosedError):
        established.send(b"x")
    established.close()
    assert established.receive_data(b"x") == []


def test_every_use_after_abort(established: TlsConnection):
    established.abort()
    for use in (
        lambda: established.receive_data(b"x"),
        established.receive_eof,
        lambda: established.provide_signature(b"x"),
        lambda: established.fail_signature("no token"),
        lambda: established.send(b"x"),
        established.close,
    ):
        with pytest.raises(UsedAfterAbortError):
            use()
    assert established.data_to_send() == b""
    established.abort()
    assert established.state is State.ABORTED


def test_abort_ends_a_suspended_handshake(suspended: TlsConnection):
    assert live_jobs() == 1
    suspended.abort()
    assert live_jobs() == 0
    with pytest.raises(UsedAfterAbortError):
        suspended.provide_signature(b"x" * 70)


def test_a_suspended_connection_that_is_just_dropped_ends_its_handshake(authority: Authority, context: TlsContext):
    server, _ = until_suspended(context, Client(client_context(authority)))
    assert live_jobs() == 1
    del server
    assert live_jobs() == 0


@pytest.mark.parametrize("protocols", [[b""], [b"x" * 256]])
def test_impossible_alpn_protocols(signer: Signer, protocols: list[bytes]):
    with pytest.raises(ValueError, match="ALPN protocols of 1 to 255 bytes expected"):
        TlsContext([signer.certificate(KeyType.ECDSA_P256, HOST)], alpn_protocols=protocols)


def test_a_context_needs_certificates_of_different_names(signer: Signer):
    certificate = signer.certificate(KeyType.ECDSA_P256, HOST)
    for certificates in ([], [certificate, certificate]):
        with pytest.raises(ValueError, match="certificates of different names expected"):
            TlsContext(certificates)


def test_impossible_ticket_keys(context: TlsContext):
    good = TicketKey.generate()
    for keys in ([], [good] * 17):
        with pytest.raises(ValueError, match="1 to 16 ticket keys expected"):
            context.set_ticket_keys(keys)
    for bad in (TicketKey(b"", good.aes, good.hmac), TicketKey(good.name, good.aes[1:], good.hmac)):
        with pytest.raises(ValueError, match="16, 32 and 32 bytes expected"):
            context.set_ticket_keys([good, bad])


def test_no_secret_in_a_repr(authority: Authority, context: TlsContext):
    key = TicketKey.generate()
    assert repr(key) == f"TicketKey(name={key.name!r})"
    server, request = until_suspended(context, Client(client_context(authority)))
    assert "tbs" not in repr(request)
    server.abort()
