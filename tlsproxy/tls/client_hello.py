"""What a ClientHello says that the choice of a certificate depends on (RFC 8446 section 4.1.2)."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import TypeAlias

TLS1_2_VERSION = 0x0303
TLS1_3_VERSION = 0x0304

_HOST_NAME = re.compile(rb"[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*\.?")
_MAX_HOST_NAME_BYTES = 255


ClientHelloFields: TypeAlias = "tuple[int, bytes, bytes | None, bytes | None, bytes | None, bytes | None, bytes | None]"
"""parse_client_hello's arguments."""


@dataclass(frozen=True, slots=True)
class ClientHello:
    """A client's offer. Numbers are IANA code points, in the client's order; None where the extension is absent."""

    server_name: str | None
    """Lower case, without a trailing dot; None also when it is no host name."""
    alpn_protocols: tuple[bytes, ...] = ()
    cipher_suites: tuple[int, ...] = ()
    signature_schemes: tuple[int, ...] | None = None
    groups: tuple[int, ...] | None = None
    offers_tls13: bool = True


def parse_client_hello(
    legacy_version: int,
    cipher_suites: bytes,
    server_name: bytes | None,
    signature_algorithms: bytes | None,
    supported_groups: bytes | None,
    supported_versions: bytes | None,
    alpn: bytes | None,
) -> ClientHello:
    """Return the offer in the given extension bodies.

    A malformed body counts as absent: OpenSSL judges it afterwards, and ends the handshake with decode_error.
    """
    versions = _code_points(supported_versions, length_bytes=1)
    return ClientHello(
        server_name=None if server_name is None else _host_name(server_name),
        alpn_protocols=() if alpn is None else _protocols(alpn),
        cipher_suites=struct.unpack(f">{len(cipher_suites) // 2}H", cipher_suites[: len(cipher_suites) & ~1]),
        signature_schemes=_code_points(signature_algorithms, length_bytes=2),
        groups=_code_points(supported_groups, length_bytes=2),
        offers_tls13=versions is not None and TLS1_3_VERSION in versions and legacy_version >= TLS1_2_VERSION,
    )


def _code_points(extension: bytes | None, *, length_bytes: int) -> tuple[int, ...] | None:
    """The 16-bit numbers of an extension that is one vector, behind its length; None when it is malformed."""
    if extension is None or len(extension) < length_bytes:
        return None
    length = len(extension) - length_bytes
    if length % 2 or int.from_bytes(extension[:length_bytes], "big") != length:
        return None
    return struct.unpack_from(f">{length // 2}H", extension, length_bytes)


def _host_name(extension: bytes) -> str | None:
    """The host_name of a server_name extension (RFC 6066 section 3); it allows one entry of that type."""
    name = extension[5:]
    expected = (len(name) + 3).to_bytes(2, "big") + b"\x00" + len(name).to_bytes(2, "big")
    if len(name) > _MAX_HOST_NAME_BYTES or extension[:5] != expected or _HOST_NAME.fullmatch(name) is None:
        return None
    return name.decode("ascii").lower().rstrip(".")


def _protocols(extension: bytes) -> tuple[bytes, ...]:
    """The names in an ALPN extension (RFC 7301 section 3.1)."""
    protocols = []
    at = 2
    while at < len(extension):
        end = at + 1 + extension[at]
        protocols.append(extension[at + 1 : end])
        at = end
    return tuple(protocols) if at == len(extension) else ()
