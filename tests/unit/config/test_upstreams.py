"""What the `upstreams` section may say."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.config.test_config_yaml import MINIMAL, parse, problems
from tests.unit.tls.peers import Authority
from tlsproxy.config import (
    Balance,
    EjectionConfig,
    HashConfig,
    HashSource,
    HealthConfig,
    ProxyProtocol,
    UnixAddress,
    UpstreamConfig,
    UpstreamTlsConfig,
)
from tlsproxy.config_yaml import parse_config

UPSTREAM = "{name: app, servers: [{address: 127.0.0.1:8000}]}"


def upstream(text: str) -> UpstreamConfig:
    (found,) = parse(MINIMAL.replace(UPSTREAM, f"{{name: app, {text}}}")).upstreams
    return found


def mistake(text: str) -> str:
    found = problems(MINIMAL.replace(UPSTREAM, f"{{name: app, {text}}}"))[0]
    return found.partition(": upstreams[0]")[2]


def test_defaults() -> None:
    found = upstream("servers: [{address: 127.0.0.1:8000}]")
    assert (found.retries, found.queue, found.keepalive, found.resolve_interval_s) == (1, 128, 256, 30)
    assert found.hash == HashConfig(HashSource.CLIENT_ADDRESS, "")
    assert (found.health, found.tls) == (None, None)
    assert found.ejection == EjectionConfig(5, 10)
    assert (found.servers[0].weight, found.servers[0].max_connections) == (1, 0)


def test_everything_it_can_say() -> None:
    found = upstream(
        "servers: [{address: 'unix:/run/a.sock', weight: 3, max_connections: 9}, {address: 'b.example:80'}], "
        "balance: consistent_hash, hash: {cookie: sid}, queue: 7, retries: 2, resolve_interval: 5s, "
        "timeouts: {queue: 1s}, health: {path: /h, host: b.example, interval: 1s, timeout: 500ms, rise: 4, fall: 5}, "
        "ejection: {failures: 0, duration: 1m}, tls: {server_name: b.example}, "
        "proxy_protocol: v2"
    )
    server = found.servers[0]
    assert (server.address, server.weight, server.max_connections) == (UnixAddress(Path("/run/a.sock")), 3, 9)
    assert (found.balance, found.hash) == (Balance.CONSISTENT_HASH, HashConfig(HashSource.COOKIE, "sid"))
    assert (found.queue, found.timeouts.queue_s, found.retries, found.resolve_interval_s) == (7, 1, 2, 5)
    assert found.health == HealthConfig("/h", "b.example", 1, 0.5, 4, 5)
    assert found.ejection == EjectionConfig(0, 60)
    assert found.tls == UpstreamTlsConfig(True, None, "b.example")
    assert (found.proxy_protocol, found.keepalive) == (ProxyProtocol.V2, 0)


def test_a_ca_file_is_read_with_the_configuration(tmp_path: Path) -> None:
    authority = Authority()
    pem = authority.chain_pem(authority.key, [])
    (tmp_path / "ca.pem").write_bytes("# Zertifizierungsstelle für alles\n".encode() + pem)
    (tmp_path / "empty.pem").write_bytes(b"nothing")
    text = MINIMAL.replace(UPSTREAM, UPSTREAM[:-1] + ", tls: {ca_file: ca.pem}}")
    (found,) = parse_config(text.encode(), "p.yaml", tmp_path).upstreams
    assert found.tls is not None
    assert pem.decode() in (found.tls.ca_pem or "")
    for name, message in [
        ("empty.pem", "expected a file of CA certificates in PEM; got another"),
        ("none.pem", "expected a readable file; got No such file or directory"),
    ]:
        with pytest.raises(Exception, match=message):
            parse_config(text.replace("ca.pem", name).encode(), "p.yaml", tmp_path)


SERVER = "servers: [{address: 127.0.0.1:1}]"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "servers: [{address: 'unix:app.sock'}]",
            ".servers[0].address: expected host:port, such as",
        ),
        (
            "servers: [{address: 127.0.0.1:1, weight: 0}]",
            ".servers[0].weight: expected a number from 1 to",
        ),
        (
            "servers: [{address: 127.0.0.1:1}, {address: 127.0.0.1:1}]",
            ": expected each server once (weight gives it more requests); got 127.0.0.1:1 again",
        ),
        (SERVER + ", proxy_protocol: v2, keepalive: 5", ".keepalive: expected one of balance"),
        (SERVER + ", hash: client_address", ".hash: expected one of balance"),
        (SERVER + ", queue: 5", ".queue: expected one of balance"),
        (SERVER + ", timeouts: {queue: 5s}", ".timeouts.queue: expected one of connect, idle, response"),
        (
            SERVER + ", balance: consistent_hash, hash: {}",
            ".hash: expected client_address, {header: NAME} or {cookie: NAME}; got a mapping",
        ),
        (
            SERVER + ", balance: consistent_hash, hash: {header: X, cookie: y}",
            ".hash.cookie: expected one of header; got an unknown key",
        ),
        (SERVER + ", health: {host: a.b}", ".health.host: expected one of fall, interval, path, rise, timeout"),
        (SERVER + ", tls: {verify: false, ca_file: x}", ".tls.ca_file: expected one of server_name, verify"),
        (
            "servers: [{address: 'unix:/a'}], tls: {}",
            ": expected tls.server_name, for a Unix socket has no name to verify; got none",
        ),
    ],
)
def test_a_mistake_in_an_upstream_is_told(text: str, message: str) -> None:
    assert mistake(text).startswith(message)


def test_what_hashes_requests_is_not_for_a_tunnel() -> None:
    text = MINIMAL.replace("routes: [{upstream: app}]", "mode: tcp\n    upstream: app").replace(
        UPSTREAM, UPSTREAM[:-1] + ", balance: consistent_hash, hash: {header: X}}"
    )
    (problem,) = problems(text)
    assert problem.startswith("proxy.yaml:10:15: listeners[0].upstream: expected an upstream that does not hash a")
