from __future__ import annotations

import pytest

from hsm.canary import Canary
from hsm.keys import public_key_der, scheme_arguments
from hsm.messages import KeyInfo, KeyType
from hsm.policy import check_tls_server
from tests.tokens import private_key


@pytest.mark.parametrize("key_type", [KeyType.ECDSA_P256, KeyType.ECDSA_P384, KeyType.RSA_2048])
def test_every_scheme_of_a_key_passes_the_policy_and_verifies(key_type):
    key = private_key(key_type)
    for scheme in key_type.schemes:
        canary = Canary(KeyInfo(0, "www", key_type, public_key_der(key.public_key()), schemes=(scheme,)))
        check_tls_server(canary.scheme, canary.tbs)
        signature = key.sign(canary.tbs, *scheme_arguments(scheme))
        assert canary.is_answered_by(signature)
        assert not canary.is_answered_by(signature[:-1] + bytes([signature[-1] ^ 1]))


def test_an_answer_to_another_canary_is_none():
    key = private_key(KeyType.ECDSA_P256)
    info = KeyInfo(0, "www", KeyType.ECDSA_P256, public_key_der(key.public_key()))
    first, second = Canary(info), Canary(info)
    assert not second.is_answered_by(key.sign(first.tbs, *scheme_arguments(first.scheme)))


def test_a_key_that_cannot_be_read_has_no_right_answer():
    assert not Canary(KeyInfo(0, "www", KeyType.ECDSA_P256, b"no key")).is_answered_by(b"")
