from __future__ import annotations

import datetime
import ipaddress

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import PolicyBuilder, Store

from hsm.keys import public_key_der, scheme_arguments
from hsm.messages import KeyType, SignatureScheme
from hsm.pki import build_csr, make_demo_ca
from tests.tokens import private_key

KINDS = [KeyType.ECDSA_P256, KeyType.ECDSA_P384, KeyType.RSA_2048]


def csr(key_type: KeyType, subject: str = "CN=www.example.com", dns_names: tuple[str, ...] = ()) -> bytes:
    key = private_key(key_type)

    def sign(scheme: SignatureScheme, tbs: bytes) -> bytes:
        return key.sign(tbs, *scheme_arguments(scheme))

    return build_csr(public_key_der(key.public_key()), sign, subject, dns_names)


@pytest.mark.parametrize("key_type", KINDS)
@pytest.mark.parametrize("count", [1, 2, 40])
def test_a_request_carries_subject_key_and_names(key_type: KeyType, count: int) -> None:
    names = [f"host-{number}.example.com" for number in range(count)]
    request = x509.load_pem_x509_csr(csr(key_type, "CN=www.example.com,O=Example\\, Ltd,C=DE", tuple(names)))
    assert request.is_signature_valid
    assert request.subject.rfc4514_string() == "CN=www.example.com,O=Example\\, Ltd,C=DE"
    assert request.public_key() == private_key(key_type).public_key()
    extension = request.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert extension.value.get_values_for_type(x509.DNSName) == names


def test_a_request_without_names_has_no_extensions() -> None:
    assert list(x509.load_pem_x509_csr(csr(KeyType.ECDSA_P256)).extensions) == []


@pytest.mark.parametrize(
    ("subject", "dns_names", "expected"),
    [
        ("www.example.com", (), "subject: expected an RFC 4514 name .*; got 'www.example.com'"),
        ("C=Germany", (), "subject: expected an RFC 4514 name"),
        ("CN=x", ("bücher.example",), "DNS name: expected ASCII, with IDNs as xn-- labels; got 'bücher.example'"),
    ],
)
def test_says_what_is_unfit_in_a_request(subject: str, dns_names: tuple[str, ...], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        csr(KeyType.ECDSA_P256, subject, dns_names)


def test_a_request_that_the_token_signed_wrongly_is_not_given_out() -> None:
    other = private_key(KeyType.ECDSA_P256, "other")
    with pytest.raises(ValueError, match="does not verify"):
        build_csr(
            public_key_der(private_key(KeyType.ECDSA_P256).public_key()),
            lambda scheme, tbs: other.sign(tbs, *scheme_arguments(scheme)),
            "CN=x",
            [],
        )


@pytest.mark.parametrize("key_type", KINDS)
def test_a_leaf_of_the_demo_ca_is_trusted_for_its_names(key_type: KeyType) -> None:
    ca = make_demo_ca()
    public_key = public_key_der(private_key(key_type).public_key())
    leaf = x509.load_pem_x509_certificate(
        ca.issue_leaf(public_key, ["localhost", "*.example.com"], ["127.0.0.1", "::1"])
    )
    verifiers = PolicyBuilder().store(Store([x509.load_pem_x509_certificate(ca.certificate_pem())]))
    for name in (
        x509.DNSName("localhost"),
        x509.DNSName("www.example.com"),
        x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
        x509.IPAddress(ipaddress.ip_address("::1")),
    ):
        assert verifiers.build_server_verifier(name).verify(leaf, []) == [leaf, ca.certificate]
    with pytest.raises(x509.verification.VerificationError):
        verifiers.build_server_verifier(x509.DNSName("example.org")).verify(leaf, [])
    usage = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert leaf.not_valid_after_utc - leaf.not_valid_before_utc < datetime.timedelta(days=91)


def test_the_demo_ca_shows_its_private_key_to_nobody() -> None:
    ca = make_demo_ca()
    assert "PRIVATE" not in repr(ca)
    assert b"PRIVATE" not in ca.certificate_pem()
    assert ca.certificate != make_demo_ca().certificate
