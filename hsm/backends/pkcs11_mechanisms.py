"""How a signature scheme of TLS is made with the mechanisms a PKCS#11 token has.

Preferred are the mechanisms that take a hash (made here): few bytes go to the token, and almost every token has them.
Those that hash on the token serve where it allows nothing else.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Container, Mapping
from dataclasses import dataclass

from hsm.errors import TokenConfigError
from hsm.messages import KeyType, SignatureScheme

CKF_SIGN = 0x800
CKM_RSA_PKCS = 0x01
CKM_RSA_PKCS_PSS = 0x0D
CKM_ECDSA = 0x1041
_HASHED_RSA_PKCS = {"sha256": 0x40, "sha384": 0x41, "sha512": 0x42}
_HASHED_RSA_PKCS_PSS = {"sha256": 0x43, "sha384": 0x44, "sha512": 0x45}
_HASHED_ECDSA = {"sha256": 0x1044, "sha384": 0x1045, "sha512": 0x1046}
_HASH_MECHANISM = {"sha256": 0x250, "sha384": 0x260, "sha512": 0x270}
_MGF1 = {"sha256": 2, "sha384": 3, "sha512": 4}
_PSS_PARAMETERS = struct.Struct("@LLL")
"""CK_RSA_PKCS_PSS_PARAMS: hashAlg, mgf, sLen."""
# DER of DigestInfo up to the hash itself (RFC 8017 section 9.2, note 1).
_DIGEST_INFO = {
    "sha256": bytes.fromhex("3031300d060960864801650304020105000420"),
    "sha384": bytes.fromhex("3041300d060960864801650304020205000430"),
    "sha512": bytes.fromhex("3051300d060960864801650304020305000440"),
}
_HASH_BYTES = {"sha256": 32, "sha384": 48, "sha512": 64}
_CURVE_BYTES = {KeyType.ECDSA_P256: 32, KeyType.ECDSA_P384: 48}


@dataclass(frozen=True, slots=True)
class Recipe:
    """One scheme, with one key type, on one token."""

    mechanism: int
    parameter: bytes = b""
    hash_name: str = ""
    """Hash the bytes to be signed first; empty: the token does."""
    prefix: bytes = b""
    """What goes before the hash."""
    curve_bytes: int | None = None
    """ECDSA: the size of r and of s. The curve takes no more of a hash (FIPS 186-5 section 6.4.1), and some tokens
    refuse more."""

    def token_input(self, tbs: bytes) -> bytes:
        """Return what C_Sign is given to sign `tbs`."""
        if not self.hash_name:
            return tbs
        return self.prefix + hashlib.new(self.hash_name, tbs).digest()[: self.curve_bytes]


def recipes_for(key_type: KeyType, mechanisms: Mapping[int, int]) -> dict[SignatureScheme, Recipe]:
    """Return the schemes a token can sign with a key of this type, given its mechanisms' CKF_* flags.

    Raises TokenConfigError, naming the mechanisms sought, if there is none.
    """
    usable = {mechanism for mechanism, flags in mechanisms.items() if flags & CKF_SIGN}
    recipes = {
        scheme: recipe for scheme in key_type.schemes if (recipe := _recipe(scheme, key_type, usable)) is not None
    }
    if not recipes:
        wanted = "CKM_RSA_PKCS_PSS or CKM_RSA_PKCS, or a hashed form of them" if key_type.is_rsa else "CKM_ECDSA"
        raise TokenConfigError(f"expected a token that signs by {wanted}; got one without")
    return recipes


def _recipe(scheme: SignatureScheme, key_type: KeyType, usable: Container[int]) -> Recipe | None:
    hash_name = scheme.hash_name
    if not key_type.is_rsa:
        curve_bytes = _CURVE_BYTES[key_type]
        if CKM_ECDSA in usable:
            return Recipe(CKM_ECDSA, hash_name=hash_name, curve_bytes=curve_bytes)
        hashed = _HASHED_ECDSA[hash_name]
        return Recipe(hashed, curve_bytes=curve_bytes) if hashed in usable else None
    if scheme.name.startswith("RSA_PSS"):
        parameter = _PSS_PARAMETERS.pack(_HASH_MECHANISM[hash_name], _MGF1[hash_name], _HASH_BYTES[hash_name])
        if CKM_RSA_PKCS_PSS in usable:
            return Recipe(CKM_RSA_PKCS_PSS, parameter, hash_name)
        hashed = _HASHED_RSA_PKCS_PSS[hash_name]
        return Recipe(hashed, parameter) if hashed in usable else None
    if CKM_RSA_PKCS in usable:
        return Recipe(CKM_RSA_PKCS, hash_name=hash_name, prefix=_DIGEST_INFO[hash_name])
    hashed = _HASHED_RSA_PKCS[hash_name]
    return Recipe(hashed) if hashed in usable else None
