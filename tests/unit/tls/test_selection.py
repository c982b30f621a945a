from __future__ import annotations

import dataclasses

import pytest

from hsm.messages import KeyType, SignatureScheme
from tests.unit.tls.peers import Signer
from tlsproxy.tls.certificates import Certificate
from tlsproxy.tls.client_hello import ClientHello
from tlsproxy.tls.selection import CertificateSelector, can_verify

P256, P384, RSA = KeyType.ECDSA_P256, KeyType.ECDSA_P384, KeyType.RSA_2048
ECDSA_SHA256, ECDSA_SHA384 = SignatureScheme.ECDSA_SECP256R1_SHA256, SignatureScheme.ECDSA_SECP384R1_SHA384
PSS, PKCS1 = SignatureScheme.RSA_PSS_RSAE_SHA256, SignatureScheme.RSA_PKCS1_SHA256
ECDHE_ECDSA, ECDHE_RSA = 0xC02B, 0xC02F
X25519, SECP256R1 = 29, 23

EVERYTHING = ClientHello(None, (), (ECDHE_ECDSA, ECDHE_RSA), tuple(SignatureScheme), (X25519, SECP256R1, 24), True)
TLS12 = dataclasses.replace(EVERYTHING, offers_tls13=False)


def asking_for(server_name: str | None) -> ClientHello:
    return dataclasses.replace(EVERYTHING, server_name=server_name)


def certificate(signer: Signer, key_type: KeyType, *names: str) -> Certificate:
    return signer.certificate(key_type, *names, name=f"{key_type.value}:{','.join(names)}")


@pytest.mark.parametrize(
    ("server_name", "expected"),
    [
        ("a.example", "a.example"),
        ("b.example", "b.example"),
        ("x.b.example", "*.b.example"),
        ("exact.b.example", "exact.b.example"),
        ("x.y.b.example", "a.example"),
        ("unknown.example", "a.example"),
        ("b.example.evil", "a.example"),
        (None, "a.example"),
    ],
)
def test_selects_by_name(signer: Signer, server_name: str | None, expected: str):
    names = ["a.example", "b.example", "*.b.example", "exact.b.example"]
    selector = CertificateSelector([certificate(signer, P256, name) for name in names])
    assert selector.select(asking_for(server_name)).dns_names == (expected,)


def test_names_are_compared_in_lower_case(signer: Signer):
    selector = CertificateSelector([certificate(signer, P256, "first"), certificate(signer, P256, "UPPER.example")])
    assert selector.select(asking_for("upper.example")).dns_names == ("upper.example",)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, P256),
        ({"signature_schemes": (PSS, ECDSA_SHA256)}, P256),
        ({"signature_schemes": (PSS,)}, RSA),
        ({"signature_schemes": (ECDSA_SHA384,)}, P384),
        ({"signature_schemes": (PKCS1,)}, P256),  # nothing fits: the first, for OpenSSL to refuse
    ],
)
def test_configured_order_decides_among_what_the_client_verifies(
    signer: Signer, changes: dict[str, tuple[int, ...]], expected: KeyType
):
    selector = CertificateSelector([certificate(signer, key_type, "a.example") for key_type in (P256, RSA, P384)])
    hello = dataclasses.replace(asking_for("a.example"), **changes)
    assert selector.select(hello).key_type is expected


def test_a_wildcard_serves_a_client_that_cannot_verify_the_exact_match(signer: Signer):
    selector = CertificateSelector(
        [certificate(signer, P256, "www.a.example"), certificate(signer, RSA, "*.a.example")]
    )
    hello = dataclasses.replace(asking_for("www.a.example"), signature_schemes=(PSS,))
    assert selector.select(hello).key_type is RSA


@pytest.mark.parametrize(
    ("key_type", "hello", "expected"),
    [
        (P256, EVERYTHING, True),
        (P384, EVERYTHING, True),
        (RSA, EVERYTHING, True),
        (RSA, dataclasses.replace(EVERYTHING, signature_schemes=(PKCS1,)), False),
        (RSA, dataclasses.replace(TLS12, signature_schemes=(PKCS1,)), True),
        (P384, dataclasses.replace(EVERYTHING, signature_schemes=(ECDSA_SHA256,)), False),
        (P384, dataclasses.replace(TLS12, signature_schemes=(ECDSA_SHA256,)), True),
        (P256, dataclasses.replace(TLS12, signature_schemes=None), False),
        (P256, dataclasses.replace(TLS12, cipher_suites=(ECDHE_RSA,)), False),
        (RSA, dataclasses.replace(TLS12, cipher_suites=(ECDHE_ECDSA,)), False),
        (P384, dataclasses.replace(TLS12, groups=(X25519, SECP256R1)), False),
        (P384, dataclasses.replace(EVERYTHING, groups=(X25519, SECP256R1)), True),
        (P384, dataclasses.replace(TLS12, groups=None), True),
        (RSA, dataclasses.replace(TLS12, groups=(X25519,)), True),
    ],
)
def test_what_a_client_can_verify(signer: Signer, key_type: KeyType, hello: ClientHello, expected: bool):
    assert can_verify(certificate(signer, key_type, "a.example"), hello) is expected


def test_a_token_without_pss_is_verified_in_tls12_alone(signer: Signer):
    limited = certificate(signer, RSA, "a.example").limited_to([PKCS1])
    assert can_verify(limited, EVERYTHING)
    assert not can_verify(limited, dataclasses.replace(EVERYTHING, cipher_suites=(0x1301,)))
    assert not can_verify(limited, dataclasses.replace(TLS12, signature_schemes=(PSS,)))
