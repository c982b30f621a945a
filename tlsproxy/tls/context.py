"""What a listener's TLS connections share: profile, certificates, ALPN protocols, ticket keys."""

from __future__ import annotations

import enum
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from hsm.messages import SignatureScheme
from tlsproxy.tls import _openssl
from tlsproxy.tls.certificates import Certificate, CertificateError
from tlsproxy.tls.client_certificates import ClientVerification
from tlsproxy.tls.client_hello import ClientHelloFields, parse_client_hello
from tlsproxy.tls.engine import TlsConnection
from tlsproxy.tls.events import ClientHelloReceived
from tlsproxy.tls.selection import CertificateSelector, tls13_schemes

_MAX_ALPN_BYTES = 255
_CHOICES_KEPT = 2048
_MAX_KEPT_BYTES = 2048
"""A ClientHello larger than this is not kept: it is nobody's usual one."""

_SCHEME_PREFERENCE = (
    SignatureScheme.ECDSA_SECP256R1_SHA256,
    SignatureScheme.ECDSA_SECP384R1_SHA384,
    SignatureScheme.RSA_PSS_RSAE_SHA256,
    SignatureScheme.RSA_PSS_RSAE_SHA384,
    SignatureScheme.RSA_PSS_RSAE_SHA512,
    SignatureScheme.RSA_PKCS1_SHA256,
    SignatureScheme.RSA_PKCS1_SHA384,
    SignatureScheme.RSA_PKCS1_SHA512,
)


class TlsProfile(enum.Enum):
    """Mozilla's server-side TLS guidelines 5.7, of the suites ECDHE with AEAD only."""

    MODERN = "modern"
    """TLS 1.3."""
    INTERMEDIATE = "intermediate"
    """TLS 1.2 and 1.3."""


@dataclass(frozen=True, slots=True)
class TicketKey:
    """Encrypts and authenticates session tickets (RFC 5077 section 4): AES-256-CBC, HMAC-SHA-256."""

    name: bytes
    """16 bytes, sent in clear: tells the keys apart."""
    aes: bytes = field(repr=False)
    """32 bytes."""
    hmac: bytes = field(repr=False)
    """32 bytes."""

    @classmethod
    def generate(cls) -> TicketKey:
        """Return a new random key."""
        return cls(os.urandom(16), os.urandom(32), os.urandom(32))


class TlsContext:
    """Makes the connections of one listener.

    `certificates` in order of preference; clients are served by name and by what they can verify. `alpn_protocols` in
    order of preference; with none, the client's ALPN extension is ignored. Clients are asked for certificates if
    `client_verification` says how to verify them. Tickets start with a random key.
    """

    def __init__(
        self,
        certificates: Sequence[Certificate],
        *,
        profile: TlsProfile = TlsProfile.INTERMEDIATE,
        alpn_protocols: Sequence[bytes] = (b"http/1.1",),
        client_verification: ClientVerification | None = None,
    ) -> None:
        """Raises CertificateError for a chain or CA OpenSSL refuses, ValueError for bad protocols or names."""
        if not certificates or len({certificate.name for certificate in certificates}) != len(certificates):
            raise ValueError(f"certificates of different names expected; got {[c.name for c in certificates]}")
        for protocol in alpn_protocols:
            if not 1 <= len(protocol) <= _MAX_ALPN_BYTES:
                raise ValueError(f"ALPN protocols of 1 to {_MAX_ALPN_BYTES} bytes expected; got {protocol!r}")
        self.certificates = tuple(certificates)
        self.asks_for_certificates = client_verification is not None
        self._selector = CertificateSelector(self.certificates)
        self._remembered_choice = functools.lru_cache(_CHOICES_KEPT)(self._choose)
        wire_format = b"".join(bytes([len(protocol)]) + protocol for protocol in alpn_protocols)
        self._settings = _openssl.Settings(wire_format)
        self.set_ticket_keys([TicketKey.generate()])
        verifier = None if client_verification is None else client_verification.verifier("client certificates")
        self._contexts = {
            certificate.name: _openssl_context(certificate, handle, profile, self._settings, verifier)
            for handle, certificate in enumerate(self.certificates)
        }

    def set_ticket_keys(self, keys: Sequence[TicketKey]) -> None:
        """Replace the ticket keys, for connections under way too: the first encrypts, all decrypt.

        A ticket under another key than the first is replaced by a new one when it is used. Raises ValueError for a
        wrong length, or fewer than 1 or more than 16 keys.
        """
        self._settings.set_ticket_keys([(key.name, key.aes, key.hmac) for key in keys])

    def connection(self) -> TlsConnection:
        """Return a new connection that waits for a ClientHello."""
        return TlsConnection(self)

    def choose(self, fields: ClientHelloFields, size_bytes: int) -> ClientHelloReceived:
        """Return what the client says and the certificate it is served. `size_bytes` is the length of all fields.

        Clients of one program differ in little but the name they ask for, so the choice is remembered by the bytes it
        depends on: to read them takes ten times as long as to find them again.
        """
        return self._remembered_choice(fields) if size_bytes <= _MAX_KEPT_BYTES else self._choose(fields)

    def _choose(self, fields: ClientHelloFields) -> ClientHelloReceived:
        client_hello = parse_client_hello(*fields)
        certificate = self._selector.select(client_hello)
        return ClientHelloReceived(client_hello.server_name, client_hello.alpn_protocols, certificate)

    def openssl_context(self, certificate: Certificate) -> _openssl.Context:
        """Return the OpenSSL context that serves `certificate`, one of this context's."""
        return self._contexts[certificate.name]


def _openssl_context(
    certificate: Certificate,
    handle: int,
    profile: TlsProfile,
    settings: _openssl.Settings,
    verifier: _openssl.ClientVerifier | None,
) -> _openssl.Context:
    min_version = _openssl.TLS1_3 if profile is TlsProfile.MODERN else _openssl.TLS1_2
    # A token without RSA-PSS, as many a TPM is, cannot sign for TLS 1.3: that certificate's clients get TLS 1.2.
    max_version = _openssl.TLS1_3 if tls13_schemes(certificate) else _openssl.TLS1_2
    if max_version < min_version:
        raise CertificateError(
            certificate.name, f"a key that signs with RSA-PSS expected: the profile {profile.value} is TLS 1.3 only"
        )
    schemes = ":".join(scheme.label for scheme in _SCHEME_PREFERENCE if scheme in certificate.schemes)
    try:
        return _openssl.Context(
            certificate.chain, handle, min_version, max_version, schemes.encode(), settings, verifier
        )
    except _openssl.OpenSSLError as error:
        raise CertificateError(certificate.name, f"OpenSSL refuses the chain: {error}") from None
