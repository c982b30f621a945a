from __future__ import annotations

import pytest

from tests.routes import route
from tests.unit.http.test_forwarding import request_of
from tlsproxy.config import HeaderRules, HstsConfig, RedirectConfig
from tlsproxy.errors import HttpError
from tlsproxy.http.routing import Route, Router, redirect_location
from tlsproxy.http.target import host_name, routing_path

ROUTER = Router(
    [
        route(host=host, path=path, upstream=upstream)
        for host, path, upstream in [
            ("*", "/", "default"),
            ("www.example.com", "/", "www"),
            ("www.example.com", "/api/v2", "v2"),
            ("www.example.com", "/api", "api"),
            ("*.example.com", "/", "any"),
            ("*.dev.example.com", "/only", "dev"),
        ]
    ]
)


def find(router: Router, host: str, target: bytes) -> Route | None:
    return router.find(request_of(b"GET %b HTTP/1.1\r\nHost: %b\r\n\r\n" % (target, host.encode())))


@pytest.mark.parametrize(
    ("host", "path", "upstream"),
    [
        ("www.example.com", b"/", "www"),
        ("www.example.com", b"/api/v1", "api"),
        ("www.example.com", b"/api/v2/x", "v2"),
        ("a.example.com", b"/", "any"),
        ("a.b.example.com", b"/api", "any"),
        ("a.dev.example.com", b"/only/x", "dev"),
        ("a.dev.example.com", b"/", None),
        ("example.com", b"/", "default"),
        ("other", b"/x", "default"),
    ],
)
def test_host_first_then_the_longest_path(host: str, path: bytes, upstream: str | None) -> None:
    found = find(ROUTER, host, path)
    assert (found.config.upstream if found else None) == upstream


def test_no_route_for_an_unknown_host() -> None:
    assert find(Router([route(host="a")]), "b", b"/") is None


def test_a_client_without_host_gets_what_is_for_any() -> None:
    found = ROUTER.find(request_of(b"GET / HTTP/1.0\r\n\r\n"))
    assert found is not None
    assert found.config.upstream == "default"


GUARDED = Router([route(path="/", upstream="app"), route(path="/admin", upstream="guarded")])


@pytest.mark.parametrize(
    "target",
    [
        b"/admin/../x",
        b"/admin/%2e%2e/x",
        b"/x/..;/admin",
        b"/x/..;a=b/admin",
        b"/;a/admin",
        b"/%61dmin/%2e%2E/x",
        b"/x/../admin%2f..%2fx",
        b"/x%5c..%5cadmin",
        b"/x/..%5Cadmin",
        b"/%5cadmin",
    ],
)
def test_what_a_server_may_read_as_another_routes_path_is_refused(target: bytes) -> None:
    with pytest.raises(HttpError) as caught:
        find(GUARDED, "a", target)
    assert (caught.value.status, caught.value.reason) == (400, "ambiguous_path")


def test_so_is_what_a_server_may_read_as_climbing_above_the_root() -> None:
    with pytest.raises(HttpError) as caught:
        find(GUARDED, "a", b"/..;/x")
    assert (caught.value.status, caught.value.reason) == (400, "bad_target")


@pytest.mark.parametrize(
    ("target", "upstream"),
    [
        (b"/x/./y/../z", "app"),
        (b"/admin/x/../y", "guarded"),
        (b"//admin", "guarded"),
        (b"/admin;jsessionid=1/x;v=2", "guarded"),
        (b"/x;v=1/y", "app"),
        (b"/x%5cy", "app"),
        (b"/x?/../admin;\\", "app"),
        (b"/.well-known/x", "app"),
    ],
)
def test_what_no_server_can_is_served(target: bytes, upstream: str) -> None:
    found = find(GUARDED, "a", target)
    assert found is not None
    assert found.config.upstream == upstream


def location(redirect: RedirectConfig, head: bytes) -> str | None:
    return redirect_location(redirect, request_of(head))


@pytest.mark.parametrize(
    ("redirect", "expected"),
    [
        (RedirectConfig("https", None, None, 301), "https://www.example.com/a%20b/../c?d=e"),
        (RedirectConfig("https", None, 8443, 301), "https://www.example.com:8443/a%20b/../c?d=e"),
        (RedirectConfig("http", "other.example", None, 301), "http://other.example/a%20b/../c?d=e"),
    ],
)
def test_a_redirect_keeps_path_and_query_and_drops_the_old_port(redirect: RedirectConfig, expected: str) -> None:
    assert location(redirect, b"GET /a%20b/../c?d=e HTTP/1.1\r\nHost: WWW.example.com:8080\r\n\r\n") == expected


def test_a_redirect_of_no_path_and_of_no_host() -> None:
    redirect = RedirectConfig("https", None, None, 308)
    assert location(redirect, b"OPTIONS * HTTP/1.1\r\nHost: [::1]:80\r\n\r\n") == "https://[::1]/"
    assert location(redirect, b"GET / HTTP/1.0\r\n\r\n") is None


def test_hsts_is_part_of_every_answer() -> None:
    for hsts, value in [
        (HstsConfig(31536000, False, False), b"max-age=31536000"),
        (HstsConfig(0, True, True), b"max-age=0; includeSubDomains; preload"),
    ]:
        found = find(Router([route(hsts=hsts, response_headers=HeaderRules((("X", "1"),), (), ()))]), "a", b"/")
        assert found is not None
        line = b"Strict-Transport-Security: " + value + b"\r\n"
        assert (found.reply_rules.appended, found.response_rules.appended) == (line, b"X: 1\r\n" + line)
        assert b"strict-transport-security" in found.response_rules.not_sent


@pytest.mark.parametrize(
    ("target", "path"),
    [
        (b"/a/b?c=/../", b"/a/b"),
        (b"/a/../b", b"/b"),
        (b"/a/./b/", b"/a/b/"),
        (b"/a//b", b"/a/b"),
        (b"/a/b/..", b"/a/"),
        (b"/a/..", b"/"),
        (b"/a%2fb", b"/a/b"),
        (b"/%61dmin", b"/admin"),
        (b"/x/%2e%2e/admin", b"/admin"),
        (b"//admin", b"/admin"),
        (b"/.well-known/x", b"/.well-known/x"),
        (b"*", b"/"),
    ],
)
def test_paths_are_matched_as_a_server_would_read_them(target: bytes, path: bytes) -> None:
    assert routing_path(target) == path


@pytest.mark.parametrize(("host", "name"), [(b"A.b.:443", "a.b"), (b"[::1]:8", "[::1]"), (b"10.0.0.1", "10.0.0.1")])
def test_host_names(host: bytes, name: str) -> None:
    assert host_name(host) == name
