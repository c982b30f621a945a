from __future__ import annotations

import asyncio
import datetime
import json
import socket
from collections.abc import AsyncIterator

import pytest
from prometheus_client import CollectorRegistry, Counter

from tlsproxy.serve import admin
from tlsproxy.serve.admin import AdminServer
from tlsproxy.serve.snapshot import CertificateView, ListenerView, Snapshot, WorkerView


class Fixture:
    """An admin server whose state the test sets."""

    def __init__(self) -> None:
        self.workers_ready = True
        self.token_up = True
        self.name = "www"
        self.port = 0

    def snapshot(self) -> Snapshot:
        not_after = datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc)
        return Snapshot(
            version="9",
            workers=(WorkerView(0, 4711, self.workers_ready), WorkerView(1, None, False)),
            tokens={"local": self.token_up},
            certificates=(CertificateView(self.name, ("example.com",), "ecdsa-p256", ("local",), not_after),),
            listeners=(ListenerView("0.0.0.0:8443", 3, 1000, 7),),
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
        return await self.ask(f"GET {target} HTTP/1.1\r\nHost: x\r\n{headers}\r\n".encode())


@pytest.fixture
async def fixture() -> AsyncIterator[Fixture]:
    made = Fixture()
    registry = CollectorRegistry()
    Counter("requests", "Requests.", registry=registry).inc(5)
    listening = socket.create_server(("127.0.0.1", 0))
    made.port = listening.getsockname()[1]
    server = AdminServer(listening, registry, made.snapshot)
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


async def test_the_status_page_shows_the_state_and_escapes_it(fixture: Fixture) -> None:
    fixture.name = "<script>alert(1)</script>"
    status, headers, body = await fixture.get("/")
    page = body.decode()
    assert status == 200
    assert "script>" not in page.replace("&lt;script&gt;alert(1)&lt;/script&gt;", "")
    assert "default-src 'none'" in headers["content-security-policy"]
    for text in ("0.0.0.0:8443", "1000", "example.com", "(expired)", "4711", "Ready"):
        assert text in page
    fixture.token_up = False
    assert "Not ready" in (await fixture.get("/"))[2].decode()


async def test_head_has_no_body_and_the_length_of_get(fixture: Fixture) -> None:
    get = await fixture.get("/healthz")
    head = await fixture.ask(b"HEAD /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    assert head == (get[0], get[1], b"")


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nab", 405),
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 40_000 + b"\r\n\r\n", 431),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 20000\r\n\r\n" + b"y" * 20_000, 413),
    ],
)
async def test_what_it_does_not_serve(fixture: Fixture, request_bytes: bytes, status: int) -> None:
    assert (await fixture.ask(request_bytes))[0] == status


async def test_requests_on_one_connection_are_answered_in_order(fixture: Fixture) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", fixture.port)
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET /x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
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
