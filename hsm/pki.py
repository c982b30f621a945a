"""Certificate requests signed by a token, and a small certificate authority for demonstrations and tests."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from hsm.keys import PublicKey, generate_private_key, key_type_of, load_public_key
from hsm.messages import KeyType, SignatureScheme

_CLOCK_SKEW = datetime.timedelta(hours=1)
_CA_LIFETIME = datetime.timedelta(days=3650)
_LEAF_LIFETIME = datetime.timedelta(days=90)

_SEQUENCE = 0x30
_SET = 0x31
_OCTET_STRING = 0x04
_BIT_STRING = 0x03
_ATTRIBUTES = 0xA0
_VERSION_0 = b"\x02\x01\x00"
_EXTENSION_REQUEST = bytes.fromhex("06092a864886f70d01090e")
_SUBJECT_ALT_NAME = bytes.fromhex("0603551d11")
_CSR_SCHEMES = {
    KeyType.ECDSA_P256: SignatureScheme.ECDSA_SECP256R1_SHA256,
    KeyType.ECDSA_P384: SignatureScheme.ECDSA_SECP384R1_SHA384,
}
_ALGORITHM_IDENTIFIERS = {
    SignatureScheme.ECDSA_SECP256R1_SHA256: bytes.fromhex("300a06082a8648ce3d040302"),
    SignatureScheme.ECDSA_SECP384R1_SHA384: bytes.fromhex("300a06082a8648ce3d040303"),
    SignatureScheme.RSA_PKCS1_SHA256: bytes.fromhex("300d06092a864886f70d01010b0500"),
}


def build_csr(
    public_key: bytes, sign: Callable[[SignatureScheme, bytes], bytes], subject: str, dns_names: Sequence[str]
) -> bytes:
    """Return a PKCS#10 certificate request (RFC 2986), PEM.

    `public_key` is a DER SubjectPublicKeyInfo and `sign` makes a signature by its private half, wherever that is, in
    the form of Signer.sign. `subject` is an RFC 4514 name such as `CN=www.example.com,O=Example`; `dns_names` become
    the subjectAltName.

    Raises ValueError: an unfit subject or name, or a signature that does not verify. What `sign` raises passes through.
    """
    try:
        name = x509.Name.from_rfc4514_string(subject)
    except ValueError:
        raise ValueError(f"subject: expected an RFC 4514 name such as CN=www.example.com; got {subject!r}") from None
    scheme = _CSR_SCHEMES.get(key_type_of(load_public_key(public_key)), SignatureScheme.RSA_PKCS1_SHA256)
    tbs = _der(_SEQUENCE, _VERSION_0, name.public_bytes(), public_key, _der(_ATTRIBUTES, *_request_names(dns_names)))
    signature = sign(scheme, tbs)
    request = _der(_SEQUENCE, tbs, _ALGORITHM_IDENTIFIERS[scheme], _der(_BIT_STRING, b"\x00", signature))
    csr = x509.load_der_x509_csr(request)
    if not csr.is_signature_valid:
        raise ValueError("the token's signature of the request does not verify by the token's public key")
    return csr.public_bytes(Encoding.PEM)


def _request_names(dns_names: Sequence[str]) -> list[bytes]:
    """Return the extensionRequest attribute (RFC 2985 section 5.4.2), or nothing if there are no names."""
    if not dns_names:
        return []
    names = _der(_OCTET_STRING, _alternative_names(dns_names, ()).public_bytes())
    extensions = _der(_SEQUENCE, _der(_SEQUENCE, _SUBJECT_ALT_NAME, names))
    return [_der(_SEQUENCE, _EXTENSION_REQUEST, _der(_SET, extensions))]


def _der(tag: int, *content: bytes) -> bytes:
    body = b"".join(content)
    if len(body) < 0x80:
        return bytes((tag, len(body))) + body
    length = len(body).to_bytes((len(body).bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(length))) + length + body


def _alternative_names(dns_names: Sequence[str], ip_addresses: Sequence[str]) -> x509.SubjectAlternativeName:
    unfit = [name for name in dns_names if not name.isascii()]
    if unfit:
        raise ValueError(f"DNS name: expected ASCII, with IDNs as xn-- labels; got {unfit[0]!r}")
    addresses = [x509.IPAddress(ipaddress.ip_address(address)) for address in ip_addresses]
    return x509.SubjectAlternativeName([*map(x509.DNSName, dns_names), *addresses])


@dataclass(frozen=True, slots=True)
class DemoCa:
    """A certificate authority whose key lives in this process. For demonstrations and tests only."""

    certificate: x509.Certificate
    _private_key: ec.EllipticCurvePrivateKey

    def certificate_pem(self) -> bytes:
        """Return the CA's certificate, for clients to trust."""
        return self.certificate.public_bytes(Encoding.PEM)

    def issue_leaf(self, public_key: bytes, dns_names: Sequence[str], ip_addresses: Sequence[str] = ()) -> bytes:
        """Return a server certificate for a DER SubjectPublicKeyInfo, PEM, good for 90 days.

        Raises ValueError for an unfit key or name.
        """
        key = load_public_key(public_key)
        builder = _builder(_common_name(dns_names[0]), self.certificate.subject, key, _LEAF_LIFETIME)
        for extension, critical in (
            (x509.BasicConstraints(ca=False, path_length=None), True),
            (_key_usage(is_ca=False), True),
            (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
            (_alternative_names(dns_names, ip_addresses), False),
            (x509.SubjectKeyIdentifier.from_public_key(key), False),
            (x509.AuthorityKeyIdentifier.from_issuer_public_key(self._private_key.public_key()), False),
        ):
            builder = builder.add_extension(extension, critical)
        return builder.sign(self._private_key, hashes.SHA256()).public_bytes(Encoding.PEM)


def make_demo_ca(common_name: str = "tlsproxy demo CA") -> DemoCa:
    """Return a new authority with a P-256 key, good for ten years."""
    private_key = generate_private_key(KeyType.ECDSA_P256)
    assert isinstance(private_key, ec.EllipticCurvePrivateKey)
    name = _common_name(common_name)
    builder = _builder(name, name, private_key.public_key(), _CA_LIFETIME)
    for extension in (x509.BasicConstraints(ca=True, path_length=0), _key_usage(is_ca=True)):
        builder = builder.add_extension(extension, critical=True)
    identifier = x509.SubjectKeyIdentifier.from_public_key(private_key.public_key())
    builder = builder.add_extension(identifier, critical=False)
    return DemoCa(builder.sign(private_key, hashes.SHA256()), private_key)


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: PublicKey, lifetime: datetime.timedelta
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.timezone.utc)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + lifetime)
    )


def _common_name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _key_usage(*, is_ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=is_ca,
        crl_sign=is_ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
