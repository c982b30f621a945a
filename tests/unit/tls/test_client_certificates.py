"""Clients' certificates in handshakes: who is served, who is refused and why, and whom a ticket stands for."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import ssl
import time
from collections.abc import Callable
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from hsm.messages import KeyType
from tests.client_cas import DAY, HOUR, NOW, ClientCa, IssuedClient, PrivateKey
from tests.unit.tls.peers import Authority, Client, Handshake, Signer, client_context
from tests.unit.tls.test_tickets import ticket
from tlsproxy.tls.certificates import Certificate
from tlsproxy.tls.client_authorities import client_authorities, load_client_cas, load_crls
from tlsproxy.tls.client_certificates import ClientCertificate, ClientResult, ClientVerification
from tlsproxy.tls.context import TicketKey, TlsContext
from tlsproxy.tls.engine import State
from tlsproxy.tls.events import HandshakeComplete, HandshakeFailed, SignatureNeeded

HOST = "www.example.com"
HANDSHAKE_FAILURE, BAD_CERTIFICATE, UNSUPPORTED_CERTIFICATE, REVOKED, EXPIRED = 40, 42, 43, 44, 45
ILLEGAL_PARAMETER, UNKNOWN_CA, DECRYPT_ERROR, CERTIFICATE_REQUIRED = 47, 48, 51, 116
TICKET_KEY, NEWER_TICKET_KEY = TicketKey.generate(), TicketKey.generate()
ROOT = ClientCa()
BELOW = ClientCa("below", ROOT)
FURTHER_BELOW = ClientCa("further below", BELOW)
OTHER = ClientCa("another root")
ALICE = ROOT.issue()
SERVED: list[Certificate] = []


def served(signer: Signer) -> list[Certificate]:
    """Return the certificates that every listener has: tickets are bound to them, too."""
    if not SERVED:
        SERVED.extend(signer.certificate(key_type, HOST) for key_type in (KeyType.ECDSA_P256, KeyType.RSA_2048))
    return SERVED


def listener(
    signer: Signer, *cas: ClientCa, crls: bytes | None = None, required: bool = True, depth: int = 1
) -> TlsContext:
    """Return the context of a listener that verifies its clients; all have the same ticket key."""
    loaded = load_client_cas(b"".join(ca.pem() for ca in cas or (ROOT,)), "ca.pem")
    revoked = () if crls is None else load_crls(crls, loaded, "crl.pem")
    verification = ClientVerification(client_authorities(loaded, revoked), required, depth)
    context = TlsContext(served(signer), client_verification=verification)
    context.set_ticket_keys([TICKET_KEY])
    return context


def listener_for_all(signer: Signer) -> TlsContext:
    """Return the context of one that asks for no certificates."""
    context = TlsContext(served(signer))
    context.set_ticket_keys([TICKET_KEY])
    return context


class Someone:
    """A client with a certificate, or none. Its SSLContext is one, so that it can show its tickets anywhere."""

    def __init__(
        self, authority: Authority, signer: Signer, version: str, certificate: IssuedClient | None, **settings: Any
    ) -> None:
        self._signer = signer
        self._tls = client_context(authority, tls12=version == "TLSv1.2", **settings)
        if certificate is not None:
            certificate.used_by(self._tls)

    def connects(self, context: TlsContext, session: ssl.SSLSession | None = None) -> Handshake:
        """Shake hands, whatever comes of it."""
        server = context.connection()
        result = Handshake(Client(self._tls, HOST, session), server)
        with contextlib.suppress(ssl.SSLError):
            to_server = result.client.step()
            while to_server and server.state is not State.CLOSED:
                new = server.receive_data(to_server)
                result.events += new
                for event in new:
                    if isinstance(event, SignatureNeeded):
                        result.events += server.provide_signature(self._signer.sign(event))
                to_server = result.client.step(server.data_to_send())
        return result

    def resumes(self, context: TlsContext, session: ssl.SSLSession) -> bool:
        return self.connects(context, session).event(HandshakeComplete).resumed


@pytest.fixture(params=["TLSv1.2", "TLSv1.3"])
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def someone(authority: Authority, signer: Signer, version: str) -> Callable[..., Someone]:
    return lambda certificate=None, **settings: Someone(authority, signer, version, certificate, **settings)


def test_who_has_a_certificate_is_served_and_known(signer: Signer, someone: Callable[..., Someone]) -> None:
    for required in (True, False):
        complete = someone(ALICE).connects(listener(signer, required=required)).event(HandshakeComplete)
        assert complete.client_certificate == ClientCertificate(ALICE.der, ALICE.fingerprint, "CN=alice", "alice")


def test_who_has_none_is_served_only_where_it_is_optional(
    signer: Signer, version: str, someone: Callable[..., Someone]
) -> None:
    complete = someone().connects(listener(signer, required=False)).event(HandshakeComplete)
    assert complete.client_certificate is None
    failed = someone().connects(listener(signer)).event(HandshakeFailed)
    assert (failed.reason, failed.client_result) == ("client certificate: none was sent", ClientResult.MISSING)
    assert failed.alert_sent == (CERTIFICATE_REQUIRED if version == "TLSv1.3" else HANDSHAKE_FAILURE)


def test_in_tls13_the_client_hears_of_it_after_its_own_handshake(signer: Signer, authority: Authority) -> None:
    handshake = Someone(authority, signer, "TLSv1.3", None).connects(listener(signer))
    assert handshake.client.connected
    assert not [event for event in handshake.events if isinstance(event, HandshakeComplete)]
    with pytest.raises(ssl.SSLError, match=r"(?i)certificate.required"):
        handshake.client.read(b"")


def forged(certificate: IssuedClient) -> IssuedClient:
    """Return it with another signature."""
    der = bytearray(certificate.der)
    der[-1] ^= 1
    return dataclasses.replace(certificate, certificate=x509.load_der_x509_certificate(bytes(der)))


BAD = {
    "expired": (
        (ROOT.issue(not_before=NOW - 9 * DAY, not_after=NOW - DAY)), {}, EXPIRED, "certificate has expired",
    ),
    "not yet valid": (
        (ROOT.issue(not_before=NOW + DAY, not_after=NOW + 9 * DAY)), {}, BAD_CERTIFICATE,
        "certificate is not yet valid",
    ),
    "of another CA": (OTHER.issue(), {}, UNKNOWN_CA, "unable to get local issuer certificate"),
    "self-signed": (
        IssuedClient(OTHER.certificate, OTHER.key), {}, UNKNOWN_CA, "self-signed certificate",
    ),
    "of a CA that only has the name": (
        ClientCa("client root").issue(), {}, UNKNOWN_CA, "unable to get local issuer certificate",
    ),
    "of a forger": (forged(ALICE), {}, DECRYPT_ERROR, "certificate signature failure"),
    "of a server": (
        ROOT.issue(purpose=ExtendedKeyUsageOID.SERVER_AUTH), {}, UNSUPPORTED_CERTIFICATE,
        "unsuitable certificate purpose",
    ),
    "of a client that is no CA": (
        ClientCa("no CA", ROOT, is_ca=False).issue(), {}, UNKNOWN_CA, "invalid CA certificate",
    ),
    "too deep": (FURTHER_BELOW.issue(), {}, UNKNOWN_CA, "certificate chain too long"),
    "too deep for 0": (BELOW.issue(), {"depth": 0}, UNKNOWN_CA, "certificate chain too long"),
    "revoked": (ALICE, {"crls": ROOT.crl(ALICE)}, REVOKED, "certificate revoked"),
    "of a CA that is revoked": (
        BELOW.issue(), {"cas": (ROOT, BELOW), "crls": ROOT.crl(BELOW) + BELOW.crl()}, REVOKED, "certificate revoked",
    ),
    "under a CRL that has expired": (
        ALICE, {"crls": ROOT.crl(next_update=NOW - HOUR / 2)}, EXPIRED, "CRL has expired",
    ),
    "under a CRL of the future": (
        ALICE, {"crls": ROOT.crl(this_update=NOW + HOUR)}, BAD_CERTIFICATE, "CRL is not yet valid",
    ),
    "below a CA that has no CRL": (
        BELOW.issue(), {"crls": ROOT.crl()}, UNKNOWN_CA, "unable to get certificate CRL",
    ),
}  # fmt: skip


@pytest.mark.parametrize("required", [True, False])
@pytest.mark.parametrize("case", BAD)
def test_a_bad_certificate_is_refused_with_the_alert_that_says_why(
    signer: Signer, someone: Callable[..., Someone], case: str, required: bool
) -> None:
    certificate, settings, alert, reason = BAD[case]
    settings = {"cas": (ROOT,), **settings}
    context = listener(signer, *settings.pop("cas"), required=required, **settings)
    failed = someone(certificate).connects(context).event(HandshakeFailed)
    assert (failed.reason, failed.client_result) == (f"client certificate: {reason}", ClientResult.REFUSED)
    assert failed.alert_sent == alert


def test_chains_up_to_the_depth_and_those_a_crl_does_not_name_are_served(
    signer: Signer, someone: Callable[..., Someone]
) -> None:
    someone(BELOW.issue()).connects(listener(signer)).event(HandshakeComplete)
    someone(ALICE).connects(listener(signer, depth=0)).event(HandshakeComplete)
    someone(FURTHER_BELOW.issue()).connects(listener(signer, depth=2)).event(HandshakeComplete)
    crls = ROOT.crl(ROOT.issue("bob")) + BELOW.crl()
    for certificate in (ALICE, BELOW.issue()):
        someone(certificate).connects(listener(signer, ROOT, BELOW, crls=crls)).event(HandshakeComplete)


KEYS: list[Callable[[], PrivateKey]] = [
    lambda: rsa.generate_private_key(65537, 2048),
    lambda: ec.generate_private_key(ec.SECP384R1()),
    ed25519.Ed25519PrivateKey.generate,
]


@pytest.mark.parametrize("key", KEYS)
def test_the_clients_key_need_not_be_of_our_keys_type(
    signer: Signer, someone: Callable[..., Someone], key: Callable[[], PrivateKey]
) -> None:
    someone(ROOT.issue(key=key())).connects(listener(signer)).event(HandshakeComplete)


def test_clients_are_told_the_names_of_the_cas(signer: Signer, authority: Authority) -> None:
    received = []
    someone = Someone(authority, signer, "TLSv1.2", ALICE)
    someone._tls._msg_callback = lambda connection, direction, version, content, message, data: received.append(data)
    someone.connects(listener(signer, ROOT, OTHER)).event(HandshakeComplete)
    (request,) = (data for data in received if data[:1] == b"\x0d")
    assert all(ca.certificate.subject.public_bytes() in request for ca in (ROOT, OTHER))


def test_our_own_chain_is_not_completed_by_the_cas_of_clients(signer: Signer, authority: Authority) -> None:
    received = []
    cas = load_client_cas(
        b"".join(ca.public_bytes(Encoding.PEM) for ca in (authority.root, authority.intermediate)), ""
    )
    leaf_alone = dataclasses.replace(served(signer)[0], chain=served(signer)[0].chain[:1])
    verification = ClientVerification(client_authorities(cas, ()), required=False, depth=1)
    someone = Someone(authority, signer, "TLSv1.2", None)
    someone._tls._msg_callback = lambda connection, direction, version, content, message, data: received.append(data)
    someone.connects(TlsContext([leaf_alone], client_verification=verification))
    (sent,) = (data for data in received if data[:1] == b"\x0b")
    assert leaf_alone.chain[0] in sent
    assert authority.intermediate.public_bytes(Encoding.DER) not in sent


def test_a_chain_that_is_too_large_is_refused(signer: Signer, someone: Callable[..., Someone]) -> None:
    someone(ROOT.issue(padding_bytes=20_000)).connects(listener(signer)).event(HandshakeComplete)
    failed = someone(ROOT.issue(padding_bytes=40_000)).connects(listener(signer)).event(HandshakeFailed)
    assert (failed.alert_sent, failed.reason) == (ILLEGAL_PARAMETER, "excessive message size")


@pytest.mark.parametrize(
    ("subject", "text", "common_name"),
    [
        ([], "", None),
        ([(NameOID.ORGANIZATION_NAME, "Example")], "O=Example", None),
        (
            [(NameOID.COUNTRY_NAME, "DE"), (NameOID.COMMON_NAME, "Bärbel"), (NameOID.COMMON_NAME, "b")],
            "CN=b,CN=B\\C3\\A4rbel,C=DE",
            "Bärbel",
        ),
        ([(NameOID.COMMON_NAME, 'a,b+c"\n\r\x00\x7f')], 'CN=a\\,b\\+c\\"\\0A\\0D\\00\\7F', 'a,b+c"\n\r\x00\x7f'),
    ],
)
def test_a_subject_is_shown_with_everything_escaped(
    signer: Signer,
    someone: Callable[..., Someone],
    subject: list[tuple[x509.ObjectIdentifier, str]],
    text: str,
    common_name: str | None,
) -> None:
    name = x509.Name([x509.NameAttribute(*attribute) for attribute in subject])
    found = someone(ROOT.issue(name)).connects(listener(signer)).event(HandshakeComplete).client_certificate
    assert found is not None
    assert (found.subject, found.common_name) == (text, common_name)


def test_what_is_resumed_is_the_same_client_and_needs_no_signature(
    signer: Signer, someone: Callable[..., Someone]
) -> None:
    context = listener(signer, crls=ROOT.crl())
    alice = someone(ALICE)
    again = alice.connects(context, ticket(alice.connects(context)))
    assert not [event for event in again.events if isinstance(event, SignatureNeeded)]
    complete = again.event(HandshakeComplete)
    assert complete.resumed
    assert complete.client_certificate == ClientCertificate(ALICE.der, ALICE.fingerprint, "CN=alice", "alice")
    nobody = someone()
    optional = listener(signer, required=False)
    complete = nobody.connects(optional, ticket(nobody.connects(optional))).event(HandshakeComplete)
    assert (complete.resumed, complete.client_certificate) == (True, None)


def test_a_ticket_resumes_only_where_clients_are_verified_as_they_were(
    signer: Signer, someone: Callable[..., Someone]
) -> None:
    alice = someone(ALICE)
    crl = ROOT.crl()
    listeners = [
        (listener(signer, crls=crl), listener(signer, crls=crl)),
        (listener(signer), listener(signer)),
        (listener(signer, required=False), listener(signer, required=False)),
        (listener(signer, depth=2), listener(signer, depth=2)),
        (listener(signer, ROOT, OTHER), listener(signer, ROOT, OTHER)),
        (listener_for_all(signer), listener_for_all(signer)),
    ]
    for i, (issuing, _) in enumerate(listeners):
        for j, (_, asked) in enumerate(listeners):
            assert alice.resumes(asked, ticket(alice.connects(issuing))) is (i == j), (i, j)


def test_a_ticket_brings_nobody_past_a_crl_that_is_new(signer: Signer, someone: Callable[..., Someone]) -> None:
    alice = someone(ALICE)
    session = ticket(alice.connects(listener(signer, crls=ROOT.crl())))
    failed = alice.connects(listener(signer, crls=ROOT.crl(ALICE)), session).event(HandshakeFailed)
    assert (failed.alert_sent, failed.client_result) == (REVOKED, ClientResult.REFUSED)


def test_a_ticket_of_a_listener_that_asks_nobody_brings_nobody_in(
    signer: Signer, someone: Callable[..., Someone]
) -> None:
    nobody = someone()
    for elsewhere in (listener_for_all(signer), listener(signer, required=False)):
        failed = nobody.connects(listener(signer), ticket(nobody.connects(elsewhere))).event(HandshakeFailed)
        assert failed.client_result is ClientResult.MISSING


def test_a_ticket_outlives_neither_certificate_nor_ca_nor_crl(authority: Authority, signer: Signer) -> None:
    """Renewed tickets included: what counts is when the certificate was shown."""
    moment = datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0) + datetime.timedelta(seconds=4)
    cases = {
        "lasting": (ALICE, ROOT.crl()),
        "certificate": (ROOT.issue(not_after=moment), None),
        "CA": (ClientCa("short", ROOT, not_after=moment).issue(), None),
        "CRL": (ALICE, ROOT.crl(next_update=moment)),
    }
    resumable = []
    for name, (certificate, crls) in cases.items():
        for version in ("TLSv1.2", "TLSv1.3"):
            context = listener(signer, crls=crls)
            client = Someone(authority, signer, version, certificate)
            session = ticket(client.connects(context))
            context.set_ticket_keys([NEWER_TICKET_KEY, TICKET_KEY])
            renewing = client.connects(context, session)
            assert renewing.event(HandshakeComplete).resumed
            context.set_ticket_keys([NEWER_TICKET_KEY])
            resumable.append((name, client, context, ticket(renewing)))
    while datetime.datetime.now(datetime.timezone.utc) <= moment + datetime.timedelta(seconds=1):
        time.sleep(0.1)
    for name, client, context, session in resumable:
        events = client.connects(context, session).events
        assert any(isinstance(event, HandshakeComplete) and event.resumed for event in events) is (name == "lasting")
