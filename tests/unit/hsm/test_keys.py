from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from hsm.keys import is_signature_valid, key_type_of, load_public_key, public_key_der, scheme_arguments
from hsm.messages import KeyType, SignatureScheme
from tests.tokens import private_key


@pytest.mark.parametrize("key_type", [KeyType.ECDSA_P256, KeyType.ECDSA_P384, KeyType.RSA_2048])
def test_a_signature_is_valid_for_its_key_its_scheme_and_its_bytes_only(key_type: KeyType) -> None:
    key = private_key(key_type)
    other = private_key(key_type, "other").public_key()
    public_key = load_public_key(public_key_der(key.public_key()))
    for scheme in key_type.schemes:
        signature = key.sign(b"tbs", *scheme_arguments(scheme))
        assert is_signature_valid(public_key, scheme, b"tbs", signature)
        assert not is_signature_valid(public_key, scheme, b"tbs.", signature)
        assert not is_signature_valid(other, scheme, b"tbs", signature)
        assert not is_signature_valid(public_key, scheme, b"tbs", signature[:-1])
        assert not is_signature_valid(public_key, scheme, b"tbs", b"")
        assert not any(
            is_signature_valid(public_key, wrong, b"tbs", signature)
            for wrong in key_type.schemes
            if wrong is not scheme
        )


def test_ecdsa_signatures_are_der() -> None:
    key = private_key(KeyType.ECDSA_P256)
    signature = key.sign(b"tbs", *scheme_arguments(SignatureScheme.ECDSA_SECP256R1_SHA256))
    assert all(0 < number < 2**256 for number in decode_dss_signature(signature))


def test_the_type_of_a_key_is_known_from_either_half() -> None:
    for key_type in (KeyType.ECDSA_P256, KeyType.ECDSA_P384, KeyType.RSA_2048):
        key = private_key(key_type)
        assert key_type_of(key) is key_type_of(key.public_key()) is key_type


@pytest.mark.parametrize(
    ("key", "found"),
    [
        (ec.generate_private_key(ec.SECP521R1()), "an EC key on secp521r1"),
        (rsa.generate_private_key(65537, 1024), "an RSA key of 1024 bits"),
        (ed25519.Ed25519PrivateKey.generate(), "Ed25519PrivateKey"),
    ],
)
def test_says_which_keys_it_takes_and_which_it_got(key: object, found: str) -> None:
    with pytest.raises(ValueError, match=f"expected a key of type ecdsa-p256, .*; got .*{found}"):
        key_type_of(key)


def test_a_public_key_of_another_kind_is_refused() -> None:
    der = (
        ed25519.Ed25519PrivateKey.generate().public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    )
    with pytest.raises(ValueError, match="expected an EC or RSA public key"):
        load_public_key(der)
