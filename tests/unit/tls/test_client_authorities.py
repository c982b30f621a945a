"""CAs and CRLs as an operator hands them over: each mistake is told, for clients would be refused without a word."""

from __future__ import annotations

import datetime

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from tests.client_cas import DAY, HOUR, NOW, ClientCa
from tlsproxy.tls.certificates import CertificateError
from tlsproxy.tls.client_authorities import ClientAuthorities, client_authorities, load_client_cas, load_crls

ROOT = ClientCa()
BELOW = ClientCa("below", ROOT)
OTHER = ClientCa("other")
LEAF = ROOT.issue()
NO_CRLS = ClientCa("no CRLs", signs_crls=False)
MANY = [ClientCa(f"{i:03}{'x' * 61}") for i in range(3)]
BROKEN = b"-----BEGIN %b-----\nMAA=\n-----END %b-----\n"


def load(*cas: ClientCa, crls: bytes | None = None) -> ClientAuthorities:
    loaded = load_client_cas(b"".join(ca.pem() for ca in cas), "ca.pem")
    return client_authorities(loaded, () if crls is None else load_crls(crls, loaded, "crl.pem"))


def test_cas_and_crls_in_any_order_with_their_times() -> None:
    short = ClientCa("short", not_after=NOW + 5 * DAY)
    crls = BELOW.crl(this_update=NOW - 2 * HOUR, next_update=NOW + HOUR) + short.crl() + ROOT.crl(LEAF)
    found = load(BELOW, short, ROOT, ROOT, crls=b"comment\n" + crls)
    assert found.certificates == tuple(ca.certificate.public_bytes(Encoding.DER) for ca in (BELOW, short, ROOT))
    assert len(found.crls) == 3
    second = datetime.timedelta(seconds=1)
    assert abs(found.not_after - (NOW + 5 * DAY)) < second
    assert found.next_update is not None
    assert found.this_update is not None
    assert abs(found.next_update - (NOW + HOUR)) < second
    assert abs(found.this_update - (NOW - HOUR)) < second
    assert found.cas_are_valid_at(NOW)
    assert not found.cas_are_valid_at(NOW + 6 * DAY)
    assert not found.cas_are_valid_at(NOW - 60 * DAY)
    assert [found.crls_are_valid_at(NOW + shift * HOUR) for shift in (-1.5, 0, 2)] == [False, True, False]
    assert load(ROOT).crls_are_valid_at(NOW + 1000 * DAY)


@pytest.mark.parametrize(
    ("pem", "message"),
    [
        (b"", "PEM certificates expected; got none"),
        (ROOT.crl(), "PEM certificates expected; got none"),
        (BROKEN % (b"CERTIFICATE", b"CERTIFICATE"), "PEM certificates expected; got malformed ones: "),
        (
            LEAF.pem(),
            "certificates only expected; got a private key as well: keys belong in the token, never in a file",
        ),
        (
            ROOT.pem() + LEAF.certificate.public_bytes(Encoding.PEM),
            "CA certificates expected; got one of no CA (basicConstraints): CN=alice",
        ),
        (ClientCa("a", is_ca=False).pem(), "CA certificates expected; got one of no CA (basicConstraints): CN=a"),
        (
            ClientCa("a", signs_certificates=False).pem(),
            "CAs that may sign certificates (keyUsage) expected; got CN=a",
        ),
        (
            OTHER.pem() + BELOW.pem(),
            "with each CA those above it expected, up to a self-signed one; got no issuer of CN=below",
        ),
    ],
)
def test_what_is_no_set_of_cas(pem: bytes, message: str) -> None:
    with pytest.raises(CertificateError) as caught:
        load_client_cas(pem, "ca.pem")
    assert str(caught.value).startswith(f"ca.pem: {message}")
    assert "\n" not in str(caught.value)


def test_more_names_than_a_handshake_can_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tlsproxy.tls.client_authorities._MAX_NAMES_BYTES", 200)
    load(*MANY[:2])
    with pytest.raises(CertificateError, match=r"CA names of at most 200 bytes in all expected, .*; got 237$"):
        load(*MANY)


@pytest.mark.parametrize(
    ("cas", "crls", "message"),
    [
        ([ROOT], b"", "PEM certificate revocation lists expected; got none"),
        ([ROOT], ROOT.pem(), "PEM certificate revocation lists expected; got none"),
        (
            [ROOT],
            BROKEN % (b"X509 CRL", b"X509 CRL"),
            "PEM certificate revocation lists expected; got malformed ones: ",
        ),
        ([ROOT], ROOT.crl() + OTHER.crl(), "CRLs that CAs in ca_file have signed expected; got one of CN=other"),
        (
            [ROOT],
            ClientCa().crl(),
            "CRLs that CAs in ca_file have signed expected; got one of CN=client root",
        ),
        (
            [ROOT, BELOW],
            ROOT.crl(),
            "a CRL of every CA in ca_file expected, as clients of one without are refused; got none of CN=below",
        ),
        ([ROOT], ROOT.crl() + ROOT.crl(delta=True), "complete CRLs expected; got a delta CRL of CN=client root"),
        ([NO_CRLS], NO_CRLS.crl(), "CRLs of CAs that may sign them (keyUsage) expected; got one of CN=no CRLs"),
    ],
)
def test_what_are_no_crls_of_these_cas(cas: list[ClientCa], crls: bytes, message: str) -> None:
    with pytest.raises(CertificateError) as caught:
        load(*cas, crls=crls)
    assert str(caught.value).startswith(f"crl.pem: {message}")
    assert "\n" not in str(caught.value)
