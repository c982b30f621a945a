"""The keys of a PKCS#11 token: which can sign for TLS, and what their public halves are."""

from __future__ import annotations

import logging
import secrets
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from hsm.backends._cryptoki import Module
from hsm.keyreference import KeyReference
from hsm.keys import CURVES, MODULUS_BITS, PublicKey, key_type_of, load_public_key, public_key_der
from hsm.messages import KeyType

MAX_KEYS = 1000

CKA_CLASS, CKA_LABEL, CKA_ID = 0x00, 0x03, 0x102
CKA_TOKEN, CKA_PRIVATE, CKA_SENSITIVE, CKA_EXTRACTABLE = 0x01, 0x02, 0x103, 0x162
CKA_KEY_TYPE, CKA_SIGN, CKA_VERIFY = 0x100, 0x108, 0x10A
CKA_MODULUS, CKA_MODULUS_BITS, CKA_PUBLIC_EXPONENT, CKA_PUBLIC_KEY_INFO = 0x120, 0x121, 0x122, 0x129
CKA_EC_PARAMS, CKA_EC_POINT, CKA_VALUE = 0x180, 0x181, 0x11
CKO_CERTIFICATE, CKO_PUBLIC_KEY, CKO_PRIVATE_KEY = 1, 2, 3
CKK_RSA, CKK_EC = 0, 3
CKM_RSA_PKCS_KEY_PAIR_GEN, CKM_EC_KEY_PAIR_GEN = 0x00, 0x1040
_ID_BYTES = 8

_log = logging.getLogger(__name__)

# DER of the namedCurve OBJECT IDENTIFIER, as CKA_EC_PARAMS has it.
EC_PARAMS = {
    bytes.fromhex("06082a8648ce3d030107"): ec.SECP256R1(),
    bytes.fromhex("06052b81040022"): ec.SECP384R1(),
}


def pack_ulong(value: int) -> bytes:
    """Return a CK_ULONG as an attribute's value."""
    return struct.pack("@L", value)


@dataclass(frozen=True, slots=True)
class TokenKey:
    """A private key found on a token."""

    handle: int
    label: str
    id: bytes
    key_type: KeyType
    public_key: bytes
    """SubjectPublicKeyInfo, DER."""


def find_keys(module: Module, session: int, references: Sequence[str]) -> list[TokenKey]:
    """Return the keys these references name, or, given none, all that can sign for TLS.

    A key that is missing, ambiguous or of no use is logged; the others still serve. Raises CryptokiError.
    """
    found: dict[int, TokenKey] = {}
    for reference in map(KeyReference.parse, references) if references else [KeyReference()]:
        handles = _find(module, session, CKO_PRIVATE_KEY, reference.label, reference.id)
        name = _describe(reference)
        if not handles:
            _log.error("expected a private key with %s; the token has none", name)
        if references and len(handles) > 1:
            _log.error("expected one private key with %s; the token has %d: tell them apart by id=", name, len(handles))
            continue
        for handle in handles:
            key = _read_key(module, session, handle)
            if key is not None:
                found[handle] = key
    return list(found.values())


def _find(module: Module, session: int, class_: int, label: str | None, id_: bytes | None) -> list[int]:
    template = {CKA_CLASS: pack_ulong(class_)}
    if label is not None:
        template[CKA_LABEL] = label.encode()
    if id_ is not None:
        template[CKA_ID] = id_
    return module.find_objects(session, template, MAX_KEYS)


def _describe(reference: KeyReference) -> str:
    parts = []
    if reference.label is not None:
        parts.append(f"label {reference.label!r}")
    if reference.id is not None:
        parts.append(f"id {reference.id.hex()}")
    return " and ".join(parts) or "any label"


def _read_key(module: Module, session: int, handle: int) -> TokenKey | None:
    """Return the key behind a private key's handle, or None, with the reason logged, if it cannot serve TLS."""
    label_bytes = module.attribute(session, handle, CKA_LABEL) or b""
    label = label_bytes.decode("utf-8", "replace")
    id_ = module.attribute(session, handle, CKA_ID) or b""
    name = f"key {label!r} (id {id_.hex() or 'none'})"
    if module.attribute(session, handle, CKA_SIGN) == b"\x00":
        _log.info("%s: passed over: its CKA_SIGN is false", name)
        return None
    try:
        public_key = _public_key(module, session, handle, label_bytes, id_)
        if public_key is None:
            _log.error(
                "%s: expected its public key, as a public key or certificate object of the same id or label, or as"
                " CKA_PUBLIC_KEY_INFO; the token has none of them",
                name,
            )
            return None
        return TokenKey(handle, label, id_, key_type_of(public_key), public_key_der(public_key))
    except ValueError as error:
        _log.info("%s: passed over: %s", name, error)
        return None


def _public_key(module: Module, session: int, private: int, label: bytes, id_: bytes) -> PublicKey | None:
    """Return the public half of a private key from wherever the token shows it. Raises ValueError and CryptokiError."""
    sought = {CKA_ID: id_} if id_ else {CKA_LABEL: label}
    for handle in module.find_objects(session, {CKA_CLASS: pack_ulong(CKO_PUBLIC_KEY), **sought}, 1):
        return _from_attributes(module, session, handle)
    for handle in module.find_objects(session, {CKA_CLASS: pack_ulong(CKO_CERTIFICATE), **sought}, 1):
        certificate = x509.load_der_x509_certificate(module.attribute(session, handle, CKA_VALUE) or b"")
        return load_public_key(certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))
    info = module.attribute(session, private, CKA_PUBLIC_KEY_INFO)
    if info:
        return load_public_key(info)
    return _from_attributes(module, session, private)


def _from_attributes(module: Module, session: int, handle: int) -> PublicKey | None:
    """Return the key that CKA_MODULUS and CKA_PUBLIC_EXPONENT, or CKA_EC_PARAMS and CKA_EC_POINT, tell of."""
    key_type = module.attribute(session, handle, CKA_KEY_TYPE)
    if key_type == pack_ulong(CKK_RSA):
        modulus = module.attribute(session, handle, CKA_MODULUS)
        exponent = module.attribute(session, handle, CKA_PUBLIC_EXPONENT)
        if modulus and exponent:
            return rsa.RSAPublicNumbers(int.from_bytes(exponent, "big"), int.from_bytes(modulus, "big")).public_key()
        return None
    if key_type == pack_ulong(CKK_EC):
        parameters = module.attribute(session, handle, CKA_EC_PARAMS)
        point = module.attribute(session, handle, CKA_EC_POINT)
        if parameters is None or point is None:
            return None
        curve = EC_PARAMS.get(parameters)
        if curve is None:
            raise ValueError(f"expected a key on P-256 or P-384; got CKA_EC_PARAMS {parameters.hex()}")
        # CKA_EC_POINT is a DER OCTET STRING (04, length, point), but some tokens leave that wrapping away.
        bare_bytes = 1 + 2 * ((curve.key_size + 7) // 8)
        return ec.EllipticCurvePublicKey.from_encoded_point(curve, point[-bare_bytes:])
    raise ValueError("expected an RSA or EC key; got one of another CKA_KEY_TYPE")


def generate_key(module: Module, session: int, label: str, key_type: KeyType) -> None:
    """Make a key pair on the token: for signing, never to leave it. Its CKA_ID is random. Raises CryptokiError."""
    true, false = b"\x01", b"\x00"
    common = {CKA_TOKEN: true, CKA_LABEL: label.encode(), CKA_ID: secrets.token_bytes(_ID_BYTES)}
    public = {**common, CKA_VERIFY: true}
    private = {**common, CKA_PRIVATE: true, CKA_SENSITIVE: true, CKA_EXTRACTABLE: false, CKA_SIGN: true}
    if key_type.is_rsa:
        mechanism = CKM_RSA_PKCS_KEY_PAIR_GEN
        public |= {CKA_MODULUS_BITS: pack_ulong(MODULUS_BITS[key_type]), CKA_PUBLIC_EXPONENT: b"\x01\x00\x01"}
    else:
        mechanism = CKM_EC_KEY_PAIR_GEN
        public[CKA_EC_PARAMS] = next(der for der, curve in EC_PARAMS.items() if curve.name == CURVES[key_type].name)
    module.generate_key_pair(session, mechanism, public, private)
