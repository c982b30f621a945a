"""Which of a listener's certificates a client is served."""

from __future__ import annotations

from collections.abc import Sequence

from hsm.messages import KeyType, SignatureScheme
from tlsproxy.tls.certificates import Certificate
from tlsproxy.tls.client_hello import ClientHello

# TLS 1.2 names the certificate's kind in the cipher suite (RFC 5289, RFC 7905): those that _connection.c enables.
_ECDHE_ECDSA_SUITES = frozenset({0xC02B, 0xC02C, 0xCCA9})
_ECDHE_RSA_SUITES = frozenset({0xC02F, 0xC030, 0xCCA8})

# In TLS 1.3 an ECDSA scheme names the curve, and PKCS#1 v1.5 is for certificates only (RFC 8446 section 4.2.3).
_TLS13_RSA_SCHEMES = (
    SignatureScheme.RSA_PSS_RSAE_SHA256,
    SignatureScheme.RSA_PSS_RSAE_SHA384,
    SignatureScheme.RSA_PSS_RSAE_SHA512,
)
_TLS13_SCHEMES = {
    KeyType.ECDSA_P256: (SignatureScheme.ECDSA_SECP256R1_SHA256,),
    KeyType.ECDSA_P384: (SignatureScheme.ECDSA_SECP384R1_SHA384,),
}

_CURVE_GROUPS = {KeyType.ECDSA_P256: 23, KeyType.ECDSA_P384: 24}
"""RFC 8422 section 5.1.1: in TLS 1.2 supported_groups also limits the curves of certificates."""


def tls13_schemes(certificate: Certificate) -> tuple[SignatureScheme, ...]:
    """Return those of the certificate's schemes that TLS 1.3 has. None: it can only be served in TLS 1.2."""
    possible = _TLS13_SCHEMES.get(certificate.key_type, _TLS13_RSA_SCHEMES)
    return tuple(scheme for scheme in possible if scheme in certificate.schemes)


def can_verify(certificate: Certificate, client_hello: ClientHello) -> bool:
    """Tell whether the client can verify a signature by the certificate's key, in the TLS version it will get."""
    offered = client_hello.signature_schemes
    if offered is None:
        return False  # without the extension TLS 1.2 means SHA-1 (RFC 5246 section 7.4.1.4.1)
    key_type = certificate.key_type
    if client_hello.offers_tls13 and (schemes := tls13_schemes(certificate)):
        return not set(schemes).isdisjoint(offered)
    suites = _ECDHE_RSA_SUITES if key_type.is_rsa else _ECDHE_ECDSA_SUITES
    if suites.isdisjoint(client_hello.cipher_suites) or set(certificate.schemes).isdisjoint(offered):
        return False
    return key_type.is_rsa or client_hello.groups is None or _CURVE_GROUPS[key_type] in client_hello.groups


class CertificateSelector:
    """The choice by name, then by what the client can verify; the configured order decides between equals.

    A name matches exactly, or by a wildcard for its first label (RFC 9525 section 6.3). Without a name, or with an
    unknown one, every certificate is a candidate: many clients send none.
    """

    __slots__ = ("_all", "_exact", "_wildcard")

    def __init__(self, certificates: Sequence[Certificate]) -> None:
        self._all = tuple(certificates)
        self._exact: dict[str, tuple[Certificate, ...]] = {}
        self._wildcard: dict[str, tuple[Certificate, ...]] = {}
        for certificate in certificates:
            for name in dict.fromkeys(certificate.dns_names):
                names, key = (self._wildcard, name[2:]) if name.startswith("*.") else (self._exact, name)
                names[key] = (*names.get(key, ()), certificate)

    def select(self, client_hello: ClientHello) -> Certificate:
        """Return the certificate to serve.

        When the client can verify none, that is the first candidate: OpenSSL then ends the handshake with the alert
        that belongs to the reason.
        """
        candidates: tuple[Certificate, ...] = ()
        if client_hello.server_name is not None:
            parent = client_hello.server_name.partition(".")[2]
            candidates = self._exact.get(client_hello.server_name, ()) + self._wildcard.get(parent, ())
        candidates = candidates or self._all
        for certificate in candidates:
            if can_verify(certificate, client_hello):
                return certificate
        return candidates[0]
