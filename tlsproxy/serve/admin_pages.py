"""What the admin port answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from importlib import resources
from typing import Final, Protocol

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from hsm.metricstore import Family
from tlsproxy.metrics import Merged
from tlsproxy.serve.anatomy import SlowHandshake
from tlsproxy.serve.snapshot import Snapshot

_STATUS_PAGE = {
    "index.html": "text/html; charset=utf-8",
    "app.css": "text/css; charset=utf-8",
    "app.js": "text/javascript; charset=utf-8",
    "chart.js": "text/javascript; charset=utf-8",
    "table.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}


class Source(Protocol):
    """Who knows the state of the whole."""

    registry: CollectorRegistry
    """All metrics."""

    def snapshot(self) -> Snapshot:
        """Return the state at this moment."""

    def read(self, families: Mapping[str, Family]) -> Merged:
        """Return the present values of `families`, by name, over all processes."""

    def slowest(self) -> list[SlowHandshake]:
        """Return the slowest handshakes of late, the slowest first."""


@dataclass(frozen=True, slots=True)
class Response:
    """An answer with all of its body."""

    status: HTTPStatus
    content_type: str
    body: bytes


def text(status: HTTPStatus) -> Response:
    """Return an answer that says no more than its status."""
    return Response(status, "text/plain; charset=utf-8", f"{status.value} {status.phrase}\n".encode())


def respond(target: bytes, accept: str, source: Source) -> Response:
    """Return the answer to GET `target`, the event stream excepted."""
    path = target.partition(b"?")[0]
    if path == b"/metrics":
        encode, content_type = choose_encoder(accept)
        return Response(HTTPStatus.OK, content_type, encode(source.registry))
    if path == b"/healthz":
        snapshot = source.snapshot()
        return _verdict(snapshot.healthy, {"workers_ready": snapshot.workers_ready, "workers": len(snapshot.workers)})
    if path == b"/readyz":
        snapshot = source.snapshot()
        return _verdict(snapshot.ready, {"workers_ready": snapshot.workers_ready, "tokens": snapshot.tokens})
    if path == b"/handshakes/slowest":
        return _json(HTTPStatus.OK, [handshake.to_document() for handshake in source.slowest()])
    return _STATIC.get(path) or text(HTTPStatus.NOT_FOUND)


def _verdict(good: bool, details: dict[str, object]) -> Response:
    status = HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE
    return _json(status, {"status": "ok" if good else "unavailable"} | details)


def _json(status: HTTPStatus, document: object) -> Response:
    return Response(status, "application/json", json.dumps(document).encode() + b"\n")


def _load_status_page() -> dict[bytes, Response]:
    files = resources.files("tlsproxy.serve") / "static"
    pages = {
        f"/{name}".encode(): Response(HTTPStatus.OK, content_type, (files / name).read_bytes())
        for name, content_type in _STATUS_PAGE.items()
    }
    return pages | {b"/": pages.pop(b"/index.html")}


_STATIC: Final[Mapping[bytes, Response]] = _load_status_page()
