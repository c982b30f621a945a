from __future__ import annotations

import pytest

from hsm.errors import PolicyRejected
from hsm.messages import SignatureScheme
from hsm.policy import RULES, check_tls_server

ECDSA = SignatureScheme.ECDSA_SECP256R1_SHA256
PSS = SignatureScheme.RSA_PSS_RSAE_SHA256
PKCS1 = SignatureScheme.RSA_PKCS1_SHA256
CONTEXT = b" " * 64 + b"TLS 1.3, server CertificateVerify\x00"
RANDOMS = b"c" * 32 + b"s" * 32


def key_exchange(group: int, share: bytes, curve_type: int = 3) -> bytes:
    return RANDOMS + bytes((curve_type,)) + group.to_bytes(2, "big") + bytes((len(share),)) + share


@pytest.mark.parametrize("hash_bytes", [32, 48])
@pytest.mark.parametrize("scheme", [ECDSA, PSS])
def test_allows_a_tls13_server_certificate_verify(scheme: SignatureScheme, hash_bytes: int) -> None:
    check_tls_server(scheme, CONTEXT + b"h" * hash_bytes)


@pytest.mark.parametrize(
    ("group", "share"),
    [(23, b"\x04" + b"x" * 64), (24, b"\x04" + b"x" * 96), (29, b"x" * 32)],
    ids=["P-256", "P-384", "X25519"],
)
@pytest.mark.parametrize("scheme", [ECDSA, PSS, PKCS1])
def test_allows_a_tls12_server_key_exchange(scheme: SignatureScheme, group: int, share: bytes) -> None:
    check_tls_server(scheme, key_exchange(group, share))


BROKEN: list[tuple[str, SignatureScheme, bytes]] = [
    ("tls13-length", ECDSA, CONTEXT),
    ("tls13-length", ECDSA, CONTEXT + b"h" * 31),
    ("tls13-length", ECDSA, CONTEXT + b"h" * 33),
    ("tls13-length", ECDSA, CONTEXT + b"h" * 64),
    ("tls13-scheme", PKCS1, CONTEXT + b"h" * 32),
    ("tls12-length", ECDSA, b""),
    ("tls12-length", ECDSA, RANDOMS + b"\x03\x00\x17"),
    ("tls12-length", ECDSA, key_exchange(29, b"x" * 31)),
    ("tls12-length", ECDSA, key_exchange(29, b"x" * 33)),
    ("tls12-length", ECDSA, key_exchange(23, b"\x04" + b"x" * 64) + b"y"),
    ("tls12-length", ECDSA, key_exchange(23, b"\x04" + b"x" * 64)[:-1]),
    ("tls12-curve-type", ECDSA, key_exchange(23, b"\x04" + b"x" * 64, curve_type=1)),
    ("tls12-group", ECDSA, key_exchange(25, b"\x04" + b"x" * 132)),
    ("tls12-point", ECDSA, key_exchange(23, b"\x02" + b"x" * 64)),
    ("tls12-point", ECDSA, key_exchange(24, b"\x00" + b"x" * 96)),
]


@pytest.mark.parametrize(("rule", "scheme", "tbs"), BROKEN)
def test_names_the_rule_that_is_broken(rule: str, scheme: SignatureScheme, tbs: bytes) -> None:
    with pytest.raises(PolicyRejected) as caught:
        check_tls_server(scheme, tbs)
    assert caught.value.rule == rule


def test_every_rule_is_known_beforehand() -> None:
    assert {rule for rule, _, _ in BROKEN} == set(RULES)


@pytest.mark.parametrize(
    "tbs",
    [
        b" " * 64 + b"TLS 1.3, client CertificateVerify\x00" + b"h" * 32,
        b" " * 63 + b"TLS 1.3, server CertificateVerify\x00" + b"h" * 33,
        b" " * 64 + b"TLS 1.3, server CertificateVerify\x01" + b"h" * 32,
        b"0\x82\x01\x0a" + b"c" * 400,
        b'{"alg":"ES256"}.' + b"j" * 200,
        bytes(1024),
    ],
    ids=["client's", "short padding", "no separator", "a certificate", "a token", "zeros"],
)
def test_refuses_what_a_stolen_key_would_be_used_for(tbs: bytes) -> None:
    for scheme in SignatureScheme:
        with pytest.raises(PolicyRejected):
            check_tls_server(scheme, tbs)


def test_a_changed_byte_of_the_frame_is_noticed() -> None:
    """Of the bytes that are not the hash, the randoms or the point's coordinates, every single one matters."""
    for tbs, fixed in (
        (CONTEXT + b"h" * 32, range(len(CONTEXT))),
        (key_exchange(23, b"\x04" + b"x" * 64), range(64, 69)),
    ):
        check_tls_server(ECDSA, tbs)
        for position in fixed:
            changed = bytearray(tbs)
            changed[position] ^= 0x81
            with pytest.raises(PolicyRejected):
                check_tls_server(ECDSA, bytes(changed))
