"""Which route takes a request, first by host, then by the longest path prefix; and where redirects lead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tlsproxy.config import HeaderRules, HstsConfig, RedirectConfig, RouteConfig
from tlsproxy.errors import HttpError
from tlsproxy.http.forwarding import RequestRules, ResponseRules
from tlsproxy.http.heads import RequestHead
from tlsproxy.http.syntax import MessageError
from tlsproxy.http.target import other_readings


@dataclass(frozen=True, slots=True)
class Route:
    """A route with its header rules made ready."""

    config: RouteConfig
    request_rules: RequestRules
    response_rules: ResponseRules
    reply_rules: ResponseRules
    """For responses that the proxy makes in the upstream's place."""


_Paths = tuple[tuple[bytes, Route], ...]


class Router:
    """The routes of one listener.

    The most specific host wins: its exact name, then `*.` and a parent (the longest first), then `*`. Among that host's
    routes the longest `path` that the request's path starts with wins; routes of other hosts are not considered.
    """

    __slots__ = ("_any", "_exact", "_wildcard")

    def __init__(self, routes: Sequence[RouteConfig]) -> None:
        by_host: dict[str, list[tuple[bytes, Route]]] = {}
        for config in routes:
            by_host.setdefault(config.host.lower(), []).append((config.path.encode(), _route(config)))
        ordered = {
            host: tuple(sorted(paths, key=lambda item: len(item[0]), reverse=True)) for host, paths in by_host.items()
        }
        self._any: _Paths = ordered.pop("*", ())
        self._wildcard = {host[2:]: paths for host, paths in ordered.items() if host.startswith("*.")}
        self._exact = {host: paths for host, paths in ordered.items() if not host.startswith("*.")}

    def find(self, request: RequestHead) -> Route | None:
        """Return the route that `request` takes, or None.

        Raises HttpError 400 where a server might read another route's path in the target: the request would get past
        what is in front of that one.
        """
        paths = self._paths(request.host_name)
        found = _longest(paths, request.path)
        try:
            others = other_readings(request.target)
        except MessageError as error:
            raise HttpError(400, error.rule) from None
        if others and any(_longest(paths, other) is not found for other in others):
            raise HttpError(400, "ambiguous_path")
        return found

    def _paths(self, host: str) -> _Paths:
        paths = self._exact.get(host)
        if paths is not None:
            return paths
        if self._wildcard:
            _, _, parent = host.partition(".")
            while parent:
                if parent in self._wildcard:
                    return self._wildcard[parent]
                _, _, parent = parent.partition(".")
        return self._any


def _longest(paths: _Paths, path: bytes) -> Route | None:
    for prefix, route in paths:
        if path.startswith(prefix):
            return route
    return None


def _route(config: RouteConfig) -> Route:
    always = () if config.hsts is None else (("Strict-Transport-Security", _hsts(config.hsts)),)
    return Route(
        config,
        RequestRules(config.request_headers),
        ResponseRules(config.response_headers, always),
        ResponseRules(HeaderRules((), (), ()), always),
    )


def _hsts(config: HstsConfig) -> str:
    """Return the field's value (RFC 6797 section 6.1)."""
    value = f"max-age={config.max_age_s}"
    if config.include_subdomains:
        value += "; includeSubDomains"
    return value + "; preload" if config.preload else value


def redirect_location(redirect: RedirectConfig, request: RequestHead) -> str | None:
    """Return the URL that `request` is sent to, or None if no host is known: neither side named one."""
    host = redirect.host or request.host_name
    if not host:
        return None
    port = "" if redirect.port is None else f":{redirect.port}"
    target = "/" if request.target == b"*" else request.target.decode("ascii")
    return f"{redirect.scheme}://{host}{port}{target}"
