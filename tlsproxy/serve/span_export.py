"""Where spans go: in batches to an OpenTelemetry collector (OTLP over HTTP), from a thread of the SDK's own.

No request waits for it. What the collector does not take is dropped and counted; the log says once why, and once when
it is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import ssl
import sys
import threading
from collections.abc import Sequence

import requests
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased

import tlsproxy
from hsm.metricstore import MetricStore
from tlsproxy import metrics
from tlsproxy.config import TracingConfig

QUEUE_SPANS = 4096
"""Spans that may wait for the collector; further ones push out the oldest."""
BATCH_SPANS = 256
BATCH_INTERVAL_S = 1.0
EXPORT_TIMEOUT_S = 5.0
MAX_ATTRIBUTE_CHARACTERS = 512
"""Some are the client's own words."""
SAMPLER = ParentBased(ALWAYS_ON, remote_parent_not_sampled=ALWAYS_ON)
"""Which requests are recorded is decided before: for the others no span is asked for, and what is below follows."""
_SWITCH_INTERVAL_S = 0.0005
"""How long the event loop may wait for the interpreter while a batch is encoded; Python's default is ten times that."""

_log = logging.getLogger("tlsproxy.tracing")


class SpanExport:
    """Makes and exports this process's spans. Belongs to the running event loop."""

    def __init__(self, config: TracingConfig, store: MetricStore) -> None:
        """Count in `store`. Nothing is sent before there are spans."""
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        _silence_sdk()
        resource = Resource.create(
            {
                "service.name": config.service_name,
                "service.version": tlsproxy.__version__,
                "host.name": socket.gethostname(),
                "process.pid": os.getpid(),
            }
        )
        self.provider = TracerProvider(
            sampler=SAMPLER,
            resource=resource,
            shutdown_on_exit=False,
            span_limits=SpanLimits(max_attribute_length=MAX_ATTRIBUTE_CHARACTERS),
        )
        self.provider.add_span_processor(_Processor(_Exporter(config.endpoint, store), store))

    async def close(self, timeout_s: float) -> None:
        """Send what is left, for `timeout_s` at most."""
        loop = asyncio.get_running_loop()
        done = asyncio.Event()

        def shut_down() -> None:
            self.provider.shutdown()
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(done.set)

        # A daemon, unlike an executor's threads: the process does not wait for it.
        threading.Thread(target=shut_down, daemon=True).start()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(done.wait(), timeout_s)


class _Processor(BatchSpanProcessor):
    """Collects spans into batches, and counts them."""

    def __init__(self, exporter: SpanExporter, store: MetricStore) -> None:
        super().__init__(
            exporter,
            max_queue_size=QUEUE_SPANS,
            schedule_delay_millis=BATCH_INTERVAL_S * 1000,
            max_export_batch_size=BATCH_SPANS,
        )
        self._values = store.values
        self._recorded = store.counter(metrics.TRACE_SPANS)

    def on_end(self, span: ReadableSpan) -> None:
        self._values[self._recorded] += 1.0
        super().on_end(span)


class _Exporter(SpanExporter):
    """Sends batches, and takes note of how that went."""

    def __init__(self, endpoint: str, store: MetricStore) -> None:
        # Settings of the environment that aren't OpenTelemetry's (a proxy, ~/.netrc) are not for us.
        session = requests.Session()
        session.trust_env = False
        trusted = ssl.get_default_verify_paths()
        self._otlp = OTLPSpanExporter(
            endpoint, certificate_file=trusted.cafile or trusted.capath, timeout=EXPORT_TIMEOUT_S, session=session
        )
        self._endpoint = endpoint
        self._loop = asyncio.get_running_loop()
        self._values = store.values
        self._slots = {ok: store.counter(metrics.TRACE_SPANS_EXPORTED, (result,)) for ok, result in _RESULTS.items()}
        self._reason = _LastMessage()
        _EXPORTER_LOGGER.addHandler(self._reason)
        self._failing = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send a batch. Called in the SDK's thread."""
        result = self._otlp.export(spans)
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._exported, len(spans), result is SpanExportResult.SUCCESS)
        return result

    def shutdown(self) -> None:
        self._otlp.shutdown()  # type: ignore[no-untyped-call]
        _EXPORTER_LOGGER.removeHandler(self._reason)

    def _exported(self, spans: int, ok: bool) -> None:
        self._values[self._slots[ok]] += spans
        if ok is self._failing:
            self._failing = not ok
            extra = {"endpoint": self._endpoint}
            if ok:
                _log.info("spans are exported again", extra=extra)
            else:
                _log.warning("spans are not exported", extra=extra | {"reason": self._reason.text})


_RESULTS = {True: "ok", False: "failed"}
_EXPORTER_LOGGER = logging.getLogger("opentelemetry.exporter")


class _LastMessage(logging.Handler):
    """Keeps the last message."""

    text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text = record.getMessage()


def _silence_sdk() -> None:
    """Keep the SDK from logging: it warns of every bad tracestate, and so clients would fill the log."""
    sdk = logging.getLogger("opentelemetry")
    sdk.propagate = False
    sdk.addHandler(logging.NullHandler())
