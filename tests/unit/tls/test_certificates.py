from __future__ import annotations

import datetime
import ipaddress

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from hsm.messages import KeyType, SignatureScheme
from tests.unit.tls.peers import NOW, Authority, generate_key
from tlsproxy.tls.certificates import CertificateError, load_chain


@pytest.mark.parametrize("key_type", [KeyType.ECDSA_P256, KeyType.ECDSA_P384, KeyType.RSA_2048])
def test_describes_the_leaf(authority: Authority, key_type: KeyType):
    key = generate_key(key_type)
    names = [
        x509.DNSName("WWW.Example.com"),
        x509.DNSName("*.example.com"),
        x509.IPAddress(ipaddress.ip_address("::1")),
    ]
    certificate = load_chain("www", authority.chain_pem(key, names), "www.pem")
    assert (certificate.name, certificate.key_type) == ("www", key_type)
    assert certificate.dns_names == ("www.example.com", "*.example.com", "::1")
    assert [x509.load_der_x509_certificate(der).subject.rfc4514_string() for der in certificate.chain] == [
        "CN=leaf",
        "CN=intermediate",
    ]
    assert certificate.public_key == key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert certificate.not_after.tzinfo is not None


def test_without_subject_alternative_names_there_are_no_names(authority: Authority):
    pem = authority.leaf_pem(generate_key(KeyType.ECDSA_P256), [])
    assert load_chain("www", pem, "www.pem").dns_names == ()


def test_validity_period(authority: Authority):
    certificate = load_chain("www", authority.leaf_pem(generate_key(KeyType.ECDSA_P256), []), "www.pem")
    assert certificate.is_valid_at(NOW)
    assert not certificate.is_valid_at(NOW + datetime.timedelta(days=2))
    assert not certificate.is_valid_at(NOW - datetime.timedelta(days=2))


def test_refuses_a_private_key_in_the_file(authority: Authority):
    key = generate_key(KeyType.ECDSA_P256)
    pem = authority.leaf_pem(key, []) + key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with pytest.raises(CertificateError, match=r"^www\.pem: certificates only expected; got a private key"):
        load_chain("www", pem, "www.pem")


@pytest.mark.parametrize("pem", [b"", b"\x30\x82\x01\x00", b"-----BEGIN PUBLIC KEY-----\n"])
def test_refuses_a_file_without_certificate(pem: bytes):
    with pytest.raises(CertificateError, match=r"^www\.pem: PEM certificates expected; got none"):
        load_chain("www", pem, "www.pem")


@pytest.mark.parametrize("body", [b"", b"not base64!\n", b"MIIB\n"])
def test_refuses_malformed_pem(body: bytes):
    pem = b"-----BEGIN CERTIFICATE-----\n" + body + b"-----END CERTIFICATE-----\n"
    with pytest.raises(CertificateError, match=r"^www\.pem: PEM certificates expected; got malformed ones"):
        load_chain("www", pem, "www.pem")


@pytest.mark.parametrize(
    ("key", "found"),
    [
        (ed25519.Ed25519PrivateKey.generate(), "Ed25519"),
        (ec.generate_private_key(ec.SECP521R1()), "EC secp521r1"),
        (rsa.generate_private_key(65537, 1024), "RSA of 1024 bits"),
    ],
)
def test_refuses_an_unsupported_key(authority: Authority, key: ec.EllipticCurvePrivateKey, found: str):
    with pytest.raises(CertificateError, match=rf"^www\.pem: a key of type ecdsa-p256, .* expected; got {found}$"):
        load_chain("www", authority.leaf_pem(key, []), "www.pem")


def test_names_the_certificate_that_is_out_of_order(authority: Authority):
    leaf = authority.leaf_pem(generate_key(KeyType.ECDSA_P256), [])
    root, intermediate = (ca.public_bytes(Encoding.PEM) for ca in (authority.root, authority.intermediate))
    load_chain("www", leaf + intermediate + root, "www.pem")
    with pytest.raises(CertificateError, match=r"number 1 \(CN=leaf\) is not issued by number 2 \(CN=root\)"):
        load_chain("www", leaf + root + intermediate, "www.pem")
    with pytest.raises(CertificateError, match=r"number 2 \(CN=intermediate\) is not issued by number 3 \(CN=leaf\)"):
        load_chain("www", leaf + intermediate + leaf, "www.pem")


def test_an_issuer_of_the_same_name_but_another_key_is_found_out(authority: Authority):
    leaf = authority.leaf_pem(generate_key(KeyType.ECDSA_P256), [])
    with pytest.raises(CertificateError, match=r"number 1 .* is not issued by number 2"):
        load_chain("www", leaf + Authority().intermediate.public_bytes(Encoding.PEM), "www.pem")


def test_refuses_an_endless_chain(authority: Authority):
    pem = authority.root.public_bytes(Encoding.PEM) * 17
    with pytest.raises(CertificateError, match="at most 16 certificates expected; got 17"):
        load_chain("www", pem, "www.pem")


def test_limiting_to_what_a_token_signs(authority: Authority):
    certificate = load_chain("www", authority.leaf_pem(generate_key(KeyType.RSA_2048), []), "www.pem")
    pkcs1 = SignatureScheme.RSA_PKCS1_SHA256
    assert certificate.limited_to([SignatureScheme.ECDSA_SECP256R1_SHA256, pkcs1]).schemes == (pkcs1,)
    with pytest.raises(CertificateError, match="a token that signs with rsa-2048 keys for TLS expected"):
        certificate.limited_to([SignatureScheme.ECDSA_SECP256R1_SHA256])
