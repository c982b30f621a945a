"""What the `listeners` section may say."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.config.test_config_yaml import MINIMAL, parse, problems
from tlsproxy.config import ClientCertificatesConfig, ClientVerify, HeaderRules, HstsConfig, RedirectConfig

LISTENER = "    certificates: [www]\n    routes: [{upstream: app}]\n"


def test_a_listener_without_tls_redirects() -> None:
    text = MINIMAL.replace(
        LISTENER,
        "    tls: off\n    routes: [{redirect: {}}, {path: /x, redirect: {host: a.b, port: 8443, status: 301}}]\n",
    )
    (listener,) = parse(text).listeners
    assert (listener.profile, listener.certificates) == (None, ())
    plain, other = listener.routes
    assert (plain.upstream, plain.redirect) == (None, RedirectConfig("https", None, None, 308))
    assert other.redirect == RedirectConfig("https", "a.b", 8443, 301)


def test_everything_a_route_can_say() -> None:
    text = MINIMAL.replace(
        "routes: [{upstream: app}]",
        """proxy_protocol_from: [127.0.0.1]
    trusted_proxies: [10.0.0.0/8, "2001:db8::1"]
    forwarded: true
    limits: {body_bytes: 1MiB}
    timeouts: {body_idle: 7s}
    routes:
      - upstream: app
        path: /api
        request_headers: {set: {Host: inside, X-A: "1"}, add: {X-B: b c}, remove: [Cookie]}
        response_headers: {set: {Server: s}, remove: [X-Powered-By]}
        hsts: {max_age: 365d, include_subdomains: true, preload: true}
        limits: {body_bytes: 0}
        timeouts: {body_idle: 5s, response: 1m}
      - upstream: app""",
    )
    (listener,) = parse(text).listeners
    assert [str(item) for item in listener.trusted_proxies] == ["10.0.0.0/8", "2001:db8::1/128"]
    assert [str(item) for item in listener.proxy_protocol_from] == ["127.0.0.1/32"]
    assert listener.forwarded
    api, rest = listener.routes
    assert api.request_headers == HeaderRules((("Host", "inside"), ("X-A", "1")), (("X-B", "b c"),), ("Cookie",))
    assert api.response_headers == HeaderRules((("Server", "s"),), (), ("X-Powered-By",))
    assert api.hsts == HstsConfig(365 * 86400, True, True)
    assert (api.body_bytes, api.body_idle_s, api.response_s) == (0, 5, 60)
    assert (rest.body_bytes, rest.body_idle_s, rest.response_s, rest.hsts) == (1 << 20, 7, None, None)


def test_clients_may_be_asked_for_certificates() -> None:
    def read(tls: str) -> ClientCertificatesConfig | None:
        text = MINIMAL.replace("    certificates: [www]\n", f"    certificates: [www]\n    tls: {tls}\n")
        if tls == "off":
            text = text.replace("    certificates: [www]\n", "")
        return parse(text).listeners[0].client_certificates

    assert read("off") is read("{profile: modern}") is None
    found = read("{client_certificates: {ca_file: ca.pem}}")
    assert found is not None
    assert (found.verify, found.ca_file, found.crl_file, found.depth) == (
        ClientVerify.REQUIRED,
        Path("/etc/tlsproxy/ca.pem"),
        None,
        1,
    )
    found = read("{client_certificates: {verify: optional, ca_file: /ca.pem, crl_file: crl.pem, depth: 3}}")
    assert found is not None
    assert (found.verify, found.ca_file, found.crl_file, found.depth) == (
        ClientVerify.OPTIONAL,
        Path("/ca.pem"),
        Path("/etc/tlsproxy/crl.pem"),
        3,
    )


_REFUSED_FIELD = "expected the name of a header field that the proxy does not write itself; got "


@pytest.mark.parametrize(
    ("listener", "message"),
    [
        ("tls: on, certificates: [www], routes: [{upstream: app}]", "tls: expected a mapping or off; got 'on'"),
        (
            "tls: off, certificates: [www], routes: [{upstream: app}]",
            "certificates: expected one of address",
        ),
        ("tls: off, routes: [{}]", "routes[0]: expected exactly one of upstream and redirect; got neither"),
        (
            "tls: off, routes: [{upstream: app, redirect: {}}]",
            "routes[0]: expected exactly one of upstream and redirect; got both",
        ),
        (
            "tls: off, routes: [{upstream: app, hsts: {max_age: 1d}}]",
            "routes[0].hsts: expected hsts only where there is TLS (RFC 6797 section 7.2); got it with tls: off",
        ),
        (
            "tls: off, routes: [{redirect: {}, timeouts: {response: 1s}}]",
            "routes[0].timeouts: expected one of host, hsts, path, redirect, response_headers, upstream",
        ),
        (
            "tls: off, routes: [{redirect: {status: 300}}]",
            "routes[0].redirect.status: expected 301 or 302 or 303 or 307 or 308; got '300'",
        ),
        (
            "tls: off, routes: [{upstream: app, request_headers: {set: {X-Forwarded-For: a}}}]",
            f"routes[0].request_headers.set.X-Forwarded-For: {_REFUSED_FIELD}'X-Forwarded-For'",
        ),
        (
            "tls: off, routes: [{upstream: app, request_headers: {add: {client-cert: a}}}]",
            f"routes[0].request_headers.add.client-cert: {_REFUSED_FIELD}'client-cert'",
        ),
        (
            "certificates: [www], tls: {client_certificates: {}}, routes: [{upstream: app}]",
            "tls.client_certificates: expected the key 'ca_file'; got none",
        ),
        (
            "certificates: [www], tls: {client_certificates: required}, routes: [{upstream: app}]",
            "tls.client_certificates: expected a mapping; got 'required'",
        ),
        (
            "certificates: [www], tls: {client_certificates: {ca_file: a, verify: on}}, routes: [{upstream: app}]",
            "tls.client_certificates.verify: expected required or optional; got 'on'",
        ),
        (
            "certificates: [www], tls: {client_certificates: {ca_file: a, depth: 17}}, routes: [{upstream: app}]",
            "tls.client_certificates.depth: expected a number from 0 to 16; got '17'",
        ),
        (
            "certificates: [www], tls: {client_certificates: {ca_file: a, crl: b}}, routes: [{upstream: app}]",
            "tls.client_certificates.crl: expected one of ca_file, crl_file, depth, verify; got an unknown key",
        ),
        (
            "tls: off, routes: [{upstream: app, response_headers: {remove: [Content-Length]}}]",
            f"routes[0].response_headers.remove[0]: {_REFUSED_FIELD}'Content-Length'",
        ),
        (
            'tls: off, routes: [{upstream: app, response_headers: {add: {"X Y": a}}}]',
            f"routes[0].response_headers.add.X Y: {_REFUSED_FIELD}'X Y'",
        ),
        (
            'tls: off, routes: [{upstream: app, response_headers: {add: {X: "a\\r\\nb"}}}]',
            "routes[0].response_headers.add.X: expected a header field's value, printable ASCII; got 'a\\r\\nb'",
        ),
        (
            "tls: off, trusted_proxies: [10.0.0.1/8], routes: [{upstream: app}]",
            "trusted_proxies[0]: expected an IP address or network, such as 10.0.0.0/8; got '10.0.0.1/8'",
        ),
        ("tls: off, forwarded: yes, routes: [{upstream: app}]", "forwarded: expected true or false; got 'yes'"),
    ],
)
def test_a_mistake_in_a_listener_is_told(listener: str, message: str) -> None:
    text = MINIMAL.replace("  - address: 0.0.0.0:8443\n" + LISTENER, f"  - {{address: 0.0.0.0:80, {listener}}}\n")
    assert problems(text)[0].partition(": listeners[0].")[2].startswith(message)
