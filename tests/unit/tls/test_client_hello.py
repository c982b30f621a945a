from __future__ import annotations

import pytest

from tlsproxy.tls.client_hello import ClientHello, parse_client_hello

TLS12, TLS13 = b"\x02\x03\x03", b"\x04\x03\x04\x03\x03"


def parse(
    *,
    server_name: bytes | None = None,
    signature_algorithms: bytes | None = None,
    groups: bytes | None = None,
    versions: bytes | None = None,
    alpn: bytes | None = None,
) -> ClientHello:
    return parse_client_hello(0x0303, b"\x13\x01\xc0\x2b", server_name, signature_algorithms, groups, versions, alpn)


def sni(name: bytes) -> bytes:
    return (len(name) + 3).to_bytes(2, "big") + b"\x00" + len(name).to_bytes(2, "big") + name


def test_reads_every_field():
    hello = parse(
        server_name=sni(b"WWW.Example.com."),
        signature_algorithms=b"\x00\x04\x04\x03\x08\x04",
        groups=b"\x00\x02\x00\x1d",
        versions=TLS13,
        alpn=b"\x00\x0c\x02h2\x08http/1.1",
    )
    assert hello == ClientHello(
        server_name="www.example.com",
        alpn_protocols=(b"h2", b"http/1.1"),
        cipher_suites=(0x1301, 0xC02B),
        signature_schemes=(0x0403, 0x0804),
        groups=(0x1D,),
        offers_tls13=True,
    )


def test_absent_extensions():
    hello = parse()
    assert (hello.server_name, hello.alpn_protocols, hello.signature_schemes, hello.groups) == (None, (), None, None)
    assert not hello.offers_tls13


def test_tls12_in_supported_versions_is_not_tls13():
    assert not parse(versions=TLS12).offers_tls13


@pytest.mark.parametrize(
    "extension",
    [
        b"",
        b"\x00",
        sni(b""),
        sni(b"a" * 64),
        sni(b".".join([b"a" * 60] * 5)),
        sni(b"a..b"),
        sni(b"a\x00b"),
        sni(b"a b\r\n"),
        sni("bücher.example".encode()),
        sni(b"example.com")[:-1],
        sni(b"example.com") + b"x",
        sni(b"example.com").replace(b"\x00\x00\x0b", b"\x01\x00\x0b"),
    ],
)
def test_what_is_no_host_name_counts_as_none(extension: bytes):
    assert parse(server_name=extension).server_name is None


@pytest.mark.parametrize("extension", [b"", b"\x00", b"\x00\x02\x04", b"\x00\x04\x04\x03", b"\x00\x03\x04\x03\x08"])
def test_malformed_number_lists_count_as_absent(extension: bytes):
    hello = parse(signature_algorithms=extension, groups=extension, versions=extension)
    assert (hello.signature_schemes, hello.groups, hello.offers_tls13) == (None, None, False)


@pytest.mark.parametrize("extension", [b"", b"\x00", b"\x00\x03\x02h", b"\x00\x05\xffh2h2"])
def test_malformed_alpn_counts_as_absent(extension: bytes):
    assert parse(alpn=extension).alpn_protocols == ()
