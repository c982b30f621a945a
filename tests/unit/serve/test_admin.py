from __future__ import annotations

import asyncio
import datetime
import json
import socket
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter

from hsm.metricstore import Family
from tests.unit.serve.test_anatomy import HANDSHAKE
from tlsproxy import metrics
from tlsproxy.metrics import Merged
from tlsproxy.serve import admin, live_feed
from tlsproxy.serve.admin import AdminServer
from tlsproxy.serve.anatomy import SlowHandshake
from tlsproxy.serve.live_document import FAMILIES as LIVE_FAMILIES
from tlsproxy.serve.snapshot import CertificateView, ListenerView, ServerView, Snapshot, UpstreamView, WorkerView


class Fixture:
    """An admin server whose state the test sets."""

    def __init__(self) -> None:
        self.workers_ready = True
        self.token_up = True
        self.server_up = True
        self.name = "www"
        self.version = "9"
        self.port = 0
        self.merged: dict[str, dict[tuple[str, ...], tuple[float, ...]]] = {name: {} for name in LIVE_FAMILIES}
        self.registry = CollectorRegistry()
        Counter("requests", "Requests.", registry=self.registry).inc(5)

    def read(self, families: Mapping[str, Family]) -> Merged:
        assert families == LIVE_FAMILIES
        return {name: dict(label_sets) for name, label_sets in self.merged.items()}

    def slowest(self) -> list[SlowHandshake]:
        return [HANDSHAKE]

    def snapshot(self) -> Snapshot:
        not_after = datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc)
        return Snapshot(
            version=self.version,
            workers=(WorkerView(0, 4711, self.workers_ready), WorkerView(1, None, False)),
            tokens={"local": self.token_up},
            certificates=(CertificateView(self.name, ("example.com",), "ecdsa-p256", ("local",), not_after),),
            listeners=(ListenerView("0.0.0.0:8443", 3, 1000, 7),),
            upstreams=(UpstreamView("app", (ServerView("10.0.0.1:80", 1, int(self.server_up), 0),)),),
        )

    async def ask(self, request: bytes) -> tuple[int, dict[str, str], bytes]:
        """Send bytes on a connection of its own; return status, headers and body."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(request)
        writer.write_eof()
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        await writer.wait_closed()
        status_line, *lines = head.decode().split("\r\n")
        return int(status_line.split()[1]), dict(line.lower().split(": ", 1) for line in lines), body

    async def get(self, target: str, headers: str = "") -> tuple[int, dict[str, str], bytes]:
        return await self.ask(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n".encode())


@pytest.fixture
async def fixture() -> AsyncIterator[Fixture]:
    made = Fixture()
    listening = socket.create_server(("127.0.0.1", 0))
    made.port = listening.getsockname()[1]
    server = AdminServer(listening, made)
    await server.start()
    yield made
    await server.close()


async def test_metrics_in_the_text_format_and_as_openmetrics(fixture: Fixture) -> None:
    status, headers, body = await fixture.get("/metrics")
    assert (status, b"requests_total 5.0\n" in body) == (200, True)
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    status, headers, body = await fixture.get("/metrics", "Accept: application/openmetrics-text; version=1.0.0\r\n")
    assert (status, body.endswith(b"# EOF\n")) == (200, True)
    assert headers["content-type"].startswith("application/openmetrics-text")


async def test_healthz_asks_for_a_worker_and_readyz_for_a_token_too(fixture: Fixture) -> None:
    async def verdicts() -> tuple[int, int]:
        return (await fixture.get("/healthz"))[0], (await fixture.get("/readyz"))[0]

    assert await verdicts() == (200, 200)
    fixture.token_up = False
    assert await verdicts() == (200, 503)
    assert json.loads((await fixture.get("/readyz"))[2]) == {
        "status": "unavailable",
        "workers_ready": 1,
        "tokens": {"local": False},
    }
    fixture.token_up, fixture.workers_ready = True, False
    assert await verdicts() == (503, 503)


@pytest.mark.parametrize(
    ("path", "content_type"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/app.js", "text/javascript; charset=utf-8"),
        ("/app.css", "text/css; charset=utf-8"),
        ("/icon.svg", "image/svg+xml"),
    ],
)
async def test_the_status_page_is_files_that_may_load_nothing_from_elsewhere(
    fixture: Fixture, path: str, content_type: str
) -> None:
    status, headers, body = await fixture.get(path)
    assert (status, headers["content-type"]) == (200, content_type)
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "unsafe" not in headers["content-security-policy"]
    assert b"https://" not in body
    assert b"http://" not in body.replace(b"http://www.w3.org/2000/svg", b"")


async def test_the_slowest_handshakes_as_json(fixture: Fixture) -> None:
    status, headers, body = await fixture.get("/handshakes/slowest")
    assert (status, headers["content-type"]) == (200, "application/json")
    assert json.loads(body) == [HANDSHAKE.to_document()]


class Watcher:
    """One who reads /live."""

    @classmethod
    async def open(cls, port: int) -> Watcher:
        watcher = cls()
        watcher.reader, watcher.writer = await asyncio.open_connection("127.0.0.1", port)
        watcher.writer.write(b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n")
        watcher.head = (await watcher.reader.readuntil(b"\r\n\r\n")).decode()
        return watcher

    async def document(self) -> dict[str, Any]:
        while not (line := await self.reader.readline()).startswith(b"data: "):
            assert line
        document: dict[str, Any] = json.loads(line.removeprefix(b"data: "))
        return document

    def close(self) -> None:
        self.writer.transport.abort()


async def test_the_state_is_streamed(fixture: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_feed, "INTERVAL_S", 0.01)
    watcher = await Watcher.open(fixture.port)
    assert watcher.head.startswith("HTTP/1.1 200")
    assert "content-type: text/event-stream" in watcher.head.lower()
    document = await watcher.document()
    assert (document["ready"], document["handshakes"]["full"], document["handshakes"]["duration"]) == (True, 0, None)
    assert document["certificates"][0]["days_left"] < 0
    assert document["slowest"] == [HANDSHAKE.to_document()]
    fixture.merged[metrics.HANDSHAKES.name]["0.0.0.0:8443", "ok", "false", "TLSv1.3"] = (5.0,)
    fixture.token_up = False
    documents = [await watcher.document() for _ in range(20)]
    assert sum(document["handshakes"]["full"] > 0 for document in documents) == 1
    assert not documents[-1]["ready"]
    watcher.close()


async def test_watchers_beyond_the_limit_are_told_so(fixture: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_feed, "MAX_WATCHERS", 1)
    monkeypatch.setattr(live_feed, "INTERVAL_S", 0.01)
    first = await Watcher.open(fixture.port)
    second = await Watcher.open(fixture.port)
    assert second.head.startswith("HTTP/1.1 503")
    for watcher in (first, second):
        watcher.close()
    for _ in range(100):
        third = await Watcher.open(fixture.port)
        third.close()
        if third.head.startswith("HTTP/1.1 200"):
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the first one's place was never free")


async def test_nothing_is_read_while_nobody_watches(fixture: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_feed, "INTERVAL_S", 0.01)
    watcher = await Watcher.open(fixture.port)
    await watcher.document()
    watcher.close()
    reads = []
    monkeypatch.setattr(fixture, "read", lambda families: reads.append(1) or fixture.merged)
    for _ in range(100):
        before = len(reads)
        await asyncio.sleep(0.05)
        if len(reads) == before:
            return
    raise AssertionError("it never stopped")


async def test_head_has_no_body_and_the_length_of_get(fixture: Fixture) -> None:
    get = await fixture.get("/healthz")
    head = await fixture.ask(b"HEAD /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert head == (get[0], get[1], b"")


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\nab", 405),
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 40_000 + b"\r\n\r\n", 431),
        (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 20000\r\n\r\n" + b"y" * 20_000, 413),
    ],
)
async def test_what_it_does_not_serve(fixture: Fixture, request_bytes: bytes, status: int) -> None:
    assert (await fixture.ask(request_bytes))[0] == status


async def test_requests_on_one_connection_are_answered_in_order(fixture: Fixture) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", fixture.port)
    for request in (b"GET /healthz HTTP/1.1\r\n", b"GET /x HTTP/1.1\r\nConnection: close\r\n"):
        writer.write(request + b"Host: localhost\r\n\r\n")
    answers = await reader.read()
    writer.close()
    assert answers.startswith(b"HTTP/1.1 200")
    assert b"HTTP/1.1 404" in answers


async def test_a_slow_request_is_cut_off(fixture: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "REQUEST_TIMEOUT_S", 0.05)
    reader, writer = await asyncio.open_connection("127.0.0.1", fixture.port)
    writer.write(b"GET / HTTP/1.1\r\n")
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await reader.readexactly(1)
    writer.close()


async def test_connections_beyond_the_limit_are_closed(fixture: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "MAX_CONNECTIONS", 1)
    _, first = await asyncio.open_connection("127.0.0.1", fixture.port)
    reader, second = await asyncio.open_connection("127.0.0.1", fixture.port)
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await reader.readexactly(1)
    for writer in (first, second):
        writer.close()


@pytest.mark.parametrize(
    ("address", "host", "status"),
    [
        ("127.0.0.1", "127.0.0.1:9900", 200),
        ("127.0.0.1", "LocalHost:1", 200),
        ("127.0.0.1", "[::1]", 200),
        ("127.0.0.1", "rebound.example:9900", 421),
        ("127.0.0.1", "localhost.rebound.example", 421),
        ("127.0.0.1", "127.0.0.1.rebound.example", 421),
        ("0.0.0.0", "proxy.internal:9900", 200),
    ],
)
@pytest.mark.parametrize("target", ["/metrics", "/live"])
async def test_on_loopback_it_answers_to_no_name_that_a_web_page_may_have(
    address: str, host: str, status: int, target: str
) -> None:
    made = Fixture()
    with socket.create_server((address, 0)) as listening:
        made.port = listening.getsockname()[1]
        server = AdminServer(listening, made)
        await server.start()
        reader, writer = await asyncio.open_connection("127.0.0.1", made.port)
        writer.write(f"GET {target} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        assert int((await reader.readline()).split()[1]) == status
        writer.close()
        await server.close()
