"""What becomes of requests, as OpenTelemetry spans.

A traced request has a span of its own; below it are one for each attempt at an upstream and, for the first request on a
connection, the TLS handshake it had to wait for and, below that, the signature. Names and attributes are those of
OpenTelemetry's semantic conventions where they have any. No span holds a query, a header's value other than User-Agent,
or anything of a body.

The trace goes on from a client's `traceparent` to the server's (W3C Trace Context). Whether it is recorded is for a
trusted proxy to say; for everyone else a share of the requests is drawn here, so that no client can have itself traced.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from time import monotonic, time_ns
from typing import TYPE_CHECKING

from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import (
    INVALID_SPAN_CONTEXT,
    Span,
    SpanKind,
    Status,
    StatusCode,
    Tracer,
    TraceState,
    format_trace_id,
    get_current_span,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

import tlsproxy
from tlsproxy.config import UnixAddress
from tlsproxy.http.heads import RequestHead
from tlsproxy.http.routing import Route

if TYPE_CHECKING:
    from tlsproxy.serve.handshake import HandshakeSummary
    from tlsproxy.serve.upstream_connection import UpstreamConnection

_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"))
_OTHER = "_OTHER"
_NOTHING_SAID = Context()

_propagator = TraceContextTextMapPropagator()
_ids = RandomIdGenerator()


class Tracing:
    """Begins the traces of one process's requests."""

    def __init__(self, provider: TracerProvider, share: float) -> None:
        """`share` of the requests is recorded."""
        self._tracer = provider.get_tracer("tlsproxy", tlsproxy.__version__)
        self._share = share

    def begin(
        self,
        request: RequestHead,
        route: Route | None,
        *,
        scheme: str,
        client_ip: str,
        trusted: bool,
        handshake: HandshakeSummary | None,
    ) -> RequestTrace:
        """Begin the trace of a request that has come in, or go on with the client's.

        `client_ip` is where the request came from; its peer is `trusted` to say whether it is recorded. `handshake` is
        the one this request had to wait for, if any.
        """
        said = _trace_context(request)
        parent = get_current_span(said).get_span_context() if said else INVALID_SPAN_CONTEXT
        recorded = parent.trace_flags.sampled if trusted and parent.is_valid else random.random() < self._share  # noqa: S311 - no secret
        if not recorded:
            trace_id = parent.trace_id or _ids.generate_trace_id()
            return RequestTrace(_header_lines(trace_id, _ids.generate_span_id(), 0, parent.trace_state))
        method = _known_method(request)
        name = "HTTP" if method == _OTHER else method
        span = self._tracer.start_span(
            name if route is None else f"{name} {route.config.path}",
            context=said,
            kind=SpanKind.SERVER,
            attributes=_request_attributes(request, method, route, scheme, client_ip),
        )
        trace = RecordedTrace(self._tracer, span, method)
        if handshake is not None:
            trace.add_handshake(handshake)
        return trace


class RequestTrace:
    """The trace of a request, as far as one that isn't recorded has it: the server is told the trace's id."""

    __slots__ = ("_header_lines",)

    def __init__(self, header_lines: bytes) -> None:
        self._header_lines = header_lines

    @property
    def recorded_id(self) -> str | None:
        """The trace's id, by which it is found at the collector; None if it isn't recorded."""
        return None

    def attempt_begun(self) -> None:
        """The request is to be sent to an upstream."""

    def attempt_connected(self, connection: UpstreamConnection, upstream: str) -> bytes:  # noqa: ARG002
        """There is a connection to send it on; return the header fields that tell the server of the trace."""
        return self._header_lines

    def attempt_ended(self, status: int, error: str = "") -> None:
        """The upstream has answered with `status`, or failed with `error` after it; 0: no answer."""

    def ended(self, status: int, error: str = "") -> None:
        """The client has been answered with `status`; 0: it has not. Idempotent."""


class RecordedTrace(RequestTrace):
    """The spans of one request."""

    __slots__ = ("_attempt", "_attempts", "_context", "_error", "_method", "_span", "_tracer")

    def __init__(self, tracer: Tracer, span: Span, method: str) -> None:
        self._tracer = tracer
        self._span = span
        self._method = method
        self._context = set_span_in_context(span, _NOTHING_SAID)
        self._attempt: Span | None = None
        self._attempts = 0
        self._error = ""

    @property
    def recorded_id(self) -> str:
        """The trace's id."""
        return format_trace_id(self._span.get_span_context().trace_id)

    def add_handshake(self, handshake: HandshakeSummary) -> None:
        """Add the handshake that went before, and its signature."""
        complete = handshake.complete
        phases = handshake.phases
        attributes: dict[str, str | bool | float] = {
            "tls.protocol.name": "tls",
            "tls.protocol.version": complete.tls_version.removeprefix("TLSv"),
            "tls.cipher": complete.cipher,
            "tls.curve": complete.group or "",
            "tls.resumed": complete.resumed,
            "tls.client.server_name": complete.server_name or "",
            "tlsproxy.certificate": complete.certificate.name,
        }
        if phases is not None:
            attributes |= {f"tlsproxy.handshake.{name}": seconds for name, seconds in phases._asdict().items()}
        # Spans are dated by the wall clock, what is known of the handshake by the monotonic one.
        clock_offset_ns = time_ns() - int(monotonic() * 1e9)
        started_ns = int(handshake.started_s * 1e9) + clock_offset_ns
        span = self._tracer.start_span(
            "TLS handshake", context=self._context, attributes=attributes, start_time=started_ns
        )
        if phases is not None and complete.scheme is not None and handshake.token is not None:
            requested_ns = int(handshake.signature_requested_s * 1e9) + clock_offset_ns
            signature = self._tracer.start_span(
                "signature",
                context=set_span_in_context(span, _NOTHING_SAID),
                kind=SpanKind.CLIENT,
                attributes={
                    "hsm.token": handshake.token,
                    "tls.signature_scheme": complete.scheme.label,
                    "hsm.queue_s": phases.queue_s,
                    "hsm.sign_s": phases.sign_s,
                },
                start_time=requested_ns,
            )
            signature.end(requested_ns + int((phases.queue_s + phases.sign_s) * 1e9))
        span.end(started_ns + int(handshake.duration_s * 1e9))

    def attempt_begun(self) -> None:
        """Begin a span for it."""
        self._error = ""
        self._attempt = self._tracer.start_span(
            "HTTP" if self._method == _OTHER else self._method,
            context=self._context,
            kind=SpanKind.CLIENT,
            attributes={"http.request.method": self._method},
        )
        self._attempts += 1

    def attempt_connected(self, connection: UpstreamConnection, upstream: str) -> bytes:
        """Say which server it is."""
        span = self._attempt
        assert span is not None
        span.set_attributes(_connection_attributes(connection, upstream))
        if self._attempts > 1:
            span.set_attribute("http.request.resend_count", self._attempts - 1)
        context = span.get_span_context()
        return _header_lines(context.trace_id, context.span_id, context.trace_flags, context.trace_state)

    def attempt_ended(self, status: int, error: str = "") -> None:
        """End its span."""
        span, self._attempt = self._attempt, None
        if span is not None:
            _end(span, status, error or (str(status) if status >= 400 else ""))
            self._error = error

    def ended(self, status: int, error: str = "") -> None:
        """End all spans that have not ended."""
        if self._span.is_recording():
            error = error or self._error
            self.attempt_ended(0, error or "abandoned")
            _end(self._span, status, error or (str(status) if status >= 500 else ""))


def _end(span: Span, status: int, error: str) -> None:
    if status:
        span.set_attribute("http.response.status_code", status)
    if error:
        span.set_attribute("error.type", error)
        span.set_status(Status(StatusCode.ERROR))
    span.end()


def _header_lines(trace_id: int, span_id: int, flags: int, state: TraceState) -> bytes:
    lines = f"traceparent: 00-{trace_id:032x}-{span_id:016x}-{flags:02x}\r\n"
    if state:
        lines += f"tracestate: {state.to_header()}\r\n"
    return lines.encode("ascii")


def _trace_context(request: RequestHead) -> Context:
    """Return what the client says of the trace: empty if nothing. More than one traceparent says nothing."""
    said = [value for lower, _, value in request.fields if lower == b"traceparent"]
    if len(said) != 1:
        return _NOTHING_SAID
    states = [value.decode("latin-1") for lower, _, value in request.fields if lower == b"tracestate"]
    carrier: Mapping[str, str | list[str]] = {"traceparent": said[0].decode("latin-1"), "tracestate": states}
    return _propagator.extract(carrier, _NOTHING_SAID)


def _known_method(request: RequestHead) -> str:
    method = request.method.decode("ascii")
    return method if method in _METHODS else _OTHER


def _request_attributes(
    request: RequestHead, method: str, route: Route | None, scheme: str, client_ip: str
) -> dict[str, str]:
    attributes = {
        "http.request.method": method,
        "url.scheme": scheme,
        "url.path": request.target.partition(b"?")[0].decode("ascii"),
        "server.address": request.host_name,
        "client.address": client_ip,
        "network.protocol.version": "2" if request.version == b"2.0" else request.version.decode("ascii"),
    }
    if method == _OTHER:
        attributes["http.request.method_original"] = request.method.decode("ascii")
    if route is not None:
        attributes["http.route"] = route.config.path
    agent = next((value for lower, _, value in request.fields if lower == b"user-agent"), b"")
    if agent:
        attributes["user_agent.original"] = agent.decode("latin-1")
    return attributes


def _connection_attributes(connection: UpstreamConnection, upstream: str) -> dict[str, str | int | bool]:
    configured = connection.server.config.address
    address = connection.server.address
    attributes: dict[str, str | int | bool] = {
        "tlsproxy.upstream": upstream,
        "tlsproxy.connection_reused": connection.reused,
    }
    if isinstance(configured, UnixAddress) or isinstance(address, UnixAddress):
        return attributes | {"network.transport": "unix", "server.address": str(configured)}
    return attributes | {
        "server.address": configured.host,
        "server.port": configured.port,
        "network.peer.address": address.host,
        "network.peer.port": address.port,
    }
