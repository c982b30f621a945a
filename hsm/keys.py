"""Key types and signature schemes in the terms of the `cryptography` package."""

from __future__ import annotations

from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key

from hsm.messages import KeyType, SignatureScheme

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey

CURVES: dict[KeyType, ec.EllipticCurve] = {KeyType.ECDSA_P256: ec.SECP256R1(), KeyType.ECDSA_P384: ec.SECP384R1()}
MODULUS_BITS = {KeyType.RSA_2048: 2048, KeyType.RSA_3072: 3072, KeyType.RSA_4096: 4096}
_PUBLIC_EXPONENT = 65537
_HASHES = {"sha256": hashes.SHA256(), "sha384": hashes.SHA384(), "sha512": hashes.SHA512()}


def generate_private_key(key_type: KeyType) -> PrivateKey:
    """Return a new private key from OpenSSL's random generator."""
    if key_type.is_rsa:
        return rsa.generate_private_key(_PUBLIC_EXPONENT, MODULUS_BITS[key_type])
    return ec.generate_private_key(CURVES[key_type])


def key_type_of(key: object) -> KeyType:
    """Return the type of a public or private key of `cryptography`.

    Raises ValueError for a kind of key that TLS servers of this product cannot have.
    """
    if isinstance(key, ec.EllipticCurvePublicKey | ec.EllipticCurvePrivateKey):
        found = f"an EC key on {key.curve.name}"
        for key_type, curve in CURVES.items():
            if curve.name == key.curve.name:
                return key_type
    elif isinstance(key, rsa.RSAPublicKey | rsa.RSAPrivateKey):
        found = f"an RSA key of {key.key_size} bits"
        for key_type, bits in MODULUS_BITS.items():
            if bits == key.key_size:
                return key_type
    else:
        found = f"a key of class {type(key).__name__}"
    raise ValueError(f"expected a key of type {', '.join(kind.value for kind in KeyType)}; got {found}")


def public_key_der(key: PublicKey) -> bytes:
    """Return the SubjectPublicKeyInfo (RFC 5280 section 4.1.2.7), DER."""
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def load_public_key(der: bytes) -> PublicKey:
    """Return the key in a DER SubjectPublicKeyInfo. Raises ValueError."""
    key = load_der_public_key(der)
    if not isinstance(key, ec.EllipticCurvePublicKey | rsa.RSAPublicKey):
        raise ValueError(f"expected an EC or RSA public key; got one of class {type(key).__name__}")
    return key


def scheme_arguments(scheme: SignatureScheme) -> tuple[Any, ...]:
    """Return what `sign(tbs, ...)` and `verify(signature, tbs, ...)` take for this scheme (RFC 8446 section 4.2.3)."""
    hash_ = _HASHES[scheme.hash_name]
    if scheme.name.startswith("ECDSA"):
        return (ec.ECDSA(hash_),)
    if scheme.name.startswith("RSA_PSS"):
        return (padding.PSS(padding.MGF1(hash_), padding.PSS.DIGEST_LENGTH), hash_)
    return (padding.PKCS1v15(), hash_)


def is_signature_valid(key: PublicKey, scheme: SignatureScheme, tbs: bytes, signature: bytes) -> bool:
    """Tell whether `signature` is one of `tbs` by the private half of `key`."""
    try:
        key.verify(signature, tbs, *scheme_arguments(scheme))
    except InvalidSignature:
        return False
    return True
