"""Clients' certificates: how a listener verifies them, and what is known of one that was verified."""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass, field

from tlsproxy.tls import _openssl
from tlsproxy.tls.certificates import CertificateError
from tlsproxy.tls.client_authorities import ClientAuthorities

_NEVER_S = (1 << 63) - 1


class ClientResult(enum.Enum):
    """What became of the client's certificate in a handshake that asked for one."""

    VERIFIED = "verified"
    """Now, or in the handshake that this one resumes."""
    MISSING = "missing"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class ClientCertificate:
    """A certificate that was verified."""

    der: bytes = field(repr=False)
    fingerprint: str
    """SHA-256 of the DER form, in hex."""
    subject: str
    """A distinguished name (RFC 4514), all but printable ASCII escaped."""
    common_name: str | None
    """The subject's first one, as it is: any characters, of any number."""


@dataclass(frozen=True, slots=True)
class ClientVerification:
    """How a listener verifies its clients."""

    authorities: ClientAuthorities
    required: bool
    """A client without a certificate is refused, too. One with a bad certificate is in any case."""
    depth: int
    """How many CAs may stand between a client's certificate and the root."""

    def verifier(self, source: str) -> _openssl.ClientVerifier:
        """Return it as OpenSSL has it. `source` is named in errors. Raises CertificateError."""
        authorities = self.authorities
        next_update = authorities.next_update
        try:
            return _openssl.ClientVerifier(
                self.required,
                self.depth,
                _NEVER_S if next_update is None else int(next_update.timestamp()),
                self._digest(),
                authorities.certificates,
                authorities.crls,
            )
        except _openssl.OpenSSLError as error:
            raise CertificateError(source, f"OpenSSL refuses a CA or a CRL: {error}") from None

    def _digest(self) -> bytes:
        """Return 32 bytes that no other verification has."""
        digest = hashlib.sha256(b"%d %d" % (self.required, self.depth))
        for kind, items in ((b"CA", self.authorities.certificates), (b"CRL", self.authorities.crls)):
            for der in items:
                digest.update(b" %b %d " % (kind, len(der)))
                digest.update(der)
        return digest.digest()
