"""The `listeners` section of the configuration file."""

from __future__ import annotations

import re
from collections.abc import Set
from pathlib import Path

from tlsproxy.config import (
    ClientCertificatesConfig,
    ClientVerify,
    HeaderRules,
    HstsConfig,
    ListenerConfig,
    ListenerLimits,
    ListenerMode,
    ListenerTimeouts,
    Network,
    RedirectConfig,
    RouteConfig,
    TlsProfile,
)
from tlsproxy.yaml_nodes import InvalidValueError, MappingReader, Value
from tlsproxy.yaml_values import (
    FIELD_NAME,
    HOST_LABEL,
    NOWHERE,
    read_host_name,
    read_listen_address,
    read_name,
    read_network,
)

_ROUTE_HOST = re.compile(rf"\*|(?:\*\.)?{HOST_LABEL}(?:\.{HOST_LABEL})*|\d+(?:\.\d+){{3}}|\[[0-9a-f:.]+\]")
_ROUTE_PATH = re.compile(r"/[!-\"$->@-~]*")
_FIELD_VALUE = re.compile(r"[!-~](?:[ -~]*[!-~])?")
_REDIRECT_STATUSES = (301, 302, 303, 307, 308)
_FRAMING = frozenset(
    ("connection", "content-length", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade")
)
"""Fields that say how a message is delimited or what happens on one hop: never anyone's but the proxy's."""
_ORIGIN_FIELDS = frozenset(
    (
        "client-cert",
        "client-cert-chain",
        "forwarded",
        "via",
        "x-forwarded-for",
        "x-forwarded-host",
        "x-forwarded-port",
        "x-forwarded-proto",
        "x-forwarded-server",
        "x-request-id",
    )
)
"""Fields of requests that the proxy writes itself, of what it knows or of what a trusted proxy says."""
_NO_RULES = HeaderRules((), (), ())
_MAX_BODY_BYTES = 1 << 50
_MAX_CLIENT_CAS = 16
"""Between a client's certificate and the root."""
_DAY_S = 86400.0


def read_listener(value: Value) -> ListenerConfig:
    """Return one listener."""
    reader = value.mapping()
    mode = reader.optional("mode", lambda item: item.choice(ListenerMode), ListenerMode.HTTP)
    with_tls: tuple[TlsProfile | None, ClientCertificatesConfig | None] = (TlsProfile.INTERMEDIATE, None)
    profile, client_certificates = reader.optional("tls", _tls, with_tls)
    certificates: tuple[str, ...] = ()
    if profile is not None:
        certificates = reader.required("certificates", lambda item: item.each(read_name, at_least=1), ())
    timeouts = _timeouts(reader.section("timeouts"))
    limits = _limits(reader.section("limits"))
    routes: tuple[RouteConfig, ...] = ()
    trusted_proxies: tuple[Network, ...] = ()
    forwarded = False
    http2 = False
    upstream = None
    if mode is ListenerMode.HTTP:
        read_route = _RouteReader(limits, timeouts, tls=profile is not None)
        routes = reader.required("routes", lambda item: item.each(read_route, at_least=1), ())
        trusted_proxies = reader.optional("trusted_proxies", lambda item: item.each(read_network), ())
        forwarded = reader.optional("forwarded", Value.boolean, False)
        http2 = reader.optional("http2", Value.boolean if profile is not None else _no_http2, False)
    else:
        upstream = reader.required("upstream", read_name, None)
    result = ListenerConfig(
        address=reader.required("address", read_listen_address, NOWHERE),
        mode=mode,
        profile=profile,
        client_certificates=client_certificates,
        certificates=certificates,
        timeouts=timeouts,
        limits=limits,
        proxy_protocol_from=reader.optional("proxy_protocol_from", lambda item: item.each(read_network), ()),
        trusted_proxies=trusted_proxies,
        forwarded=forwarded,
        http2=http2,
        routes=routes,
        upstream=upstream,
        origin=value.origin,
    )
    reader.finish()
    return result


def _tls(value: Value) -> tuple[TlsProfile | None, ClientCertificatesConfig | None]:
    if value.scalar_is("off"):
        return None, None
    reader = value.mapping("a mapping or off")
    profile = reader.optional("profile", lambda item: item.choice(TlsProfile), TlsProfile.INTERMEDIATE)
    client_certificates = reader.optional("client_certificates", _client_certificates, None)
    reader.finish()
    return profile, client_certificates


def _client_certificates(value: Value) -> ClientCertificatesConfig:
    reader = value.mapping()
    client_certificates = ClientCertificatesConfig(
        verify=reader.optional("verify", lambda item: item.choice(ClientVerify), ClientVerify.REQUIRED),
        ca_file=reader.required("ca_file", Value.path_name, Path()),
        crl_file=reader.optional("crl_file", Value.path_name, None),
        depth=reader.optional("depth", lambda item: item.integer(0, _MAX_CLIENT_CAS), 1),
        origin=value.origin,
    )
    reader.finish()
    return client_certificates


def _no_http2(value: Value) -> bool:
    if value.boolean():
        value.note("expected http2 only where there is TLS, whose ALPN chooses it; got it with tls: off")
        raise InvalidValueError
    return False


def _timeouts(reader: MappingReader) -> ListenerTimeouts:
    def seconds(key: str, default_s: float) -> float:
        return reader.optional(key, lambda value: value.duration(0.1, 30 * _DAY_S), default_s)

    timeouts = ListenerTimeouts(
        handshake_s=seconds("handshake", 10.0),
        header_s=seconds("header", 10.0),
        body_idle_s=seconds("body_idle", 20.0),
        idle_s=seconds("idle", 60.0),
        tunnel_idle_s=seconds("tunnel_idle", 3600.0),
    )
    reader.finish()
    return timeouts


def _limits(reader: MappingReader) -> ListenerLimits:
    def count(key: str, default: int) -> int:
        return reader.optional(key, lambda value: value.integer(0, 10_000_000), default)

    limits = ListenerLimits(
        header_bytes=reader.optional("header_bytes", lambda value: value.size(1 << 10, 1 << 20), 64 << 10),
        body_bytes=reader.optional("body_bytes", lambda value: value.size(0, _MAX_BODY_BYTES), 0),
        body_rate=reader.optional("body_rate", lambda value: value.size(0, 1 << 30), 256),
        connections=count("connections", 20_000),
        connections_per_client=count("connections_per_client", 0),
        handshakes=count("handshakes", 2048),
        streams=reader.optional("streams", lambda value: value.integer(1, 1000), 100),
    )
    reader.finish()
    return limits


class _RouteReader:
    """Reads the routes of a listener; what they leave out is as the listener has it."""

    def __init__(self, limits: ListenerLimits, timeouts: ListenerTimeouts, *, tls: bool) -> None:
        self._limits = limits
        self._timeouts = timeouts
        self._tls = tls

    def __call__(self, value: Value) -> RouteConfig:
        reader = value.mapping()
        upstream: str | None = reader.optional("upstream", read_name, None)
        redirect = reader.optional("redirect", _redirect, None)
        given = [key for key in ("upstream", "redirect") if reader.get(key) is not None]
        if len(given) != 1:
            value.note(f"expected exactly one of upstream and redirect; got {'both' if given else 'neither'}")
        body_bytes = self._limits.body_bytes
        body_idle_s = self._timeouts.body_idle_s
        response_s: float | None = None
        request_headers = _NO_RULES
        if upstream is not None:
            request_headers = _request_header_rules(reader.section("request_headers"))
            limits = reader.section("limits")
            body_bytes = limits.optional("body_bytes", lambda item: item.size(0, _MAX_BODY_BYTES), body_bytes)
            limits.finish()
            timeouts = reader.section("timeouts")
            body_idle_s = timeouts.optional("body_idle", lambda item: item.duration(0.1, 30 * _DAY_S), body_idle_s)
            response_s = timeouts.optional("response", lambda item: item.duration(0.01, _DAY_S), response_s)
            timeouts.finish()
        route = RouteConfig(
            host=reader.optional("host", _route_host, "*"),
            path=reader.optional("path", lambda item: item.text("a path that starts with '/'", _ROUTE_PATH), "/"),
            upstream=upstream,
            redirect=redirect,
            request_headers=request_headers,
            response_headers=_response_header_rules(reader.section("response_headers")),
            hsts=reader.optional("hsts", self._hsts, None),
            body_bytes=body_bytes,
            body_idle_s=body_idle_s,
            response_s=response_s,
            origin=value.origin,
        )
        reader.finish()
        return route

    def _hsts(self, value: Value) -> HstsConfig:
        if not self._tls:
            value.note("expected hsts only where there is TLS (RFC 6797 section 7.2); got it with tls: off")
            raise InvalidValueError
        reader = value.mapping()
        hsts = HstsConfig(
            max_age_s=int(reader.required("max_age", lambda item: item.duration(0, 10 * 365 * _DAY_S), 0.0)),
            include_subdomains=reader.optional("include_subdomains", Value.boolean, False),
            preload=reader.optional("preload", Value.boolean, False),
        )
        reader.finish()
        return hsts


def _route_host(value: Value) -> str:
    return value.text("a lower-case host name, *.example.com or *", _ROUTE_HOST)


def _redirect(value: Value) -> RedirectConfig:
    def status(item: Value) -> int:
        number = item.integer(300, 399)
        if number not in _REDIRECT_STATUSES:
            raise item.invalid(" or ".join(map(str, _REDIRECT_STATUSES)))
        return number

    reader = value.mapping()
    redirect = RedirectConfig(
        scheme=reader.optional("scheme", lambda item: item.text("http or https", re.compile("https?")), "https"),
        host=reader.optional("host", read_host_name, None),
        port=reader.optional("port", lambda item: item.integer(1, 65535), None),
        status=reader.optional("status", status, 308),
    )
    reader.finish()
    return redirect


def _request_header_rules(reader: MappingReader) -> HeaderRules:
    refused = _FRAMING | _ORIGIN_FIELDS
    return _header_rules(reader, to_set=refused, to_add_or_remove=refused | {"host"})


def _response_header_rules(reader: MappingReader) -> HeaderRules:
    return _header_rules(reader, to_set=_FRAMING, to_add_or_remove=_FRAMING)


def _header_rules(reader: MappingReader, *, to_set: Set[str], to_add_or_remove: Set[str]) -> HeaderRules:
    """Read `set`, `add` and `remove`, where names in `to_set` and `to_add_or_remove` are refused."""

    def field_name(value: Value, text: str, refused: Set[str]) -> str:
        if not FIELD_NAME.fullmatch(text) or text.lower() in refused:
            value.note(f"expected the name of a header field that the proxy does not write itself; got {text!r}")
            raise InvalidValueError
        return text

    def fields(value: Value, refused: Set[str]) -> tuple[tuple[str, str], ...]:
        return tuple(
            (field_name(item, key, refused), item.text("a header field's value, printable ASCII", _FIELD_VALUE))
            for key, item in value.entries()
        )

    rules = HeaderRules(
        set=reader.optional("set", lambda value: fields(value, to_set), ()),
        add=reader.optional("add", lambda value: fields(value, to_add_or_remove), ()),
        remove=reader.optional(
            "remove", lambda value: value.each(lambda item: field_name(item, item.text(), to_add_or_remove)), ()
        ),
    )
    reader.finish()
    return rules
