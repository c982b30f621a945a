from __future__ import annotations

import ssl

import pytest

from hsm.messages import KeyType, SignatureScheme
from tests.unit.tls.peers import Authority, Client, Signer, client_context, shake_hands, until_suspended
from tlsproxy.tls.context import TlsContext, TlsProfile
from tlsproxy.tls.engine import State, live_jobs
from tlsproxy.tls.events import (
    ClientHelloReceived,
    HandshakeComplete,
    HandshakeFailed,
    PlaintextReceived,
    SignatureNeeded,
)

HOST = "www.example.com"
RSA_SCHEMES = {"TLSv1.2": SignatureScheme.RSA_PSS_RSAE_SHA256, "TLSv1.3": SignatureScheme.RSA_PSS_RSAE_SHA256}
SCHEMES = {
    KeyType.ECDSA_P256: SignatureScheme.ECDSA_SECP256R1_SHA256,
    KeyType.ECDSA_P384: SignatureScheme.ECDSA_SECP384R1_SHA384,
    KeyType.RSA_2048: SignatureScheme.RSA_PSS_RSAE_SHA256,
    KeyType.RSA_3072: SignatureScheme.RSA_PSS_RSAE_SHA256,
}


@pytest.mark.parametrize("key_type", SCHEMES)
def test_tls13_with_each_key_type(authority: Authority, signer: Signer, key_type: KeyType):
    certificate = signer.certificate(key_type, HOST)
    handshake = shake_hands(TlsContext([certificate]), Client(client_context(authority, alpn=["http/1.1"])), signer)
    assert handshake.client.connected
    assert [type(event) for event in handshake.events] == [ClientHelloReceived, SignatureNeeded, HandshakeComplete]
    assert handshake.event(SignatureNeeded).scheme is SCHEMES[key_type]
    assert handshake.event(SignatureNeeded).certificate is certificate
    assert handshake.event(HandshakeComplete) == HandshakeComplete(
        tls_version="TLSv1.3",
        cipher="TLS_AES_128_GCM_SHA256",
        group=handshake.event(HandshakeComplete).group,
        scheme=SCHEMES[key_type],
        alpn=b"http/1.1",
        resumed=False,
        server_name=HOST,
        certificate=certificate,
    )


@pytest.mark.parametrize("key_type", SCHEMES)
def test_tls12_with_each_key_type(authority: Authority, signer: Signer, key_type: KeyType):
    certificate = signer.certificate(key_type, HOST)
    handshake = shake_hands(TlsContext([certificate]), Client(client_context(authority, tls12=True)), signer)
    complete = handshake.event(HandshakeComplete)
    assert (complete.tls_version, complete.alpn) == ("TLSv1.2", None)
    assert complete.cipher == f"ECDHE-{'RSA' if key_type.is_rsa else 'ECDSA'}-AES128-GCM-SHA256"
    assert complete.scheme in key_type.schemes


def test_modern_profile_refuses_tls12(authority: Authority, signer: Signer):
    context = TlsContext([signer.certificate(KeyType.ECDSA_P256, HOST)], profile=TlsProfile.MODERN)
    client = Client(client_context(authority, tls12=True))
    with pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
        shake_hands(context, client, signer)


def test_failed_signature_ends_in_internal_error(authority: Authority, signer: Signer):
    client = Client(client_context(authority))
    server, _ = until_suspended(TlsContext([signer.certificate(KeyType.ECDSA_P256, HOST)]), client)
    assert (server.state, live_jobs()) == (State.SUSPENDED, 1)
    assert server.fail_signature("no token") == [HandshakeFailed(80, None, "no token")]
    assert server.state is State.CLOSED
    with pytest.raises(ssl.SSLError, match="INTERNAL_ERROR"):
        client.step(server.data_to_send())


def test_data_flows_both_ways(authority: Authority, signer: Signer):
    context = TlsContext([signer.certificate(KeyType.ECDSA_P256, HOST)])
    handshake = shake_hands(context, Client(client_context(authority)), signer)
    assert handshake.server.receive_data(handshake.client.send(b"ping")) == [PlaintextReceived(b"ping")]
    handshake.server.send(b"po", b"ng")
    assert handshake.client.read(handshake.server.data_to_send()) == b"pong"
