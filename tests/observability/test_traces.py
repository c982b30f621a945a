"""Traces of a real proxy, exported over OTLP to a collector that decodes them as any other would."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from hsm.messages import KeyType
from tests.backends import BackendConnection, always, backend, ok
from tests.proxy import Proxy, free_port, make_site, running_proxy, site_config, write_config

KEYS = {"www": KeyType.ECDSA_P256}


class Collector:
    """Takes OTLP over HTTP."""

    def __init__(self, port: int = 0, tls: ssl.SSLContext | None = None) -> None:
        self.batches: list[ExportTraceServiceRequest] = []
        self.headers: list[dict[str, str]] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                assert self.path == "/v1/traces"
                assert self.headers["Content-Type"] == "application/x-protobuf"
                collector.batches.append(ExportTraceServiceRequest.FromString(body))
                collector.headers.append(dict(self.headers.items()))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def spans(self) -> list[Span]:
        return [
            span
            for batch in list(self.batches)
            for of_resource in batch.resource_spans
            for of_scope in of_resource.scope_spans
            for span in of_scope.spans
        ]

    def named(self, name: str) -> list[Span]:
        return sorted((span for span in self.spans if span.name == name), key=lambda span: span.start_time_unix_nano)


@contextlib.contextmanager
def collector(port: int = 0, tls: ssl.SSLContext | None = None) -> Iterator[Collector]:
    running = Collector(port, tls)
    try:
        yield running
    finally:
        running.close()


def attributes(span: Any) -> dict[str, Any]:
    found = {}
    for pair in span.attributes:
        kind = pair.value.WhichOneof("value")
        found[pair.key] = getattr(pair.value, kind)
    return found


def traced(directory: Path, app_port: int, endpoint: str, **changes: Any) -> dict[str, Any]:
    tracing = {"endpoint": endpoint, "sample": 1}
    return site_config(directory, KEYS, f"127.0.0.1:{app_port}", tracing=tracing, **changes)


def get_twice(proxy: Proxy) -> None:
    """Make two requests on one connection, of one trace each."""
    context = proxy.client_context()
    with (
        socket.create_connection(("127.0.0.1", proxy.port), timeout=30) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as tls,
    ):
        connection = http.client.HTTPConnection("localhost")
        connection.sock = tls
        for path in ("/first?token=secret", "/second"):
            connection.request("GET", path)
            assert connection.getresponse().read() == b"hello"


async def test_a_request_is_traced_from_its_handshake_to_the_server(tmp_path: Path) -> None:
    make_site(tmp_path, KEYS)
    async with backend(always(ok())) as app:
        with collector() as spans:
            config = traced(tmp_path, app.port, f"http://127.0.0.1:{spans.port}")
            async with running_proxy(tmp_path, config) as proxy:
                await asyncio.to_thread(get_twice, proxy)
                await proxy.until(lambda: len(spans.named("GET /")) == 2, "two requests' spans")
                recorded = await proxy.metric("tlsproxy_trace_spans_total")

                async def all_exported() -> bool:
                    return await proxy.metric("tlsproxy_trace_spans_exported_total", result="ok") == recorded

                await proxy.until(all_exported, "all spans exported")
                access_log = [json.loads(line) for line in proxy.log.splitlines() if '"event": "request"' in line]

            first, second = spans.named("GET /")
            (handshake,) = spans.named("TLS handshake")
            (signature,) = spans.named("signature")
            attempts = spans.named("GET")
            assert len(spans.spans) == recorded == 6
            assert signature.parent_span_id == handshake.span_id
            assert handshake.parent_span_id == first.span_id
            assert [attempt.parent_span_id for attempt in attempts] == [first.span_id, second.span_id]
            assert {handshake.trace_id, signature.trace_id, attempts[0].trace_id} == {first.trace_id}
            assert second.trace_id != first.trace_id
            assert [line["trace_id"] for line in access_log] == [first.trace_id.hex(), second.trace_id.hex()]
            sent_on = [line for line in app.received.split(b"\r\n") if line.startswith(b"traceparent: ")]
            assert [line[13:].split(b"-")[1:3] for line in sent_on] == [
                [attempt.trace_id.hex().encode(), attempt.span_id.hex().encode()] for attempt in attempts
            ]

            seconds = attributes(handshake)
            parts = sum(value for name, value in seconds.items() if name.startswith("tlsproxy.handshake."))
            assert abs(parts - (handshake.end_time_unix_nano - handshake.start_time_unix_nano) / 1e9) < 1e-5
            assert handshake.start_time_unix_nano <= signature.start_time_unix_nano
            assert signature.end_time_unix_nano <= handshake.end_time_unix_nano
            assert attributes(signature)["hsm.token"] == "local"
            assert "secret" not in str(spans.batches)
            resource = attributes(spans.batches[0].resource_spans[0].resource)
            assert resource["service.name"] == "tlsproxy"


async def test_requests_do_not_wait_for_a_collector_that_is_away_and_its_return_is_noticed(tmp_path: Path) -> None:
    make_site(tmp_path, KEYS)
    port = free_port()
    endpoint = f"http://127.0.0.1:{port}/v1/traces"
    async with backend(always(ok())) as app, running_proxy(tmp_path, traced(tmp_path, app.port, endpoint)) as proxy:
        for _ in range(3):
            assert await proxy.get() == (200, b"hello")

        async def lost() -> bool:
            return await proxy.metric("tlsproxy_trace_spans_exported_total", result="failed") > 0

        await proxy.until(lost, "spans counted as lost")
        with collector(port) as spans:

            async def arrived() -> bool:
                await proxy.get()
                return bool(spans.spans)

            await proxy.until(arrived, "spans at the collector")
            await proxy.until(lambda: "spans are exported again" in proxy.log, "the log says so")
    warnings = [json.loads(line) for line in proxy.log.splitlines() if "spans are not exported" in line]
    assert len(warnings) == 1
    assert warnings[0]["endpoint"] == endpoint
    assert warnings[0]["reason"]
    assert "Traceback" not in proxy.log


async def test_a_proxy_that_drains_sends_the_last_spans(tmp_path: Path) -> None:
    make_site(tmp_path, KEYS)
    async with backend(always(ok())) as app:
        with collector() as spans:
            async with running_proxy(tmp_path, traced(tmp_path, app.port, f"http://127.0.0.1:{spans.port}")) as proxy:
                await proxy.get()
                assert await proxy.stop() == 0
            assert len(spans.named("GET /")) == 1


async def test_a_proxy_ends_though_its_collector_never_answers(tmp_path: Path) -> None:
    make_site(tmp_path, KEYS)
    async with backend(always(ok())) as app:
        with socket.create_server(("127.0.0.1", 0)) as deaf:
            endpoint = f"http://127.0.0.1:{deaf.getsockname()[1]}"
            async with running_proxy(tmp_path, traced(tmp_path, app.port, endpoint)) as proxy:
                await proxy.get()
                deaf.settimeout(30)
                connection, _ = deaf.accept()
                with connection:
                    assert await proxy.stop() == 0


async def test_a_resumed_handshake_has_no_signature_and_a_broken_request_names_its_error(tmp_path: Path) -> None:
    make_site(tmp_path, KEYS)

    async def hang_up(connection: BackendConnection) -> None:
        await connection.head()

    async with backend(hang_up) as app:
        with collector() as spans:
            async with running_proxy(tmp_path, traced(tmp_path, app.port, f"http://127.0.0.1:{spans.port}")) as proxy:
                await asyncio.to_thread(post_twice_with_resumption, proxy)
                await proxy.until(lambda: len(spans.named("POST /")) == 2, "two requests' spans")
    assert [attributes(span)["tls.resumed"] for span in spans.named("TLS handshake")] == [False, True]
    assert len(spans.named("signature")) == 1
    for span in (*spans.named("POST /"), *spans.named("POST")):
        assert attributes(span)["error.type"] == "closed_before_response"
    assert {attributes(span)["http.response.status_code"] for span in spans.named("POST /")} == {502}


def post_twice_with_resumption(proxy: Proxy) -> None:
    context = proxy.client_context()
    session = None
    for _ in range(2):
        with (
            socket.create_connection(("127.0.0.1", proxy.port), timeout=30) as plain,
            context.wrap_socket(plain, server_hostname="localhost", session=session) as tls,
        ):
            tls.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n")
            assert tls.recv(1000).startswith(b"HTTP/1.1 502 ")
            session = tls.session


async def test_a_share_of_none_records_nothing_and_the_trace_goes_on(tmp_path: Path) -> None:
    make_site(tmp_path, KEYS)
    async with backend(always(ok())) as app:
        with collector() as spans:
            config = traced(tmp_path, app.port, f"http://127.0.0.1:{spans.port}")
            config["tracing"]["sample"] = 0
            async with running_proxy(tmp_path, config) as proxy:
                await proxy.get()
                assert await proxy.stop() == 0
            assert spans.batches == []
    assert app.received.count(b"traceparent: 00-") == 1
    assert "trace_id" not in proxy.log


async def test_a_collector_behind_tls_is_verified_and_gets_the_headers_of_the_environment(tmp_path: Path) -> None:
    site = make_site(tmp_path, KEYS)
    key = tmp_path / "collector.key"
    key.write_bytes(site.private_keys["www"].private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "www.pem", key)
    async with backend(always(ok())) as app:
        with collector(tls=tls) as spans:
            config = traced(tmp_path, app.port, f"https://localhost:{spans.port}/v1/traces")
            headers = {"OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer%20abc"}
            async with running_proxy(tmp_path, config, os.environ | headers) as proxy:
                await proxy.get()
                await proxy.until(lambda: "spans are not exported" in proxy.log, "an unknown CA is refused")
            assert spans.batches == []
            trusting = {"SSL_CERT_FILE": str(tmp_path / "ca.pem")}
            async with running_proxy(tmp_path, config, os.environ | headers | trusting) as proxy:
                await proxy.get()
                await proxy.until(lambda: spans.named("GET /"), "the span")
            assert spans.headers[0]["authorization"] == "Bearer abc"


def test_without_its_packages_the_configuration_is_at_fault(tmp_path: Path) -> None:
    make_site(tmp_path, KEYS)
    config = write_config(tmp_path, traced(tmp_path, free_port(), "http://127.0.0.1:4318"))
    # An OpenTelemetry of its own, with nothing in it, goes before the real one.
    (tmp_path / "without" / "opentelemetry").mkdir(parents=True)
    (tmp_path / "without" / "opentelemetry" / "__init__.py").touch()
    result = subprocess.run(
        [sys.executable, "-m", "tlsproxy", "check", str(config)],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "without")},
        capture_output=True,
        text=True,
        check=False,
    )
    line = next(number for number, text in enumerate(config.read_text().splitlines(), 1) if "endpoint" in text)
    assert result.stderr == (
        f"{config}:{line}:13: tracing.endpoint: expected tlsproxy's extra `otel` (pip install tlsproxy[otel]); "
        "got an installation without it\n"
    )
    assert result.returncode == 2
