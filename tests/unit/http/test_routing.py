from __future__ import annotations

import pytest

from tlsproxy.config import Origin, RouteConfig
from tlsproxy.http.routing import Router
from tlsproxy.http.target import host_name, routing_path

ORIGIN = Origin("f", 1, 1, "routes")
ROUTER = Router(
    [
        RouteConfig(host, path, upstream, ORIGIN)
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
        ("", b"/", "default"),
        ("other", b"/x", "default"),
    ],
)
def test_host_first_then_the_longest_path(host: str, path: bytes, upstream: str | None) -> None:
    route = ROUTER.find(host, path)
    assert (route.upstream if route else None) == upstream


def test_no_route_for_an_unknown_host() -> None:
    assert Router([RouteConfig("a", "/", "u", ORIGIN)]).find("b", b"/") is None


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
