"""What the supervisor tells of itself and its workers: the metrics of all processes, and the state at one moment.

Counters only ever grow, whatever becomes of processes: what a worker has counted is kept when it is gone for good.
"""

from __future__ import annotations

import platform
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from time import monotonic, time
from typing import Any, TypeAlias

from prometheus_client import CollectorRegistry

import tlsproxy
from hsm.metrics import CIRCUIT_STATE, TOKEN_UP
from hsm.metrics import FAMILIES as HSM_FAMILIES
from hsm.metricstore import Family, MetricStore, read_samples
from tlsproxy import metrics
from tlsproxy.metrics import Merged, StoreCollector, merge_stores
from tlsproxy.serve.anatomy import SlowHandshake, slowest
from tlsproxy.serve.generation import Generation
from tlsproxy.serve.rates import SAMPLED, SAMPLES, Reading, Span, handshakes_lately
from tlsproxy.serve.snapshot import CertificateView, ListenerView, ServerView, Snapshot, UpstreamView, WorkerView
from tlsproxy.serve.status import status_document
from tlsproxy.tls._openssl import LIBRARY_VERSION

_FAMILIES = {**metrics.FAMILIES, **HSM_FAMILIES}
_ASKED_OF_WORKERS = {family.name: family for family in (TOKEN_UP, metrics.UPSTREAM_SERVER_UP)}
_Gauge: TypeAlias = tuple[str, tuple[str, ...]]
"""A family's name and label values."""


class Figures:
    """Reads the metric stores of the generations; the first of these is the one in force, the others are draining."""

    def __init__(self, generations: Callable[[], Sequence[Generation]]) -> None:
        self._generations = generations
        self._store = MetricStore()
        self._gone = MetricStore()
        self._samples: deque[Reading] = deque(maxlen=SAMPLES)
        self._restarts = self._store.counter(metrics.WORKER_RESTARTS)
        self._reloads = {  # there from the start: increase() does not see the step from nothing to one
            result: self._store.counter(metrics.CONFIG_RELOADS, (result,)) for result in ("success", "failure")
        }
        build = (tlsproxy.__version__, platform.python_version(), LIBRARY_VERSION)
        self._store.values[self._store.gauge(metrics.BUILD_INFO, build)] = 1.0
        self.registry = CollectorRegistry()
        """All metrics, for the admin port."""
        self.registry.register(StoreCollector(_FAMILIES, self._fds))

    def close(self) -> None:
        """Let go of the shared memory."""
        self._store.close()
        self._gone.close()

    def absorb(self, fd: int) -> None:
        """Keep what is counted in the store behind `fd`, which is about to be closed."""
        for sample in read_samples(fd, _FAMILIES):
            self._gone.add(sample)

    def count_restart(self) -> None:
        """Count a proxy worker started in place of another."""
        self._store.values[self._restarts] += 1.0

    def ticket_key_made(self) -> None:
        """Take note that session tickets are encrypted with a new key from now on."""
        self._store.values[self._store.gauge(metrics.TICKET_KEY_CREATED)] = time()

    def count_reload(self, result: str) -> None:
        """Count a reload, by result: success or failure."""
        self._store.values[self._reloads[result]] += 1.0

    def take_sample(self) -> None:
        """Remember where the counters stand; to be called every rates.SAMPLE_INTERVAL_S."""
        self._samples.append(self._sample())

    def status(self) -> dict[str, Any]:
        """Return the state of the whole as JSON has it."""
        current, *draining = self._generations()
        circuits: dict[str, dict[str, int]] = {}
        live = (worker.metrics_fd for worker in current.workers if worker.ready)
        for (token, state), (count,) in merge_stores(live, {CIRCUIT_STATE.name: CIRCUIT_STATE})[
            CIRCUIT_STATE.name
        ].items():
            if count:
                circuits.setdefault(token, {})[state] = int(count)
        return status_document(
            self.snapshot(),
            circuits,
            handshakes_lately(self._last_minute()),
            draining_workers=sum(worker.pid is not None for generation in draining for worker in generation.workers),
        )

    def read(self, families: Mapping[str, Family]) -> Merged:
        """Return the present values of `families`, by name, over all processes."""
        return merge_stores(self._fds(), families)

    def slowest(self) -> list[SlowHandshake]:
        """Return the slowest handshakes of late."""
        return slowest(worker.slowest for generation in self._generations() for worker in generation.workers)

    def snapshot(self) -> Snapshot:
        """Return the state of the whole."""
        current = self._generations()[0]
        said = _said_by_workers(current)
        lately = self._last_minute()
        return Snapshot(
            version=tlsproxy.__version__,
            workers=tuple(WorkerView(worker.index, worker.pid, worker.ready) for worker in current.workers),
            tokens={
                token.name: any(said.get((TOKEN_UP.name, (token.name,)), ())) for token in current.config.hsm.tokens
            },
            certificates=tuple(
                CertificateView(
                    name,
                    material.certificate.dns_names,
                    material.certificate.key_type.value,
                    material.config.tokens,
                    material.certificate.not_after,
                )
                for name, material in current.materials.certificates.items()
            ),
            listeners=tuple(
                _listener_view(str(listener.address), lately.now.merged) for listener in current.config.listeners
            ),
            upstreams=_upstream_views(current, said, lately),
        )

    def _sample(self) -> Reading:
        return Reading(monotonic(), merge_stores(self._counting_fds(), SAMPLED))

    def _last_minute(self) -> Span:
        now = self._sample()
        return Span(self._samples[0] if self._samples else now, now)

    def _counting_fds(self) -> list[int]:
        """Return the stores of proxy workers, those that are gone included."""
        workers = (worker for generation in self._generations() for worker in generation.workers)
        return [self._gone.fd, *(worker.metrics_fd for worker in workers if not worker.closed)]

    def _fds(self) -> list[int]:
        generations = self._generations()
        slot = self._store.gauge(metrics.WORKERS_READY)
        self._store.values[slot] = sum(worker.ready for worker in generations[0].workers)
        # Generations share the workers of a token that has not changed.
        tokens = dict.fromkeys(fd for generation in generations for fd in generation.tokens.metrics_fds)
        return [self._store.fd, generations[0].own_metrics_fd, *self._counting_fds(), *tokens]


def _said_by_workers(generation: Generation) -> dict[_Gauge, list[bool]]:
    """Return what each worker says that serves new clients: does it reach a token, does it send a server requests?

    One that is being replaced reaches nothing, and one that drains goes by an earlier configuration.
    """
    said: dict[_Gauge, list[bool]] = {}
    for worker in generation.workers:
        if worker.ready:
            for sample in read_samples(worker.metrics_fd, _ASKED_OF_WORKERS):
                said.setdefault((sample.family.name, sample.labels), []).append(sample.values[0] >= 1.0)
    return said


def _upstream_views(
    generation: Generation, said: Mapping[_Gauge, Sequence[bool]], lately: Span
) -> tuple[UpstreamView, ...]:
    ejections = lately.increases(metrics.UPSTREAM_EJECTIONS)

    def view(upstream: str, address: str) -> ServerView:
        labels = (upstream, address)
        ups = said.get((metrics.UPSTREAM_SERVER_UP.name, labels), ())
        (ejected,) = ejections.get(labels, (0.0,))
        return ServerView(address, len(ups), sum(ups), int(ejected))

    return tuple(
        UpstreamView(upstream.name, tuple(view(upstream.name, str(server.address)) for server in upstream.servers))
        for upstream in generation.config.upstreams
    )


def _listener_view(address: str, merged: Merged) -> ListenerView:
    results = {True: 0.0, False: 0.0}
    for (listener, result, *_), (count,) in merged[metrics.HANDSHAKES.name].items():
        if listener == address:
            results[result == "ok"] += count
    (open_connections,) = merged[metrics.CONNECTIONS.name].get((address,), (0.0,))
    return ListenerView(address, int(open_connections), int(results[True]), int(results[False]))
