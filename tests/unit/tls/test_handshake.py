from __future__ import annotations

import ssl

import pytest

from hsm.messages import KeyType, SignatureScheme
from tests.unit.tls.peers import Authority, Client, Signer, client_context, shake_hands, until_suspended
from tlsproxy.tls.certificates import CertificateError
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


def test_a_token_without_pss_signs_for_tls12(authority: Authority, signer: Signer):
    pkcs1 = [scheme for scheme in SignatureScheme if scheme.label.startswith("rsa_pkcs1")]
    limited = signer.certificate(KeyType.RSA_2048, HOST).limited_to(pkcs1)
    for certificates in ([limited], [signer.certificate(KeyType.RSA_2048, "other.example"), limited]):
        handshake = shake_hands(TlsContext(certificates), Client(client_context(authority)), signer)
        complete = handshake.event(HandshakeComplete)
        assert (complete.tls_version, complete.scheme) == ("TLSv1.2", SignatureScheme.RSA_PKCS1_SHA256)
    with pytest.raises(CertificateError, match="a key that signs with RSA-PSS expected"):
        TlsContext([limited], profile=TlsProfile.MODERN)


@pytest.mark.parametrize(
    ("server_name", "expected"),
    [("a.example", "a.example"), ("x.b.example", "*.b.example"), ("c.example", "a.example"), (None, "a.example")],
)
@pytest.mark.parametrize("tls12", [True, False])
def test_the_server_name_selects(
    authority: Authority, signer: Signer, server_name: str | None, expected: str, tls12: bool
):
    client_tls = client_context(authority, tls12=tls12)
    client_tls.check_hostname = False
    context = TlsContext([signer.certificate(KeyType.ECDSA_P256, name) for name in ("a.example", "*.b.example")])
    handshake = shake_hands(context, Client(client_tls, server_name), signer)
    assert handshake.event(ClientHelloReceived).server_name == server_name
    assert handshake.event(HandshakeComplete).certificate.dns_names == (expected,)
    assert handshake.client.tls.getpeercert()["subjectAltName"] == (("DNS", expected),)


@pytest.mark.parametrize(
    ("tls12", "ciphers", "expected"),
    [
        (False, None, KeyType.ECDSA_P256),
        (True, None, KeyType.ECDSA_P256),
        (True, "ECDHE-RSA-AES128-GCM-SHA256", KeyType.RSA_2048),
    ],
)
def test_two_key_types_for_one_name(
    authority: Authority, signer: Signer, tls12: bool, ciphers: str | None, expected: KeyType
):
    context = TlsContext([signer.certificate(key_type, HOST) for key_type in (KeyType.ECDSA_P256, KeyType.RSA_2048)])
    handshake = shake_hands(context, Client(client_context(authority, tls12=tls12, ciphers=ciphers)), signer)
    assert handshake.event(SignatureNeeded).certificate.key_type is expected
    assert handshake.client.connected


def test_a_remembered_choice_is_no_other_clients(authority: Authority, signer: Signer):
    """One context: every second client comes with a name or a version that an earlier one of its kind did not have."""
    contexts = [client_context(authority, tls12=tls12) for tls12 in (False, True)]
    context = TlsContext([signer.certificate(KeyType.ECDSA_P256, name) for name in ("a.example", "b.example")])
    long_name = "x" * 40 + ".a" * 100
    for _ in range(2):
        for client_tls, version in zip(contexts, ("TLSv1.3", "TLSv1.2"), strict=True):
            client_tls.check_hostname = False
            for name, expected in (("a.example", "a.example"), ("b.example", "b.example"), (long_name, "a.example")):
                complete = shake_hands(context, Client(client_tls, name), signer).event(HandshakeComplete)
                assert (complete.server_name, complete.tls_version) == (name, version)
                assert complete.certificate.dns_names == (expected,)


def test_our_order_of_alpn_protocols_decides(authority: Authority, signer: Signer):
    context = TlsContext([signer.certificate(KeyType.ECDSA_P256, HOST)], alpn_protocols=[b"first", b"second"])
    handshake = shake_hands(context, Client(client_context(authority, alpn=["second", "first"])), signer)
    assert handshake.event(ClientHelloReceived).alpn_protocols == (b"second", b"first")
    assert handshake.event(HandshakeComplete).alpn == b"first"
    assert handshake.client.tls.selected_alpn_protocol() == "first"


def test_without_protocols_of_ours_alpn_is_ignored(authority: Authority, signer: Signer):
    context = TlsContext([signer.certificate(KeyType.ECDSA_P256, HOST)], alpn_protocols=())
    handshake = shake_hands(context, Client(client_context(authority, alpn=["h2"])), signer)
    assert handshake.event(HandshakeComplete).alpn is None


def test_interleaved_suspended_handshakes_keep_their_signatures_apart(authority: Authority, signer: Signer):
    contexts = [TlsContext([signer.certificate(key_type, HOST)]) for key_type in SCHEMES]
    clients = [Client(client_context(authority, tls12=bool(number % 2))) for number in range(40)]
    suspended = [until_suspended(contexts[number % 4], client) for number, client in enumerate(clients)]
    assert live_jobs() == 40
    for (server, request), client in reversed(list(zip(suspended, clients, strict=True))):
        server.provide_signature(signer.sign(request))
        server.receive_data(client.step(server.data_to_send()))
        client.step(server.data_to_send())
        assert client.connected


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
