"""The PROXY protocol: how a proxy tells the next one who the client is, before anything else is said.

Versions 1 (a line of text) and 2 (binary, with TLVs) of HAProxy's specification, doc/proxy-protocol.txt, read and
written. Whoever may send such a header may claim any address, so it is only read from peers that are listed.
"""

from __future__ import annotations

import enum
import ipaddress
import re
import struct
from dataclasses import dataclass

from tlsproxy.config import Address, ProxyProtocol, plain_ip

MAX_V1_BYTES = 107
"""The longest line of version 1, with its CRLF (section 2.1)."""
MAX_V2_BYTES = 4096
"""The longest header of version 2 that is read. Addresses take 52 bytes, the rest is for TLVs."""

_V1_PREFIX = b"PROXY "
_V1_TCP = re.compile(
    rb"PROXY (TCP4|TCP6) ([0-9A-Fa-f:.]{2,45}) ([0-9A-Fa-f:.]{2,45}) (0|[1-9][0-9]{0,4}) (0|[1-9][0-9]{0,4})\r\n"
)
_V1_UNKNOWN = re.compile(rb"PROXY UNKNOWN(?: [ -~]*)?\r\n")
_V2_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
_V2_HEAD = struct.Struct("!12sBBH")
"""Signature, version and command, family and transport, length of what follows (section 2.2)."""
_V2_LOCAL = 0x20
_V2_PROXY = 0x21
_V2_UNSPEC = 0x00
_V2_TCP4 = 0x11
_V2_TCP6 = 0x21
_V2_ADDRESSES = {_V2_TCP4: struct.Struct("!4s4sHH"), _V2_TCP6: struct.Struct("!16s16sHH")}
_V2_OTHER_ADDRESSES_BYTES = {0x12: 12, 0x22: 36, 0x31: 216, 0x32: 216}
"""Datagrams and Unix sockets: well-formed, but not clients this proxy can have."""
_TLV = struct.Struct("!BH")
_TYPE_ALPN = 0x01
_TYPE_AUTHORITY = 0x02
_TYPE_SSL = 0x20
_SUBTYPE_SSL_VERSION = 0x21
_SUBTYPE_SSL_CN = 0x22
_SUBTYPE_SSL_CIPHER = 0x23
_SSL_HEAD = struct.Struct("!BI")
_CLIENT_SSL = 0x01
_CLIENT_CERT_CONN = 0x02
_CLIENT_CERT_SESS = 0x04
_VERIFIED = 0
_NOT_VERIFIED = 1
"""Anything but 0: the client has presented no certificate that was verified (section 2.2.6)."""
_MAX_COMMON_NAME = 64
"""Characters: RFC 5280 appendix A.1, ub-common-name."""


class ClientShown(enum.Enum):
    """When the client has shown a certificate that was verified."""

    NEVER = "never"
    ON_THIS_CONNECTION = "on_this_connection"
    IN_THIS_SESSION = "in_this_session"
    """On an earlier connection, whose TLS session this one resumes."""


class ProxyProtocolError(ValueError):
    """The bytes are no PROXY protocol header. Says what was expected, and shows none of them."""


@dataclass(frozen=True, slots=True)
class Endpoints:
    """The two ends of a client's connection, as the first proxy saw it; the hosts are IP addresses of one family."""

    client: Address
    server: Address


@dataclass(frozen=True, slots=True)
class TlsDetails:
    """What the next hop is told of a client's TLS."""

    version: str
    cipher: str
    alpn: bytes | None
    server_name: str | None
    client_shown: ClientShown = ClientShown.NEVER
    client_common_name: str | None = None
    """Of the client's certificate."""


@dataclass(frozen=True, slots=True)
class ProxyHeader:
    """A header that was read."""

    endpoints: Endpoints | None
    """None: the proxy speaks for itself (LOCAL) or does not know (UNKNOWN); the connection's own addresses count."""
    size: int
    """Its length in bytes: what comes after it is the client's."""


def parse_header(data: bytes) -> ProxyHeader | None:
    """Return the header that `data` begins with, or None while more bytes are needed to tell.

    Raises ProxyProtocolError, as soon as what is there can't become a header.
    """
    if data[:1] == b"P":
        return _parse_v1(data)
    if data[:12] == _V2_SIGNATURE[: len(data)]:
        return _parse_v2(data)
    raise ProxyProtocolError("expected a PROXY protocol header")


def _parse_v1(data: bytes) -> ProxyHeader | None:
    if data[: len(_V1_PREFIX)] != _V1_PREFIX[: len(data)]:
        raise ProxyProtocolError("expected a PROXY protocol header")
    end = data.find(b"\r\n", 0, MAX_V1_BYTES) + 2
    if end < 2:
        if len(data) >= MAX_V1_BYTES:
            raise ProxyProtocolError(f"expected a line of at most {MAX_V1_BYTES} bytes")
        return None
    line = data[:end]
    if _V1_UNKNOWN.fullmatch(line):
        return ProxyHeader(None, end)
    match = _V1_TCP.fullmatch(line)
    if match is None:
        raise ProxyProtocolError("expected TCP4, TCP6 or UNKNOWN with addresses and ports")
    family, *hosts = match.group(1, 2, 3)
    ip = ipaddress.IPv4Address if family == b"TCP4" else ipaddress.IPv6Address
    try:
        client, server = (str(ip(host.decode("ascii"))) for host in hosts)
    except ValueError:
        raise ProxyProtocolError(f"expected two addresses of {family.decode()}") from None
    ports = int(match[4]), int(match[5])
    if max(ports) > 65535:
        raise ProxyProtocolError("expected ports up to 65535")
    return ProxyHeader(_endpoints(Address(client, ports[0]), Address(server, ports[1])), end)


def _parse_v2(data: bytes) -> ProxyHeader | None:
    if len(data) < _V2_HEAD.size:
        return None
    _, command, family, length = _V2_HEAD.unpack_from(data)
    size = _V2_HEAD.size + length
    if command not in (_V2_LOCAL, _V2_PROXY):
        raise ProxyProtocolError("expected version 2 with the command LOCAL or PROXY")
    if size > MAX_V2_BYTES:
        raise ProxyProtocolError(f"expected at most {MAX_V2_BYTES} bytes")
    if len(data) < size:
        return None
    if command == _V2_LOCAL or family == _V2_UNSPEC:
        return ProxyHeader(None, size)
    layout = _V2_ADDRESSES.get(family)
    if layout is None:
        if _V2_OTHER_ADDRESSES_BYTES.get(family, size) <= length:
            return ProxyHeader(None, size)
        raise ProxyProtocolError("expected a known address family and transport")
    if length < layout.size:
        raise ProxyProtocolError("expected addresses of the family's length")
    _check_tlvs(data[_V2_HEAD.size + layout.size : size])
    client, server, client_port, server_port = layout.unpack_from(data, _V2_HEAD.size)
    endpoints = _endpoints(
        Address(str(ipaddress.ip_address(client)), client_port), Address(str(ipaddress.ip_address(server)), server_port)
    )
    return ProxyHeader(endpoints, size)


def _endpoints(client: Address, server: Address) -> Endpoints:
    """Return the ends of a connection, as IPv4 if both are: a proxy that listens on both families may say IPv6."""
    hosts = plain_ip(client.host), plain_ip(server.host)
    if all(":" not in host for host in hosts):
        client, server = Address(hosts[0], client.port), Address(hosts[1], server.port)
    return Endpoints(client, server)


def _check_tlvs(data: bytes) -> None:
    """Check that TLVs fill `data`; none of them is used."""
    offset = 0
    while offset < len(data):
        if len(data) - offset < _TLV.size:
            raise ProxyProtocolError("expected whole TLVs")
        _, length = _TLV.unpack_from(data, offset)
        offset += _TLV.size + length
    if offset != len(data):
        raise ProxyProtocolError("expected whole TLVs")


def own_header(version: ProxyProtocol) -> bytes:
    """Return the header of a connection that the proxy makes for itself, such as a health check."""
    return v1_header(None) if version is ProxyProtocol.V1 else v2_header(None, None)


def v1_header(endpoints: Endpoints | None) -> bytes:
    """Return a header of version 1; None stands for a connection of the proxy's own."""
    if endpoints is None:
        return b"PROXY UNKNOWN\r\n"
    client, server = endpoints.client, endpoints.server
    family = "TCP6" if ":" in client.host else "TCP4"
    return f"PROXY {family} {client.host} {server.host} {client.port} {server.port}\r\n".encode("ascii")


def v2_header(endpoints: Endpoints | None, tls: TlsDetails | None) -> bytes:
    """Return a header of version 2; None stands for a connection of the proxy's own. `tls` adds the TLVs about it."""
    if endpoints is None:
        return _V2_HEAD.pack(_V2_SIGNATURE, _V2_LOCAL, _V2_UNSPEC, 0)
    client, server = endpoints.client, endpoints.server
    family = _V2_TCP6 if ":" in client.host else _V2_TCP4
    hosts = (ipaddress.ip_address(client.host).packed, ipaddress.ip_address(server.host).packed)
    body = _V2_ADDRESSES[family].pack(*hosts, client.port, server.port)
    if tls is not None:
        body += _tls_tlvs(tls)
    return _V2_HEAD.pack(_V2_SIGNATURE, _V2_PROXY, family, len(body)) + body


def _tls_tlvs(tls: TlsDetails) -> bytes:
    details = _tlv(_SUBTYPE_SSL_VERSION, tls.version.encode("ascii")) + _tlv(
        _SUBTYPE_SSL_CIPHER, tls.cipher.encode("ascii")
    )
    client, verified = _CLIENT_SSL, _NOT_VERIFIED
    if tls.client_shown is not ClientShown.NEVER:
        client, verified = client | _CLIENT_CERT_SESS, _VERIFIED
        if tls.client_shown is ClientShown.ON_THIS_CONNECTION:
            client |= _CLIENT_CERT_CONN
    name = tls.client_common_name
    # A name is not shortened, for it would be another's; nor are control characters anybody's name.
    if name is not None and 0 < len(name) <= _MAX_COMMON_NAME and name.isprintable():
        details += _tlv(_SUBTYPE_SSL_CN, name.encode())
    tlvs = _tlv(_TYPE_SSL, _SSL_HEAD.pack(client, verified) + details)
    if tls.alpn is not None:
        tlvs += _tlv(_TYPE_ALPN, tls.alpn)
    if tls.server_name is not None:
        tlvs += _tlv(_TYPE_AUTHORITY, tls.server_name.encode("ascii"))
    return tlvs


def _tlv(kind: int, value: bytes) -> bytes:
    return _TLV.pack(kind, len(value)) + value
