"""The `upstreams` section of the configuration file."""

from __future__ import annotations

import re
import ssl

from tlsproxy.config import (
    Address,
    Balance,
    EjectionConfig,
    HashConfig,
    HashSource,
    HealthConfig,
    ProxyProtocol,
    ServerConfig,
    UnixAddress,
    UpstreamConfig,
    UpstreamTimeouts,
    UpstreamTlsConfig,
)
from tlsproxy.yaml_nodes import InvalidValueError, MappingReader, Value
from tlsproxy.yaml_values import FIELD_NAME, NOWHERE, read_host_name, read_name, read_server_address

_HEALTH_PATH = re.compile(r"/[!-~]*")
_MAX_CA_BYTES = 8 << 20
_CLIENT_ADDRESS = HashConfig(HashSource.CLIENT_ADDRESS, "")
_DAY_S = 86400.0


def read_upstream(value: Value) -> UpstreamConfig:
    """Return one upstream."""
    reader = value.mapping()
    timeouts = reader.section("timeouts")
    no_servers: tuple[ServerConfig, ...] = ()
    servers = reader.required("servers", lambda item: item.each(_server, at_least=1), no_servers)
    balance = reader.optional("balance", lambda item: item.choice(Balance), Balance.ROUND_ROBIN)
    hashed = _CLIENT_ADDRESS
    if balance is Balance.CONSISTENT_HASH:
        hashed = reader.optional("hash", _hash, _CLIENT_ADDRESS)
    proxy_protocol = reader.optional("proxy_protocol", lambda item: item.choice(ProxyProtocol), None)
    keepalive = 0
    if proxy_protocol is None:
        keepalive = reader.optional("keepalive", lambda item: item.integer(0, 100_000), 256)
    queue = 128
    queue_s = 5.0
    if any(server.max_connections for server in servers):
        queue = reader.optional("queue", lambda item: item.integer(0, 1_000_000), queue)
        queue_s = timeouts.optional("queue", lambda item: item.duration(0.01, 3600), queue_s)
    upstream = UpstreamConfig(
        name=reader.required("name", read_name, ""),
        servers=servers,
        balance=balance,
        hash=hashed,
        keepalive=keepalive,
        queue=queue,
        retries=reader.optional("retries", lambda item: item.integer(0, 10), 1),
        resolve_interval_s=reader.optional("resolve_interval", lambda item: item.duration(0.1, _DAY_S), 30.0),
        timeouts=UpstreamTimeouts(
            connect_s=timeouts.optional("connect", lambda item: item.duration(0.01, 3600), 2.0),
            response_s=timeouts.optional("response", lambda item: item.duration(0.01, _DAY_S), 30.0),
            idle_s=timeouts.optional("idle", lambda item: item.duration(0.1, _DAY_S), 60.0),
            queue_s=queue_s,
        ),
        health=reader.optional("health", _health, None),
        ejection=_ejection(reader.section("ejection")),
        tls=reader.optional("tls", _tls, None),
        proxy_protocol=proxy_protocol,
        origin=value.origin,
    )
    timeouts.finish()
    reader.finish()
    addresses = [server.address for server in servers]
    for address in {address for address in addresses if addresses.count(address) > 1} - {NOWHERE}:
        value.note(f"expected each server once (weight gives it more requests); got {address} again")
    if (
        upstream.tls is not None
        and upstream.tls.verify
        and upstream.tls.server_name is None
        and any(isinstance(server.address, UnixAddress) for server in servers)
    ):
        value.note("expected tls.server_name, for a Unix socket has no name to verify; got none")
    return upstream


def _server(value: Value) -> ServerConfig:
    reader = value.mapping()
    nowhere: Address | UnixAddress = NOWHERE
    server = ServerConfig(
        address=reader.required("address", read_server_address, nowhere),
        weight=reader.optional("weight", lambda item: item.integer(1, 1000), 1),
        max_connections=reader.optional("max_connections", lambda item: item.integer(0, 1_000_000), 0),
    )
    reader.finish()
    return server


def _hash(value: Value) -> HashConfig:
    if value.scalar_is(HashSource.CLIENT_ADDRESS.value):
        return _CLIENT_ADDRESS
    expected = "client_address, {header: NAME} or {cookie: NAME}"
    reader = value.mapping(expected)
    for source in (HashSource.HEADER, HashSource.COOKIE):
        hashed = reader.optional(source.value, lambda item: item.text("a name", FIELD_NAME), None)
        if hashed is not None:
            reader.finish()
            return HashConfig(source, hashed)
    raise value.invalid(expected)


def _health(value: Value) -> HealthConfig:
    reader = value.mapping()
    path = reader.optional("path", lambda item: item.text("a path that starts with '/'", _HEALTH_PATH), None)
    host = None
    if path is not None:
        host = reader.optional("host", read_host_name, None)
    health = HealthConfig(
        path=path,
        host=host,
        interval_s=reader.optional("interval", lambda item: item.duration(0.1, _DAY_S), 5.0),
        timeout_s=reader.optional("timeout", lambda item: item.duration(0.01, 3600), 2.0),
        rise=reader.optional("rise", lambda item: item.integer(1, 1000), 2),
        fall=reader.optional("fall", lambda item: item.integer(1, 1000), 3),
    )
    reader.finish()
    return health


def _ejection(reader: MappingReader) -> EjectionConfig:
    ejection = EjectionConfig(
        failures=reader.optional("failures", lambda item: item.integer(0, 1000), 5),
        duration_s=reader.optional("duration", lambda item: item.duration(0.1, _DAY_S), 10.0),
    )
    reader.finish()
    return ejection


def _tls(value: Value) -> UpstreamTlsConfig:
    reader = value.mapping()
    verify = reader.optional("verify", Value.boolean, True)
    ca_pem = None
    if verify:
        ca_pem = reader.optional("ca_file", _ca_file, None)
    tls = UpstreamTlsConfig(verify, ca_pem, reader.optional("server_name", read_host_name, None))
    reader.finish()
    return tls


def _ca_file(value: Value) -> str:
    """Read here, for proxy workers may be kept from reading files."""
    # PEM is ASCII; what is not stands in comments.
    pem = value.file_content(_MAX_CA_BYTES).decode("ascii", "ignore")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem)
    except (ssl.SSLError, ValueError):
        value.note("expected a file of CA certificates in PEM; got another")
        raise InvalidValueError from None
    return pem
