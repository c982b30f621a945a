"""The PROXY protocol's headers, as doc/proxy-protocol.txt of HAProxy has them."""

from __future__ import annotations

import struct
from ipaddress import IPv6Address

import pytest

from tlsproxy.config import Address
from tlsproxy.proxy_protocol import (
    MAX_V1_BYTES,
    MAX_V2_BYTES,
    ClientShown,
    Endpoints,
    ProxyHeader,
    ProxyProtocolError,
    TlsDetails,
    parse_header,
    v1_header,
    v2_header,
)

SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"
IPV4 = Endpoints(Address("192.0.2.1", 56324), Address("198.51.100.7", 443))
IPV6 = Endpoints(Address("2001:db8::1", 1), Address("2001:db8::2", 65535))
BODY4 = bytes([192, 0, 2, 1, 198, 51, 100, 7]) + struct.pack("!HH", 56324, 443)
BODY6 = bytes.fromhex("20010db800000000000000000000000120010db8000000000000000000000002") + struct.pack("!HH", 1, 65535)

MAPPED = bytes(10) + b"\xff\xff" + BODY4[:4] + bytes(10) + b"\xff\xff" + BODY4[4:]


def v2(command: int, family: int, body: bytes) -> bytes:
    return SIGNATURE + bytes([command, family]) + struct.pack("!H", len(body)) + body


HEADERS = [
    (b"PROXY TCP4 192.0.2.1 198.51.100.7 56324 443\r\n", IPV4),
    (b"PROXY TCP6 2001:db8::1 2001:0DB8::2 1 65535\r\n", IPV6),
    (b"PROXY TCP6 ::ffff:192.0.2.1 ::FFFF:c633:6407 56324 443\r\n", IPV4),
    (v2(0x21, 0x21, MAPPED), IPV4),
    (
        v2(0x21, 0x21, MAPPED[:16] + BODY6[16:]),
        Endpoints(Address(str(IPv6Address("::ffff:192.0.2.1")), 1), IPV6.server),
    ),
    (b"PROXY UNKNOWN\r\n", None),
    (b"PROXY UNKNOWN ffff:f...f:ffff ffff:f...f:ffff 65535 65535\r\n", None),
    (v2(0x21, 0x11, BODY4), IPV4),
    (v2(0x21, 0x21, BODY6), IPV6),
    (v2(0x21, 0x11, BODY4 + b"\x04\x00\x01x\xee\x00\x00"), IPV4),
    (v2(0x20, 0x00, b""), None),
    (v2(0x20, 0x11, b"anything"), None),
    (v2(0x21, 0x00, b"anything"), None),
    (v2(0x21, 0x31, b"\0" * 216), None),
    (v2(0x21, 0x12, BODY4), None),
]


@pytest.mark.parametrize(("header", "endpoints"), HEADERS)
def test_a_header_is_read_once_it_is_whole(header: bytes, endpoints: Endpoints | None) -> None:
    for size in range(len(header)):
        assert parse_header(header[:size]) is None
    for rest in (b"", b"\x16\x03\x01", b"PROXY "):
        assert parse_header(header + rest) == ProxyHeader(endpoints, len(header))


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01",
        b"GET / HTTP/1.1\r\n",
        b"PR ",
        b"POST",
        b"\r\n\r\n\x00\r\nQUIX",
        b"PROXY  TCP4 192.0.2.1 198.51.100.7 56324 443\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.7 56324  443\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.7 56324 443 \r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.7 056324 443\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.7 65536 443\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.7 -1 443\r\n",
        b"PROXY TCP4 192.0.2.256 198.51.100.7 1 443\r\n",
        b"PROXY TCP4 192.0.2.01 198.51.100.7 1 443\r\n",
        b"PROXY TCP4 2001:db8::1 2001:db8::2 1 443\r\n",
        b"PROXY TCP6 192.0.2.1 198.51.100.7 1 443\r\n",
        b"PROXY tcp4 192.0.2.1 198.51.100.7 1 443\r\n",
        b"PROXY UDP4 192.0.2.1 198.51.100.7 1 443\r\n",
        b"PROXY UNKNOWNX\r\n",
        b"PROXY UNKNOWN a\x00b\r\n",
        b"PROXY \r\n",
        b"PROXY " + b"x" * MAX_V1_BYTES,
        v2(0x11, 0x11, BODY4),
        v2(0x22, 0x11, BODY4),
        v2(0x21, 0x11, BODY4[:-1]),
        v2(0x21, 0x21, BODY6[:-1]),
        v2(0x21, 0x31, b"\0" * 215),
        v2(0x21, 0x41, b"\0" * 300),
        v2(0x21, 0x11, BODY4 + b"\x01\x00"),
        v2(0x21, 0x11, BODY4 + b"\x01\x00\x02x"),
        v2(0x21, 0x11, b"\0" * MAX_V2_BYTES)[:16],
    ],
)
def test_anything_else_is_refused_and_not_shown(data: bytes) -> None:
    with pytest.raises(ProxyProtocolError, match=r"^expected [ -~]+$"):
        parse_header(data)


def test_the_longest_line_fits() -> None:
    longest = b"PROXY UNKNOWN %b\r\n" % (b"f" * (MAX_V1_BYTES - 16))
    assert len(longest) == MAX_V1_BYTES
    assert parse_header(longest) == ProxyHeader(None, MAX_V1_BYTES)


@pytest.mark.parametrize("endpoints", [IPV4, IPV6, None])
def test_what_is_written_is_what_is_read(endpoints: Endpoints | None) -> None:
    for header in (v1_header(endpoints), v2_header(endpoints, None)):
        assert parse_header(header) == ProxyHeader(endpoints, len(header))


def test_the_tlvs_about_tls() -> None:
    tls = TlsDetails("TLSv1.3", "TLS_AES_128_GCM_SHA256", b"http/1.1", "www.example.com")
    header = v2_header(IPV4, tls)
    assert parse_header(header) == ProxyHeader(IPV4, len(header))
    ssl = b"\x01\x00\x00\x00\x01" + b"\x21\x00\x07TLSv1.3" + b"\x23\x00\x16TLS_AES_128_GCM_SHA256"
    assert header == v2(
        0x21,
        0x11,
        BODY4
        + b"\x20" + struct.pack("!H", len(ssl)) + ssl
        + b"\x01\x00\x08http/1.1"
        + b"\x02\x00\x0fwww.example.com",
    )  # fmt: skip
    assert v2_header(IPV4, TlsDetails("TLSv1.2", "X", None, None)).endswith(b"\x21\x00\x07TLSv1.2\x23\x00\x01X")


@pytest.mark.parametrize(
    ("shown", "name", "head", "name_tlv"),
    [
        (ClientShown.NEVER, None, b"\x01\x00\x00\x00\x01", b""),
        (ClientShown.ON_THIS_CONNECTION, "alice", b"\x07\x00\x00\x00\x00", b"\x22\x00\x05alice"),
        (ClientShown.IN_THIS_SESSION, "alice", b"\x05\x00\x00\x00\x00", b"\x22\x00\x05alice"),
        (ClientShown.ON_THIS_CONNECTION, "B\u00e4r", b"\x07\x00\x00\x00\x00", b"\x22\x00\x04B\xc3\xa4r"),
        (ClientShown.ON_THIS_CONNECTION, "x" * 64, b"\x07\x00\x00\x00\x00", b"\x22\x00\x40" + b"x" * 64),
        *(
            (ClientShown.ON_THIS_CONNECTION, name, b"\x07\x00\x00\x00\x00", b"")
            for name in (None, "", "x" * 65, "a\0b")
        ),
    ],
)
def test_the_tlvs_about_a_clients_certificate(
    shown: ClientShown, name: str | None, head: bytes, name_tlv: bytes
) -> None:
    header = v2_header(IPV4, TlsDetails("TLSv1.2", "X", None, None, shown, name))
    ssl = head + b"\x21\x00\x07TLSv1.2\x23\x00\x01X" + name_tlv
    assert header == v2(0x21, 0x11, BODY4 + b"\x20" + struct.pack("!H", len(ssl)) + ssl)
