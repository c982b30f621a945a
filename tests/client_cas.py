"""CAs that certify clients in tests: certificates good and bad, CRLs, and contexts of clients that have one."""

from __future__ import annotations

import datetime
import ssl
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

NOW = datetime.datetime.now(datetime.timezone.utc)
HOUR = datetime.timedelta(hours=1)
DAY = datetime.timedelta(days=1)
PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def name_of(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _usage(*, signs_certificates: bool, signs_crls: bool) -> x509.KeyUsage:
    names = (
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "encipher_only",
        "decipher_only",
    )
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs_certificates,
        crl_sign=signs_crls,
        **dict.fromkeys(names, False),
    )


@dataclass(frozen=True)
class IssuedClient:
    """A client's certificate with the CAs to be sent along, and its key."""

    certificate: x509.Certificate
    key: PrivateKey
    issuers: Sequence[x509.Certificate] = ()

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(Encoding.DER)

    @property
    def fingerprint(self) -> str:
        return self.certificate.fingerprint(hashes.SHA256()).hex()

    def pem(self) -> bytes:
        """Chain and key in one text."""
        chain = b"".join(item.public_bytes(Encoding.PEM) for item in (self.certificate, *self.issuers))
        return chain + self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    def used_by(self, context: ssl.SSLContext) -> ssl.SSLContext:
        """Have the context's connections show it."""
        with tempfile.NamedTemporaryFile() as file:
            file.write(self.pem())
            file.flush()
            context.load_cert_chain(file.name)
        return context


class ClientCa:
    """A CA: a root, or below `parent`."""

    def __init__(
        self,
        name: str = "client root",
        parent: ClientCa | None = None,
        *,
        not_after: datetime.datetime = NOW + 30 * DAY,
        is_ca: bool = True,
        signs_certificates: bool = True,
        signs_crls: bool = True,
    ) -> None:
        self.key = new_key()
        self.parent = parent
        signer = self if parent is None else parent
        name_of_signer = name_of(name) if parent is None else parent.certificate.subject
        usage = _usage(signs_certificates=signs_certificates, signs_crls=signs_crls)
        self.certificate = (
            _builder(name_of(name), name_of_signer, self.key.public_key(), signer.key, NOW - 30 * DAY, not_after)
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .sign(signer.key, hashes.SHA256())
        )

    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    def issue(
        self,
        subject: str | x509.Name = "alice",
        *,
        key: PrivateKey | None = None,
        not_before: datetime.datetime = NOW - DAY,
        not_after: datetime.datetime = NOW + DAY,
        purpose: x509.ObjectIdentifier = ExtendedKeyUsageOID.CLIENT_AUTH,
        padding_bytes: int = 0,
    ) -> IssuedClient:
        """Return a client's certificate; `padding_bytes` make it so much larger."""
        key = key or new_key()
        name = name_of(subject) if isinstance(subject, str) else subject
        builder = _builder(name, self.certificate.subject, key.public_key(), self.key, not_before, not_after)
        builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        if padding_bytes:
            padding = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.55555.1"), bytes(padding_bytes))
            builder = builder.add_extension(padding, critical=False)
        issuers = [] if self.parent is None else [self.certificate]
        ca = self.parent
        while ca is not None and ca.parent is not None:
            issuers.append(ca.certificate)
            ca = ca.parent
        return IssuedClient(builder.sign(self.key, hashes.SHA256()), key, issuers)

    def crl(
        self,
        *revoked: IssuedClient | ClientCa,
        this_update: datetime.datetime = NOW - HOUR,
        next_update: datetime.datetime = NOW + DAY,
        delta: bool = False,
    ) -> bytes:
        """Return a CRL with `revoked`, PEM."""
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(this_update)
            .next_update(next_update)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
        )
        if delta:
            builder = builder.add_extension(x509.DeltaCRLIndicator(1), critical=True)
        for item in revoked:
            entry = x509.RevokedCertificateBuilder().serial_number(item.certificate.serial_number)
            builder = builder.add_revoked_certificate(entry.revocation_date(NOW - HOUR).build())
        return builder.sign(self.key, hashes.SHA256()).public_bytes(Encoding.PEM)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | rsa.RSAPublicKey,
    issuer_key: ec.EllipticCurvePrivateKey,
    not_before: datetime.datetime,
    not_after: datetime.datetime,
) -> x509.CertificateBuilder:
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before)
        .not_valid_after(not_after)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(identifier, critical=False)
    )
