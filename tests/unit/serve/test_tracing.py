from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from time import monotonic, time_ns
from types import SimpleNamespace
from typing import Any, cast

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from hsm.messages import SignatureScheme
from tests.routes import NO_RULES, route
from tests.unit.http.test_forwarding import HOP, request_of
from tlsproxy.config import Address, ServerConfig, UnixAddress
from tlsproxy.http.forwarding import RequestRules, request_head
from tlsproxy.http.routing import Router
from tlsproxy.serve.anatomy import HandshakePhases
from tlsproxy.serve.handshake import HandshakeSummary
from tlsproxy.serve.servers import Server
from tlsproxy.serve.span_export import SAMPLER
from tlsproxy.serve.tracing import RequestTrace, Tracing
from tlsproxy.serve.upstream_connection import UpstreamConnection
from tlsproxy.tls.certificates import Certificate
from tlsproxy.tls.events import HandshakeComplete

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT_ID = "00f067aa0ba902b7"
SAMPLED = f"traceparent: 00-{TRACE_ID}-{PARENT_ID}-01\r\n".encode()
NOT_SAMPLED = f"traceparent: 00-{TRACE_ID}-{PARENT_ID}-00\r\n".encode()
COMPLETE = HandshakeComplete(
    tls_version="TLSv1.3",
    cipher="TLS_AES_128_GCM_SHA256",
    group="x25519",
    scheme=SignatureScheme.ECDSA_SECP256R1_SHA256,
    alpn=b"http/1.1",
    resumed=False,
    server_name="a.example",
    certificate=cast("Certificate", SimpleNamespace(name="www")),
)
SERVER = Address("10.0.0.1", 80)
ROUTE = Router([route(path="/api/")]).find(request_of(b"GET /api/ HTTP/1.1\r\nHost: a\r\n\r\n"))


class Collector:
    """A process's tracing, and what it has recorded."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider(sampler=SAMPLER, shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))

    def begin(self, head: bytes = b"", *, share: float = 1.0, trusted: bool = False, **changes: Any) -> RequestTrace:
        request = request_of(b"GET /api/x?secret=1 HTTP/1.1\r\nHost: a\r\n" + head + b"\r\n")
        arguments = {"scheme": "https", "client_ip": "192.0.2.7", "handshake": None} | changes
        return Tracing(self.provider, share).begin(request, ROUTE, trusted=trusted, **arguments)

    @property
    def spans(self) -> list[ReadableSpan]:
        """In the order in which they ended."""
        return list(self._exporter.get_finished_spans())


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.provider.shutdown()


def connection(address: Address | UnixAddress = SERVER, *, reused: bool = False) -> UpstreamConnection:
    server = Server(ServerConfig(address, 1, 0), address)
    return cast("UpstreamConnection", SimpleNamespace(server=server, reused=reused))


def answered(trace: RequestTrace, status: int = 200) -> list[str]:
    """Take a request to its end; return the header fields of the trace that the server got."""
    trace.attempt_begun()
    fields = trace.attempt_connected(connection(), "app")
    trace.attempt_ended(status)
    trace.ended(status)
    return fields.decode().splitlines()


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def test_a_request_and_its_attempt_are_spans_of_one_trace(collector: Collector) -> None:
    (field,) = answered(collector.begin(b"User-Agent: curl\r\n"))
    attempt, request = collector.spans
    assert (request.name, request.kind, request.parent) == ("GET /api/", SpanKind.SERVER, None)
    assert attributes(request) == {
        "http.request.method": "GET",
        "http.route": "/api/",
        "http.response.status_code": 200,
        "url.scheme": "https",
        "url.path": "/api/x",
        "server.address": "a",
        "client.address": "192.0.2.7",
        "network.protocol.version": "1.1",
        "user_agent.original": "curl",
    }
    assert (attempt.name, attempt.kind) == ("GET", SpanKind.CLIENT)
    assert attempt.parent == request.get_span_context()
    assert attributes(attempt) == {
        "http.request.method": "GET",
        "http.response.status_code": 200,
        "server.address": "10.0.0.1",
        "server.port": 80,
        "network.peer.address": "10.0.0.1",
        "network.peer.port": 80,
        "tlsproxy.upstream": "app",
        "tlsproxy.connection_reused": False,
    }
    context = attempt.get_span_context()
    assert context is not None
    assert field == f"traceparent: 00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
    assert context.trace_flags.sampled


def test_a_clients_trace_goes_on(collector: Collector) -> None:
    fields = answered(collector.begin(SAMPLED + b"tracestate: a=1\r\nTraceState: b=2\r\n"))
    attempt, request = collector.spans
    assert request.parent is not None
    assert request.parent.span_id == int(PARENT_ID, 16)
    own = attempt.get_span_context()
    assert own is not None
    assert fields == [f"traceparent: 00-{TRACE_ID}-{own.span_id:016x}-01", "tracestate: a=1,b=2"]


@pytest.mark.parametrize("said", [SAMPLED, NOT_SAMPLED])
def test_a_client_does_not_decide_whether_it_is_recorded(collector: Collector, said: bytes) -> None:
    (field,) = answered(collector.begin(said, share=0.0))
    assert collector.spans == []
    assert field.startswith(f"traceparent: 00-{TRACE_ID}-")
    assert field.endswith("-00")
    assert PARENT_ID not in field
    answered(collector.begin(said, share=1.0))
    assert len(collector.spans) == 2


def test_a_trusted_proxy_decides_whether_its_requests_are_recorded(collector: Collector) -> None:
    answered(collector.begin(NOT_SAMPLED, share=1.0, trusted=True))
    assert collector.spans == []
    answered(collector.begin(SAMPLED, share=0.0, trusted=True))
    assert len(collector.spans) == 2
    answered(collector.begin(share=0.0, trusted=True))
    assert len(collector.spans) == 2


@pytest.mark.parametrize(
    "said",
    [
        b"traceparent: 00-" + b"0" * 32 + b"-00f067aa0ba902b7-01\r\n",
        b"traceparent: 00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01\r\n",
        b"traceparent: ff-" + TRACE_ID.encode() + b"-00f067aa0ba902b7-01\r\n",
        b"traceparent: " + b"x" * 2000 + b"\r\n",
        b"traceparent: \xff\r\n",
        SAMPLED + SAMPLED,
        b"",
    ],
)
def test_what_is_no_traceparent_begins_a_new_trace_without_its_state(collector: Collector, said: bytes) -> None:
    (field,) = answered(collector.begin(said + b"tracestate: a=1\r\n", trusted=True))
    assert TRACE_ID not in field.lower()
    assert collector.spans[1].parent is None


def test_of_two_requests_at_a_share_of_a_half_about_one_is_recorded(collector: Collector) -> None:
    for _ in range(400):
        answered(collector.begin(share=0.5))
    assert 200 < len(collector.spans) < 600


def test_the_first_request_has_the_handshake_and_its_signature_below_it(collector: Collector) -> None:
    before_ns = time_ns() - 1000
    started_s = monotonic() - 1.0
    handshake = HandshakeSummary(
        started_s, 0.5, COMPLETE, HandshakePhases(0.01, 0.01, 0.1, 0.2, 0.13, 0.05), "hsm-a", started_s + 0.15
    )
    trace = collector.begin(handshake=handshake)
    trace_id = trace.recorded_id
    answered(trace)
    signature, shake, _, request = collector.spans
    assert (signature.name, shake.name) == ("signature", "TLS handshake")
    assert signature.parent == shake.get_span_context()
    assert shake.parent == request.get_span_context()
    assert f"{request.get_span_context().trace_id:032x}" == trace_id
    assert attributes(shake) == {
        "tls.protocol.name": "tls",
        "tls.protocol.version": "1.3",
        "tls.cipher": "TLS_AES_128_GCM_SHA256",
        "tls.curve": "x25519",
        "tls.resumed": False,
        "tls.client.server_name": "a.example",
        "tlsproxy.certificate": "www",
        "tlsproxy.handshake.client_hello_s": 0.01,
        "tlsproxy.handshake.certificate_s": 0.01,
        "tlsproxy.handshake.queue_s": 0.1,
        "tlsproxy.handshake.sign_s": 0.2,
        "tlsproxy.handshake.client_s": 0.13,
        "tlsproxy.handshake.finish_s": 0.05,
    }
    assert attributes(signature) == {
        "hsm.token": "hsm-a",
        "tls.signature_scheme": "ecdsa_secp256r1_sha256",
        "hsm.queue_s": 0.1,
        "hsm.sign_s": 0.2,
    }
    assert before_ns < began_ns(shake) + 1_000_000_000 <= time_ns()
    assert ended_ns(shake) - began_ns(shake) == pytest.approx(5e8, abs=1000)
    assert ended_ns(signature) - began_ns(signature) == pytest.approx(3e8, abs=1000)
    assert began_ns(signature) - began_ns(shake) == pytest.approx(1.5e8, abs=1000)
    assert began_ns(request) > ended_ns(shake)


def test_a_resumed_handshake_has_no_signature(collector: Collector) -> None:
    resumed = COMPLETE._replace(scheme=None, resumed=True)
    answered(collector.begin(handshake=HandshakeSummary(monotonic(), 0.001, resumed, None, None, 0.0)))
    assert [span.name for span in collector.spans] == ["TLS handshake", "GET", "GET /api/"]
    assert attributes(collector.spans[0])["tls.resumed"] is True


def test_each_attempt_is_a_span_and_tells_what_failed(collector: Collector) -> None:
    trace = collector.begin()
    trace.attempt_begun()
    first = trace.attempt_connected(connection(), "app")
    trace.attempt_ended(0, "connection_lost")
    trace.attempt_begun()
    second = trace.attempt_connected(connection(UnixAddress(Path("/run/b"))), "app")
    trace.attempt_ended(200)
    trace.ended(200)
    assert first != second
    failed, good, request = collector.spans
    assert (failed.status.status_code, attributes(failed)["error.type"]) == (StatusCode.ERROR, "connection_lost")
    assert attributes(good)["http.request.resend_count"] == 1
    assert attributes(good)["server.address"] == "unix:/run/b"
    assert (request.status.status_code, "error.type" in attributes(request)) == (StatusCode.UNSET, False)


def test_a_request_that_no_server_answers_tells_why(collector: Collector) -> None:
    trace = collector.begin()
    trace.attempt_begun()
    trace.attempt_ended(0, "connect_refused")
    trace.ended(502)
    _, request = collector.spans
    assert attributes(request)["error.type"] == "connect_refused"
    assert attributes(request)["http.response.status_code"] == 502
    assert request.status.status_code is StatusCode.ERROR


@pytest.mark.parametrize(("status", "attempt_fails", "request_fails"), [(404, True, False), (500, True, True)])
def test_whose_error_a_status_is(collector: Collector, status: int, attempt_fails: bool, request_fails: bool) -> None:
    answered(collector.begin(), status)
    failed = [span.status.status_code is StatusCode.ERROR for span in collector.spans]
    assert failed == [attempt_fails, request_fails]


def test_a_client_that_leaves_ends_all_spans_once(collector: Collector) -> None:
    trace = collector.begin()
    trace.attempt_begun()
    trace.ended(0, "client_closed")
    trace.ended(200)
    attempt, request = collector.spans
    assert attributes(attempt)["error.type"] == attributes(request)["error.type"] == "client_closed"
    assert "http.response.status_code" not in attributes(request)


def test_a_method_of_the_clients_own_is_no_name_of_a_span(collector: Collector) -> None:
    request = request_of(b"BREW / HTTP/1.1\r\nHost: a\r\n\r\n")
    trace = Tracing(collector.provider, 1.0).begin(
        request, None, scheme="http", client_ip="192.0.2.7", trusted=False, handshake=None
    )
    trace.ended(404)
    (span,) = collector.spans
    assert span.name == "HTTP"
    assert attributes(span)["http.request.method"] == "_OTHER"
    assert attributes(span)["http.request.method_original"] == "BREW"


def test_the_proxys_word_replaces_the_clients_in_the_head_sent_on() -> None:
    request = request_of(b"GET / HTTP/1.1\r\nHost: a\r\nTraceParent: x\r\nTraceState: y\r\nAccept: z\r\n\r\n")
    rules = RequestRules(NO_RULES)
    lines = request_head(request, HOP._replace(trace=b"traceparent: 00\r\n"), rules).split(b"\r\n")
    assert [line for line in lines if line.lower().startswith(b"trace")] == [b"traceparent: 00"]
    untouched = request_head(request, HOP, rules)
    assert b"TraceParent: x\r\nTraceState: y\r\nAccept: z\r\n" in untouched


def began_ns(span: ReadableSpan) -> int:
    assert span.start_time is not None
    return span.start_time


def ended_ns(span: ReadableSpan) -> int:
    assert span.end_time is not None
    return span.end_time
