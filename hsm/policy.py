"""What a key may sign. A proxy that was taken over must not be able to use its token as a signing oracle.

Every key here is for TLS servers, so a worker signs exactly two kinds of content, both told from everything else by
their shape: the TLS 1.3 server CertificateVerify (RFC 8446 section 4.4.3) and the TLS 1.2 ECDHE ServerKeyExchange
(RFC 8422 section 5.4). The two cannot be mistaken for each other: byte 64 is `T` in one and 3 in the other.
"""

from __future__ import annotations

from hsm.errors import PolicyRejected
from hsm.messages import SignatureScheme

_TLS13_PREFIX = b" " * 64 + b"TLS 1.3, server CertificateVerify\x00"
_TLS13_LENGTHS = frozenset(len(_TLS13_PREFIX) + hash_bytes for hash_bytes in (32, 48))
_TLS12_RANDOMS_BYTES = 64
_TLS12_MIN_BYTES = _TLS12_RANDOMS_BYTES + 4
_NAMED_CURVE = 3
_UNCOMPRESSED_POINT = 4
_SHARE_BYTES = {23: 65, 24: 97, 29: 32}
"""secp256r1, secp384r1 and x25519 (RFC 8422 section 5.1.1): the groups the proxy offers, and their shares' lengths."""
_X25519 = 29
_TLS12_ONLY_SCHEMES = frozenset(scheme for scheme in SignatureScheme if scheme.name.startswith("RSA_PKCS1"))

RULES = ("tls13-length", "tls13-scheme", "tls12-length", "tls12-curve-type", "tls12-group", "tls12-point")


def check_tls_server(scheme: SignatureScheme, tbs: bytes) -> None:
    """Return if a TLS server signs content of this shape with this scheme.

    Raises PolicyRejected, its `rule` one of RULES.
    """
    if tbs.startswith(_TLS13_PREFIX):
        if len(tbs) not in _TLS13_LENGTHS:
            raise PolicyRejected("tls13-length")
        if scheme in _TLS12_ONLY_SCHEMES:
            raise PolicyRejected("tls13-scheme")
        return
    if len(tbs) < _TLS12_MIN_BYTES:
        raise PolicyRejected("tls12-length")
    curve_type, group_high, group_low, share_bytes = tbs[_TLS12_RANDOMS_BYTES:_TLS12_MIN_BYTES]
    if curve_type != _NAMED_CURVE:
        raise PolicyRejected("tls12-curve-type")
    group = group_high << 8 | group_low
    if group not in _SHARE_BYTES:
        raise PolicyRejected("tls12-group")
    if share_bytes != _SHARE_BYTES[group] or len(tbs) != _TLS12_MIN_BYTES + share_bytes:
        raise PolicyRejected("tls12-length")
    if group != _X25519 and tbs[_TLS12_MIN_BYTES] != _UNCOMPRESSED_POINT:
        raise PolicyRejected("tls12-point")
