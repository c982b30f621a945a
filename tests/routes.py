"""Routes for tests: of everything to the upstream `app`, but for what a test wants otherwise."""

from __future__ import annotations

import dataclasses
from typing import Any

from tlsproxy.config import HeaderRules, Origin, RouteConfig

NO_RULES = HeaderRules((), (), ())
_PLAIN = RouteConfig(
    host="*",
    path="/",
    upstream="app",
    redirect=None,
    request_headers=NO_RULES,
    response_headers=NO_RULES,
    hsts=None,
    body_bytes=0,
    body_idle_s=30,
    response_s=None,
    origin=Origin("test.yaml", 1, 1, "routes[0]"),
)


def route(**changes: Any) -> RouteConfig:
    """Return the route with `changes`."""
    return dataclasses.replace(_PLAIN, **changes)
