"""The configuration as frozen data. `config_yaml` makes it from a file; nothing reads YAML after that.

Times are seconds, sizes bytes, names as in the file. A limit of 0 means no limit. Every object that a later check can
find fault with (a certificate that does not match its key, say) carries its `origin` in the file.
"""

from __future__ import annotations

import enum
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from tlsproxy.errors import Problem

Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class Origin:
    """Where in the file a value stands, for errors that are found after parsing."""

    file: str
    line: int
    column: int
    path: str
    keys: Mapping[str, tuple[int, int]] = field(default_factory=dict, compare=False)
    """Line and column of the value of each of its keys."""

    def problem(self, key: str, message: str) -> Problem:
        """Return what is wrong with the value of `key`, or with the whole where that key was left out."""
        line, column = self.keys.get(key, (self.line, self.column))
        return Problem(self.file, line, column, f"{self.path}.{key}", message)


@dataclass(frozen=True, slots=True)
class Address:
    """An `IP:port` (IPv6 in brackets) to listen on or connect to; for an upstream the host may be a name."""

    host: str
    port: int

    @property
    def is_ip(self) -> bool:
        """The host is an address, not a name."""
        try:
            return bool(ipaddress.ip_address(self.host))
        except ValueError:
            return False

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def plain_ip(ip: str) -> str:
    """Return an IP address in the one form that it is compared and told in, without what IPv6 adds to an IPv4 address.

    An IPv4 address mapped into IPv6 (RFC 4291 section 2.5.5.2) is that IPv4 address. Raises ValueError for what is no
    address, and for one with a zone (`%eth0`), which means something on its own machine only.
    """
    address = ipaddress.ip_address(ip)
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id is not None:
            raise ValueError("expected an address without a zone")
        address = address.ipv4_mapped or address
    return str(address)


class LogFormat(str, enum.Enum):
    """How log lines are written."""

    JSON = "json"
    TEXT = "text"


class LogLevel(str, enum.Enum):
    """The least severe line that is written."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class LogConfig:
    """What is logged, on stderr."""

    level: LogLevel
    format: LogFormat
    access: bool
    """A line for each request."""
    handshakes: bool
    """A line for each handshake."""
    sample_above: int
    """Of more requests or handshakes a second and proxy process a sample is written; 0: all are."""


class TokenKind(str, enum.Enum):
    """What holds the keys."""

    SOFT = "soft"
    PKCS11 = "pkcs11"
    AWSKMS = "awskms"


@dataclass(frozen=True, slots=True)
class TokenConfig:
    """A token. Only its worker process opens it and reads its PIN."""

    name: str
    kind: TokenKind
    pin_file: Path | None
    pin_env: str | None
    workers: int
    path: Path | None
    """soft: the token file."""
    module: Path | None
    """pkcs11: the vendor's library."""
    token_label: str | None
    token_serial: str | None
    slot: int | None
    region: str | None
    endpoint_url: str | None
    """awskms: where it is; without a URL, the region's own endpoint."""
    sessions: int
    """pkcs11, awskms: PKCS#11 sessions or connections, and so signatures at a time, for each worker."""
    origin: Origin


@dataclass(frozen=True, slots=True)
class HsmConfig:
    """The pool of tokens."""

    sign_deadline_s: float
    open_timeout_s: float
    max_pending: int
    tokens: tuple[TokenConfig, ...]


@dataclass(frozen=True, slots=True)
class CertificateConfig:
    """A certificate chain and the name of its key in one or several tokens."""

    name: str
    chain_file: Path
    key: str
    tokens: tuple[str, ...]
    origin: Origin


class ListenerMode(str, enum.Enum):
    """What is inside TLS."""

    HTTP = "http"
    TCP = "tcp"


class TlsProfile(str, enum.Enum):
    """Mozilla's server-side TLS recommendations, by their names."""

    MODERN = "modern"
    INTERMEDIATE = "intermediate"


class ClientVerify(str, enum.Enum):
    """Who is served by a listener that asks its clients for certificates."""

    REQUIRED = "required"
    """Who shows a good one."""
    OPTIONAL = "optional"
    """Who shows a good one, or none."""


@dataclass(frozen=True, slots=True)
class ClientCertificatesConfig:
    """How a listener's clients are verified."""

    verify: ClientVerify
    ca_file: Path
    crl_file: Path | None
    """None: nothing is revoked."""
    depth: int
    """How many CAs may stand between a client's certificate and the root."""
    origin: Origin


@dataclass(frozen=True, slots=True)
class ListenerTimeouts:
    """Seconds a client may take."""

    handshake_s: float
    header_s: float
    body_idle_s: float
    idle_s: float
    tunnel_idle_s: float


@dataclass(frozen=True, slots=True)
class ListenerLimits:
    """What a client may take, for each proxy process."""

    header_bytes: int
    body_bytes: int
    body_rate: int
    """Bytes a second that a request's body is to come with, after pauses of `body_idle` altogether."""
    connections: int
    connections_per_client: int
    handshakes: int
    """TLS handshakes under way at a time."""
    streams: int
    """Requests at a time on a connection, in HTTP/2."""


@dataclass(frozen=True, slots=True)
class HeaderRules:
    """What is done to the header fields of a message, as (name, value) or names. What is set replaces, added stays."""

    set: tuple[tuple[str, str], ...]
    add: tuple[tuple[str, str], ...]
    remove: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RedirectConfig:
    """Where clients are sent instead: the same path and query at another scheme, host or port."""

    scheme: str
    host: str | None
    """None: the host they asked for."""
    port: int | None
    """None: the scheme's own."""
    status: int


@dataclass(frozen=True, slots=True)
class HstsConfig:
    """Strict-Transport-Security (RFC 6797)."""

    max_age_s: int
    include_subdomains: bool
    preload: bool


@dataclass(frozen=True, slots=True)
class RouteConfig:
    """What becomes of requests for `host` (exact, `*.example.com`, or `*`) whose path starts with `path`.

    Either `upstream` or `redirect` is given.
    """

    host: str
    path: str
    upstream: str | None
    redirect: RedirectConfig | None
    request_headers: HeaderRules
    response_headers: HeaderRules
    hsts: HstsConfig | None
    body_bytes: int
    """The largest request body; 0 means no limit."""
    body_idle_s: float
    response_s: float | None
    """Until the response's head; None: as the upstream says."""
    origin: Origin


@dataclass(frozen=True, slots=True)
class ListenerConfig:
    """One address that clients connect to."""

    address: Address
    mode: ListenerMode
    profile: TlsProfile | None
    """None: no TLS (`tls: off`)."""
    client_certificates: ClientCertificatesConfig | None
    """None: clients are not asked for certificates."""
    certificates: tuple[str, ...]
    timeouts: ListenerTimeouts
    limits: ListenerLimits
    proxy_protocol_from: tuple[Network, ...]
    """Peers that begin each connection with a PROXY protocol header (version 1 or 2), and must."""
    trusted_proxies: tuple[Network, ...]
    """http: peers whose X-Forwarded-* and Forwarded are believed and passed on."""
    forwarded: bool
    """http: upstreams are sent Forwarded (RFC 7239) too."""
    http2: bool
    """http: clients may choose HTTP/2 (by ALPN)."""
    routes: tuple[RouteConfig, ...]
    """http: by host, then longest path."""
    upstream: str | None
    """tcp: where the bytes go."""
    origin: Origin

    @property
    def alpn_protocols(self) -> tuple[bytes, ...]:
        """What is spoken inside TLS, best first; empty if that is not for the proxy to know."""
        if self.mode is ListenerMode.TCP:
            return ()
        return (b"h2", b"http/1.1") if self.http2 else (b"http/1.1",)


class Balance(str, enum.Enum):
    """How a server is chosen for a request."""

    ROUND_ROBIN = "round_robin"
    LEAST_CONNECTIONS = "least_connections"
    CONSISTENT_HASH = "consistent_hash"


class HashSource(str, enum.Enum):
    """What of a request is hashed."""

    CLIENT_ADDRESS = "client_address"
    HEADER = "header"
    COOKIE = "cookie"


@dataclass(frozen=True, slots=True)
class HashConfig:
    """consistent_hash: what requests have in common that go to the same server."""

    source: HashSource
    name: str
    """Of the header field or cookie. Where a request lacks it, its client's address is hashed."""


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A Unix-domain stream socket."""

    path: Path

    def __str__(self) -> str:
        return f"unix:{self.path}"


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """One server of an upstream, or several if its name has several addresses."""

    address: Address | UnixAddress
    weight: int
    max_connections: int
    """Connections in use at a time, for each proxy process; 0 means no limit."""


@dataclass(frozen=True, slots=True)
class UpstreamTimeouts:
    """Seconds a server may take: to accept, until its response's head, and idle in the keep-alive pool."""

    connect_s: float
    response_s: float
    idle_s: float
    queue_s: float
    """How long a request may wait while every server has `max_connections`."""


@dataclass(frozen=True, slots=True)
class HealthConfig:
    """How servers are asked whether they work, by each proxy process."""

    path: str | None
    """A GET that is answered 2xx or 3xx; None: a connection is enough."""
    host: str | None
    """The Host of that GET; None: the server's address."""
    interval_s: float
    timeout_s: float
    rise: int
    """Successes in a row that bring a server back."""
    fall: int
    """Failures in a row that take it away."""


@dataclass(frozen=True, slots=True)
class EjectionConfig:
    """When a server whose requests fail gets none for a while."""

    failures: int
    """In a row; 0: never."""
    duration_s: float


@dataclass(frozen=True, slots=True)
class UpstreamTlsConfig:
    """TLS towards the servers."""

    verify: bool
    ca_pem: str | None
    """The CA certificates that servers are verified against; None: the system's."""
    server_name: str | None
    """For SNI and verification; None: the host of the server's address."""


class ProxyProtocol(str, enum.Enum):
    """Versions of the PROXY protocol."""

    V1 = "v1"
    V2 = "v2"


@dataclass(frozen=True, slots=True)
class UpstreamConfig:
    """A group of servers that answer alike."""

    name: str
    servers: tuple[ServerConfig, ...]
    balance: Balance
    hash: HashConfig
    keepalive: int
    """Idle connections kept for each server and proxy process."""
    queue: int
    """Requests that may wait while every server has `max_connections`, for each proxy process."""
    retries: int
    """Further servers that are tried with an idempotent request of which nothing has been answered."""
    resolve_interval_s: float
    """How often names are resolved again."""
    timeouts: UpstreamTimeouts
    health: HealthConfig | None
    ejection: EjectionConfig
    tls: UpstreamTlsConfig | None
    proxy_protocol: ProxyProtocol | None
    """Connections begin with such a header, so each serves one request or tunnel of one client."""
    origin: Origin


@dataclass(frozen=True, slots=True)
class AdminConfig:
    """The admin port: plain HTTP, so on loopback unless told otherwise."""

    address: Address


@dataclass(frozen=True, slots=True)
class TracingConfig:
    """OpenTelemetry spans of requests."""

    endpoint: str
    """URL of a collector that takes OTLP over HTTP."""
    sample: float
    """The share of requests that is recorded, from 0 to 1; where a trusted proxy has decided already, that holds."""
    service_name: str
    origin: Origin


@dataclass(frozen=True, slots=True)
class Config:
    """Everything."""

    workers: int
    """Proxy worker processes."""
    runtime_dir: Path
    """Where the sockets between the processes live."""
    drain_timeout_s: float
    """How long connections may take to finish once the proxy is told to end."""
    user: str | None
    """Whom proxy workers run as when the proxy is started by root: a name or a uid; None: as root."""
    hsm_user: str | None
    """Whom HSM workers run as, likewise."""
    watch_certificates: bool
    """Files of certificates, CAs and CRLs and soft tokens that have changed come into force by themselves."""
    hang_timeout_s: float
    """A worker process that gives no sign of life for so long is killed and replaced."""
    log: LogConfig
    hsm: HsmConfig
    certificates: tuple[CertificateConfig, ...]
    listeners: tuple[ListenerConfig, ...]
    upstreams: tuple[UpstreamConfig, ...]
    admin: AdminConfig | None
    tracing: TracingConfig | None
