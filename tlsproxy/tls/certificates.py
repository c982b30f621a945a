"""Certificate chains as an operator hands them over: read, checked, described."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Collection
from dataclasses import dataclass, field, replace

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from hsm.messages import KeyType, SignatureScheme
from tlsproxy.errors import TlsProxyError
from tlsproxy.tls import _openssl

_CURVES = {"secp256r1": KeyType.ECDSA_P256, "secp384r1": KeyType.ECDSA_P384}
_RSA_BITS = {2048: KeyType.RSA_2048, 3072: KeyType.RSA_3072, 4096: KeyType.RSA_4096}


class CertificateError(TlsProxyError):
    """A chain that cannot be served. `source` is where it came from, as the caller named it."""

    def __init__(self, source: str, message: str) -> None:
        super().__init__(f"{source}: {message}")
        self.source = source
        self.message = message


@dataclass(frozen=True, slots=True)
class Certificate:
    """A chain to serve, and what its leaf says. Times are aware, in UTC."""

    name: str
    chain: tuple[bytes, ...] = field(repr=False)
    """DER, leaf first."""
    key_type: KeyType
    dns_names: tuple[str, ...]
    """The leaf's subjectAltName: DNS names in lower case (`*.` kept) and IP addresses."""
    not_before: datetime.datetime
    not_after: datetime.datetime
    public_key: bytes = field(repr=False)
    """The leaf's SubjectPublicKeyInfo, DER."""
    schemes: tuple[SignatureScheme, ...]
    """What its key signs with."""

    def limited_to(self, schemes: Collection[SignatureScheme]) -> Certificate:
        """Return the same for a token that knows only `schemes`. Raises CertificateError when none is left."""
        left = tuple(scheme for scheme in self.schemes if scheme in schemes)
        if not left:
            raise CertificateError(self.name, f"a token that signs with {self.key_type.value} keys for TLS expected")
        return replace(self, schemes=left)

    def is_valid_at(self, moment: datetime.datetime) -> bool:
        """Tell whether `moment` (aware) lies in the leaf's validity period (RFC 5280 section 4.1.2.5)."""
        return self.not_before <= moment <= self.not_after


def load_chain(name: str, pem: bytes, source: str) -> Certificate:
    """Return the certificate `name` from PEM text: the leaf, then its issuers in order (the root may be left out).

    `source` names the text in errors, usually its path. Raises CertificateError.
    """
    chain = load_pem_certificates(pem, source)
    leaf = chain[0]
    try:
        key_type = _key_type(leaf, source)
        dns_names = _dns_names(leaf)
    except ValueError as error:
        raise malformed("certificates", error, source) from None
    if len(chain) > _openssl.MAX_CHAIN:
        raise CertificateError(source, f"at most {_openssl.MAX_CHAIN} certificates expected; got {len(chain)}")
    _check_order(chain, source)
    return Certificate(
        name=name,
        chain=tuple(certificate.public_bytes(Encoding.DER) for certificate in chain),
        key_type=key_type,
        dns_names=dns_names,
        not_before=leaf.not_valid_before_utc,
        not_after=leaf.not_valid_after_utc,
        public_key=leaf.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        schemes=key_type.schemes,
    )


def load_pem_certificates(pem: bytes, source: str) -> list[x509.Certificate]:
    """Return the certificates in PEM text, one at least. Raises CertificateError."""
    if b"PRIVATE KEY-----" in pem:
        raise CertificateError(
            source, "certificates only expected; got a private key as well: keys belong in the token, never in a file"
        )
    if b"-----BEGIN CERTIFICATE-----" not in pem:
        raise CertificateError(source, "PEM certificates expected; got none")
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise malformed("certificates", error, source) from None


def malformed(what: str, error: ValueError, source: str) -> CertificateError:
    """Return the error that PEM text deserves whose content cannot be read."""
    reason = str(error).partition("\n")[0]
    return CertificateError(source, f"PEM {what} expected; got malformed ones: {reason}")


def is_issued_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    """Tell whether `issuer` is named in the certificate and has signed it."""
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _key_type(leaf: x509.Certificate, source: str) -> KeyType:
    key = leaf.public_key()
    if isinstance(key, ec.EllipticCurvePublicKey):
        found = f"EC {key.curve.name}"
        key_type = _CURVES.get(key.curve.name)
    elif isinstance(key, rsa.RSAPublicKey):
        found = f"RSA of {key.key_size} bits"
        key_type = _RSA_BITS.get(key.key_size)
    else:
        found = type(key).__name__.removesuffix("PublicKey")
        key_type = None
    if key_type is None:
        expected = ", ".join(known.value for known in KeyType)
        raise CertificateError(source, f"a key of type {expected} expected; got {found}")
    return key_type


def _dns_names(leaf: x509.Certificate) -> tuple[str, ...]:
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    dns_names = [name.lower() for name in names.get_values_for_type(x509.DNSName)]
    return (*dns_names, *(str(address) for address in names.get_values_for_type(x509.IPAddress)))


def _check_order(chain: list[x509.Certificate], source: str) -> None:
    for position, (certificate, issuer) in enumerate(itertools.pairwise(chain), start=1):
        if not is_issued_by(certificate, issuer):
            raise CertificateError(
                source,
                f"each certificate must be issued by the next, leaf first; number {position} "
                f"({certificate.subject.rfc4514_string()}) is not issued by number {position + 1} "
                f"({issuer.subject.rfc4514_string()})",
            )
