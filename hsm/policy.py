"""What a key may sign. A proxy that was taken over must not be able to use its token as a signing oracle.

Every key here is for TLS servers, so a worker signs exactly two kinds of content, both told from everything else by
their shape: the TLS 1.3 server CertificateVerify (RFC 8446 section 4.4.3) and the TLS 1.2 ECDHE ServerKeyExchange
(RFC 8422 section 5.4). The two cannot be mistaken for each other: byte 64 is `T` in one and 3 in the other.

TLS 1.2 has no context string. What is signed there is 64 bytes of anybody's choice, four that are fixed, and a share.
165 bytes with a share for P-384 have room for a certificate with a key of the forger's; so a share must be on its
curve, which makes its second half, where that key would be, follow from the first. A share for X25519 can be anything,
but 100 bytes have no room for a certificate.
"""

from __future__ import annotations

from typing import NamedTuple

from hsm.errors import PolicyRejected
from hsm.messages import SignatureScheme

_TLS13_PREFIX = b" " * 64 + b"TLS 1.3, server CertificateVerify\x00"
_TLS13_LENGTHS = frozenset(len(_TLS13_PREFIX) + hash_bytes for hash_bytes in (32, 48))
_TLS12_RANDOMS_BYTES = 64
_TLS12_MIN_BYTES = _TLS12_RANDOMS_BYTES + 4
_NAMED_CURVE = 3
_UNCOMPRESSED_POINT = 4


class _Curve(NamedTuple):
    """y^2 = x^3 - 3x + b modulo p."""

    p: int
    b: int


_CURVES = {
    23: _Curve(
        p=2**256 - 2**224 + 2**192 + 2**96 - 1,
        b=0x5AC635D8AA3A93E7B3EBBD55769886BC651D06B0CC53B0F63BCE3C3E27D2604B,
    ),
    24: _Curve(
        p=2**384 - 2**128 - 2**96 + 2**32 - 1,
        b=int(
            "b3312fa7e23ee7e4988e056be3f82d19181d9c6efe8141120314088f5013875ac656398d8a2ed19d2a85c8edd3ec2aef",
            base=16,
        ),
    ),
}
"""secp256r1 and secp384r1 (NIST SP 800-186 section 3.2.1)."""
_SHARE_BYTES = {23: 65, 24: 97, 29: 32}
"""Those and x25519 (RFC 8422 section 5.1.1) are the groups the proxy offers; these are their shares' lengths."""
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
    curve = _CURVES.get(group)
    if curve is not None and not _is_point(curve, tbs[_TLS12_MIN_BYTES:]):
        raise PolicyRejected("tls12-point")


def _is_point(curve: _Curve, share: bytes) -> bool:
    """Tell whether a share is an uncompressed point of the curve (SEC 1 section 2.3.3)."""
    half = 1 + len(share) // 2
    x, y = int.from_bytes(share[1:half], "big"), int.from_bytes(share[half:], "big")
    is_on_curve = (y * y - x * x * x + 3 * x - curve.b) % curve.p == 0
    return share[0] == _UNCOMPRESSED_POINT and max(x, y) < curve.p and is_on_curve
