from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from hsm.errors import PolicyRejected
from hsm.messages import SignatureScheme
from hsm.policy import RULES, check_tls_server

ECDSA = SignatureScheme.ECDSA_SECP256R1_SHA256
PSS = SignatureScheme.RSA_PSS_RSAE_SHA256
PKCS1 = SignatureScheme.RSA_PKCS1_SHA256
CONTEXT = b" " * 64 + b"TLS 1.3, server CertificateVerify\x00"
RANDOMS = b"c" * 32 + b"s" * 32


def point(curve: ec.EllipticCurve) -> bytes:
    public_key = ec.generate_private_key(curve).public_key()
    return public_key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)


FIELD = 2**256 - 2**224 + 2**192 + 2**96 - 1
ROOT = pow(0x5AC635D8AA3A93E7B3EBBD55769886BC651D06B0CC53B0F63BCE3C3E27D2604B, (FIELD + 1) // 4, FIELD)
"""(0, ROOT) is on P-256; so is (FIELD, ROOT), written as nobody writes it."""
P256, P384 = point(ec.SECP256R1()), point(ec.SECP384R1())


def key_exchange(group: int, share: bytes, curve_type: int = 3) -> bytes:
    return RANDOMS + bytes((curve_type,)) + group.to_bytes(2, "big") + bytes((len(share),)) + share


@pytest.mark.parametrize("hash_bytes", [32, 48])
@pytest.mark.parametrize("scheme", [ECDSA, PSS])
def test_allows_a_tls13_server_certificate_verify(scheme: SignatureScheme, hash_bytes: int) -> None:
    check_tls_server(scheme, CONTEXT + b"h" * hash_bytes)


@pytest.mark.parametrize(
    ("group", "share"),
    [(23, P256), (24, P384), (29, b"x" * 32)],
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
    ("tls12-length", ECDSA, key_exchange(23, P256) + b"y"),
    ("tls12-length", ECDSA, key_exchange(23, P256)[:-1]),
    ("tls12-curve-type", ECDSA, key_exchange(23, P256, curve_type=1)),
    ("tls12-group", ECDSA, key_exchange(25, b"\x04" + b"x" * 132)),
    ("tls12-point", ECDSA, key_exchange(23, b"\x02" + P256[1:])),
    ("tls12-point", ECDSA, key_exchange(24, b"\x00" + P384[1:])),
    ("tls12-point", ECDSA, key_exchange(23, P256[:-1] + bytes((P256[-1] ^ 1,)))),
    ("tls12-point", ECDSA, key_exchange(24, P384[:1] + P384[49:] + P384[1:49])),
    ("tls12-point", ECDSA, key_exchange(24, bytes(97))),
    ("tls12-point", ECDSA, key_exchange(23, b"\x04" + FIELD.to_bytes(32, "big") + ROOT.to_bytes(32, "big"))),
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
    """Of the bytes that are not the hash or the randoms, every single one matters."""
    for tbs, fixed in (
        (CONTEXT + b"h" * 32, range(len(CONTEXT))),
        (key_exchange(23, P256), range(64, 133)),
    ):
        check_tls_server(ECDSA, tbs)
        for position in fixed:
            changed = bytearray(tbs)
            changed[position] ^= 0x81
            with pytest.raises(PolicyRejected):
                check_tls_server(ECDSA, bytes(changed))


def der(tag: int, *contents: bytes) -> bytes:
    content = b"".join(contents)
    length = len(content)
    return bytes((tag, length) if length < 0x80 else (tag, 0x81, length)) + content


def test_a_certificate_is_no_key_exchange_however_well_it_is_made() -> None:
    share = bytes.fromhex("0300186104")
    key = ed25519.Ed25519PrivateKey.generate().public_key()
    name = der(0x30, der(0x31, der(0x30, bytes.fromhex("0603550403"), der(0x0C, b"a.com"))))
    validity = der(0x30, der(0x17, b"260101000000Z"), der(0x17, b"360101000000Z"))
    subject_key = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    # What looks like a curve and a point's first byte hides in the parameters of the signature's algorithm.
    parameters = der(0x04, bytes(44) + share)
    algorithm = der(0x30, bytes.fromhex("06082a8648ce3d040302"), parameters)
    certificate = der(0x30, der(0x02, b"\x01"), algorithm, name, validity, der(0x30), subject_key)
    assert (len(certificate), certificate[64:69]) == (64 + 4 + 97, share)
    with pytest.raises(PolicyRejected, match="tls12-point"):
        check_tls_server(ECDSA, certificate)
