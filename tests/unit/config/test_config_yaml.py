from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from tlsproxy.config import (
    Address,
    Balance,
    Config,
    ListenerMode,
    LogFormat,
    TlsProfile,
    TokenKind,
)
from tlsproxy.config_yaml import load_config, parse_config
from tlsproxy.errors import ConfigError

MINIMAL = """\
hsm:
  tokens:
    - {name: local, kind: soft, path: token, pin_file: token.pin}
certificates:
  - {name: www, chain_file: www.pem, key: www-ecdsa}
listeners:
  - address: 0.0.0.0:8443
    certificates: [www]
    routes: [{upstream: app}]
upstreams:
  - {name: app, servers: [{address: 127.0.0.1:8000}]}
"""


def parse(text: str) -> Config:
    return parse_config(text.encode(), "proxy.yaml", Path("/etc/tlsproxy"))


def problems(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    return [str(problem) for problem in caught.value.problems]


def test_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tlsproxy.config_yaml.usable_cores", lambda: 3)
    config = parse(MINIMAL)
    assert config.workers == config.hsm.tokens[0].workers == parse(f"workers: auto\n{MINIMAL}").workers == 3
    assert config.runtime_dir == Path("/etc/tlsproxy/run")
    assert config.log.format is LogFormat.JSON
    assert config.admin is None
    assert config.hsm.sign_deadline_s == 2.0
    token = config.hsm.tokens[0]
    assert (token.path, token.pin_file) == (Path("/etc/tlsproxy/token"), Path("/etc/tlsproxy/token.pin"))
    assert config.certificates[0].tokens == ("local",)
    listener = config.listeners[0]
    assert listener.mode is ListenerMode.HTTP
    assert listener.profile is TlsProfile.INTERMEDIATE
    assert (listener.limits.header_bytes, listener.limits.connections) == (65536, 20000)
    assert (listener.routes[0].host, listener.routes[0].path) == ("*", "/")
    assert config.upstreams[0].balance is Balance.ROUND_ROBIN


def test_every_key() -> None:
    config = parse(
        """\
workers: 3
runtime_dir: /run/tlsproxy
drain_timeout: 5s
log: {level: debug, format: text}
hsm:
  sign_deadline: 500ms
  max_pending: 7
  tokens:
    - {name: local, kind: soft, path: /var/token, pin_env: SOFT_PIN, workers: 2}
    - {name: hsm-a, kind: pkcs11, module: /usr/lib/x.so, token_label: a, token_serial: "01", slot: 5, pin_file: a.pin,
       sessions: 32, workers: 1}
certificates:
  - {name: www, chain_file: /etc/www.pem, key: www, tokens: [hsm-a]}
listeners:
  - address: "[::1]:8443"
    mode: http
    certificates: [www]
    tls: {profile: modern}
    timeouts: {handshake: 1s, header: 2s, body_idle: 3m, idle: 4h, tunnel_idle: 5d}
    limits: {header_bytes: 8KiB, body_bytes: 1GiB, connections: 10, connections_per_client: 2, handshakes: 5}
    routes: [{host: "*.example.com", path: /api, upstream: app}]
  - {address: 127.0.0.1:5000, mode: tcp, certificates: [www], upstream: app}
upstreams:
  - name: app
    servers: [{address: "backend.internal:80"}, {address: "[::1]:81"}]
    balance: least_connections
    keepalive: 9
    timeouts: {connect: 1s, response: 1.5s, idle: 10s}
admin: {address: 127.0.0.1:9900}
"""
    )
    assert (config.workers, config.runtime_dir, config.drain_timeout_s) == (3, Path("/run/tlsproxy"), 5)
    assert (config.hsm.sign_deadline_s, config.hsm.max_pending) == (0.5, 7)
    soft, pkcs11 = config.hsm.tokens
    assert (soft.kind, soft.pin_env, soft.pin_file, soft.workers) == (TokenKind.SOFT, "SOFT_PIN", None, 2)
    assert (pkcs11.module, pkcs11.token_label, pkcs11.token_serial, pkcs11.slot, pkcs11.sessions) == (
        Path("/usr/lib/x.so"),
        "a",
        "01",
        5,
        32,
    )
    http, tcp = config.listeners
    assert (str(http.address), http.profile) == ("[::1]:8443", TlsProfile.MODERN)
    timeouts = http.timeouts
    assert (timeouts.handshake_s, timeouts.header_s, timeouts.body_idle_s) == (1, 2, 180)
    assert (timeouts.idle_s, timeouts.tunnel_idle_s) == (4 * 3600, 5 * 86400)
    limits = http.limits
    assert (limits.header_bytes, limits.body_bytes, limits.connections) == (8192, 1 << 30, 10)
    assert (limits.connections_per_client, limits.handshakes) == (2, 5)
    assert (tcp.mode, tcp.upstream, tcp.routes) == (ListenerMode.TCP, "app", ())
    assert [server.address for server in config.upstreams[0].servers] == [
        Address("backend.internal", 80),
        Address("::1", 81),
    ]
    assert config.upstreams[0].timeouts.response_s == 1.5


def test_a_configuration_can_be_sent_to_another_process() -> None:
    config = parse(MINIMAL)
    assert pickle.loads(pickle.dumps(config)) == config


MISTAKES = [
    ("hsm:", "workers: many\nhsm:", "1:10: workers:", "expected a number from 1 to 1024 or auto; got 'many'"),
    ("hsm:", "workers: 0\nhsm:", "1:10: workers:", "expected a number from 1 to 1024 or auto; got '0'"),
    ("hsm:", "log: [1, 2]\nhsm:", "1:6: log:", "expected a mapping; got a list of 2"),
    ("hsm:", "log: {level: loud}\nhsm:", "1:14: log.level:", "expected debug or info or warning or error; got 'loud'"),
    ("hsm:", "runtime_dir:\nhsm:", "1:13: runtime_dir:", "expected a path; got nothing"),
    ("kind: soft", "kind: hard", "3:27: hsm.tokens[0].kind:", "expected soft or pkcs11 or awskms; got 'hard'"),
    ("path: token, ", "", "3:7: hsm.tokens[0]:", "expected the key 'path'; got none"),
    (", pin_file: token.pin", "", "3:7: hsm.tokens[0]:", "expected exactly one of pin_file and pin_env; got neither"),
    (
        "pin_file: token.pin",
        "pin_file: a, pin_env: B",
        "3:7: hsm.tokens[0]:",
        "expected exactly one of pin_file and pin_env; got both",
    ),
    (
        "kind: soft, path: token",
        "kind: pkcs11, module: m.so",
        "3:7: hsm.tokens[0]:",
        "expected token_label, token_serial or slot; got none of them",
    ),
    (
        "key: www-ecdsa",
        "key: www-ecdsa, tokens: [remote]",
        "5:62: certificates[0].tokens:",
        "expected the name of a configured token (local); got 'remote'",
    ),
    (
        "certificates: [www]",
        "certificates: [wwww]",
        "8:19: listeners[0].certificates:",
        "expected the name of a configured certificate (www); got 'wwww'",
    ),
    (
        "routes: [{upstream: app}]",
        "routes: [{upstream: web}]",
        "9:25: listeners[0].routes[0].upstream:",
        "expected the name of a configured upstream (app); got 'web'",
    ),
    (
        "routes: [{upstream: app}]",
        "routes: [{upstream: app, path: /}, {upstream: app}]",
        "9:40: listeners[0].routes[1].path:",
        "expected one route for host '*' and path '/'; got another",
    ),
    (
        "routes: [{upstream: app}]",
        "routes: [{upstream: app, path: api}]",
        "9:36: listeners[0].routes[0].path:",
        "expected a path that starts with '/'; got 'api'",
    ),
    (
        "routes: [{upstream: app}]",
        "routes: [{upstream: app, host: WWW.example.com}]",
        "9:36: listeners[0].routes[0].host:",
        "expected a lower-case host name, *.example.com or *; got 'WWW.example.com'",
    ),
    (
        "routes: [{upstream: app}]",
        "routes: []",
        "9:13: listeners[0].routes:",
        "expected a list of at least 1; got an empty list",
    ),
    (
        "address: 0.0.0.0:8443",
        "address: localhost:8443",
        "7:14: listeners[0].address:",
        "expected IP:port, such as 0.0.0.0:8443 or [::]:8443; got 'localhost:8443'",
    ),
    (
        "address: 0.0.0.0:8443",
        "address: 0.0.0.0:70000",
        "7:14: listeners[0].address:",
        "expected IP:port, such as 0.0.0.0:8443 or [::]:8443; got '0.0.0.0:70000'",
    ),
    (
        "address: 127.0.0.1:8000",
        "address: http://127.0.0.1:8000",
        "11:37: upstreams[0].servers[0].address:",
        "expected host:port, such as 127.0.0.1:8000, or unix:/PATH; got 'http://127.0.0.1:8000'",
    ),
    (
        "certificates: [www]",
        "certificates: [www]\n    timeouts: {handshake: 10}",
        "9:27: listeners[0].timeouts.handshake:",
        "expected a duration such as 500ms, 2s or 1h, from 100ms to 30d; got '10'",
    ),
    (
        "certificates: [www]",
        "certificates: [www]\n    limits: {header_bytes: 64KB}",
        "9:28: listeners[0].limits.header_bytes:",
        "expected a size such as 64KiB or 1GiB, from 1024 to 1048576 bytes; got '64KB'",
    ),
    (
        "name: www,",
        "name: www, nam: x,",
        "5:17: certificates[0].nam:",
        "expected one of chain_file, key, name, tokens; got an unknown key (did you mean 'name'?)",
    ),
    (
        "name: www,",
        "name: www, name: x,",
        "5:17: certificates[0].name:",
        "expected each key once; got this one on line 5 already",
    ),
    (
        "name: www,",
        'name: "w\\nw",',
        "5:12: certificates[0].name:",
        "expected a name of letters, digits, '.', '_' and '-', at most 63 long; got 'w\\nw'",
    ),
]


@pytest.mark.parametrize(("old", "new", "place", "message"), MISTAKES)
def test_a_mistake_is_told_with_its_place(old: str, new: str, place: str, message: str) -> None:
    assert MINIMAL.count(old) == 1
    assert problems(MINIMAL.replace(old, new))[0] == f"proxy.yaml:{place} {message}"


def test_names_and_addresses_are_taken_once() -> None:
    text = MINIMAL + "  - {name: app, servers: [{address: 127.0.0.1:8000}]}\nadmin: {address: 0.0.0.0:8443}\n"
    assert problems(text) == [
        "proxy.yaml:7:14: listeners[0].address: expected an address used once; got 0.0.0.0:8443 again",
        "proxy.yaml:12:12: upstreams[1].name: expected a name no other upstream has; got 'app' again",
    ]


def test_all_problems_are_found_at_once_in_the_order_of_the_file() -> None:
    text = MINIMAL.replace("kind: soft", "kind: hard").replace("0.0.0.0:8443", "x").replace("127.0.0.1:8000", "y")
    assert [line.split(":")[1] for line in problems(text)] == ["3", "7", "11"]


@pytest.mark.parametrize("text", ["x: 1", "[]", "text", "hsm: 3"])
def test_what_is_missing_or_no_mapping_is_told(text: str) -> None:
    assert all("expected" in line and "got" in line for line in problems(text))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "c.yaml:1:1: (file): expected a configuration; got an empty file"),
        (b"a: [1", "c.yaml:1:6: (file): expected YAML; expected ',' or ']', but got '<stream end>'"),
        (b"a: 1\nb: \xff", "c.yaml:2:4: (file): expected UTF-8; got byte 0xff"),
        (b"a: \x01", "c.yaml:1:1: (file): expected YAML; got character U+0001"),
        (b"a: 1\n---\nb: 1", "c.yaml:2:1: (file): expected YAML; but found another document"),
        (b"[" * 100_000, "c.yaml:1:1: (file): expected a configuration; got too deep a nesting"),
        (b" " * (1 << 20) + b"x", "c.yaml:1:1: (file): expected at most 1048576 bytes; got 1048577"),
    ],
)
def test_what_is_no_yaml_is_one_problem(content: bytes, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(content, "c.yaml", Path("/"))
    assert str(caught.value) == expected


def test_aliases_cannot_make_a_small_file_a_huge_one() -> None:
    routes = "[" + ",".join(["{upstream: app}"] * 200) + "]"
    bomb = f"a: &r {routes}\nb: &l {{routes: *r}}\nlisteners: [{','.join(['*l'] * 200)}]\n"
    assert problems(bomb) == ["proxy.yaml:1:1: (file): expected at most 20000 values, aliases expanded; got more"]


def test_an_alias_to_itself_ends() -> None:
    assert problems("listeners: &l [*l, *l]\n")


def test_a_pin_in_the_file_is_never_shown() -> None:
    for mistake in ("pin_env: 0042-secret", "pin: 0042-secret", "pin_file: {x: 0042-secret}"):
        assert not [line for line in problems(MINIMAL.replace("pin_file: token.pin", mistake)) if "0042" in line]


def test_a_missing_file_is_one_problem() -> None:
    with pytest.raises(
        ConfigError, match=r"^/nowhere/p\.yaml:1:1: \(file\): expected a readable file; got No such file"
    ):
        load_config("/nowhere/p.yaml")


AWS_KMS = MINIMAL.replace("kind: soft, path: token, pin_file: token.pin", "kind: awskms, region: eu-central-1")


def test_keys_in_aws_kms() -> None:
    (token,) = parse(AWS_KMS).hsm.tokens
    assert (token.kind, token.region, token.endpoint_url) == (TokenKind.AWSKMS, "eu-central-1", None)
    assert (token.sessions, token.workers, token.pin_file) == (16, 1, None)
    (token,) = parse(AWS_KMS.replace("eu-central-1", "us-gov-west-1, endpoint_url: 'https://kms.test'")).hsm.tokens
    assert (token.region, token.endpoint_url) == ("us-gov-west-1", "https://kms.test")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("sessions: 4", "hsm.tokens[0]: expected the key 'region'; got none"),
        ("region: Frankfurt", "hsm.tokens[0].region: expected an AWS region such as eu-central-1; got 'Frankfurt'"),
        (
            "region: eu-west-1, endpoint_url: 'http://kms.test'",
            "endpoint_url: expected a URL such as https://HOST (http only on loopback); got 'http://kms.test'",
        ),
        ("region: eu-west-1, pin_file: x", "hsm.tokens[0].pin_file: expected"),
    ],
)
def test_a_mistake_about_aws_kms_is_told(fields: str, message: str) -> None:
    assert message in problems(AWS_KMS.replace("region: eu-central-1", fields))[0]


def test_tracing_has_defaults_and_a_path_where_none_is_given() -> None:
    assert parse(MINIMAL).tracing is None
    tracing = parse(MINIMAL + "tracing: {endpoint: 'http://[::1]:4318'}").tracing
    assert tracing is not None
    assert (tracing.endpoint, tracing.sample, tracing.service_name) == ("http://[::1]:4318/v1/traces", 0.1, "tlsproxy")
    given = parse(MINIMAL + "tracing: {endpoint: https://otel.example.com/t, sample: 1, service_name: edge}").tracing
    assert given is not None
    assert (given.endpoint, given.sample, given.service_name) == ("https://otel.example.com/t", 1.0, "edge")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{}", "tracing: expected the key 'endpoint'; got none"),
        (
            "{endpoint: 'http://user:pass@host:4318'}",
            (
                "tracing.endpoint: expected a URL such as http://127.0.0.1:4318/v1/traces, without user and password; "
                "got other text"
            ),
        ),
        (
            "{endpoint: 'http://h', sample: 1.1}",
            "tracing.sample: expected a number from 0 to 1, such as 0.1; got '1.1'",
        ),
        (
            "{endpoint: 'http://h', sample: 10%}",
            "tracing.sample: expected a number from 0 to 1, such as 0.1; got '10%'",
        ),
    ],
)
def test_what_is_wrong_about_tracing(section: str, message: str) -> None:
    (problem,) = problems(MINIMAL + f"tracing: {section}")
    assert problem.partition(": ")[2] == message
