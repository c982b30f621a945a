from __future__ import annotations

import ssl

import pytest

from hsm.messages import KeyType
from tests.unit.tls.peers import Authority, Client, Handshake, Signer, client_context, shake_hands
from tlsproxy.tls.context import TicketKey, TlsContext
from tlsproxy.tls.events import ClientHelloReceived, HandshakeComplete, SignatureNeeded

HOST = "www.example.com"
OLD, NEW = TicketKey.generate(), TicketKey.generate()


def context_with(signer: Signer, *keys: TicketKey) -> TlsContext:
    context = TlsContext([signer.certificate(KeyType.ECDSA_P256, HOST)])
    context.set_ticket_keys(keys)
    return context


def ticket(handshake: Handshake) -> ssl.SSLSession:
    """The client's newest session; in TLS 1.3 it comes with the first bytes after the handshake."""
    handshake.server.send(b"hello")
    assert handshake.client.read(handshake.server.data_to_send()) == b"hello"
    assert handshake.client.tls.session is not None
    return handshake.client.tls.session


def resumes(context: TlsContext, client: Client, signer: Signer) -> bool:
    handshake = shake_hands(context, client, signer)
    complete = handshake.event(HandshakeComplete)
    handshake.event(ClientHelloReceived)
    asked = any(isinstance(event, SignatureNeeded) for event in handshake.events)
    assert complete.resumed is not asked
    assert (complete.scheme is None) is complete.resumed
    return complete.resumed


@pytest.fixture(params=["TLSv1.2", "TLSv1.3"])
def client_tls(request: pytest.FixtureRequest, authority: Authority) -> ssl.SSLContext:
    return client_context(authority, tls12=request.param == "TLSv1.2")


def test_a_ticket_resumes_without_a_signature(signer: Signer, client_tls: ssl.SSLContext):
    context = context_with(signer, NEW)
    session = ticket(shake_hands(context, Client(client_tls), signer))
    assert resumes(context, Client(client_tls, session=session), signer)


def test_another_process_with_the_same_keys_resumes(signer: Signer, client_tls: ssl.SSLContext):
    certificate = signer.certificate(KeyType.ECDSA_P256, HOST)
    contexts = [TlsContext([certificate]) for _ in range(2)]
    for context in contexts:
        context.set_ticket_keys([NEW])
    session = ticket(shake_hands(contexts[0], Client(client_tls), signer))
    assert resumes(contexts[1], Client(client_tls, session=session), signer)


def test_without_the_key_the_handshake_is_a_full_one(signer: Signer, client_tls: ssl.SSLContext):
    context = context_with(signer, OLD)
    session = ticket(shake_hands(context, Client(client_tls), signer))
    context.set_ticket_keys([NEW])
    assert not resumes(context, Client(client_tls, session=session), signer)


def test_rotation_keeps_old_tickets_and_renews_them(signer: Signer, client_tls: ssl.SSLContext):
    context = context_with(signer, OLD)
    session = ticket(shake_hands(context, Client(client_tls), signer))
    context.set_ticket_keys([NEW, OLD])
    resumed = shake_hands(context, Client(client_tls, session=session), signer)
    assert resumed.event(HandshakeComplete).resumed
    renewed = ticket(resumed)
    context.set_ticket_keys([NEW])
    assert resumes(context, Client(client_tls, session=renewed), signer)


def test_a_forged_ticket_is_ignored(signer: Signer, client_tls: ssl.SSLContext):
    context = context_with(signer, OLD)
    session = ticket(shake_hands(context, Client(client_tls), signer))
    context.set_ticket_keys([TicketKey(OLD.name, OLD.aes, NEW.hmac)])
    assert not resumes(context, Client(client_tls, session=session), signer)


def test_a_ticket_does_not_resume_under_another_certificate(
    authority: Authority, signer: Signer, client_tls: ssl.SSLContext
):
    client_tls.check_hostname = False
    certificates = [signer.certificate(KeyType.ECDSA_P256, name) for name in ("a.example", "b.example")]
    context = TlsContext(certificates)
    session = ticket(shake_hands(context, Client(client_tls, "b.example"), signer))
    assert not resumes(context, Client(client_tls, "a.example", session=session), signer)
    assert resumes(context, Client(client_tls, "b.example", session=session), signer)


def test_one_ticket_per_handshake(authority: Authority, signer: Signer):
    received = []
    client_tls = client_context(authority)
    client_tls._msg_callback = lambda connection, direction, version, content, message, data: received.append(
        (direction, getattr(message, "name", ""))
    )
    ticket(shake_hands(context_with(signer, NEW), Client(client_tls), signer))
    assert received.count(("read", "NEWSESSION_TICKET")) == 1
