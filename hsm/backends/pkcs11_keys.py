"""The keys of a PKCS#11 token: which can sign for TLS, and what their public halves are."""

from __future__ import annotations

import logging
import secrets
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pkcs11 import Attribute, MechanismFlag, Object, ObjectClass, Session
from pkcs11 import KeyType as TokenKeyType

from hsm.backends.pkcs11_library import attribute, calling, find_objects, handle_of
from hsm.keyreference import KeyReference
from hsm.keys import CURVES, MODULUS_BITS, PublicKey, key_type_of, load_public_key, public_key_der
from hsm.messages import KeyType

MAX_KEYS = 1000

_CKA_PUBLIC_KEY_INFO = cast("Attribute", 0x129)  # PKCS#11 v2.40; not among the library's
_ID_BYTES = 8

_log = logging.getLogger(__name__)

# DER of the namedCurve OBJECT IDENTIFIER, as CKA_EC_PARAMS has it.
EC_PARAMS = {
    bytes.fromhex("06082a8648ce3d030107"): ec.SECP256R1(),
    bytes.fromhex("06052b81040022"): ec.SECP384R1(),
}


@dataclass(frozen=True, slots=True)
class TokenKey:
    """A private key found on a token."""

    handle: int
    label: str
    id: bytes
    key_type: KeyType
    public_key: bytes
    """SubjectPublicKeyInfo, DER."""


def find_keys(session: Session, references: Sequence[str]) -> list[TokenKey]:
    """Return the keys these references name, or, given none, all that can sign for TLS.

    A key that is missing, ambiguous or of no use is logged; the others still serve. Raises CryptokiError.
    """
    found: dict[int, TokenKey] = {}
    for reference in map(KeyReference.parse, references) if references else [KeyReference()]:
        objects = _find(session, reference)
        name = _describe(reference)
        if references and not objects:
            _log.error("expected a private key with %s; the token has none", name)
        if references and len(objects) > 1:
            _log.error("expected one private key with %s; the token has %d: tell them apart by id=", name, len(objects))
            continue
        for object_ in objects:
            key = _read_key(session, object_)
            if key is not None:
                found[key.handle] = key
    return list(found.values())


def _find(session: Session, reference: KeyReference) -> list[Object]:
    template = {}
    if reference.label is not None:
        template[Attribute.LABEL] = reference.label.encode()
    if reference.id is not None:
        template[Attribute.ID] = reference.id
    return find_objects(session, ObjectClass.PRIVATE_KEY, template, MAX_KEYS)


def _describe(reference: KeyReference) -> str:
    parts = []
    if reference.label is not None:
        parts.append(f"label {reference.label!r}")
    if reference.id is not None:
        parts.append(f"id {reference.id.hex()}")
    return " and ".join(parts) or "any label"


def _read_key(session: Session, private: Object) -> TokenKey | None:
    """Return the key behind a private key's handle, or None, with the reason logged, if it cannot serve TLS."""
    label_bytes = attribute(private, Attribute.LABEL) or b""
    label = label_bytes.decode("utf-8", "replace")
    id_ = attribute(private, Attribute.ID) or b""
    name = f"key {label!r} (id {id_.hex() or 'none'})"
    if attribute(private, Attribute.SIGN) == b"\x00":
        _log.info("%s: passed over: its CKA_SIGN is false", name)
        return None
    try:
        public_key = _public_key(session, private, label_bytes, id_)
        if public_key is None:
            _log.error(
                "%s: expected its public key, as a public key or certificate object of the same id or label, or as"
                " CKA_PUBLIC_KEY_INFO; the token has none of them",
                name,
            )
            return None
        return TokenKey(handle_of(private), label, id_, key_type_of(public_key), public_key_der(public_key))
    except ValueError as error:
        _log.info("%s: passed over: %s", name, error)
        return None


def _public_key(session: Session, private: Object, label: bytes, id_: bytes) -> PublicKey | None:
    """Return the public half of a private key from wherever the token shows it. Raises ValueError and CryptokiError."""
    sought = {Attribute.ID: id_} if id_ else {Attribute.LABEL: label}
    for public in find_objects(session, ObjectClass.PUBLIC_KEY, sought, 1):
        return _from_attributes(public)
    for object_ in find_objects(session, ObjectClass.CERTIFICATE, sought, 1):
        certificate = x509.load_der_x509_certificate(attribute(object_, Attribute.VALUE) or b"")
        return load_public_key(certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))
    info = attribute(private, _CKA_PUBLIC_KEY_INFO)
    return load_public_key(info) if info else _from_attributes(private)


def _from_attributes(object_: Object) -> PublicKey | None:
    """Return the key that CKA_MODULUS and CKA_PUBLIC_EXPONENT, or CKA_EC_PARAMS and CKA_EC_POINT, tell of."""
    key_type = attribute(object_, Attribute.KEY_TYPE)
    if key_type == struct.pack("@L", TokenKeyType.RSA):
        modulus = attribute(object_, Attribute.MODULUS)
        exponent = attribute(object_, Attribute.PUBLIC_EXPONENT)
        if modulus and exponent:
            return rsa.RSAPublicNumbers(int.from_bytes(exponent, "big"), int.from_bytes(modulus, "big")).public_key()
        return None
    if key_type == struct.pack("@L", TokenKeyType.EC):
        parameters = attribute(object_, Attribute.EC_PARAMS)
        point = attribute(object_, Attribute.EC_POINT)
        if parameters is None or point is None:
            return None
        curve = EC_PARAMS.get(parameters)
        if curve is None:
            raise ValueError(f"expected a key on P-256 or P-384; got CKA_EC_PARAMS {parameters.hex()}")
        # CKA_EC_POINT is a DER OCTET STRING (04, length, point), but some tokens leave that wrapping away.
        bare_bytes = 1 + 2 * ((curve.key_size + 7) // 8)
        return ec.EllipticCurvePublicKey.from_encoded_point(curve, point[-bare_bytes:])
    raise ValueError("expected an RSA or EC key; got one of another CKA_KEY_TYPE")


def generate_key(session: Session, label: str, key_type: KeyType) -> None:
    """Make a key pair on the token: for signing, never to leave it. Its CKA_ID is random. Raises CryptokiError."""
    options: dict[str, Any] = {
        "id": secrets.token_bytes(_ID_BYTES),
        "label": label,
        "store": True,
        "capabilities": MechanismFlag.SIGN | MechanismFlag.VERIFY,
        "private_template": {Attribute.EXTRACTABLE: False},
    }
    with calling("C_GenerateKeyPair"):
        if key_type.is_rsa:
            session.generate_keypair(TokenKeyType.RSA, MODULUS_BITS[key_type], **options)
        else:
            curve = next(der for der, curve in EC_PARAMS.items() if curve.name == CURVES[key_type].name)
            parameters = {Attribute.EC_PARAMS: curve}
            session.create_domain_parameters(TokenKeyType.EC, parameters, local=True).generate_keypair(**options)
