"""A client (Python's own ssl over memory), and keys that sign in the test: the worker's part."""

from __future__ import annotations

import contextlib
import datetime
import ssl
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from hsm.messages import KeyType, SignatureScheme
from tlsproxy.tls.certificates import Certificate, load_chain
from tlsproxy.tls.context import TlsContext
from tlsproxy.tls.engine import State, TlsConnection
from tlsproxy.tls.events import Event, SignatureNeeded

NOW = datetime.datetime.now(datetime.timezone.utc)

EventType = TypeVar("EventType")
PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


def generate_key(key_type: KeyType) -> PrivateKey:
    if key_type.is_rsa:
        return rsa.generate_private_key(65537, int(key_type.value.removeprefix("rsa-")))
    return ec.generate_private_key(ec.SECP256R1() if key_type is KeyType.ECDSA_P256 else ec.SECP384R1())


def distinguished_name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def certificate_builder(
    subject: str, issuer: str, public_key: CertificatePublicKeyTypes, issuer_key: CertificatePublicKeyTypes
) -> x509.CertificateBuilder:
    """Python 3.13 asks for the key identifiers (RFC 5280 section 4.2.1.1)."""
    return (
        x509.CertificateBuilder()
        .subject_name(distinguished_name(subject))
        .issuer_name(distinguished_name(issuer))
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - datetime.timedelta(hours=1))
        .not_valid_after(NOW + datetime.timedelta(days=1))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )


class Authority:
    """A root and an intermediate CA; issues leaves as PEM chains."""

    def __init__(self) -> None:
        self.root_key = ec.generate_private_key(ec.SECP256R1())
        self.root = self._ca("root", "root", self.root_key, self.root_key)
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.intermediate = self._ca("intermediate", "root", self.key, self.root_key)

    @staticmethod
    def _ca(
        subject: str, issuer: str, key: ec.EllipticCurvePrivateKey, issuer_key: ec.EllipticCurvePrivateKey
    ) -> x509.Certificate:
        builder = certificate_builder(subject, issuer, key.public_key(), issuer_key.public_key())
        usage = dict.fromkeys(
            (
                "digital_signature",
                "content_commitment",
                "key_encipherment",
                "data_encipherment",
                "key_agreement",
                "encipher_only",
                "decipher_only",
            ),
            False,
        )
        return (
            builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(x509.KeyUsage(**usage, key_cert_sign=True, crl_sign=True), critical=True)
            .sign(issuer_key, hashes.SHA256())
        )

    def leaf_pem(self, key: PrivateKey, names: Iterable[x509.GeneralName]) -> bytes:
        builder = certificate_builder("leaf", "intermediate", key.public_key(), self.key.public_key())
        names = list(names)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self.key, hashes.SHA256()).public_bytes(Encoding.PEM)

    def chain_pem(self, key: PrivateKey, names: Iterable[x509.GeneralName]) -> bytes:
        return self.leaf_pem(key, names) + self.intermediate.public_bytes(Encoding.PEM)


class Signer:
    """Issues certificates and holds their keys: what a token does for the engine."""

    def __init__(self, authority: Authority) -> None:
        self._authority = authority
        self._keys: dict[bytes, PrivateKey] = {}
        self._generated: dict[KeyType, PrivateKey] = {}

    def certificate(self, key_type: KeyType, *dns_names: str, name: str = "") -> Certificate:
        if key_type not in self._generated:
            self._generated[key_type] = generate_key(key_type)
        key = self._generated[key_type]
        pem = self._authority.chain_pem(key, [x509.DNSName(dns_name) for dns_name in dns_names])
        certificate = load_chain(name or f"{dns_names[0]} {key_type.value}", pem, "test.pem")
        self._keys[certificate.public_key] = key
        return certificate

    def sign(self, request: SignatureNeeded) -> bytes:
        key = self._keys[request.certificate.public_key]
        hash_algorithm = {"sha256": hashes.SHA256(), "sha384": hashes.SHA384(), "sha512": hashes.SHA512()}[
            request.scheme.hash_name
        ]
        if isinstance(key, ec.EllipticCurvePrivateKey):
            return key.sign(request.tbs, ec.ECDSA(hash_algorithm))
        if request.scheme in (
            SignatureScheme.RSA_PKCS1_SHA256,
            SignatureScheme.RSA_PKCS1_SHA384,
            SignatureScheme.RSA_PKCS1_SHA512,
        ):
            return key.sign(request.tbs, padding.PKCS1v15(), hash_algorithm)
        pss = padding.PSS(padding.MGF1(hash_algorithm), padding.PSS.DIGEST_LENGTH)
        return key.sign(request.tbs, pss, hash_algorithm)


class Client:
    """A TLS client over memory."""

    def __init__(
        self,
        context: ssl.SSLContext,
        server_name: str | None = "www.example.com",
        session: ssl.SSLSession | None = None,
    ) -> None:
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=server_name, session=session)
        self.connected = False
        self.closed = False
        """The server has said that it will send no more."""

    def step(self, received: bytes = b"") -> bytes:
        """Take the server's bytes, go on with the handshake, return the client's bytes."""
        self._incoming.write(received)
        if not self.connected:
            try:
                self.tls.do_handshake()
                self.connected = True
            except ssl.SSLWantReadError:
                pass
        return self._outgoing.read()

    def pending(self) -> bytes:
        """The client's bytes that step() did not return: it raised."""
        return self._outgoing.read()

    def send(self, data: bytes) -> bytes:
        self.tls.write(data)
        return self._outgoing.read()

    def read(self, received: bytes) -> bytes:
        """Take the server's bytes; return the plaintext in them, up to a close_notify."""
        self._incoming.write(received)
        plaintext = bytearray()
        try:
            while data := self.tls.read(65536):
                plaintext += data
            self.closed = True
        except ssl.SSLZeroReturnError:
            self.closed = True
        except ssl.SSLWantReadError:
            pass
        return bytes(plaintext)

    def close(self) -> bytes:
        """Return the client's close_notify."""
        with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLSyscallError):
            self.tls.unwrap()
        return self._outgoing.read()


def client_context(
    authority: Authority, *, tls12: bool = False, alpn: Sequence[str] = (), ciphers: str | None = None
) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=authority.root.public_bytes(Encoding.PEM).decode())
    if tls12:
        context.maximum_version = ssl.TLSVersion.TLSv1_2
    if ciphers is not None:
        context.set_ciphers(ciphers)
    if alpn:
        context.set_alpn_protocols(alpn)
    return context


@dataclass
class Handshake:
    """A finished handshake: both ends, and everything the server reported."""

    client: Client
    server: TlsConnection
    events: list[Event] = field(default_factory=list)

    def event(self, kind: type[EventType]) -> EventType:
        (found,) = (event for event in self.events if isinstance(event, kind))
        return found


def shake_hands(context: TlsContext, client: Client, signer: Signer) -> Handshake:
    """Run a handshake to its end, good or bad. Raises the client's ssl.SSLError."""
    server = context.connection()
    result = Handshake(client, server)
    to_server = client.step()
    while to_server and server.state is not State.CLOSED:
        new = server.receive_data(to_server)
        result.events += new
        for event in new:
            if isinstance(event, SignatureNeeded):
                result.events += server.provide_signature(signer.sign(event))
        to_server = client.step(server.data_to_send())
    return result


def until_suspended(context: TlsContext, client: Client) -> tuple[TlsConnection, SignatureNeeded]:
    """Return a server connection that waits for a signature."""
    server = context.connection()
    request = server.receive_data(client.step())[-1]
    assert isinstance(request, SignatureNeeded)
    return server, request
