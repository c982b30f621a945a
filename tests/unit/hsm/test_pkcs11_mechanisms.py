from __future__ import annotations

import hashlib

import pytest

from hsm.backends.pkcs11_mechanisms import recipes_for
from hsm.errors import TokenConfigError
from hsm.messages import KeyType, SignatureScheme

SIGN = 0x800
VERIFY = 0x2000
TBS = b"to be signed"


def test_prefers_mechanisms_that_take_a_hash():
    recipes = recipes_for(KeyType.RSA_2048, dict.fromkeys([0x01, 0x0D, 0x40, 0x43], SIGN))
    assert recipes[SignatureScheme.RSA_PKCS1_SHA256].mechanism == 0x01
    assert recipes[SignatureScheme.RSA_PSS_RSAE_SHA512].mechanism == 0x0D
    assert (
        recipes_for(KeyType.ECDSA_P256, dict.fromkeys([0x1041, 0x1044], SIGN))[
            SignatureScheme.ECDSA_SECP256R1_SHA256
        ].mechanism
        == 0x1041
    )


def test_takes_mechanisms_that_hash_where_there_are_no_others():
    recipes = recipes_for(KeyType.RSA_2048, dict.fromkeys([0x40, 0x43, 0x45], SIGN))
    assert {scheme: recipe.mechanism for scheme, recipe in recipes.items()} == {
        SignatureScheme.RSA_PKCS1_SHA256: 0x40,
        SignatureScheme.RSA_PSS_RSAE_SHA256: 0x43,
        SignatureScheme.RSA_PSS_RSAE_SHA512: 0x45,
    }
    assert all(recipe.token_input(TBS) == TBS for recipe in recipes.values())
    assert set(recipes_for(KeyType.ECDSA_P384, {0x1045: SIGN})) == {SignatureScheme.ECDSA_SECP384R1_SHA384}


def test_cuts_the_hash_to_what_the_curve_takes():
    recipe = recipes_for(KeyType.ECDSA_P256, {0x1041: SIGN})[SignatureScheme.ECDSA_SECP384R1_SHA384]
    assert recipe.token_input(TBS) == hashlib.sha384(TBS).digest()[:32]


def test_wraps_the_hash_for_pkcs1():
    recipe = recipes_for(KeyType.RSA_2048, {0x01: SIGN})[SignatureScheme.RSA_PKCS1_SHA256]
    hash_ = hashlib.sha256(TBS).digest()
    assert recipe.token_input(TBS) == bytes.fromhex("3031300d060960864801650304020105000420") + hash_


@pytest.mark.parametrize(
    ("key_type", "mechanisms", "named"),
    [
        (KeyType.ECDSA_P256, {0x01: SIGN}, "CKM_ECDSA"),
        (KeyType.ECDSA_P256, {0x1041: VERIFY}, "CKM_ECDSA"),
        (KeyType.RSA_4096, {0x1041: SIGN}, "CKM_RSA_PKCS_PSS or CKM_RSA_PKCS"),
    ],
)
def test_names_the_mechanism_that_is_missing(key_type, mechanisms, named):
    with pytest.raises(TokenConfigError, match=named):
        recipes_for(key_type, mechanisms)
