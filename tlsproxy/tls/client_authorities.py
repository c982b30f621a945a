"""The CAs by which a listener verifies its clients, and their CRLs (RFC 5280), as an operator hands them over."""

from __future__ import annotations

import datetime
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding

from tlsproxy.tls.certificates import CertificateError, is_issued_by, load_pem_certificates, malformed

_MAX_NAMES_BYTES = 0xFFFF
"""RFC 8446 section 4.2.4: so long is the list of CA names that clients are sent at most."""
_CRL = re.compile(rb"-----BEGIN X509 CRL-----.+?-----END X509 CRL-----", re.DOTALL)

ExtensionT = TypeVar("ExtensionT", bound=x509.ExtensionType)


@dataclass(frozen=True, slots=True)
class ClientAuthorities:
    """CAs and what they have revoked. Times are aware, in UTC."""

    certificates: tuple[bytes, ...] = field(repr=False)
    """DER."""
    crls: tuple[bytes, ...] = field(repr=False)
    """DER, of every CA; none: nothing is revoked."""
    not_before: datetime.datetime
    not_after: datetime.datetime
    """When the first CA's certificate expires."""
    this_update: datetime.datetime | None
    next_update: datetime.datetime | None
    """When the first CRL expires; None: none does."""

    def cas_are_valid_at(self, moment: datetime.datetime) -> bool:
        """Tell whether `moment` (aware) lies in the validity period of every CA."""
        return self.not_before <= moment <= self.not_after

    def crls_are_valid_at(self, moment: datetime.datetime) -> bool:
        """Tell whether `moment` (aware) lies between issue and next update of every CRL."""
        begun = self.this_update is None or self.this_update <= moment
        return begun and (self.next_update is None or moment <= self.next_update)


def load_client_cas(pem: bytes, source: str) -> tuple[x509.Certificate, ...]:
    """Return the CA certificates in PEM text, in any order; with each there must be those above it, up to a root.

    `source` names the text in errors, usually its path. Raises CertificateError.
    """
    cas = tuple(dict.fromkeys(load_pem_certificates(pem, source)))
    try:
        for ca in cas:
            _check_ca(ca, source)
        names_bytes = sum(2 + len(name) for name in {ca.subject.public_bytes() for ca in cas})
    except ValueError as error:
        raise malformed("CA certificates", error, source) from None
    if names_bytes > _MAX_NAMES_BYTES:
        message = f"CA names of at most {_MAX_NAMES_BYTES} bytes in all expected, as clients are sent them"
        raise CertificateError(source, f"{message}; got {names_bytes}")
    for ca in cas:
        if not any(is_issued_by(ca, issuer) for issuer in cas):
            message = "with each CA those above it expected, up to a self-signed one; got no issuer of"
            raise CertificateError(source, f"{message} {_name(ca.subject)}")
    return cas


def load_crls(pem: bytes, cas: Collection[x509.Certificate], source: str) -> tuple[x509.CertificateRevocationList, ...]:
    """Return the CRLs in PEM text, in any order: those of all `cas`, and of no other. Raises CertificateError."""
    blocks = _CRL.findall(pem)
    if not blocks:
        raise CertificateError(source, "PEM certificate revocation lists expected; got none")
    try:
        crls = tuple(x509.load_pem_x509_crl(block) for block in blocks)
        covered = {ca for crl in crls for ca in _issuers(crl, cas, source)}
    except ValueError as error:
        raise malformed("certificate revocation lists", error, source) from None
    for ca in cas:
        if ca not in covered:
            message = "a CRL of every CA in ca_file expected, as clients of one without are refused; got none of"
            raise CertificateError(source, f"{message} {_name(ca.subject)}")
    return crls


def client_authorities(
    cas: Collection[x509.Certificate], crls: Collection[x509.CertificateRevocationList]
) -> ClientAuthorities:
    """Return what load_client_cas and load_crls have returned in the form that proxy workers are sent."""
    next_updates = [crl.next_update_utc for crl in crls if crl.next_update_utc is not None]
    return ClientAuthorities(
        certificates=tuple(ca.public_bytes(Encoding.DER) for ca in cas),
        crls=tuple(crl.public_bytes(Encoding.DER) for crl in crls),
        not_before=max(ca.not_valid_before_utc for ca in cas),
        not_after=min(ca.not_valid_after_utc for ca in cas),
        this_update=max((crl.last_update_utc for crl in crls), default=None),
        next_update=min(next_updates, default=None),
    )


def _check_ca(ca: x509.Certificate, source: str) -> None:
    constraints = _extension(ca, x509.BasicConstraints)
    if constraints is None or not constraints.ca:
        name = _name(ca.subject)
        raise CertificateError(source, f"CA certificates expected; got one of no CA (basicConstraints): {name}")
    usage = _extension(ca, x509.KeyUsage)
    if usage is not None and not usage.key_cert_sign:
        message = "CAs that may sign certificates (keyUsage) expected; got"
        raise CertificateError(source, f"{message} {_name(ca.subject)}")


def _issuers(
    crl: x509.CertificateRevocationList, cas: Iterable[x509.Certificate], source: str
) -> list[x509.Certificate]:
    """Return those of `cas` that have issued the CRL. Raises CertificateError for one that OpenSSL cannot use."""
    name = _name(crl.issuer)
    if any(isinstance(extension.value, x509.DeltaCRLIndicator) for extension in crl.extensions):
        raise CertificateError(source, f"complete CRLs expected; got a delta CRL of {name}")
    issuers = [ca for ca in cas if ca.subject == crl.issuer and _has_signed(ca, crl)]
    if not issuers:
        raise CertificateError(source, f"CRLs that CAs in ca_file have signed expected; got one of {name}")
    for ca in issuers:
        usage = _extension(ca, x509.KeyUsage)
        if usage is not None and not usage.crl_sign:
            raise CertificateError(source, f"CRLs of CAs that may sign them (keyUsage) expected; got one of {name}")
    return issuers


def _has_signed(ca: x509.Certificate, crl: x509.CertificateRevocationList) -> bool:
    try:
        return crl.is_signature_valid(ca.public_key())  # type: ignore[arg-type]  # a key that signs nothing: TypeError
    except (TypeError, ValueError, UnsupportedAlgorithm):
        return False


def _extension(certificate: x509.Certificate, kind: type[ExtensionT]) -> ExtensionT | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def _name(name: x509.Name) -> str:
    return name.rfc4514_string() or "a CA without a name"
