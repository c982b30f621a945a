"""Which route takes a request: first by host, then by the longest path prefix."""

from __future__ import annotations

from collections.abc import Sequence

from tlsproxy.config import RouteConfig

_Paths = tuple[tuple[bytes, RouteConfig], ...]


class Router:
    """The routes of one listener.

    The most specific host wins: its exact name, then `*.` and a parent (the longest first), then `*`. Among that host's
    routes the longest `path` that the request's path starts with wins; routes of other hosts are not considered.
    """

    __slots__ = ("_any", "_exact", "_wildcard")

    def __init__(self, routes: Sequence[RouteConfig]) -> None:
        by_host: dict[str, list[tuple[bytes, RouteConfig]]] = {}
        for route in routes:
            by_host.setdefault(route.host.lower(), []).append((route.path.encode(), route))
        ordered = {
            host: tuple(sorted(paths, key=lambda item: len(item[0]), reverse=True)) for host, paths in by_host.items()
        }
        self._any: _Paths = ordered.pop("*", ())
        self._wildcard = {host[2:]: paths for host, paths in ordered.items() if host.startswith("*.")}
        self._exact = {host: paths for host, paths in ordered.items() if not host.startswith("*.")}

    def find(self, host: str, path: bytes) -> RouteConfig | None:
        """Return the route for `host` (lower case, no port) and a normalised path, or None."""
        for prefix, route in self._paths(host):
            if path.startswith(prefix):
                return route
        return None

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
