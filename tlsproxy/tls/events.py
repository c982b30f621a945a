"""What a TlsConnection reports. Events come in the order in which things happened."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from hsm.messages import SignatureScheme
from tlsproxy.tls.certificates import Certificate
from tlsproxy.tls.client_certificates import ClientCertificate, ClientResult


@dataclass(frozen=True, slots=True)
class ClientHelloReceived:
    """The client has introduced itself and its certificate is chosen. Once per handshake, resumed ones included."""

    server_name: str | None
    """The host name the client asked for: lower case; None without one."""
    alpn_protocols: tuple[bytes, ...]
    certificate: Certificate


@dataclass(frozen=True, slots=True)
class SignatureNeeded:
    """The handshake is suspended until provide_signature or fail_signature is called."""

    certificate: Certificate
    scheme: SignatureScheme
    tbs: bytes = field(repr=False)
    """The bytes to be signed, not their digest: RFC 8446 section 4.4.3, or RFC 8422 section 5.4 in TLS 1.2."""


class HandshakeComplete(NamedTuple):
    """The handshake succeeded: data may be sent."""

    tls_version: str
    """`TLSv1.2` or `TLSv1.3`."""
    cipher: str
    """OpenSSL's name of the cipher suite."""
    group: str | None
    """The key exchange's group, in OpenSSL's spelling: `x25519`."""
    scheme: SignatureScheme | None
    """None when the handshake was resumed: nothing was signed."""
    alpn: bytes | None
    resumed: bool
    server_name: str | None
    certificate: Certificate
    client_certificate: ClientCertificate | None = None
    """None when the client has none, or was not asked for one."""


@dataclass(frozen=True, slots=True)
class PlaintextReceived:
    """Data from the client, decrypted; never empty."""

    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class CloseNotify:
    """The client will send no more (RFC 8446 section 6.1). It may still read."""


@dataclass(frozen=True, slots=True)
class HandshakeFailed:
    """The handshake ended without success. An alert for the client may be left to send; nothing else works any more."""

    alert_sent: int | None
    """Alert description, RFC 8446 section 6."""
    alert_received: int | None
    reason: str
    client_result: ClientResult | None = None
    """MISSING or REFUSED, if it failed for the client's certificate."""


@dataclass(frozen=True, slots=True)
class ConnectionFailed:
    """The connection broke after the handshake. An alert may be left to send; nothing else works any more."""

    alert_sent: int | None
    alert_received: int | None
    reason: str


Event: TypeAlias = (
    ClientHelloReceived
    | SignatureNeeded
    | HandshakeComplete
    | PlaintextReceived
    | CloseNotify
    | HandshakeFailed
    | ConnectionFailed
)
